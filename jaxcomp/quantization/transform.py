"""Quantization of parameters onto grids with straight-through gradients: grid, scale, what shares it, rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp

from jaxcomp.core.barriers import made_once
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Channels, Layout, checked_layout
from jaxcomp.core.leaves import dense
from jaxcomp.core.meshes import here
from jaxcomp.core.paths import Where, key_of_leaf
from jaxcomp.core.records import recorded
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import check_finite, replace_slots, slots
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.core.types import Key, Params, PyTree, Shape, State, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.blocks import Cut, cut, range_of
from jaxcomp.quantization.grids import Grid, Int
from jaxcomp.quantization.leaves import Folded, Quantized, encoded, scales_and_zero
from jaxcomp.quantization.scales import (
    AbsMax,
    Fixed,
    Nearest,
    Rounding,
    ScaleRule,
    Stochastic,
    checked_rounding,
    checked_rule,
)

OWNER = "quantize"


@recorded
def quantize(
    grid: Grid = Int(8),  # noqa: B008 - frozen
    *,
    per: Layout = Channels(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    scale: ScaleRule | None = None,
    rounding: Rounding = Nearest(),  # noqa: B008 - frozen
    clip_gradient: bool = True,
    where: Where | None = None,
) -> Transform:
    """Rounds the selected arrays to a grid; ``apply`` makes a ``Quantized`` leaf of each.

    The scale follows the parameters at every ``apply`` and carries no gradient; the rounding's gradient is straight
    through, cut outside the grid's range. A mask of an earlier ``prune`` stays, and what it hides stays zero. For
    scales that are trained see :func:`~jaxcomp.quantization.learned.learned`.

    Args:
      grid: ``Int(bits, symmetric=, narrow=)``, ``Log(bits)`` or ``Companded``, ``Float(exponent, mantissa)``,
        ``NF4()``, ``PoT(bits)``, ``APoT(bits)``, ``Levels(values)``; with scales on a grid of their own ``Blocked``,
        which the recipes ``mx`` and ``nvfp4`` are made of.
      per: what shares a scale: ``Tensor()``, ``Channels()`` (the default: each output feature, each head, each stacked
        layer), ``Groups(size)`` along the axis that products sum over, ``Tiles(shape)``, ``Buckets(size)``.
      roles: what the program does with each axis, ``jaxcomp.roles(fn)(params, *args)``. Without it a matrix's path
        settles its axes, and so does that of a convolution's kernel; other arrays of three axes and more want roles,
        or axes that ``per`` names.
      scale: how the range is found: ``AbsMax()``, ``MeanAbs()``, ``Percentile(percent)``, ``MSE()``, ``Fixed(end)``.
        The default is ``MeanAbs()`` for the sign, ``Int(1)``, and ``AbsMax()`` for all others.
      rounding: ``Nearest()`` or ``Stochastic(key)``, which takes new random numbers at each ``update``.
      clip_gradient: whether the gradient is cut outside the range; outside that of ``AbsMax()`` nothing is.
      where: which leaves; the default is those of two axes or more that the roles name, and without roles ``matrices``.

    Raises:
      TypeError: a grid, a layout, roles, a rule or a rounding that is not one.
      ValueError: at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, axes that a selected leaf does not have or
        that groups or tiles do not divide, axes whose roles are not known, or a ``Fixed`` tree without the leaf. The
        message names the path.

    >>> t = quantize(Int(2, narrow=True))
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [0.2, 3.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 1., -4.],
           [ 0.,  4.]], dtype=float32)

    Source: Krishnamoorthi 2018, arXiv:1806.08342; straight-through as in Bengio et al. 2013, arXiv:1308.3432; buckets
    as in Polino et al. 2018, arXiv:1802.05668.
    """
    if not isinstance(grid, Grid):
        raise TypeError(f"{OWNER}: wants a grid such as Int(8) or Log(4), got {grid!r}.")
    checked_layout(OWNER, per)
    checked_roles(OWNER, roles)
    checked_rule(OWNER, scale)
    checked_rounding(OWNER, rounding)
    selected = selecting(where, roles)

    def apply(state: State, params: Params) -> Params:
        new = {}
        for path, slot in slots(params, selected, OWNER).items():
            x = cut(slot, per, roles=roles, owner=OWNER)
            key = None if isinstance(rounding, Nearest) else _leaf_key(state, rounding, path)
            leaf: Quantized | Folded = _quantized(x, grid, scale, key=key, clipped=clip_gradient)
            if x.folded:
                leaf = Folded(leaf, tuple(slot.array.shape))
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return replace_slots(params, new)

    if isinstance(rounding, Nearest):
        inner = stateless(lambda params: apply((), params))
    else:
        inner = _drawing(rounding.key, apply)

    def init(params: Params) -> State:
        check_finite(slots(params, selected, OWNER), OWNER)
        return inner.init(params)

    return Transform(init, inner.update, inner.apply)


def _drawing(key: Key, apply: Callable[[State, Params], Params]) -> Transform:
    """A transform whose state is the data of the step's key."""

    def init(params: Params) -> State:
        state = jax.random.key_data(here(key))

        def run() -> None:  # no argument and no result: params may hold functions, as an Equinox module does
            apply(state, params)

        jax.eval_shape(run)
        return state

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
        return jax.random.key_data(jax.random.fold_in(here(key), jnp.asarray(step, jnp.uint32)))

    return Transform(init, update, apply)


def _leaf_key(state: State, rounding: Stochastic, path: str) -> Key:
    """The step's key for a leaf: by its path, so that another leaf more changes none."""
    return key_of_leaf(jax.random.wrap_key_data(state, impl=jax.random.key_impl(rounding.key)), path)


def _quantized(x: Cut, grid: Grid, rule: ScaleRule | None, *, key: Key | None, clipped: bool) -> Quantized:
    """One array on its grid."""
    # No weight is outside its own block's range, so the backward pass need not look.
    covered = isinstance(rule, AbsMax | None) and grid.scale_grid is None
    how = {"grid": grid, "clipped": clipped and not covered}
    if isinstance(rule, Fixed):
        return _on_grid(x.values, range_of(x, grid, rule), key, **how)
    return _ranged(x.values, x.mask, key, blocks=x.blocks, rule=rule, **how)


class _How(TypedDict):
    grid: Grid
    clipped: bool


# One program a leaf where nobody else compiles one; inside jit, one trace for all leaves that are alike.
@partial(jax.jit, static_argnames=("blocks", "rule", "grid", "clipped"))
def _ranged(
    w: jax.Array, mask: jax.Array | None, key: Key | None, *, blocks: Shape, rule: ScaleRule | None, **how: Unpack[_How]
) -> Quantized:
    """An array whose ranges a rule finds."""
    return _on_grid(w, range_of(Cut(OWNER, "", w, mask, blocks), how["grid"], rule), key, **how)


@partial(jax.jit, static_argnames=("grid", "clipped"))
def _on_grid(
    w: jax.Array, ends: tuple[jax.Array, jax.Array | None], key: Key | None, *, grid: Grid, clipped: bool
) -> Quantized:
    """An array on the grid of known ranges."""
    # Or XLA on CPU finds the scale anew for each weight that it divides and multiplies: here, and in the gradient.
    scale, zero = made_once(scales_and_zero(grid, *ends))
    noise = None if key is None else jax.random.uniform(key, w.shape, compute_dtype(w.dtype))
    codes = encoded(w, grid, dense(scale), zero, noise=noise, clipped=clipped)
    return Quantized(codes, scale, zero, grid.elements, jnp.dtype(w.dtype))
