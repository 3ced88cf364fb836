"""Leaves rounded and pruned by the second moments of what they multiply: a weight's rows found, solved, laid back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.errors import count_known, naming
from jaxcomp.core.layouts import Channels, Layout, checked_layout
from jaxcomp.core.leaves import dense
from jaxcomp.core.paths import Where, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import each
from jaxcomp.core.roles import Roles
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots
from jaxcomp.core.specs import checked_fraction, is_number
from jaxcomp.core.types import Leaf, Params, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.pruning.specs import NM
from jaxcomp.ptq import columns, notices
from jaxcomp.ptq.columns import Done, Rows, Rule
from jaxcomp.quantization.blocks import Cut, range_of
from jaxcomp.quantization.grids import Grid, Int
from jaxcomp.quantization.leaves import Quantized, scales_and_zero
from jaxcomp.quantization.numerics.affine import no_weights, spread
from jaxcomp.quantization.scales import Fixed, ScaleRule, checked_rule
from jaxcomp.trace.rows import Moments

Keep = NM | float
"""Which weights stay: n of every m neighbours that a product sums over, or all but a fraction."""


class How(NamedTuple):
    """What is asked of every leaf; the fields are arguments of :func:`solve`."""

    owner: str
    grid: Grid | None
    per: Layout
    scale: ScaleRule | None
    keep: Keep | None
    by_activation: bool
    reached: bool
    damping: float


@on_any_mesh
def gptq(
    params: Params,
    moments: Mapping[str, Moments],
    grid: Grid = Int(4),  # noqa: B008 - frozen
    *,
    per: Layout = Channels(),  # noqa: B008 - frozen
    scale: ScaleRule | None = None,
    by_activation: bool = True,
    reached: bool = True,
    damping: float = 0.01,
    where: Where | None = None,
) -> Params:
    """The parameters with their selected leaves on a grid: each row's error made good by the rows not yet rounded.

    The leaves are those that ``quantize`` makes. What an earlier ``prune`` masked stays masked.

    Args:
      params: arrays, in any containers.
      moments: of what the leaves multiply, by path: :func:`~jaxcomp.trace.rows.row_moments`.
      grid: any that ``quantize`` takes.
      per: what shares a scale, as of ``quantize``; the axes are those that the moments know.
      scale: how a range is found, as of ``quantize``.
      by_activation: rows of large inputs are rounded first, while there are still many to make it good.
      reached: the scale of ``Groups`` along the inputs is found in the weights as they are when their group is reached;
        False takes the weights that were given. A grid whose scales lie on a grid of their own takes these always.
      damping: added to the diagonal of the moments, as a fraction of its mean; at least 0.
      where: which leaves; the default is those that the moments are of.

    Raises:
      TypeError: a grid, a layout or a rule that is not one, moments of another kind.
      ValueError: what :func:`~jaxcomp.core.slots.slots` raises, a leaf without moments or with those of another shape,
        moments that are not finite, groups that do not divide the axis, a damping below 0. The message names the path.

    >>> from jaxcomp.trace import row_moments
    >>> from jaxcomp import materialize, quantize
    >>> x = jax.random.normal(jax.random.key(0), (256, 8)) @ jax.random.normal(jax.random.key(1), (8, 8))
    >>> params = {"kernel": jax.random.normal(jax.random.key(2), (8, 4))}
    >>> fn = lambda p, x: x @ p["kernel"]
    >>> ours = gptq(params, row_moments(fn)(params, x), Int(3))
    >>> theirs = quantize(Int(3)).apply((), params)
    >>> error = lambda p: float(jnp.sum((fn(materialize(p), x) - fn(params, x)) ** 2))
    >>> error(ours) < 0.6 * error(theirs)
    True

    Source: Frantar et al. 2022, arXiv:2210.17323. Deviations: rows of large inputs go first by default, and with
    ``Groups`` whole groups do, so that a group stays one; inputs that were always zero leave their weights as they are
    rounded.
    """
    how = How("gptq", grid, per, scale, None, by_activation, reached, damping)
    return solve(params, moments, how, where)


@on_any_mesh
def sparsegpt(
    params: Params,
    moments: Mapping[str, Moments],
    keep: Keep,
    *,
    grid: Grid | None = None,
    per: Layout = Channels(),  # noqa: B008 - frozen
    scale: ScaleRule | None = None,
    by_activation: bool = True,
    reached: bool = True,
    damping: float = 0.01,
    where: Where | None = None,
) -> Params:
    """The parameters with their selected leaves pruned, and rounded where there is a grid: what stays makes it good.

    The leaves are those that ``prune``, and ``chain(prune, quantize)``, make. With a grid both are done at once: a row
    is pruned and rounded before the next one is chosen.

    Args:
      params: arrays, in any containers.
      moments: of what the leaves multiply, by path: :func:`~jaxcomp.trace.rows.row_moments`.
      keep: ``NM(n, m)`` along the last axis that a product sums over, or the fraction of weights that go, in [0, 1),
        met in each block of rows: 128 of them, or those of a group that shares a scale.
      grid, per, scale, by_activation, reached, damping, where: as of :func:`gptq`.

    Raises:
      TypeError, ValueError: as of :func:`gptq`; a fraction outside [0, 1), neighbours that do not divide the axis.

    >>> from jaxcomp.trace import row_moments
    >>> x = jax.random.normal(jax.random.key(0), (256, 8)) @ jax.random.normal(jax.random.key(1), (8, 8))
    >>> params = {"kernel": jax.random.normal(jax.random.key(2), (8, 4))}
    >>> moments = row_moments(lambda p, x: x @ p["kernel"])(params, x)
    >>> sparsegpt(params, moments, NM(2, 4))["kernel"].mask.reshape(2, 4, 4).sum(1).tolist()
    [[2, 2, 2, 2], [2, 2, 2, 2]]

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    how = How("sparsegpt", grid, per, scale, _checked_keep(keep), by_activation, reached, damping)
    return solve(params, moments, how, where)


def solve(params: Params, moments: Mapping[str, Moments], how: How, where: Where | None) -> Params:
    """The parameters with what :class:`How` makes of the selected leaves."""
    _check(how, moments)
    found = slots(params, _known(moments) if where is None else where, how.owner)
    check_finite(found, how.owner)
    places = {path: _place(slot, moments, how) for path, slot in found.items()}
    notices.of_rows(how.owner, {path: moments[slot.leaf_path] for path, slot in found.items()})

    def one(path: str, slot: Slot) -> Leaf:
        seen, place = moments[slot.leaf_path], places[path]
        if isinstance(how.scale, Fixed):
            ends = range_of(place.cut(slot, how.owner), how.grid or Int(), how.scale)
        else:
            ends = None
        leaf = _solved(slot.array, slot.full_mask, seen, ends, place=place, rule=place.rule(how))
        return leaf if slot.mask is None or how.keep is not None else Masked(_inside(leaf), slot.mask)

    return replace_slots(params, each(one, found, how.owner))


class Place(NamedTuple):
    """How a leaf's rows lie in it: static.

    Fields:
      apart, summed, kept: its axes; the order in which a solver wants them.
      blocks: of its scales along each axis.
      group: rows of one scale that is found when they are reached; 0 for scales that are found before.
    """

    apart: tuple[int, ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: Shape
    group: int

    def cut(self, slot: Slot, owner: str) -> Cut:
        """The leaf as a quantizer sees it."""
        return Cut(owner, slot.path, slot.array, slot.full_mask, self.blocks)

    def rule(self, how: How) -> Rule:
        """What is done to its rows."""
        return Rule(
            how.grid,
            self.group,
            None if isinstance(how.scale, Fixed) else how.scale,
            how.keep,
            by_activation=how.by_activation,
            damping=float(how.damping),
        )

    def rows(self, x: jax.Array) -> jax.Array:
        """An array of the leaf's rank as ``(apart, rows, columns)``."""
        moved = jnp.transpose(x, (*self.apart, *self.summed, *self.kept))
        sizes = [math.prod(x.shape[i] for i in axes) for axes in (self.apart, self.summed, self.kept)]
        return moved.reshape(sizes)

    def back(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The inverse, to this shape."""
        order = (*self.apart, *self.summed, *self.kept)
        moved = x.reshape([shape[i] for i in order])
        return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))


def _place(slot: Slot, moments: Mapping[str, Moments], how: How) -> Place:
    """Where the rows of a leaf are.

    Raises:
      ValueError: nobody knows, or what is asked for does not fit them; the message names the path.
    """
    shape = tuple(slot.array.shape)
    with naming(how.owner, slot.path):
        seen = moments.get(slot.leaf_path) if slot.path == slot.leaf_path else None
        if seen is None:
            raise ValueError(f"has no moments, which are of {some_paths(moments)}; gather them, or narrow where")
        kept = tuple(i for i in range(len(shape)) if i not in (*seen.apart, *seen.summed))
        fits = max((*seen.apart, *seen.summed), default=-1) < len(shape)
        sizes = [tuple(shape[i] for i in seen.apart), math.prod(shape[i] for i in seen.summed)] if fits else []
        if [seen.second.shape[:-2], seen.second.shape[-1]] != sizes:
            raise ValueError(
                f"has shape {shape}, and its moments, of shape {seen.second.shape}, are of another; gather them again"
            )
        _check_numbers(seen)
        roles = Roles({slot.leaf_path: seen.roles(len(shape))})
        blocks, row = slot.blocks(how.per, roles, how.owner)
        if row:
            raise ValueError("would be cut in buckets across its rows; take Channels(), Groups(size) or Tensor()")
        _check_neighbours(how.keep, seen, shape)
        return Place(seen.apart, seen.summed, kept, blocks, _group(how, seen, shape, blocks))


def _group(how: How, seen: Moments, shape: Shape, blocks: Shape) -> int:
    """How many neighbouring rows share a scale that is found when they are reached; 0 where scales are found before."""
    if how.grid is None or how.grid.scale_grid is not None or not how.reached or isinstance(how.scale, Fixed):
        return 0
    *before, last = seen.summed
    apart = all(blocks[i] == n for i, n in enumerate(shape) if i not in seen.summed)
    runs = all(blocks[i] == shape[i] for i in before) and blocks[last] < shape[last]
    group = shape[last] // blocks[last]
    whole = blocks[last] == 1 and not any(shape[i] > 1 for i in before)
    return group if apart and runs and not whole else 0


@partial(jax.jit, static_argnames=("place", "rule"))
def _solved(
    w: jax.Array,
    mask: jax.Array | None,
    seen: Moments,
    ends: tuple[jax.Array, jax.Array | None] | None,
    *,
    place: Place,
    rule: Rule,
) -> Leaf:
    """One leaf: a program a shape."""
    wide = w.astype(compute_dtype(w.dtype))
    scale, zero = (None, None) if rule.grid is None or rule.group else _given_scale(wide, mask, ends, place, rule)
    own = [None if x is None else jnp.broadcast_to(spread(dense(x), w.shape), w.shape) for x in (scale, zero)]
    rows: Rows = jax.tree.map(place.rows, Rows(wide, *own, mask))
    h = seen.second.reshape(-1, *seen.second.shape[-2:]).astype(wide.dtype)
    done, _ = jax.vmap(partial(columns.solve, rule=rule))(rows, h) if len(h) > 1 else _alone(rows, h, rule)
    kept = None if done.mask is None else place.back(done.mask, w.shape)
    if rule.grid is None or done.codes is None:
        values = place.back(done.values, w.shape).astype(w.dtype)
        return values if kept is None else Masked(values, kept)
    if rule.group:
        scale, zero = (None if x is None else place.back(x, place.blocks) for x in (done.scale, done.zero))
    codes = place.back(done.codes, w.shape)
    if not rule.grid.has_zero:
        codes = jnp.where(spread(no_weights(wide, place.blocks), w.shape), jnp.zeros_like(codes), codes)
    leaf = Quantized(codes, scale, zero, rule.grid.elements, jnp.dtype(w.dtype))
    return leaf if kept is None else Masked(leaf, kept)


def _alone(rows: Rows, h: jax.Array, rule: Rule) -> tuple[Done, jax.Array]:
    """Without a batch axis, which costs some programs a slower Cholesky."""
    done = columns.solve(*jax.tree.map(lambda x: x[0], (rows, h)), rule=rule)
    return jax.tree.map(lambda x: x[None], done)


def _given_scale(
    w: jax.Array,
    mask: jax.Array | None,
    ends: tuple[jax.Array, jax.Array | None] | None,
    place: Place,
    rule: Rule,
) -> tuple[Leaf, jax.Array | None]:
    """The scales of the weights as they were given."""
    assert rule.grid is not None
    kept = w if mask is None else jnp.where(mask, w, jnp.zeros_like(w))
    found = range_of(Cut("", "", kept, mask, place.blocks), rule.grid, rule.scale) if ends is None else ends
    return scales_and_zero(rule.grid, *found)


def _inside(leaf: Leaf) -> Leaf:
    return leaf.values if isinstance(leaf, Masked) else leaf


def _known(moments: Mapping[str, Moments]) -> Where:
    def has_moments(path: str, leaf: Leaf) -> bool:
        return path in moments

    return has_moments


def _check(how: How, moments: Mapping[str, Moments]) -> None:
    """Raises TypeError or ValueError where an argument is not what it should be."""
    if how.grid is not None and not isinstance(how.grid, Grid):
        raise TypeError(f"{how.owner}: wants a grid such as Int(4), got {how.grid!r}.")
    checked_layout(how.owner, how.per)
    checked_rule(how.owner, how.scale)
    if not is_number(how.damping) or not 0 <= how.damping < math.inf:
        raise ValueError(f"{how.owner}: damping must be a number that is not negative, got {how.damping!r}.")
    wrong = [path for path, seen in moments.items() if not isinstance(seen, Moments)]
    if wrong:
        raise TypeError(
            f"{how.owner}: the moments of {wrong[0]!r} are {type(moments[wrong[0]]).__name__}, not Moments; gather them"
            " by jaxcomp.trace.row_moments(fn)(params, *args)."
        )


def _checked_keep(keep: Keep) -> Keep:
    return keep if isinstance(keep, NM) else checked_fraction("sparsegpt", keep, "NM(n, m) or a number in [0, 1)")


def _check_numbers(seen: Moments) -> None:
    bad = count_known(lambda x: ~jnp.isfinite(x), seen.second)
    if bad:
        raise ValueError(
            f"has moments with {bad} values that are not finite, of {seen.second.size}; mend the batch that made them"
        )


def _check_neighbours(keep: Keep | None, seen: Moments, shape: Shape) -> None:
    if not isinstance(keep, NM):
        return
    axis = seen.summed[-1]
    if keep.axis is not None and keep.axis % len(shape) != axis:
        raise ValueError(
            f"is pruned along axis {axis}, the last that products sum over, and {keep} names another; name none"
        )
    if shape[axis] % keep.m:
        raise ValueError(
            f"has {shape[axis]} elements along axis {axis} of shape {shape}, which groups of {keep.m} do not divide;"
            " leave it out by a rule"
        )
