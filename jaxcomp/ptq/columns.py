"""The columns of a weight rounded or pruned row by row, each row's error made good by the rows to come. Arrays alone.

With ``h = Σ x xᵀ`` the loss of ``q`` in place of ``w`` is ``tr((w - q)ᵀ h (w - q))``. With ``h = r rᵀ``, ``r`` upper,
it is the squared norm of ``rᵀ (w - q)``, whose row i holds the errors of rows up to i alone: what the rows before have
left there is taken up by row i before it is rounded. That is GPTQ's recursion without the inverse of ``h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.core.bits import order_keys
from jaxcomp.pruning.masks.nm import n_m_mask
from jaxcomp.pruning.masks.thresholds import fraction_of, smallest
from jaxcomp.pruning.specs import NM
from jaxcomp.ptq.factor import Factor, factor
from jaxcomp.quantization.blocks import Cut, range_of
from jaxcomp.quantization.grids import Grid
from jaxcomp.quantization.scales import ScaleRule

BLOCK = 128
"""Rows of a block: SparseGPT's, over which a fraction is met."""
_CHUNK = 8
_TILE = 256


@dataclass(frozen=True)
class Rule:
    """What is done to the rows, in static values.

    Attributes:
      grid: what they are rounded to, or None.
      group: how many neighbouring rows share a scale that is found when the first of them is reached, where none is
        pruned; 0 where all scales are given.
      scale: how such a scale is found.
      keep: which of them stay: n of m neighbours, all but a fraction of each block, or, None, what the mask says.
      by_activation: whether rows of large inputs go first; neighbours that share a choice stay together.
      damping: what is added to the diagonal of ``h``, as a fraction of its mean.
    """

    grid: Grid | None
    group: int
    scale: ScaleRule | None
    keep: NM | float | None
    by_activation: bool
    damping: float


class Rows(NamedTuple):
    """A weight and what is known of its rows: ``(n, columns)`` each.

    Fields:
      w: the weight.
      scale, zero: of each weight, or None.
      alive: which weights there are, or None for all.
    """

    w: jax.Array
    scale: jax.Array | None = None
    zero: jax.Array | None = None
    alive: jax.Array | None = None


class Done(NamedTuple):
    """What became of rows.

    Fields:
      values: the weights that there are now.
      codes: their numbers on the grid, or None.
      scale, zero: of the groups, ``(n / group, columns)``, where they were found here.
      mask: which weights stay, or None.
    """

    values: jax.Array
    codes: jax.Array | None
    scale: jax.Array | None
    zero: jax.Array | None
    mask: jax.Array | None


@partial(jax.jit, static_argnames="rule")
def factored(h: Float[Array, "n n"], rule: Rule) -> Factor:
    """What :func:`solve` wants of the inputs: the factor of their second moments ``h``, in its order of the rows."""
    return factor(h, _order(jnp.diagonal(h), rule) if rule.by_activation else None, damping=rule.damping)


@partial(jax.jit, static_argnames="rule")
def solve(rows: Rows, inputs: Factor, rule: Rule) -> Done:
    """The rows rounded, pruned, or both, so that ``tr((w - values)ᵀ h (w - values))`` is small.

    Args:
      rows: the weight.
      inputs: of its second moments, by this rule or one that differs in the grid alone.
      rule: what is done.

    Source: Frantar et al. 2022, arXiv:2210.17323 (rounding), 2023, arXiv:2301.00774 (pruning, and both); that the
    factor of ``h`` gives the recursion too: Chee et al. 2023, arXiv:2307.13304, theorem 6. Deviations: inputs that were
    always zero leave their weights as they are rounded, where the published code sets them to 0.
    """
    order = inputs.order
    if order is not None:
        rows = jax.tree.map(lambda x: x[order], rows)
    values, codes, scale, zero, mask = _all_blocks(rows, inputs.root, rule)
    if order is not None:
        back = jnp.argsort(order)
        values, codes, mask = jax.tree.map(lambda x: x[back], (values, codes, mask))
        groups = jnp.argsort(order[:: max(rule.group, 1)])
        scale, zero = jax.tree.map(lambda x: x[groups], (scale, zero))
    return Done(values, codes, scale, zero, mask)


def _order(diagonal: jax.Array, rule: Rule) -> jax.Array:
    """Rows by descending activation; those of one group, and of one choice of n among m, next to each other."""
    units = [u for u in (rule.group, rule.keep.m if isinstance(rule.keep, NM) else 0) if u > 1]
    keys = [-diagonal]
    for size in sorted(units):
        means = -jnp.mean(diagonal.reshape(-1, size), axis=1)
        keys += [jnp.arange(len(diagonal)) // size, jnp.repeat(means, size)]
    return jnp.lexsort(keys)


def _all_blocks(rows: Rows, root: jax.Array, rule: Rule) -> Done:
    """Block after block; the rows of the last one are filled up with zeros whose inputs go with no others.

    The factor and the errors lie from the last row to the first, so that no part of the factor is ever turned.
    """
    n, block = len(root), _block_of(rule)
    tile = block * max(1, min(_TILE // block, -(-n // block)))
    full = _filled(rows, n, -(-n // block) * block, of_some=isinstance(rule.keep, float))
    root = _grown(root, -(-n // tile) * tile)

    def one(errors: jax.Array, b: jax.Array) -> tuple[jax.Array, Done]:
        start, here = b * block, len(root) - (b + 1) * block
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), full)
        inverse = _inverse(lax.dynamic_slice(root, (here, here), (block, block))).T[::-1, ::-1]

        def add(t: jax.Array, total: jax.Array) -> jax.Array:
            """What the errors of one tile of earlier rows ask of these; rows to come have none yet."""
            at = len(root) - (t + 1) * tile
            coupling = lax.dynamic_slice(root, (at, here), (tile, block))
            return total + _dot(coupling.T, lax.dynamic_slice_in_dim(errors, at, tile))

        asked = lax.fori_loop(0, (start + tile - 1) // tile, add, jnp.zeros_like(part.w))
        done = _one_block(part, part.w + _dot(inverse, asked[::-1]), inverse, rule=rule)
        return lax.dynamic_update_slice_in_dim(errors, (part.w - done.values)[::-1], here, 0), done

    nothing = jnp.zeros((len(root), rows.w.shape[1]), rows.w.dtype)
    _, done = lax.scan(one, nothing, jnp.arange(-(-n // block)))
    values, codes, scale, zero, mask = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tuple(done))
    values, codes, mask = jax.tree.map(lambda x: x[:n], (values, codes, mask))
    return Done(values, codes, scale, zero, mask)


def _block_of(rule: Rule) -> int:
    choice = rule.keep.m if isinstance(rule.keep, NM) else 1
    return rule.group or -(-BLOCK // choice) * choice


def _filled(rows: Rows, n: int, size: int, *, of_some: bool) -> Rows:
    """As many rows as ``size``: those that are more are zeros, of scale 1, and count for nothing where some go."""
    if size == n:
        return rows
    alive = jnp.ones(rows.w.shape, bool) if rows.alive is None and of_some else rows.alive
    scale = None if rows.scale is None else _pad(rows.scale, size - n, 1)
    zero = None if rows.zero is None else _pad(rows.zero, size - n, 0)
    return Rows(_pad(rows.w, size - n, 0), scale, zero, None if alive is None else _pad(alive, size - n, 0))


def _pad(x: jax.Array, more: int, value: int) -> jax.Array:
    return jnp.pad(x, ((0, more), (0, 0)), constant_values=value)


def _grown(root: jax.Array, size: int) -> jax.Array:
    """A factor of so many rows, those that are more in front and of the identity."""
    more = size - len(root)
    ones = jnp.diag((jnp.arange(size) < more).astype(root.dtype))
    return root if not more else jnp.pad(root, ((more, 0), (more, 0))) + ones


def _inverse(root: jax.Array) -> jax.Array:
    return lax.linalg.triangular_solve(root, jnp.eye(len(root), dtype=root.dtype), left_side=True, lower=True)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision="highest")


def _one_block(part: Rows, w: jax.Array, inverse: jax.Array, *, rule: Rule) -> Done:
    """One block, of which no row is settled yet.

    Args:
      part: its rows as they were.
      w: what they are best, given the rows before.
      inverse: of its part of the factor, lower: how its rows' errors go on.
      rule: what is done.
    """
    scale, zero = part.scale, part.zero
    if rule.group:
        scale, zero = _found_scale(w, part.alive, rule)
    scales, zeros = jax.tree.map(lambda x: jnp.broadcast_to(x, w.shape), (scale, zero))
    values, codes, _, _, mask = _all_rows(Rows(w, scales, zeros, part.alive), inverse, rule)
    return Done(values, codes, *((scale, zero) if rule.group else (None, None)), mask)


def _all_rows(block: Rows, inverse: jax.Array, rule: Rule) -> Done:
    """The rows of a block, a few at a time: the errors of those before are made good at once."""
    w, chooses = block.w, isinstance(rule.keep, NM)
    size = rule.keep.m if isinstance(rule.keep, NM) else max(k for k in range(1, _CHUNK + 1) if not len(w) % k)
    mask = block.alive if chooses else _kept(w, inverse, block.alive, rule=rule)
    of_rows = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), block._replace(alive=mask))

    def chunk(errors: jax.Array, given: tuple[jax.Array, Rows]) -> tuple[jax.Array, Done]:
        at, (now, scale, zero, mask) = given
        couplings = lax.dynamic_slice_in_dim(inverse, at, size)
        now = now - _dot(couplings, errors)
        here = lax.dynamic_slice_in_dim(couplings, at, size, 1)
        if chooses:
            mask = _kept(now, here, mask, rule=rule)
        new, done = _rows_of(now, Rows(now, scale, zero, mask), here, grid=rule.grid)
        return lax.dynamic_update_slice_in_dim(errors, new, at, 0), done

    _, done = lax.scan(chunk, jnp.zeros_like(w), (jnp.arange(0, len(w), size), of_rows))
    values, codes, mask = jax.tree.map(lambda x: x.reshape(w.shape), (done.values, done.codes, done.mask))
    return Done(values, codes, None, None, mask)


def _rows_of(now: jax.Array, rows: Rows, inverse: jax.Array, *, grid: Grid | None) -> tuple[jax.Array, Done]:
    """A few rows one after the other: their errors over the pivots, and what became of them."""

    def row(now: jax.Array, given: tuple[jax.Array, jax.Array, Rows]) -> tuple[jax.Array, tuple[jax.Array, Done]]:
        i, coupling, here = given
        w = now[i]
        value, code = _settled(w, here, grid)
        error = (w - value) / coupling[i]
        return now - coupling[:, None] * error[None], (error, Done(value, code, None, None, here.alive))

    _, (errors, done) = lax.scan(row, now, (jnp.arange(len(now)), inverse.T, rows))
    return errors, done


def _settled(w: jax.Array, here: Rows, grid: Grid | None) -> tuple[jax.Array, jax.Array | None]:
    """A row as it is kept: pruned, then on the grid; and its codes."""
    kept = w if here.alive is None else jnp.where(here.alive, w, jnp.zeros_like(w))
    if grid is None or here.scale is None:
        return kept, None
    scale, zero = here.scale[None], None if here.zero is None else here.zero[None]
    codes = grid.encode(kept[None], scale, zero)
    values = grid.decode(codes, scale, zero)[0]
    return values if here.alive is None else jnp.where(here.alive, values, jnp.zeros_like(values)), codes[0]


def _kept(w: jax.Array, inverse: jax.Array, alive: jax.Array | None, *, rule: Rule) -> jax.Array | None:
    """Which rows stay, by what it costs to prune each alone."""
    if rule.keep is None:
        return alive
    scores = jnp.square(w / jnp.diagonal(inverse)[:, None])
    if isinstance(rule.keep, NM):
        return n_m_mask(scores, NM(rule.keep.n, rule.keep.m, 0), alive)
    count = scores.size if alive is None else jnp.sum(alive, dtype=jnp.uint32)
    (gone,) = smallest([order_keys(scores)], [alive], fraction_of(count, rule.keep))
    return ~gone if alive is None else alive & ~gone


def _found_scale(w: jax.Array, alive: jax.Array | None, rule: Rule) -> tuple[jax.Array, jax.Array | None]:
    assert rule.grid is not None
    kept = w if alive is None else jnp.where(alive, w, jnp.zeros_like(w))
    return rule.grid.scale_of(*range_of(Cut("", "", kept, alive, (1, w.shape[1])), rule.grid, rule.scale))
