"""Dots of codes: the backend's own, or on a CPU code that sums products and what a zero point needs, in one piece."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.factors import Factor, total
from jaxcomp.activations.packed_products import LaidFactor, laid_factor
from jaxcomp.activations.prepared import Carried
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import DType, PyTree, Shape
from jaxcomp.kernels.llvm_dots import llvm_dot, llvm_panel_dot, llvm_panel_floats, refusal
from jaxcomp.kernels.llvm_panels import refusal_of_codes
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import CODED_DOT
from jaxcomp.trace.products import DotNumbers, axes_by_use

Axes = tuple[int, ...]
Parts = tuple[Axes, Axes, Axes]


def panel_pair(given: object, side: int, pair: tuple[Factor, Factor]) -> tuple[Factor, Factor] | None:
    """The factors of a dot with the weight on ``side`` in panels, as it lies; None where it is not, or not one."""
    w, (a, b) = given.weight if isinstance(given, Carried) else None, pair
    if not isinstance(w, PanelWeight) or w.lead or pair[1 - side].codes.dtype != jnp.int8:
        return None
    return (a, laid_factor(b, w)) if side else (laid_factor(a, w), b)


class Sums(NamedTuple):
    """The sums of products of codes; and of either side, if the other has a zero point, those of its own codes.

    The latter are over what a product sums over; these axes are kept.
    """

    products: jax.Array
    left: jax.Array | None = None
    right: jax.Array | None = None


def coded_dot(op: Op, a: Factor, b: Factor, numbers: DotNumbers) -> Sums:
    """The sums of a dot of codes.

    Args:
      op: the dot.
      a, b: its operands, their axes perhaps cut; one perhaps in panels.
      numbers: which axes of both are summed over, and which both share.
    """
    kind, laid = a.sum_type, next((i for i, f in enumerate((a, b)) if _in_panels(f) is not None), None)
    wanted = tuple(i for i, other in enumerate((b, a)) if other.zero is not None)
    leaves, tree = jax.tree.flatten((a.codes, b.codes, _in_panels(a) or _in_panels(b)))

    def own(*leaves: jax.Array) -> list[jax.Array]:
        a, b, _ = jax.tree.unflatten(tree, leaves)
        return [_plain(op, a, b, numbers, kind), *(total((a, b)[i], tuple(numbers[0][i])) for i in wanted)]

    if a.codes.dtype != jnp.int8 or explicit_mesh(leaves) is not None:
        sums, *totals = own(*leaves)
    else:
        left, right = (axes_by_use(numbers, side, f.codes.ndim) for side, f in enumerate((a, b)))
        how = _How(left, right, b.reach if b.zero is None else 128, laid, wanted)
        sums, *totals = _primitive.bind(*leaves, jaxpr=jax.make_jaxpr(own)(*leaves), tree=tree, how=how)
    by_side = dict(zip(wanted, totals, strict=True))
    return Sums(sums, by_side.get(0), by_side.get(1))


def rescaled_dot(
    a: Factor, b: Factor, numbers: DotNumbers, finished: Callable[[Factor, Factor], jax.Array]
) -> jax.Array:
    """A dot of codes with its rescale in one piece, where one operand is in panels; else as ``finished`` has it.

    Args:
      a, b: its operands.
      numbers: which axes of both are summed over, and which both share.
      finished: the dot of them, with its rescale.
    """
    laid = next((i for i, f in enumerate((a, b)) if _in_panels(f) is not None), None)
    leaves, tree = jax.tree.flatten((a, b))
    scales = {f.scale.dtype for f in (a, b)}
    if (
        laid is None
        or (a, b)[laid].zero is not None
        or scales != {jnp.dtype(jnp.float32)}
        or explicit_mesh(leaves) is not None
    ):
        return finished(a, b)
    jaxpr = jax.make_jaxpr(lambda *leaves: [finished(*jax.tree.unflatten(tree, leaves))])(*leaves)
    left, right = (axes_by_use(numbers, side, f.codes.ndim) for side, f in enumerate((a, b)))
    return _rescaled.bind(*leaves, jaxpr=jaxpr, tree=tree, laid=laid, parts=(left, right))[0]


def _in_panels(f: Factor) -> PanelWeight | None:
    return f.weight if isinstance(f, LaidFactor) and isinstance(f.weight, PanelWeight) else None


class _How(NamedTuple):
    """How a dot of codes goes.

    Attributes:
      left, right: the axes of both operands.
      reach: the largest magnitude in the right one.
      laid: which of them is in panels, if one is.
      wanted: of which of them the sums over its own codes are asked.
    """

    left: Parts
    right: Parts
    reach: int
    laid: int | None
    wanted: Axes


def _for_cpu(*leaves: jax.Array, tree: PyTree, how: _How, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    a, b, w = jax.tree.unflatten(tree, leaves)
    (batch, rows, length), (_, features, _) = _sizes(a, how.left), _sizes(b, how.right)
    small = refusal(batch, rows, features, length) if w is None else refusal_of_codes()
    if small or not (a.size and b.size):
        return run_call(*leaves, jaxpr=jaxpr)
    sums, totals = _laid_out(a, b, how) if w is None else _by_panels(a, b, w, how)
    sides = (a, how.left), (b, how.right)
    found = [sums, *(totals[i] if i in totals else total(sides[i][0], sides[i][1][2]) for i in how.wanted)]
    return [v.reshape(aval.shape) for v, aval in zip(found, jaxpr.out_avals, strict=True)]


def _sizes(x: jax.Array, axes: Parts) -> Axes:
    return tuple(math.prod(x.shape[i] for i in part) for part in axes)


def _rows(x: jax.Array, axes: Parts) -> jax.Array:
    """``(batch, rows, length)``."""
    return jnp.transpose(x, [i for part in axes for i in part]).reshape(_sizes(x, axes))


def _by_panels(a: jax.Array, b: jax.Array, w: PanelWeight, how: _How) -> tuple[jax.Array, dict[int, jax.Array]]:
    """One weight for all rows: products, and the sums over codes that come with it, by side."""
    if how.laid == 0:
        return llvm_panel_dot(_rows(b, how.right)[0], w).T, {0: w.totals}
    return llvm_panel_dot(_rows(a, how.left)[0], w), {1: w.totals}


def _laid_out(a: jax.Array, b: jax.Array, how: _How) -> tuple[jax.Array, dict[int, jax.Array]]:
    """The same where the right operand is laid out for this product."""
    shared, kept, summed = how.right
    batch, features, length = _sizes(b, how.right)
    last = max(kept, default=-1) < min(summed)
    right = jnp.transpose(b, [*shared, *kept, *summed] if last else [*shared, *summed, *kept])
    right = right.reshape(batch, features, length) if last else right.reshape(batch, length, features)
    sums, totals = llvm_dot(_rows(a, how.left), right, how.reach, last=last)
    totals = totals.reshape([b.shape[i] for i in (*shared, *kept)])
    return sums, {1: jnp.transpose(totals, np.argsort((*shared, *kept)).tolist())}


_primitive = call_in_one_piece(CODED_DOT, _for_cpu)


def _rescaled_for_cpu(
    *leaves: jax.Array, tree: PyTree, laid: int, parts: tuple[Parts, Parts], jaxpr: ClosedJaxpr
) -> list[jax.Array]:
    factors = jax.tree.unflatten(tree, leaves)
    x, w, of_x = factors[1 - laid], _in_panels(factors[laid]), parts[1 - laid]
    assert w is not None
    if refusal_of_codes() or not all(isinstance(n, int) for n in x.codes.shape) or not (x.codes.size and w.codes.size):
        return run_call(*leaves, jaxpr=jaxpr)
    zero = jnp.zeros((1,) * x.codes.ndim, jnp.int32) if x.zero is None else x.zero
    by_row, zeros = (_by_row(v, x.codes.shape, of_x) for v in (x.scale, zero))
    y = llvm_panel_floats(_rows(x.codes, of_x)[0], w, by_row, zeros)
    return [(y if laid else y.T).reshape(jaxpr.out_avals[0].shape)]


def _by_row(v: jax.Array, shape: Shape, axes: Parts) -> jax.Array:
    """A number for each row, of one for each or for some of them."""
    *_, summed = axes
    kept = [1 if i in summed else n for i, n in enumerate(shape)]
    return _rows(jnp.broadcast_to(spread(v, tuple(kept)), kept), axes).reshape(-1)


_rescaled = call_in_one_piece(CODED_DOT, _rescaled_for_cpu)


def _plain(op: Op, a: jax.Array, b: jax.Array, numbers: DotNumbers, kind: DType) -> jax.Array:
    """The backend's own. One row of int8 is two on CPU: of one alone XLA makes all of the other operand int32 first."""

    def dot(a: jax.Array, b: jax.Array, numbers: DotNumbers = numbers) -> jax.Array:
        return op.bind(a, b, dimension_numbers=numbers, preferred_element_type=kind)[0]

    (contract, batch), codes = numbers, (a, b)
    kept = [
        math.prod(n for i, n in enumerate(x.shape) if i not in axes) for x, axes in zip(codes, contract, strict=True)
    ]
    if a.dtype != jnp.int8 or batch != ((), ()) or 1 not in kept or kept == [1, 1]:
        return dot(a, b)
    side = kept.index(1)

    def doubled(*codes: jax.Array) -> jax.Array:
        one = codes[side][None]
        two, moved = jnp.concatenate([one, one]), tuple(i + 1 for i in contract[side])
        if side == 0:
            sums = dot(two, codes[1], ((moved, contract[1]), batch))
        else:
            sums = dot(codes[0], two, ((contract[0], moved), batch))
        return jax.lax.index_in_dim(sums, 0, 0 if side == 0 else codes[0].ndim - len(contract[0]), keepdims=False)

    return jax.lax.platform_dependent(a, b, cpu=doubled, default=dot)
