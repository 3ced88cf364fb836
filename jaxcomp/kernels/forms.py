"""One table: the form in which a product of activations and a packed weight runs, by backend, types and class of shape.

The first form of the first row that fits, and that can run the product, is the one that runs. :func:`form_of` answers
for one backend, :func:`forms_of` for all, in words for a report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels import (
    llvm_convolution,
    llvm_integers,
    llvm_panels,
    llvm_products,
    llvm_sparse,
    pallas_mosaic,
    pallas_triton,
)
from jaxcomp.kernels.blocks import MANY, shape_class
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.sparse import SparseWeight
from jaxcomp.kernels.weight_only import summable
from jaxcomp.kernels.windows import Window

Weight = PackedWeight | SparseWeight | PanelWeight
"""What multiplies activations: a matrix, or the kernel of a convolution."""
BACKENDS = ("cpu", "cuda", "rocm", "tpu")
"""Those that the table names; another is served by the rows for all."""
ANY = "*"
"""Fits everything."""


class Row(NamedTuple):
    """Which forms serve some products, the best first."""

    backend: str
    types: str
    shape: str
    forms: tuple[str, ...]


TABLE = (
    Row("cpu", "codes", ANY, ("integers",)),
    Row(ANY, "codes by bytes", ANY, ("dot",)),
    Row("cpu", "sparse", ANY, ("llvm", "whole")),
    Row(ANY, "sparse", ANY, ("whole",)),
    Row("cpu", "panels", ANY, ("llvm", "whole")),
    Row(ANY, "panels", ANY, ("whole",)),
    Row("cpu", ANY, "one", ("llvm", "sums", "chunks", "whole")),
    Row("cpu", ANY, "few", ("llvm", "chunks", "whole")),
    Row("cpu", ANY, ANY, ("chunks", "whole")),
    Row("cuda", "bytes", "one", ("sums", "triton", "whole")),
    Row("cuda", ANY, "one", ("triton", "sums", "whole")),
    Row("cuda", ANY, "few", ("triton", "whole")),
    Row("tpu", ANY, "one", ("mosaic", "sums", "whole")),
    Row("tpu", ANY, "few", ("mosaic", "whole")),
    Row(ANY, ANY, "one", ("sums", "whole")),
    Row(ANY, ANY, ANY, ("whole",)),
)
"""First match wins. Types are of the weight "bytes", 8 bits with one scale a feature, "packed", "sparse", with
positions, or "panels", of features; of the activations "codes", integers, and of both "codes by bytes"."""


class Images(NamedTuple):
    """What a kernel convolves: the images' shape, channels last, and how it goes."""

    shape: Shape
    window: Window

    @property
    def windows(self) -> int:
        """Rows of the result."""
        return math.prod(self.window.result(self.shape, 1))


class Product(NamedTuple):
    """What a form is chosen by.

    Attributes:
      rows: of activations.
      dtype: theirs: a float type, or int8 or int16 of codes.
      weight: what multiplies them, arrays or their shapes.
      kept: whether the program is to be kept, as jax.export does: then only what jax promises to run later serves.
      parted: whether the compiler parts it over several devices, which it cannot do to a kernel.
      device: the kind of the device that it is for, or "" where that is not known.
      images: of a convolution, whose rows are windows.
    """

    rows: int
    dtype: DType
    weight: Weight
    kept: bool = False
    parted: bool = False
    device: str = ""
    images: Images | None = None

    @property
    def in_codes(self) -> bool:
        """Whether the activations are integers."""
        return jnp.issubdtype(self.dtype, jnp.integer)

    @property
    def floats(self) -> DType:
        """The type in which a form of floats is given them."""
        return floats_of(self.dtype, self.weight)


def floats_of(dtype: DType, w: Weight) -> DType:
    """The type of activations as floats: their own, or of codes that of the weight's sums."""
    return w.computed if jnp.issubdtype(dtype, jnp.integer) else dtype


class Form(NamedTuple):
    """A way to run a product: on which backends, and why it cannot run one there; None if it can.

    It takes packed weights, or any weight.
    """

    backends: frozenset[str]
    refusal: Callable[[Product], str | None]
    any_weight: bool = False


def _sums(p: Product) -> str | None:
    assert isinstance(p.weight, PackedWeight)
    if p.rows != 1:
        return f"it takes one row, and there are {p.rows}"
    return None if summable(p.weight) and _is_full(p) else "codes of this weight lie across fields or scales"


def _whole(p: Product) -> str | None:
    return None


def _chunks(p: Product) -> str | None:
    return None if _is_full(p) else "there is nothing to multiply"


def _is_full(p: Product) -> bool:
    return 0 not in (p.rows, *p.weight.shape)


def _dot(p: Product) -> str | None:
    if not p.in_codes or "codes by bytes" not in _types(p):
        return "it takes codes of activations, and weights of 8 bits with a scale a feature"
    return _chunks(p)


def _kernel(why: Callable[[Any], str | None], types: frozenset[DType]) -> Callable[[Product], str | None]:
    def refusal(p: Product) -> str | None:
        if p.parted:
            return "the compiler cannot part a kernel over several devices; use jax.shard_map around it"
        given = p.dtype if types == _CODES else p.floats
        if given not in types:
            return f"it takes {', '.join(sorted(t.name for t in types))}, and the activations are {given}"
        return _chunks(p) or why(p.weight)

    return refusal


def _triton(p: Product) -> str | None:
    """Triton's call has no promise to run later, and it is not lowered but for a known device."""
    if not p.device:
        return "no GPU is known here: jax.sharding.use_abstract_mesh with an AbstractDevice names one"
    return _kernel(pallas_triton.refusal, _FLOATS)(p)


def _llvm(p: Product) -> str | None:
    why = _kernel(_LLVM[type(p.weight)], _FLOATS)(p)
    if why or p.images is None or not isinstance(p.weight, SparseWeight):
        return why
    return llvm_convolution.refusal(*p.images)


_LLVM: Mapping[type, Callable[[Any], str | None]] = {
    PackedWeight: llvm_products.refusal,
    SparseWeight: llvm_sparse.refusal,
    PanelWeight: llvm_panels.refusal,
}


_FLOATS = frozenset(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
_CODES = frozenset(map(jnp.dtype, (jnp.int8, jnp.int16)))
FORMS: Mapping[str, Form] = {
    "sums": Form(frozenset({ANY}), _sums),
    "chunks": Form(frozenset({"cpu"}), _chunks),
    "whole": Form(frozenset({ANY}), _whole, any_weight=True),
    "llvm": Form(frozenset({"cpu"}), _llvm, any_weight=True),
    "integers": Form(frozenset({"cpu"}), _kernel(llvm_integers.refusal, _CODES)),
    "dot": Form(frozenset({ANY}), _dot),
    "triton": Form(frozenset({"cuda"}), _triton),
    "mosaic": Form(frozenset({"tpu"}), _kernel(pallas_mosaic.refusal, _FLOATS - {jnp.dtype(jnp.float16)})),
}
"""The forms of a product of activations and a packed or sparse weight.

"sums": bytes times activations, summed, in XLA's kernels. "chunks": some features dequantized at a time. "whole": all
of them. "llvm": code of our own for the processor that is there, if llvmlite is installed; "integers": the same for
activations in codes, whose products are summed as integers. "dot": XLA's product of int8 by int8. "triton", "mosaic":
Pallas kernels. All but "integers" and "dot" take codes of activations as floats.
"""
UNPROMISED = frozenset({"llvm", "integers", "triton"})
"""Forms that a kept program holds only where they are asked for."""


def form_of(backend: str, p: Product, asked: str | None = None) -> str:
    """The form in which a product of activations and a packed weight runs.

    Args:
      backend: "cpu", "cuda", "rocm", "tpu", or another.
      p: the product.
      asked: this form, and no other.

    Raises:
      ValueError: the backend lacks the form asked for, or it cannot run this product.
    """
    chosen = next(
        form
        for row in TABLE
        if _fits(row, backend, p)
        for form in row.forms
        if not _refusal(form, backend, p) and not (p.kept and form in UNPROMISED)
    )
    if asked is None or asked == chosen:
        return chosen
    if asked not in FORMS:
        raise ValueError(f"weight_only: there is no form {asked!r}; there are {', '.join(FORMS)}, or None to choose.")
    if why := _refusal(asked, backend, p):
        raise ValueError(
            f"weight_only: the form {asked!r} does not run on {backend} here: {why}; {chosen!r} runs: ask for it, or"
            " for None."
        )
    return asked


def _fits(row: Row, backend: str, p: Product) -> bool:
    wanted, found = (row.backend, row.shape), (backend, shape_class(p.rows))
    return row.types in _types(p) and all(a in (ANY, b) for a, b in zip(wanted, found, strict=True))


def _types(p: Product) -> tuple[str, ...]:
    """All names that the table has for the types of a product."""
    if isinstance(p.weight, PackedWeight):
        weight = "bytes" if p.weight.bits == 8 and p.weight.scale.shape[-1] == 1 else "packed"
    else:
        weight = "sparse" if isinstance(p.weight, SparseWeight) else "panels"
    return (ANY, weight, "codes", f"codes by {weight}") if p.in_codes else (ANY, weight)


def _refusal(name: str, backend: str, p: Product) -> str | None:
    form = FORMS[name]
    if not form.backends & {ANY, backend}:
        return f"it is for {', '.join(sorted(form.backends))}"
    if not isinstance(p.weight, PackedWeight) and not form.any_weight:
        kind = "sparse" if isinstance(p.weight, SparseWeight) else "the kernel of a convolution"
        return f"it is for packed matrices, and the weight is {kind}"
    return form.refusal(p)


def runs_in_turn(rows: int, dtype: DType, w: Weight) -> bool:
    """Whether stacked weights are multiplied one after another on a CPU, whose forms take one matrix.

    Floats by packed codes for many rows are not: XLA's product of all at once is as fast.
    """
    floats = jnp.issubdtype(dtype, jnp.floating)
    return w.lead > 0 and not (floats and isinstance(w, PackedWeight) and shape_class(rows) == MANY)


def _first(w: Weight) -> Weight:
    """Of stacked weights the shapes of one."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[w.lead :], v.dtype), w)


def forms_of(rows: int, dtype: DType, w: Weight, images: Images | None = None) -> str:
    """The forms of a product, or of a convolution of images, by backend, in words.

    >>> from jaxcomp.quantization.grids import Int
    >>> w = PackedWeight(jnp.zeros((8, 64), jnp.uint8), jnp.ones((8, 1)), None, Int(4), 128, 128, 128, jnp.float32)
    >>> forms_of(1, jnp.dtype(jnp.bfloat16), w)
    'llvm on cpu, triton on cuda, sums on rocm, mosaic on tpu'
    >>> forms_of(100, jnp.dtype(jnp.bfloat16), w)
    'chunks on cpu, whole on cuda, rocm and tpu'
    """
    found: dict[str, list[str]] = {}
    for backend in BACKENDS:
        each = w if backend != "cpu" or not runs_in_turn(rows, dtype, w) else _first(w)
        found.setdefault(form_of(backend, Product(rows, dtype, each, device=ANY, images=images)), []).append(backend)
    if len(found) == 1:
        return next(iter(found))
    listed = {
        form: " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names) for form, names in found.items()
    }
    return ", ".join(f"{form} on {names}" for form, names in listed.items())
