"""Functions of our own in an XLA program on a CPU: LLVM code made here, called through XLA's foreign functions.

XLA's own kernels of one or a few rows keep one sum, or neither shifts nor masks, and a matrix in codes is then no
faster to read than one in floats. Here the code of a product is written as LLVM sees it, compiled by llvmlite for the
processor that is there, and called by XLA with the operands where they lie. The result is made in chunks by XLA's own
threads and the one that calls.

Layouts are those of ``xla/ffi/api/c_api.h`` in jaxlib 0.10 and 0.12 (``jax.ffi.include_dir()``), in words of eight
bytes; what is read has not moved between them.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, reduce
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.kernels.llvm_code import Operand, Types, Writer, counted, least

if TYPE_CHECKING:
    from llvmlite import ir

PACKAGE = "llvmlite"

# Words of XLA_FFI_CallFrame: the extension, the interface, the context, operands, results.
_EXTENSION, _API, _CONTEXT, _OPERANDS, _RESULTS = 1, 2, 3, 9, 14
# Of XLA_FFI_Buffer: its data and its dimensions.
_DATA, _DIMENSIONS = 3, 5
# Of XLA_FFI_Api.
_DESTROY, _SCHEDULE, _THREADS = 8, 17, 18
# Of XLA_FFI_Metadata_Extension; of the metadata, in bytes: the version that a handler was written for.
_METADATA, _MAJOR, _MINOR = 3, 24, 28
_VERSION = (0, 1)

# Words of what the threads of a call share.
_USERS, _NEXT, _DONE, _CHUNKS, _OPERAND = 0, 1, 2, 3, 4


Chunk = Callable[["ir.IRBuilder", list[Operand], "ir.Value", "ir.Value"], None]
"""Writes the code of a chunk of the results, the last operands: from one row of an operand to before another."""


def missing() -> str | None:
    """Why no function can be made here; None if it can."""
    if find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed: pip install 'jaxcomp[cpu]'"
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return "it is for processors of 64 bits"
    return None


@cache
def _known() -> dict[str, bool]:
    """What LLVM knows that the processor that is here can do, and what it cannot: its name may promise more."""
    from llvmlite import binding as llvm

    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know them on every system
        return {}


@cache
def features() -> frozenset[str]:
    """What the processor that is here can do, in LLVM's words."""
    return frozenset(name for name, has in _known().items() if has)


def dots() -> int:
    """Bytes of the vectors of which the processor that is here has dot products of four bytes; 0 if it has none."""
    if "avx512vnni" in features():
        return 64
    return 32 if "avxvnni" in features() else 0


class Work(NamedTuple):
    """A function of matrices in chunks.

    Attributes:
      name: what its code is kept under: the same name, the same code.
      chunk: writes the code of a chunk.
      rows: how many rows of one operand a chunk takes.
      by: which operand that is; results stand behind the last.
      results: how many there are.
    """

    name: str
    chunk: Chunk
    rows: int
    by: int
    results: int = 1


def call(work: Work, result: jax.ShapeDtypeStruct, *operands: jax.Array) -> jax.Array:
    """The result, of this shape and type, of a function of these matrices, in the program that is traced; on a CPU.

    An operand of more axes than two is a matrix whose rows are all but the last.
    """
    return call_for(work, [result], *operands)[0]


def call_for(work: Work, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array) -> Sequence[jax.Array]:
    """The same of a function of several results."""
    target = _registered(work, (*(x.ndim for x in operands), *(len(result.shape) for result in results)))
    return jax.ffi.ffi_call(target, results)(*operands)


def digest(code: object) -> str:
    """A short name of what code depends on: the same, if that is written alike."""
    return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def parts(count: int, size: int) -> jax.Array:
    """An operand to make chunks by: the first of each of so many, and the one after its last; int32 ``(parts, 2)``.

    >>> parts(5, 2).tolist()
    [[0, 2], [2, 4], [4, 5]]
    """
    first = np.arange(-(-count // size), dtype=np.int32) * size
    return jnp.asarray(np.stack([first, np.minimum(first + size, count)], 1))


_KEPT: dict[str, Any] = {}
_ONE_BY_ONE = Lock()


def _registered(work: Work, axes: tuple[int, ...]) -> str:
    target = f"jaxcomp_{work.name}"
    if set(axes) != {2}:
        target += f"_{''.join(map(str, axes))}"
    with _ONE_BY_ONE:
        if target not in _KEPT:
            engine = _compiled(_module(work, axes))
            handler = ctypes.c_void_p(engine.get_function_address("handler"))
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
            _KEPT[target] = engine
    return target


# ---- compiling


def _machine() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    words = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(_known().items()))
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=words, opt=3)


def _compiled(module: ir.Module) -> Any:
    """What holds the code of a module, and must live as long as it is called."""
    from llvmlite import binding as llvm

    machine = _machine()
    module.triple = machine.triple
    code = llvm.parse_assembly(str(module))
    code.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(code, passes)
    engine = llvm.create_mcjit_compiler(code, _machine())
    engine.finalize_object()
    return engine


# ---- the code around a chunk


def _module(work: Work, axes: tuple[int, ...]) -> ir.Module:
    from llvmlite import ir

    t, module = Types(), ir.Module("jaxcomp")
    loop = _loop(module, t, work, len(axes))
    _handler(module, t, loop, _task(module, t, loop), work, axes)
    return module


def _left(w: Writer, shared: ir.Value) -> None:
    """One user fewer; the last frees what they share."""
    before = w.added(shared, _USERS, -1)
    with w.b.if_then(w.b.icmp_signed("==", before, w.t.word(1))):
        w.libc("free", w.t.void, shared)


def _function(module: ir.Module, name: str, result: ir.Type, *given: ir.Type) -> tuple[ir.Function, ir.IRBuilder]:
    from llvmlite import ir

    function = ir.Function(module, ir.FunctionType(result, given), name)
    return function, ir.IRBuilder(function.append_basic_block())


def _loop(module: ir.Module, t: Types, work: Work, operands: int) -> ir.Function:
    """Makes chunks until none is left; threads that come late find none, and read nothing but the counters."""
    loop, b = _function(module, "loop", t.void, t.pointer)
    w, shared = Writer(b, t), loop.args[0]
    chunks = w.load(shared, _CHUNKS)
    more, body, done = (b.append_basic_block(x) for x in ("more", "body", "done"))
    b.branch(more)
    b.position_at_end(more)
    number = w.added(shared, _NEXT, 1)
    b.cbranch(b.icmp_signed("<", number, chunks), body, done)
    b.position_at_end(body)
    found = [Operand(*(w.load(shared, _OPERAND + 3 * i + j) for j in range(3))) for i in range(operands)]
    first, rows = b.mul(number, t.word(work.rows)), found[work.by].rows
    last = b.add(first, t.word(work.rows))
    work.chunk(b, found, first, least(b, last, rows))
    w.added(shared, _DONE, 1)
    b.branch(more)
    b.position_at_end(done)
    b.ret_void()
    return loop


def _task(module: ir.Module, t: Types, loop: ir.Function) -> ir.Function:
    """What a thread runs; the last that leaves frees what they share."""
    task, b = _function(module, "task", t.void, t.pointer)
    w, shared = Writer(b, t), task.args[0]
    b.call(loop, [shared])
    _left(w, shared)
    b.ret_void()
    return task


def _handler(
    module: ir.Module, t: Types, loop: ir.Function, task: ir.Function, work: Work, axes: tuple[int, ...]
) -> None:
    """What XLA calls: once to learn for which version it was written, then with operands."""
    handler, b = _function(module, "handler", t.i64, t.pointer)
    w, frame = Writer(b, t), handler.args[0]
    extension = w.load(frame, _EXTENSION)
    with b.if_then(b.icmp_signed("!=", extension, t.word(0))):
        metadata = w.load(extension, _METADATA)
        for place, version in zip((_MAJOR, _MINOR), _VERSION, strict=True):
            b.store(t.i32(version), b.inttoptr(b.add(metadata, t.word(place)), t.pointer))
        b.ret(t.word(0))

    shared = w.libc("malloc", t.pointer, t.word(8 * (_OPERAND + 3 * len(axes))))
    buffers = [w.load(w.load(frame, _OPERANDS), i) for i in range(len(axes) - work.results)]
    buffers += [w.load(w.load(frame, _RESULTS), i) for i in range(work.results)]
    for i, (buffer, count) in enumerate(zip(buffers, axes, strict=True)):
        *lead, columns = (w.load(w.load(buffer, _DIMENSIONS), axis) for axis in range(count))
        for j, value in enumerate((w.load(buffer, _DATA), reduce(b.mul, lead), columns)):
            w.store(shared, _OPERAND + 3 * i + j, value)
    chunks = b.sdiv(b.add(w.load(shared, _OPERAND + 3 * work.by + 1), t.word(work.rows - 1)), t.word(work.rows))
    for word, value in ((_USERS, t.word(1)), (_NEXT, t.word(0)), (_DONE, t.word(0)), (_CHUNKS, chunks)):
        w.store(shared, word, value)

    helpers = b.sub(_threads(w, frame), t.word(1))
    fewer = b.icmp_signed("<", chunks, helpers)
    with counted(b, t.word(0), b.select(fewer, chunks, helpers)):
        _scheduled(w, frame, shared, b.ptrtoint(task, t.i64))
    b.call(loop, [shared])
    waiting, ready = b.append_basic_block("waiting"), b.append_basic_block("ready")
    b.branch(waiting)
    b.position_at_end(waiting)
    done = b.load_atomic(w.at(shared, _DONE), "seq_cst", 8, typ=t.i64)
    b.cbranch(b.icmp_signed("<", done, chunks), waiting, ready)
    b.position_at_end(ready)
    _left(w, shared)
    b.ret(t.word(0))


def _arguments(w: Writer, *words: ir.Value) -> ir.Value:
    """A structure of the interface's: its size, no extension, and these words."""
    with w.b.goto_entry_block():
        place = w.b.alloca(w.t.i64, len(words) + 2)
    for i, value in enumerate((w.t.word(8 * (len(words) + 2)), w.t.word(0), *words)):
        w.store(place, i, value)
    return place


def _checked(w: Writer, api: ir.Value, error: ir.Value) -> ir.Value:
    """Whether a function of the interface's gave no error; one that it gave is destroyed."""
    wrong = w.b.icmp_signed("!=", error, w.t.word(0))
    with w.b.if_then(wrong):
        w.foreign(w.load(api, _DESTROY), w.t.void, _arguments(w, error))
    return w.b.not_(wrong)


def _threads(w: Writer, frame: ir.Value) -> ir.Value:
    """How many threads XLA has for its work; one where it does not say."""
    api, place = w.load(frame, _API), w.b.alloca(w.t.i64)
    w.b.store(w.t.word(1), place)
    with w.b.if_then(w.b.icmp_signed(">", w.load(api, 0), w.t.word(8 * _THREADS))):
        given = _arguments(w, w.load(frame, _CONTEXT), w.b.ptrtoint(place, w.t.i64))
        _checked(w, api, w.foreign(w.load(api, _THREADS), w.t.i64, given))
    return w.b.load(place, typ=w.t.i64)


def _scheduled(w: Writer, frame: ir.Value, shared: ir.Value, task: ir.Value) -> None:
    """One more thread, if XLA has one."""
    api = w.load(frame, _API)
    w.added(shared, _USERS, 1)
    given = _arguments(w, w.load(frame, _CONTEXT), task, w.b.ptrtoint(shared, w.t.i64))
    well = _checked(w, api, w.foreign(w.load(api, _SCHEDULE), w.t.i64, given))
    with w.b.if_then(w.b.not_(well)):
        w.added(shared, _USERS, -1)
