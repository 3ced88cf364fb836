"""StableHLO: a function with its compressed weights inside, in a file that JAX reads without jaxcomp."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

from jaxcomp.activations.function import quantize_function
from jaxcomp.activations.planning import Rules
from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.core.bits import bits_of, pack_bits_on_host, unpack_bits
from jaxcomp.core.leaves import pack
from jaxcomp.core.types import Leaf, Params, PyTree, Shape
from jaxcomp.export.errors import ExportError, want_rules
from jaxcomp.trace.ranges import Range

OWNER = "to_stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
"""Those that a file serves unless others are asked for."""
KNOWN = (*PLATFORMS, "rocm")
"""All that JAX lowers to."""
ORDERS = (0, 1, 2)


def to_stablehlo(
    path: str | os.PathLike[str],
    fn: Callable[..., PyTree],
    params: Params,
    *args: PyTree,
    platforms: Sequence[str] = PLATFORMS,
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
    integer: bool = True,
    gradients: int = 0,
) -> int:
    """Writes ``lambda *args: fn(params, *args)`` as a program that ``jax.export.deserialize`` reads.

    Compressed leaves stay compressed in the file and in the memory of who runs it: their packed codes are the
    program's constants, and what dequantizes them or multiplies them is in the program. It wants jax alone, no jaxcomp
    and not the code of ``fn``.

    Args:
      path: the file, which is written whole or not at all.
      fn: a pure function ``fn(params, *args)``.
      params: its parameters; compressed leaves are run as :func:`~jaxcomp.quantize_function` runs them.
      args: further arguments, or their ``jax.ShapeDtypeStruct``; none of their values is kept. A dimension may be one
        of ``jax.export.symbolic_shape("batch, 64")``, and the program then takes any size there.
      platforms: of "cpu", "cuda", "rocm", "tpu": where the program runs.
      rules, ranges: of activations, as of :func:`~jaxcomp.quantize_function`; None leaves them in float.
      integer: run what the rules quantize on integers; else rounded in float.
      gradients: how often the program can be differentiated by ``args``. Each order holds the weights once more.

    Returns:
      The bytes of the file.

    Raises:
      ExportError: an argument or a result that is no plain container of arrays, an operation that a platform does not
        have or that JAX does not promise to run later, a question about a free dimension that has no one answer.
      FileError: the file cannot be written.

    >>> import tempfile, jaxcomp as jc
    >>> tree = jc.quantize(jc.Int(4)).apply((), {"w": jnp.eye(64)})
    >>> file = f"{tempfile.mkdtemp()}/program"
    >>> rows = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 64"), jnp.float32)
    >>> size = to_stablehlo(file, lambda p, x: x @ p["w"], tree, rows)
    >>> with open(file, "rb") as f:
    ...     program = export.deserialize(bytearray(f.read()))
    >>> program.call(jnp.ones((3, 64))).shape, program.platforms
    ((3, 64), ('cpu', 'cuda', 'tpu'))

    Source: JAX's documentation of ``jax.export``, and the StableHLO specification.
    """
    want_rules(OWNER, rules, ranges=ranges)
    if gradients not in ORDERS:
        raise ExportError(f"{OWNER}: gradients must be 0, 1 or 2, the order of derivatives, got {gradients!r}.")
    unknown = set(platforms) - set(KNOWN)
    if unknown or not platforms:
        raise ExportError(f"{OWNER}: platforms must be a tuple of some of {', '.join(KNOWN)}, got {platforms!r}.")
    program = exported(
        closed(fn, params, rules=rules, ranges=ranges, integer=integer),
        *args,
        platforms=tuple(platforms),
    )
    data = _serialized(program, gradients)
    with replacing(path, owner=OWNER) as f:
        write_all(f, data)
    return len(data)


def closed(
    fn: Callable[..., PyTree],
    params: Params,
    *,
    rules: Rules | None,
    ranges: Mapping[str, Range] | None,
    integer: bool,
) -> Callable[..., PyTree]:
    """``fn`` over its parameters, which are constants in the smallest types that a program can hold."""
    leaves, treedef = jax.tree.flatten(pack(params))
    kept = [kept_small(leaf) for leaf in leaves]
    run = quantize_function(fn, rules or {}, integer=integer and bool(rules))

    def closed_over(*args: PyTree) -> PyTree:
        return run(jax.tree.unflatten(treedef, [make() for make in kept]), ranges, *args)

    return closed_over


def kept_small(leaf: Leaf) -> Callable[[], Leaf]:
    """Makes the leaf inside a program, from a constant that takes the bits that its type says.

    JAX writes a byte for each element of a type of less than a byte (jax 0.12), so those are packed into bytes here.
    """
    if not isinstance(leaf, jax.Array | np.ndarray) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return lambda: leaf
    host = np.asarray(leaf)
    bits = _stored_bits(host.dtype)
    if bits >= 8 or not host.size:
        return lambda: jnp.asarray(host)
    codes = host.view(np.uint8) & np.uint8(2**bits - 1)
    packed, dtype, shape = np.asarray(pack_bits_on_host(codes, bits)), host.dtype, host.shape
    return lambda: _unpacked(jnp.asarray(packed), bits, dtype=dtype, shape=shape)


def _stored_bits(dtype: np.dtype) -> int:
    """How many bits of an element the file holds."""
    if dtype == np.dtype(bool):
        return 1
    known = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return bits_of(dtype) if known else 8 * dtype.itemsize


def _unpacked(data: jax.Array, bits: int, *, dtype: np.dtype, shape: Shape) -> jax.Array:
    codes = unpack_bits(data, bits, int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if dtype == np.dtype(bool):
        return codes.astype(bool)
    return jax.lax.bitcast_convert_type(codes.astype(jnp.dtype(f"uint{bits}")), dtype)


def exported(
    fn: Callable[..., PyTree], *specs: PyTree, platforms: Sequence[str], owner: str = OWNER
) -> export.Exported:
    """``jax.export``'s program; what the function itself raises goes through as it is."""
    jitted = jax.jit(fn)
    try:
        jitted.trace(*specs)
    except Exception as e:
        if "Inconclusive" not in type(e).__name__:
            raise
        raise ExportError(
            f"{owner}: the function asks something of a free dimension that has more than one answer: {_first(e)}"
            ' Settle it by symbolic_shape(..., constraints=["batch <= 64"]) or the like, or fix the dimension; leaves'
            " that jaxcomp.prepare made choose their kernel by the number of rows."
        ) from e
    try:
        return _Bare.of(export.export(jitted, platforms=tuple(platforms))(*specs))
    except (NotImplementedError, ValueError) as e:
        raise ExportError(
            f"{owner}: {_first(e)} Ask for other platforms= than {tuple(platforms)}, or write that operation with"
            " those that every platform has."
        ) from e


class _Bare(export.Exported):
    """A program, and its derivatives, without the places in source files where its operations come from.

    JAX keeps them (0.10 to 0.12), paths of the machine that wrote the file and all: half of a small program.
    """

    @classmethod
    def of(cls, program: export.Exported) -> _Bare:
        data = program.mlir_module_serialized
        version = re.search(rb"StableHLO_v([\d.]+)", data)
        if version is not None:
            with make_ir_context() as context:
                module = stablehlo.deserialize_portable_artifact(context, data)
                passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
                data = stablehlo.serialize_portable_artifact(module, version[1].decode())
        bare = replace(program, mlir_module_serialized=data)
        return cls(**{f.name: getattr(bare, f.name) for f in fields(bare)})

    def vjp(self) -> export.Exported:
        """The program of the derivative, bare too."""
        return self.of(super().vjp())


def _serialized(program: export.Exported, gradients: int) -> bytes:
    try:
        return bytes(program.serialize(vjp_order=gradients))
    except ValueError as e:
        raise ExportError(
            f"{OWNER}: {_first(e)} A reader without this class cannot make it: let the function take and give arrays in"
            " dicts, lists and tuples, or register the class with jax.export.register_pytree_node_serialization on both"
            " sides."
        ) from e


def _first(e: Exception) -> str:
    """The first paragraph of an error of JAX's, as one sentence."""
    text = " ".join(str(e).strip().split("\n\n")[0].split())
    return text if text.endswith(".") else f"{text}."
