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
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

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


class Operand(NamedTuple):
    """A matrix in memory: its address and the numbers of its rows and columns, all int64."""

    data: ir.Value
    rows: ir.Value
    columns: ir.Value


Chunk = Callable[["ir.IRBuilder", list[Operand], "ir.Value"], None]
"""Writes the code that makes one chunk of the result, the last operand: its number is the last argument."""


def missing() -> str | None:
    """Why no function can be made here; None if it can."""
    if find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed: pip install 'jaxcomp[cpu]'"
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return "it is for processors of 64 bits"
    return None


def call(name: str, chunk: Chunk, rows: int, result: jax.ShapeDtypeStruct, *operands: jax.Array) -> jax.Array:
    """The result of a function of matrices, in the program that is traced; on a CPU alone.

    Args:
      name: what the code is kept under: the same name, the same code.
      chunk: writes the code of a chunk.
      rows: how many rows of the second operand a chunk takes.
      result: its shape and type.
      operands: matrices.
    """
    target = _registered(name, chunk, rows, len(operands) + 1)
    return jax.ffi.ffi_call(target, result)(*operands)


_KEPT: dict[str, Any] = {}


def _registered(name: str, chunk: Chunk, rows: int, operands: int) -> str:
    target = f"jaxcomp_{name}"
    if target not in _KEPT:
        engine = _compiled(_module(chunk, rows, operands))
        handler = ctypes.c_void_p(engine.get_function_address("handler"))
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
        _KEPT[target] = engine
    return target


# ---- compiling


def _machine() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)


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


class Types:
    """Types and constants by short names."""

    def __init__(self) -> None:
        from llvmlite import ir

        self.i8, self.i32, self.i64 = (ir.IntType(bits) for bits in (8, 32, 64))
        self.f32, self.pointer, self.void = ir.FloatType(), ir.PointerType(), ir.VoidType()

    def word(self, value: int) -> ir.Value:
        """An int64."""
        return self.i64(value)


@contextmanager
def counted(b: ir.IRBuilder, first: ir.Value, last: ir.Value) -> Iterator[ir.Value]:
    """A loop: its body sees the numbers from the first to the one before the last."""
    start, body, done = (b.append_basic_block(x) for x in ("loop", "body", "done"))
    before = b.block
    b.branch(start)
    b.position_at_end(start)
    number = b.phi(first.type)
    number.add_incoming(first, before)
    b.cbranch(b.icmp_signed("<", number, last), body, done)
    b.position_at_end(body)
    yield number
    number.add_incoming(b.add(number, number.type(1)), b.block)
    b.branch(start)
    b.position_at_end(done)


class _Writer:
    """Reads and writes words of memory."""

    def __init__(self, b: ir.IRBuilder, t: Types) -> None:
        self.b, self.t = b, t

    def at(self, base: ir.Value, word: int) -> ir.Value:
        """The place of a word behind an address, given as an int64 or a pointer."""
        if base.type == self.t.i64:
            base = self.b.inttoptr(base, self.t.pointer)
        return self.b.gep(base, [self.t.word(word)], source_etype=self.t.i64)

    def load(self, base: ir.Value, word: int) -> ir.Value:
        return self.b.load(self.at(base, word), typ=self.t.i64)

    def store(self, base: ir.Value, word: int, value: ir.Value) -> None:
        self.b.store(value, self.at(base, word))

    def added(self, base: ir.Value, word: int, by: int) -> ir.Value:
        """What a word was before so much was added to it, for all threads at once."""
        return self.b.atomic_rmw("add", self.at(base, word), self.t.word(by), "seq_cst")

    def foreign(self, address: ir.Value, result: ir.Type, *given: ir.Value) -> ir.Value:
        """Calls a function at an address."""
        from llvmlite import ir

        kind = ir.FunctionType(result, [x.type for x in given])
        function = self.b.inttoptr(address, kind.as_pointer())
        return self.b.call(function, list(given))

    def libc(self, name: str, result: ir.Type, *given: ir.Value) -> ir.Value:
        """Calls a function of the C library's; Python's own would want its lock where allocations are traced."""
        library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        return self.foreign(self.t.word(address or 0), result, *given)

    def left(self, shared: ir.Value) -> None:
        """One user fewer; the last frees what they share."""
        before = self.added(shared, _USERS, -1)
        with self.b.if_then(self.b.icmp_signed("==", before, self.t.word(1))):
            self.libc("free", self.t.void, shared)


def _module(chunk: Chunk, rows: int, operands: int) -> ir.Module:
    from llvmlite import ir

    t, module = Types(), ir.Module("jaxcomp")
    work = _work(module, t, chunk, operands)
    task = _task(module, t, work)
    _handler(module, t, work, task, rows, operands)
    return module


def _function(module: ir.Module, name: str, result: ir.Type, *given: ir.Type) -> tuple[ir.Function, ir.IRBuilder]:
    from llvmlite import ir

    function = ir.Function(module, ir.FunctionType(result, given), name)
    return function, ir.IRBuilder(function.append_basic_block())


def _work(module: ir.Module, t: Types, chunk: Chunk, operands: int) -> ir.Function:
    """Makes chunks until none is left; threads that come late find none, and read nothing but the counters."""
    work, b = _function(module, "work", t.void, t.pointer)
    w, shared = _Writer(b, t), work.args[0]
    chunks = w.load(shared, _CHUNKS)
    more, body, done = (b.append_basic_block(x) for x in ("more", "body", "done"))
    b.branch(more)
    b.position_at_end(more)
    number = w.added(shared, _NEXT, 1)
    b.cbranch(b.icmp_signed("<", number, chunks), body, done)
    b.position_at_end(body)
    found = [Operand(*(w.load(shared, _OPERAND + 3 * i + j) for j in range(3))) for i in range(operands)]
    chunk(b, found, number)
    w.added(shared, _DONE, 1)
    b.branch(more)
    b.position_at_end(done)
    b.ret_void()
    return work


def _task(module: ir.Module, t: Types, work: ir.Function) -> ir.Function:
    """What a thread runs; the last that leaves frees what they share."""
    task, b = _function(module, "task", t.void, t.pointer)
    w, shared = _Writer(b, t), task.args[0]
    b.call(work, [shared])
    w.left(shared)
    b.ret_void()
    return task


def _handler(module: ir.Module, t: Types, work: ir.Function, task: ir.Function, rows: int, operands: int) -> None:
    """What XLA calls: once to learn for which version it was written, then with operands."""
    handler, b = _function(module, "handler", t.i64, t.pointer)
    w, frame = _Writer(b, t), handler.args[0]
    extension = w.load(frame, _EXTENSION)
    with b.if_then(b.icmp_signed("!=", extension, t.word(0))):
        metadata = w.load(extension, _METADATA)
        for place, version in zip((_MAJOR, _MINOR), _VERSION, strict=True):
            b.store(t.i32(version), b.inttoptr(b.add(metadata, t.word(place)), t.pointer))
        b.ret(t.word(0))

    shared = w.libc("malloc", t.pointer, t.word(8 * (_OPERAND + 3 * operands)))
    buffers = [w.load(w.load(frame, _OPERANDS), i) for i in range(operands - 1)]
    buffers.append(w.load(w.load(frame, _RESULTS), 0))
    for i, buffer in enumerate(buffers):
        sizes = w.load(buffer, _DIMENSIONS)
        for j, value in enumerate((w.load(buffer, _DATA), w.load(sizes, 0), w.load(sizes, 1))):
            w.store(shared, _OPERAND + 3 * i + j, value)
    chunks = b.sdiv(b.add(w.load(shared, _OPERAND + 4), t.word(rows - 1)), t.word(rows))
    for word, value in ((_USERS, t.word(1)), (_NEXT, t.word(0)), (_DONE, t.word(0)), (_CHUNKS, chunks)):
        w.store(shared, word, value)

    helpers = b.sub(_threads(w, frame), t.word(1))
    fewer = b.icmp_signed("<", chunks, helpers)
    with counted(b, t.word(0), b.select(fewer, chunks, helpers)):
        _scheduled(w, frame, shared, b.ptrtoint(task, t.i64))
    b.call(work, [shared])
    waiting, ready = b.append_basic_block("waiting"), b.append_basic_block("ready")
    b.branch(waiting)
    b.position_at_end(waiting)
    done = b.load_atomic(w.at(shared, _DONE), "seq_cst", 8, typ=t.i64)
    b.cbranch(b.icmp_signed("<", done, chunks), waiting, ready)
    b.position_at_end(ready)
    w.left(shared)
    b.ret(t.word(0))


def _arguments(w: _Writer, *words: ir.Value) -> ir.Value:
    """A structure of the interface's: its size, no extension, and these words."""
    with w.b.goto_entry_block():
        place = w.b.alloca(w.t.i64, len(words) + 2)
    for i, value in enumerate((w.t.word(8 * (len(words) + 2)), w.t.word(0), *words)):
        w.store(place, i, value)
    return place


def _checked(w: _Writer, api: ir.Value, error: ir.Value) -> ir.Value:
    """Whether a function of the interface's gave no error; one that it gave is destroyed."""
    wrong = w.b.icmp_signed("!=", error, w.t.word(0))
    with w.b.if_then(wrong):
        w.foreign(w.load(api, _DESTROY), w.t.void, _arguments(w, error))
    return w.b.not_(wrong)


def _threads(w: _Writer, frame: ir.Value) -> ir.Value:
    """How many threads XLA has for its work; one where it does not say."""
    api, place = w.load(frame, _API), w.b.alloca(w.t.i64)
    w.b.store(w.t.word(1), place)
    with w.b.if_then(w.b.icmp_signed(">", w.load(api, 0), w.t.word(8 * _THREADS))):
        given = _arguments(w, w.load(frame, _CONTEXT), w.b.ptrtoint(place, w.t.i64))
        _checked(w, api, w.foreign(w.load(api, _THREADS), w.t.i64, given))
    return w.b.load(place, typ=w.t.i64)


def _scheduled(w: _Writer, frame: ir.Value, shared: ir.Value, task: ir.Value) -> None:
    """One more thread, if XLA has one."""
    api = w.load(frame, _API)
    w.added(shared, _USERS, 1)
    given = _arguments(w, w.load(frame, _CONTEXT), task, w.b.ptrtoint(shared, w.t.i64))
    well = _checked(w, api, w.foreign(w.load(api, _SCHEDULE), w.t.i64, given))
    with w.b.if_then(w.b.not_(well)):
        w.added(shared, _USERS, -1)
