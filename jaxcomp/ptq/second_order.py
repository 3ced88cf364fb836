"""Leaves rounded and pruned by the second moments of what they multiply: a weight's rows found, solved, laid back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Channels, Layout, checked_layout
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import Where, leaves_with_paths, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import each
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots
from jaxcomp.core.specs import checked_fraction, is_number
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.wrappers import Masked
from jaxcomp.pruning.specs import NM
from jaxcomp.ptq import columns, notices
from jaxcomp.ptq.columns import Rows, Rule
from jaxcomp.ptq.places import How, Keep, Place, place_of
from jaxcomp.quantization.blocks import Cut, range_of
from jaxcomp.quantization.grids import Grid, Int
from jaxcomp.quantization.leaves import Quantized, scales_and_zero
from jaxcomp.quantization.numerics.affine import no_weights, spread
from jaxcomp.quantization.scales import Fixed, ScaleRule, checked_rule
from jaxcomp.trace.rows import Moments

T = TypeVar("T")


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
      ValueError: what :func:`~jaxcomp.core.slots.slots` raises, no leaf with moments, one without or with
        those of another shape, moments that are not finite, groups that do not divide the axis, a damping below 0. The
        message names the path.

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
        met in each block of 128 rows.
      grid, per, scale, by_activation, damping, where: as of :func:`gptq`; scales are of the weights that stay, as they
        are when the others are gone.

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
    how = How("sparsegpt", grid, per, scale, _checked_keep(keep), by_activation, reached=False, damping=damping)
    return solve(params, moments, how, where)


def solve(params: Params, moments: Mapping[str, Moments], how: How, where: Where | None) -> Params:
    """The parameters with what :class:`How` makes of the selected leaves."""
    _check(how, moments)
    found = slots(params, _known(how.owner, params, moments) if where is None else where, how.owner)
    check_finite(found, how.owner)
    places = {path: place_of(slot, moments, how) for path, slot in found.items()}
    notices.of_rows(how.owner, {path: moments[slot.leaf_path] for path, slot in found.items()})

    def one(path: str, slot: Slot) -> Leaf:
        seen, place = moments[slot.leaf_path], places[path]
        if isinstance(how.scale, Fixed):
            ends = range_of(place.cut(slot, how.owner), how.grid or Int(), how.scale)
        else:
            ends = None
        leaf = _solved(slot.array, slot.full_mask, seen, ends=ends, place=place, rule=place.rule(how))
        return leaf if slot.mask is None or how.keep is not None else Masked(_inside(leaf), slot.mask)

    return replace_slots(params, each(one, found, how.owner))


Ends = tuple[jax.Array, jax.Array | None]


@partial(jax.jit, static_argnames=("place", "rule"))
def _solved(
    w: jax.Array, mask: jax.Array | None, seen: Moments, *, ends: Ends | None, place: Place, rule: Rule
) -> Leaf:
    """One leaf: a program a shape."""
    wide = w.astype(compute_dtype(w.dtype))
    h = seen.second.reshape(-1, *seen.second.shape[-2:]).astype(wide.dtype)
    rows: Rows = jax.tree.map(place.axes.of, Rows(wide, alive=mask))
    inputs = _each(partial(columns.factored, rule=rule), h)
    if rule.grid is None or rule.group:
        scale, zero = None, None
    else:
        x = Cut("", "", wide, mask, place.blocks)
        if rule.keep is not None and ends is None:
            left = _each(partial(columns.solve, rule=replace(rule, grid=None)), rows, inputs)
            x = x._replace(values=place.axes.back(left.values, w.shape), mask=place.axes.back(left.mask, w.shape))
        scale, zero = _given_scale(x, ends, rule)
        own = [None if x is None else jnp.broadcast_to(spread(dense(x), w.shape), w.shape) for x in (scale, zero)]
        rows = rows._replace(**dict(zip(("scale", "zero"), jax.tree.map(place.axes.of, own), strict=True)))
    done = _each(partial(columns.solve, rule=rule), rows, inputs)
    kept = None if done.mask is None else place.axes.back(done.mask, w.shape)
    if rule.grid is None or done.codes is None:
        values = place.axes.back(done.values, w.shape).astype(w.dtype)
        return values if kept is None else Masked(values, kept)
    if rule.group:
        scale, zero = (None if x is None else place.axes.back(x, place.blocks) for x in (done.scale, done.zero))
    codes = place.axes.back(done.codes, w.shape)
    if not rule.grid.has_zero:
        codes = jnp.where(spread(no_weights(wide, place.blocks), w.shape), jnp.zeros_like(codes), codes)
    leaf = Quantized(codes, scale, zero, rule.grid.elements, jnp.dtype(w.dtype))
    return leaf if kept is None else Masked(leaf, kept)


def _each(fn: Callable[..., T], *args: PyTree) -> T:
    """Of each matrix; of one alone without a batch axis, which costs some programs a slower Cholesky."""
    if len(jax.tree.leaves(args)[0]) > 1:
        return jax.vmap(fn)(*args)
    return jax.tree.map(lambda x: x[None], fn(*jax.tree.map(lambda x: x[0], args)))


def _given_scale(x: Cut, ends: Ends | None, rule: Rule) -> tuple[Leaf, jax.Array | None]:
    """The scales of the weights as they were given."""
    assert rule.grid is not None
    kept = x.values if x.mask is None else jnp.where(x.mask, x.values, jnp.zeros_like(x.values))
    return scales_and_zero(
        rule.grid, *(range_of(x._replace(values=kept), rule.grid, rule.scale) if ends is None else ends)
    )


def _inside(leaf: Leaf) -> Leaf:
    return leaf.values if isinstance(leaf, Masked) else leaf


def _known(owner: str, params: Params, moments: Mapping[str, Moments]) -> Where:
    paths = [path for path, _ in leaves_with_paths(params, is_leaf=is_compressed)[0]]
    if not set(paths) & set(moments):
        raise ValueError(
            f"{owner}: no leaf has moments: they are of {some_paths(moments) or 'nothing'}, and the paths are"
            f" {some_paths(paths)}; gather them with these parameters by jaxcomp.trace.row_moments(fn)(params, *args)."
        )

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
