"""Products of codes: int8 by int8 into int32, float8 by float8 into float32; then one rescale; zero points exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.coded_dots import Sums, coded_dot, rescaled_dot
from jaxcomp.activations.convolutions import convolution
from jaxcomp.activations.factors import Factor, total
from jaxcomp.activations.reasons import (
    CUT_WINDOW,
    GROUPED_BATCH,
    LARGE_SUM,
    MIXED_KINDS,
    RAGGED,
    SHIFTED_KERNEL,
    Why,
    short_blocks,
)
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import DotNumbers, by_rows, dot_axes, dot_numbers, groups_of

SMALLEST_BLOCK = 8
"""Blocks of the contracted axis with a scale of their own are this long at least, or integers gain nothing."""


def refusal(op: Op, a: Factor, b: Factor) -> Why | None:
    """Why this product cannot be run on codes; None if it can."""
    pairs = _summed(op)
    if (a.codes.dtype == jnp.int8) != (b.codes.dtype == jnp.int8):
        return MIXED_KINDS
    if math.prod(b.codes.shape[j] for _, j in pairs) * a.reach * b.reach >= 2**31:
        return LARGE_SUM
    if op.name == "dot_general":
        return _blocks_refusal(a, b, pairs)
    if op.name == "ragged_dot_general":
        return _ragged_refusal(op, a, b)
    if any(max(a.scale.shape[i], b.scale.shape[j]) > 1 for i, j in pairs):
        return CUT_WINDOW
    if op.eqn.params["batch_group_count"] != 1:
        return GROUPED_BATCH
    return None if b.zero is None else SHIFTED_KERNEL


def _blocks_refusal(a: Factor, b: Factor, pairs: list[tuple[int, int]]) -> Why | None:
    """Why the scales along the axes that a dot sums over do not let it run on codes.

    What counts is how many elements a block has over all these axes: one head of 64 is as good as 64 of one axis.
    """
    block, length, most = 1, 1, 1
    for i, j in pairs:
        n, (few, many) = a.codes.shape[i], sorted((a.scale.shape[i], b.scale.shape[j]))
        block, length, most = block * (n // many), length * n, most * many
        if many % few:
            return short_blocks(n, many, SMALLEST_BLOCK)
    return short_blocks(length, most, SMALLEST_BLOCK) if most > 1 and block < SMALLEST_BLOCK else None


def integer_product(op: Op, a: Factor, b: Factor) -> jax.Array:
    """The result of a dot or convolution on codes, in the equation's own type.

    ``Σ (a - za) sa (b - zb) sb == sa sb (Σ a b - za Σ b - zb Σ a + n za zb)``, all in int32 up to the rescale.
    """
    products = {"dot_general": _dot, "ragged_dot_general": _ragged, "conv_general_dilated": convolution}
    return products[op.name](op, a, b).astype(result_of(op).dtype)


def turned_left(op: Op, a: Factor, b: Factor) -> jax.Array:
    """:func:`integer_product` of a dot whose left operand lies with the axes that are summed over last."""
    return integer_product(_summed_last(op, 0), _turned(op, 0, a), b)


def turned_right(op: Op, a: Factor, b: Factor) -> jax.Array:
    """:func:`integer_product` of a dot whose right operand lies with the axes that are summed over last."""
    return integer_product(_summed_last(op, 1), a, _turned(op, 1, b))


def _turned(op: Op, side: int, f: Factor) -> Factor:
    """A factor as it lies: XLA then cancels the transposition that put its axes where the program has them.

    With both in the program XLA folds them into the product, and its fast product of int8 on CPU is not found any more.
    """
    order = _order(op, side)
    zero = None if f.zero is None else jnp.transpose(f.zero, order)
    return Factor(jnp.transpose(f.codes, order), jnp.transpose(f.scale, order), zero, f.reach)


def _order(op: Op, side: int) -> list[int]:
    """The axes of an operand: those that both share, those that the result keeps, those that are summed over."""
    return [axis for part in dot_axes(op.eqn, side) for axis in part]


def _summed_last(op: Op, side: int) -> Op:
    """The dot of an operand in that order."""
    order = _order(op, side)
    numbers = [[list(axes) for axes in pair] for pair in op.eqn.params["dimension_numbers"]]
    for pair in numbers:
        pair[side] = [order.index(i) for i in pair[side]]
    turned = tuple(tuple(tuple(axes) for axes in pair) for pair in numbers)
    return replace(op, eqn=op.eqn.replace(params={**op.eqn.params, "dimension_numbers": turned}))


def _summed(op: Op) -> list[tuple[int, int]]:
    """The pairs of axes that are summed over."""
    if op.name != "conv_general_dilated":
        (lhs, rhs), _ = dot_numbers(op.eqn)
        return list(zip(lhs, rhs, strict=True))
    numbers = op.eqn.params["dimension_numbers"]
    return list(zip(numbers.lhs_spec[1:], numbers.rhs_spec[1:], strict=True))


def _dot(op: Op, a: Factor, b: Factor) -> jax.Array:
    numbers = op.eqn.params["dimension_numbers"]
    (lhs, rhs), (lhs_batch, rhs_batch) = numbers
    counts = [max(a.scale.shape[i], b.scale.shape[j]) for i, j in zip(lhs, rhs, strict=True)]
    cut = sum(count > 1 for count in counts)
    if not cut:
        return rescaled_dot(a, b, numbers, partial(_dotted, op, numbers))
    a, left = _blocked(a, dict(zip(lhs, counts, strict=True)))
    b, right = _blocked(b, dict(zip(rhs, counts, strict=True)))
    outer = [[left[i][0] for i in lhs if len(left[i]) > 1], [right[j][0] for j in rhs if len(right[j]) > 1]]
    batch = [[*outer[0], *(left[i][-1] for i in lhs_batch)], [*outer[1], *(right[j][-1] for j in rhs_batch)]]
    summed = tuple(left[i][-1] for i in lhs), tuple(right[j][-1] for j in rhs)
    return _dotted(op, (summed, (tuple(batch[0]), tuple(batch[1]))), a, b).sum(tuple(range(cut)))


def _dotted(op: Op, numbers: DotNumbers, a: Factor, b: Factor) -> jax.Array:
    """A dot of factors with these axes, rescaled."""
    contract, batch_axes = numbers
    n = math.prod(a.codes.shape[i] for i in contract[0])

    def placed(v: jax.Array, side: int) -> jax.Array:
        """In the result's axes: batch axes, free ones of the left, free ones of the right."""
        first = batch_axes[side]
        free = [i for i in range(v.ndim) if i not in contract[side] and i not in first]
        other = (b, a)[side].codes.ndim - len(contract[side]) - len(first)
        shape = [v.shape[i] for i in first]
        own = [v.shape[i] for i in free]
        v = jnp.transpose(v, [*first, *free, *contract[side]])
        return v.reshape([*shape, *own, *[1] * other] if side == 0 else [*shape, *[1] * other, *own])

    return _rescaled(coded_dot(op, a, b, numbers), (a, b), n, placed)


def _blocked(f: Factor, counts: dict[int, int]) -> tuple[Factor, list[list[int]]]:
    """A factor with contracted axes cut into blocks, and where each of its axes went: (block, within) if it was cut."""
    shape: list[int] = []
    places: list[list[int]] = []
    for i, n in enumerate(f.codes.shape):
        count = counts.get(i, 1)
        new = [count, n // count] if count > 1 else [n]
        places.append([len(shape) + k for k in range(len(new))])
        shape += new

    def split(v: jax.Array) -> jax.Array:
        """A scale or zero points, each of whose axes may be shared."""
        split_shape: list[int] = []
        for axis, own in enumerate(v.shape):
            count = counts.get(axis, 1)
            v = jnp.repeat(v, count // own, axis) if axis in counts and 1 < own < count else v
            split_shape += [count if own > 1 else 1, 1] if count > 1 else [own]
        return v.reshape(split_shape)

    zero = None if f.zero is None else split(f.zero)
    return Factor(f.codes.reshape(shape), split(f.scale), zero, f.reach), places


def _ragged_refusal(op: Op, a: Factor, b: Factor) -> Why | None:
    """Why a ragged dot does not run on codes."""
    at = by_rows(op.eqn)
    if at is None:
        return RAGGED
    count, length = max(a.scale.shape[at.left], b.scale.shape[at.right]), a.codes.shape[at.left]
    return short_blocks(length, count, length) if count > 1 else None


def _ragged(op: Op, a: Factor, b: Factor) -> jax.Array:
    """What belongs to a group, as the weight's scale and the sums over its codes do, is taken for each of its rows."""
    at, sizes = by_rows(op.eqn), cast(jax.Array, op.rest[0])
    assert at is not None
    (sums,) = op.bind(a.codes, b.codes, preferred_element_type=a.sum_type)
    group_of = groups_of(sizes, a.codes.shape[1 - at.left])

    def placed(v: jax.Array, side: int) -> jax.Array:
        """In the result's axes, rows and features; 0 for rows beyond the last group, whose products are 0."""
        if side == 0:
            return v.reshape(-1, 1)
        full = jnp.broadcast_to(v, [b.codes.shape[i] if i == at.group else n for i, n in enumerate(v.shape)])
        by_group = jnp.moveaxis(full, (at.group, at.right), (0, 1))[:, 0]
        return jnp.take(by_group, group_of, 0, mode="fill", fill_value=0)

    found = Sums(sums, total(a.codes, (at.left,)), total(b.codes, (at.right,)))
    return _rescaled(found, (a, b), a.codes.shape[at.left], placed)


def _rescaled(
    found: Sums, factors: tuple[Factor, Factor], n: int, placed: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """Corrects for zero points and scales, with sums over ``n`` codes.

    ``placed(v, side)`` puts an operand's value in the result's axes.
    """
    scales = [placed(spread(f.scale, f.codes.shape), side) for side, f in enumerate(factors)]
    zeros = [None if f.zero is None else placed(spread(f.zero, f.codes.shape), side) for side, f in enumerate(factors)]
    sums = found.products
    if zeros[0] is not None and found.right is not None:
        sums = sums - zeros[0] * placed(found.right, 1)
    if zeros[1] is not None and found.left is not None:
        sums = sums - zeros[1] * placed(found.left, 0)
    if zeros[0] is not None and zeros[1] is not None:
        sums = sums + n * zeros[0] * zeros[1]
    return sums.astype(scales[0].dtype) * (scales[0] * scales[1])
