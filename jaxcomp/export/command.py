"""What ``jaxcomp export`` does: a file of weights, and for programs a function, become a file of another runtime."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations import Act, Rules, quantize_function, ranges_of
from jaxcomp.core.leaves import materialize
from jaxcomp.core.types import Params, PyTree
from jaxcomp.export.errors import ExportError
from jaxcomp.export.running import SUFFIXES, Target, apart, opened
from jaxcomp.trace import calibrate_over
from jaxcomp.trace import roles as roles_of
from jaxcomp.trace.program import shapes_of
from jaxcomp.trace.ranges import Range

Format = Literal["onnx", "stablehlo", "litert", "compressed-tensors", "gguf"]
"""What files are exported to."""
OWNER = "export"
ANY = 3
"""What stands for a dimension that is free, where the program is tried."""


@dataclass(frozen=True)
class Exported:
    """What became of a file.

    Attributes:
      path: the new file.
      bytes: its size.
      apart: the largest difference of its results and the JAX function's, as a part of the largest; and their cosine.
        None for weights alone.
    """

    path: Path
    bytes: int
    apart: tuple[float, float] | None


def export_weights(tree: Params, to: Format, out: Path, *, fn: str, shapes: Sequence[str]) -> Exported:
    """Writes a tree as compressed-tensors (a folder) or GGUF; a function says what products do with its axes."""
    roles = None
    if fn:
        function, scope = function_of(fn), jax.export.SymbolicScope()
        specs = [spec_of(text, free=False, scope=scope) for text in shapes]
        _fits(function, tree, specs, fn=fn)
        roles = roles_of(function)(shapes_of(tree), *specs)
    return Exported(out, writer(to)(out, tree, roles=roles), None)


def export_program(
    tree: Params, to: Target, out: Path, *, fn: str, shapes: Sequence[str], samples: Sequence[Path]
) -> Exported:
    """Writes ``fn(tree, *args)`` and runs what was written beside the function.

    Args:
      tree, to, out: of what, to what, where.
      fn: ``"module:function"``.
      shapes: of each argument, ``"1,28,28,1"`` or ``"batch,128:int32"``; a name is a dimension of any size, for
        which LiteRT takes 1.
      samples: .npy files, one an argument, of examples along the first axis. With them activations are rounded to 8
        bits, their ranges those of the samples.

    Raises:
      ExportError: a function that cannot be had, a shape that is none, samples of another shape.
    """
    function = function_of(fn)
    scope = jax.export.SymbolicScope()
    specs = [spec_of(text, free=to != "litert", scope=scope) for text in shapes]
    _fits(function, tree, specs, fn=fn)
    tried = [_tried(spec, i) for i, spec in enumerate(specs)]
    options: dict[str, PyTree] = {}
    rules: Rules = {}
    ranges: dict[str, Range] | None = None
    if samples:
        batches = _batches(samples, tried)
        rules, ranges = {".*": Act(8)}, ranges_of(calibrate_over(function)(materialize(tree), batches))
        options, tried = {"rules": rules, "ranges": ranges}, list(batches[0])
        if to != "stablehlo":
            options["samples"] = batches
    size = writer(to)(out, function, tree, *specs, **options)
    run = jax.jit(quantize_function(function, rules, integer=bool(rules)))
    wanted = [np.asarray(x) for x in jax.tree.leaves(run(tree, ranges, *tried))]
    return Exported(out, size, apart(opened(out, to)(*tried), wanted))


def writer(to: Format) -> Callable[..., int]:
    """What writes this format."""
    found: Callable[..., int] = getattr(importlib.import_module("jaxcomp.export"), f"to_{to.replace('-', '_')}")
    return found


def output_of(file: Path, to: Format) -> Path:
    """Where a file is exported to, unless that is said."""
    if to == "compressed-tensors":
        return file.with_name(f"{file.stem}_{to}")
    return file.with_suffix(".gguf" if to == "gguf" else SUFFIXES[to])


def function_of(text: str) -> Callable[..., PyTree]:
    """The function that ``module:function`` names; the current directory is looked in first.

    Raises:
      ExportError: there is none.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise ExportError(
            f"{OWNER}: --fn must be MODULE:FUNCTION, a function of the parameters and the arguments, got {text!r}."
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as e:
        raise ExportError(f"{OWNER}: --fn {text} cannot be imported: {e}.") from e
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ExportError(f"{OWNER}: --fn {text}: the module {module!r} has no function {name!r}.")
    function: Callable[..., PyTree] = found
    return function


def spec_of(text: str, *, free: bool, scope: jax.export.SymbolicScope) -> jax.ShapeDtypeStruct:
    """An argument's shape and type.

    >>> spec_of("batch,28:int32", free=False, scope=jax.export.SymbolicScope())
    ShapeDtypeStruct(shape=(1, 28), dtype=int32)
    """
    dims, _, dtype = text.partition(":")
    words = [word.strip() for word in dims.split(",")]
    if not free:
        words = [word if word.isdigit() else "1" for word in words]
    try:
        shape = jax.export.symbolic_shape(",".join(words), scope=scope)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or "float32"))
    except (ValueError, TypeError) as e:
        raise ExportError(
            f"{OWNER}: --shape wants numbers and names with commas between, and a type behind a colon, such as"
            f" batch,128:int32, got {text!r}: {' '.join(str(e).split())}"
        ) from e


def _fits(function: Callable[..., PyTree], tree: Params, specs: Sequence[jax.ShapeDtypeStruct], *, fn: str) -> None:
    """The function takes the file's tree and the arguments, or the one error says what it says."""
    try:
        jax.eval_shape(lambda *args: function(materialize(tree), *args), *specs)
    except Exception as e:
        raise ExportError(
            f"{OWNER}: --fn {fn} does not take the file's tree and arguments of the shapes"
            f" {[spec.shape for spec in specs]}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        ) from e


def _tried(spec: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Numbers to try an argument with: normal ones, or small integers."""
    shape = [n if isinstance(n, int) else ANY for n in spec.shape]
    rng = np.random.default_rng(seed)
    floats = jnp.issubdtype(spec.dtype, jnp.floating)
    return jnp.asarray(rng.normal(size=shape) if floats else rng.integers(0, 2, shape), spec.dtype)


def _batches(samples: Sequence[Path], tried: Sequence[jax.Array]) -> list[tuple[jax.Array, ...]]:
    """The samples in batches of the sizes that the arguments have."""
    arrays = [_array(path) for path in samples]
    same = len(arrays) == len(tried) and all(a.shape[1:] == t.shape[1:] for a, t in zip(arrays, tried, strict=True))
    count = min((len(a) // len(t) for a, t in zip(arrays, tried, strict=False)), default=0) if same else 0
    if not count:
        raise ExportError(
            f"{OWNER}: --samples hold arrays of shapes {[a.shape for a in arrays]}; wanted is a file for each --shape,"
            f" with at least as many examples along the first axis: {[t.shape for t in tried]}."
        )

    def batch(i: int) -> tuple[jax.Array, ...]:
        pairs = zip(arrays, tried, strict=True)
        return tuple(jnp.asarray(a[i * len(t) : (i + 1) * len(t)], t.dtype) for a, t in pairs)

    return [batch(i) for i in range(count)]


def _array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as e:
        raise ExportError(
            f"{OWNER}: --samples {os.fspath(path)!r} is no .npy file of numbers ({e}); write it by numpy.save."
        ) from e
