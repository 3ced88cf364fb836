"""The product of activations and a packed weight, in the form that its platform has: chosen when it is lowered.

One program lowered for several platforms holds the form of each. ``jax.lax.platform_dependent`` cannot serve: lowered
for several platforms at once it lowers each branch for all of them, and a Pallas call has no lowering for CPU. A
primitive has a rule for each platform, lowered for that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxcomp.core.types import DType, PyTree
from jaxcomp.kernels.blocks import Blocks, blocks_for
from jaxcomp.kernels.forms import BACKENDS, Images, Product, Weight, floats_of, form_of
from jaxcomp.kernels.llvm_convolution import llvm_convolution
from jaxcomp.kernels.llvm_integers import llvm_integer_product
from jaxcomp.kernels.llvm_panels import llvm_panel_product
from jaxcomp.kernels.llvm_products import llvm_product
from jaxcomp.kernels.llvm_sparse import llvm_sparse_product
from jaxcomp.kernels.lowering import is_kept, is_parted
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.pallas_mosaic import mosaic_product
from jaxcomp.kernels.pallas_triton import triton_product
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.sparse import SparseWeight
from jaxcomp.kernels.weight_only import chunks, dot_of_bytes, in_step, sums, sums_of_bytes, whole
from jaxcomp.kernels.weight_only import weight_only as plain
from jaxcomp.kernels.windows import Window

Matrix = PackedWeight | SparseWeight
Kernel = SparseWeight | PanelWeight
Run = Callable[[jax.Array, Any], jax.Array]


def weight_only(x: jax.Array, w: Matrix, *, dtype: DType | None = None, form: str | None = None) -> jax.Array:
    """``x @ values(w).T``, with sums in float32 at least, in the form that the table has for where it runs.

    Its gradient is that of the plain forms. Over stacked weights, in ``jax.vmap``, the plain forms run.

    Args:
      x: ``(..., length)``, float; or codes of activations, int8 or int16 of 255 at most, by a packed weight.
      w: ``(features, length)``, packed or sparse; its values are not rounded to its own type.
      dtype: of the result ``(..., features)``; if None that of ``x``, or for codes that of the sums.
      form: this form of ``jaxcomp.kernels.forms``, and no other.

    Raises:
      ValueError: the backend that it is lowered for lacks the form asked for, or it cannot run these shapes and types.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.quantization import Int
    >>> codes = jnp.pad(jnp.array([[1, 2], [3, -4]], jnp.int8), ((0, 0), (0, 6)))
    >>> w = PackedWeight(codes, jnp.array([[1.0], [0.5]]), None, Int(8), 2, 2, 8, jnp.dtype("float32"))
    >>> weight_only(jnp.array([1.0, 10.0]), w).tolist()
    [21.0, -18.5]
    >>> weight_only(jnp.array([1.0, 10.0]), w, form="mosaic")
    Traceback (most recent call last):
    ValueError: weight_only: the form 'mosaic' does not run on cpu here: it is for tpu; 'llvm' runs: ask for it...
    """
    rows = x.reshape(-1, w.length)
    y = _product(rows, w, _Asked(jax.numpy.dtype(dtype or floats_of(x.dtype, w)), form))
    return y.reshape(*x.shape[:-1], w.shape[-2])


def convolution(
    x: jax.Array, w: Kernel, window: Window, *, dtype: DType | None = None, form: str | None = None
) -> jax.Array:
    """The convolution by ``values(w)``, in the form that the table has for where it runs, as :func:`weight_only` is.

    Args:
      x: ``(images, *spatial, channels)``, float.
      w: ``(features, length)``; along ``length`` the elements of the kernel before the channels of a group.
      window: how the kernel goes.
      dtype: of the result ``(images, *windows, features)``; that of ``x`` if None.
      form: this form of ``jaxcomp.kernels.forms``, and no other.

    Raises:
      ValueError: as :func:`weight_only` does.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from jaxcomp.kernels.sparse import sparse_parts
    >>> kernel = np.array([[1.0, 0.0, 10.0]], np.float32)  # of one feature, three elements, one channel
    >>> w = SparseWeight(*map(jnp.asarray, sparse_parts(kernel, kernel)), None, None, 3, jnp.dtype("float32"))
    >>> window = Window((3,), strides=(1,), padding=((1, 1),), dilation=(1,), base=(1,), groups=1)
    >>> convolution(jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1), w, window).reshape(-1).tolist()
    [20.0, 31.0, 2.0]
    """
    return _product(x, w, _Asked(jax.numpy.dtype(dtype or x.dtype), form, window))


class _Asked(NamedTuple):
    """The result's type, the form asked for, and the windows of a convolution."""

    dtype: DType
    form: str | None
    window: Window | None = None

    def plain(self, x: jax.Array, w: Weight) -> jax.Array:
        """The product in the plain forms."""
        if self.window is None:
            assert not isinstance(w, PanelWeight)
            return plain(x, w, dtype=self.dtype)
        return _whole_convolution(x, w, self.window).astype(self.dtype)


class _Static(TypedDict):
    """What the primitive knows beside arrays: how they make operands, and what is asked."""

    tree: PyTree
    asked: _Asked


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: Weight, asked: _Asked) -> jax.Array:
    leaves, tree = jax.tree.flatten((x, w))
    return _primitive.bind(*leaves, tree=tree, asked=asked)


@_product.defjvp
def _product_jvp(asked: _Asked, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(asked.plain, primals, tangents)
    return _product(*primals, asked), tangent


def run_of(form: str, backend: str, blocks: Blocks | None = None, window: Window | None = None) -> Run:
    """The function of a form: ``(rows, length)`` by a weight to ``(rows, features)``, of any float type, or codes.

    Args:
      form: its name.
      backend: where it will run.
      blocks: for a kernel.
      window: of a convolution, which is of images by a sparse kernel or one in panels.
    """
    if window is not None:
        convolve = _llvm_convolution if form == "llvm" else _whole_convolution
        return lambda x, w: convolve(x, w, window)
    if form in _CODES:
        return _CODES[form]
    if form in _KERNELS:
        assert blocks is not None
        kernel = partial(_KERNELS[form], blocks=blocks)
        return lambda x, w: kernel(x.astype(floats_of(x.dtype, w)), w)
    if form == "llvm":
        return _llvm
    run = _SUMS.get(backend, sums) if form == "sums" else _PLAIN[form]
    return lambda x, w: run(*in_step(x.astype(w.computed), w))


def _llvm(x: jax.Array, w: Matrix) -> jax.Array:
    return llvm_sparse_product(x, w) if isinstance(w, SparseWeight) else llvm_product(x, w)


def _llvm_convolution(x: jax.Array, w: Kernel, window: Window) -> jax.Array:
    return llvm_convolution(x, w, window) if isinstance(w, SparseWeight) else llvm_panel_product(x, w, window)


def _whole_convolution(x: jax.Array, w: Weight, window: Window) -> jax.Array:
    return window.convolved(x.astype(w.computed), w.values())


_CODES: dict[str, Run] = {"integers": llvm_integer_product, "dot": dot_of_bytes}
_KERNELS = {"triton": triton_product, "mosaic": mosaic_product}
_PLAIN: dict[str, Run] = {"chunks": chunks, "whole": whole}
_SUMS: dict[str, Run] = {"cpu": sums_of_bytes}


_primitive = Primitive("weight_only")


def _abstract(*avals: jax.core.ShapedArray, **static: Unpack[_Static]) -> jax.core.ShapedArray:
    (x, w), asked = jax.tree.unflatten(static["tree"], avals), static["asked"]
    shape = (x.shape[0], w.shape[-2]) if asked.window is None else asked.window.result(x.shape, w.shape[-2])
    return jax.core.ShapedArray(shape, asked.dtype)


@cache
def _jitted(**static: Unpack[_Static]) -> Callable[..., jax.Array]:
    return jax.jit(partial(_primitive.bind, **static))


_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(lambda *leaves, **static: _jitted(**static)(*leaves))


def _batched(
    leaves: Sequence[jax.Array], axes: Sequence[int | None], **static: Unpack[_Static]
) -> tuple[jax.Array, int]:
    """More rows where only the activations are batched; else the plain forms."""
    x, tree, asked = leaves[0], static["tree"], static["asked"]
    if axes[0] is not None and all(axis is None for axis in axes[1:]):
        x = jax.numpy.moveaxis(x, axes[0], 0)
        y = _primitive.bind(x.reshape(-1, *x.shape[2:]), *leaves[1:], **static)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    if asked.form is not None:
        raise ValueError(
            f"weight_only: the form {asked.form!r} does not run under vmap over weights; leave the form to the"
            " table, or map over the weights with jax.lax.map."
        )

    def run(*parts: jax.Array) -> jax.Array:
        return asked.plain(*jax.tree.unflatten(tree, parts))

    return jax.vmap(run, tuple(axes))(*leaves), 0


batching.primitive_batchers[_primitive] = _batched


def _rule(backend: str) -> Callable[..., Any]:
    """How the primitive is lowered for one backend."""

    def lower(ctx: mlir.LoweringRuleContext, *values: object, **static: Unpack[_Static]) -> object:
        device = device_kind(backend)

        def run(*leaves: jax.Array) -> jax.Array:
            (x, w), asked = jax.tree.unflatten(static["tree"], leaves), static["asked"]
            images = None if asked.window is None else Images(x.shape, asked.window)
            rows = x.shape[0] if images is None else images.windows
            p = Product(rows, x.dtype, w, is_kept(ctx), is_parted(ctx), device, images)
            form = form_of(backend, p, asked.form)
            blocks = blocks_for(form, device, p.rows) if form in _KERNELS else None
            return run_of(form, backend, blocks, asked.window)(x, w).astype(asked.dtype)

        return mlir.lower_fun(run, multiple_results=False)(ctx, *values)

    return lower


for _backend in BACKENDS:
    mlir.register_lowering(_primitive, _rule(_backend), platform=_backend)
mlir.register_lowering(_primitive, _rule("other"))


def device_kind(backend: str) -> str:
    """The kind of device that a program is lowered for, as jax names it; "" where none of this backend is known."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None and named.platform in (backend, None):
        return named.device_kind
    try:
        return jax.local_devices(backend=backend)[0].device_kind
    except RuntimeError:
        return ""
