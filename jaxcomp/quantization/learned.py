"""Learned quantizers: parameters whose scales, and for asymmetric grids offsets, are trained with the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.gradients import masked, masked_through, scale_gradient, straight_through
from jaxcomp.core.layouts import Channels, Groups, Layout, Tensor, Tiles, checked_layout
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed
from jaxcomp.core.packed import compressed_leaf, unpacked
from jaxcomp.core.paths import Where, leaves_with_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots
from jaxcomp.core.types import DType, Leaf, Params
from jaxcomp.core.words import block_words
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.blocks import Cut, cut, range_of
from jaxcomp.quantization.grids import Grid, Int
from jaxcomp.quantization.leaves import Folded, Quantized, encoded
from jaxcomp.quantization.numerics.affine import in_steps, in_type, no_weights, scale_for, spread
from jaxcomp.quantization.numerics.rounding import nearest
from jaxcomp.quantization.scales import MSE, MeanAbs, ScaleRule, checked_rule

OWNER = "learned"


@compressed_leaf(meta=("grid",))
class Learned(CompressedLeaf):
    """``dense == (codes - z) * s``, where ``codes = clip(round(latent / s + z))``.

    ``s = |scale|`` and ``z = clip(round(-offset / s))``, or 0 without an offset. The codes are levels where the grid is
    a table. It is a leaf of *parameters*: an optimizer trains its arrays. ``pack`` gives the ``Quantized`` leaf of the
    same bits (in a ``Masked`` one where the latent weights are masked).

    Fields:
      latent: the weights in float, an array or what an earlier or later ``prune`` made of it.
      scale: float, of the dense rank, one number a block; the step of an integer grid, the clipping threshold over the
        top level of a table. What counts is its magnitude, at least the smallest normal number, so a step of the
        optimizer beyond 0 neither flips signs nor divides by zero; NaN stays NaN.
      offset: the value of code 0, in the scale's shape and type; None for a symmetric grid or a table.
      grid: static.
    """

    latent: Leaf
    scale: jax.Array
    offset: jax.Array | None
    grid: Grid

    open: ClassVar[tuple[str, ...]] = ("latent",)
    made_by: ClassVar[str] = OWNER

    @property
    def method(self) -> str:  # noqa: D102
        return f"Learned {self.grid.label}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return (block_words(self.shape, tuple(self.scale.shape)),)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.latent.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return jnp.dtype(self.latent.dtype)

    def quantized(self) -> Quantized:
        """The leaf with its codes, without gradients and without the mask of the latent weights."""
        w, scale, offset = jax.lax.stop_gradient((dense(self.latent), *_wide(self)))
        scale = _magnitude(scale, self.grid)
        zero = None if offset is None else _zero_point(offset, scale, self.grid)
        return Quantized(encoded(w, self.grid, scale, zero), scale, zero, self.grid, self.dtype)

    def materialize(self) -> jax.Array:
        """The weights on their grid, with the gradients of LSQ for latent weights, scale and offset.

        Raises:
          ValueError: a later transform gave the latent weights a grid too.
        """
        _check_latent(self.latent)
        leaf = self.quantized()
        numbers, scale, zero = leaf.numbers(), leaf.scale, leaf.zero_point
        value = self.grid.decode(numbers, scale, zero)
        value = straight_through(_gradient_of(self, numbers, scale, zero), value)
        value = in_type(value, scale, self.dtype)
        if not isinstance(self.latent, Masked):
            return value
        return (masked_through if self.latent.straight else masked)(value, unpacked(self.latent.mask))

    def in_training(self) -> Quantized | Masked:
        """What ``pack`` gives, its codes still in a float type; they pass on the gradients of :meth:`materialize`."""
        _check_latent(self.latent)
        leaf = self.quantized()
        steps = _gradient_of(self, leaf.numbers(), leaf.scale, leaf.zero_point) / spread(leaf.scale, self.shape)
        leaf = replace(leaf, codes=straight_through(steps, leaf.codes))
        return replace(self.latent, values=leaf) if isinstance(self.latent, Masked) else leaf

    def pack(self) -> Quantized | Masked:
        """``Quantized`` with codes of ``grid.bits`` bits; it trains no more."""
        _check_latent(self.latent)
        leaf = self.quantized()
        return (Masked(leaf, self.latent.mask) if isinstance(self.latent, Masked) else leaf).pack()


def _wide(leaf: Learned) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset in the type that codes are computed in: a loop may have cast its parameters to a narrow one."""
    dtype = compute_dtype(leaf.scale.dtype)
    return leaf.scale.astype(dtype), None if leaf.offset is None else leaf.offset.astype(dtype)


def _gradient_of(leaf: Learned, numbers: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """What :meth:`Learned.materialize` takes its gradient of: equation 3 and 5 of LSQ, and LSQ+'s for the offset.

    Linear in the trained values, with constants that are finite everywhere, so that no gradient is NaN.
    """
    grid, shape = leaf.grid, leaf.shape
    x = dense(leaf.latent).astype(scale.dtype)
    steps = in_steps(jax.lax.stop_gradient(x), scale)
    inside = jnp.ones(shape, bool)
    slope = numbers  # of the scale: for a sign the derivative itself, as in XNOR-Net
    if grid.clips:
        low, high = grid.ends
        zero = jnp.zeros_like(scale) if zero_point is None else zero_point
        shifted, centred = steps + spread(zero, shape), numbers - spread(zero, shape)
        inside = (shifted > low) & (shifted < high)
        slope = jnp.where(inside, centred - steps, numbers)
    factor = gradient_factor(grid, leaf.size // scale.size)
    wide, offset = _wide(leaf)
    trained = _magnitude(scale_gradient(wide, factor), grid)
    outside = jnp.zeros_like(x)
    if offset is not None:
        outside = jnp.broadcast_to(spread(scale_gradient(offset, factor), shape), shape)
    return jnp.where(inside, x, outside) + slope * spread(trained, shape)


def gradient_factor(grid: Grid, weights: int) -> float:
    """``1 / sqrt(n * q_max)`` for n weights a scale; ``q_max`` is the highest code, or level in units of the scale.

    >>> gradient_factor(Int(3), 12) == (12 * 3) ** -0.5
    True

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.2.
    """
    return float(weights * grid.top) ** -0.5


def _magnitude(scale: jax.Array, grid: Grid) -> jax.Array:
    """``max(|scale|, floor)``; the gradient is that of ``|scale|``, at 0 and below the floor too: no scale dies."""
    floor = float(jnp.finfo(scale.dtype).tiny) * max(1 / grid.finest, 1.0)
    sign = jnp.where(scale < 0, -jnp.ones_like(scale), jnp.ones_like(scale))
    size = sign * scale
    return straight_through(size, jnp.maximum(jax.lax.stop_gradient(size), jnp.asarray(floor, scale.dtype)))


def _zero_point(offset: jax.Array, scale: jax.Array, grid: Grid) -> jax.Array:
    zero = jnp.clip(nearest(-offset / scale), *grid.ends)
    return jnp.where(zero == 0, jnp.zeros_like(zero), zero)


def _check_latent(latent: Leaf) -> None:
    inner = latent.values if isinstance(latent, Masked) else latent
    if isinstance(inner, Quantized | Folded | Learned):
        raise ValueError(
            f"{OWNER}: {inner.made_by} put the latent weights of a learned leaf on a grid of their own; leave learned"
            " leaves out of it by a rule."
        )


@on_any_mesh
def learned(
    params: Params,
    grid: Grid = Int(4),  # noqa: B008 - frozen
    *,
    per: Layout = Channels(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    scale: ScaleRule | None = None,
    offset: bool = False,
    where: Where | None = None,
) -> Params:
    """Parameters whose selected arrays are :class:`Learned` leaves: quantizers that are trained with the weights.

    With ``v = (w - offset) / s`` the gradients of ``materialize`` are

        ``dŵ/dw = 1`` inside the grid and 0 where it clips,
        ``dŵ/ds = (round(v) - v) g`` inside, the end code times ``g`` where it clips,
        ``dŵ/d offset = 0`` inside, ``g`` where it clips, ``g = 1 / sqrt(n q_max)`` for n weights a scale.

    A table's levels stand for the codes; for ``PoT`` and ``APoT``, whose top level is 1, the scale is then the clipping
    threshold α. ``materialize`` the parameters in the loss and train them with any optimizer, with
    :func:`~jaxcomp.core.slots.weight_mask` as the mask of weight decay. Transforms may follow: ``prune(0.5).apply``
    prunes the latent weights.

    Args:
      params: the parameters.
      grid: ``Int(1..8)``, or a table: ``PoT``, ``APoT``, ``Float``, ``NF4``, ``Levels``. The scale of a sign,
        ``Int(1)``, has the derivative itself as gradient, ``sign(w) g``.
      per: what shares a scale, as in :func:`~jaxcomp.quantization.transform.quantize`, but for ``Buckets``.
      roles, where: of the axes, and which leaves, as there.
      scale: the rule that finds the range to begin with. The default is LSQ's step, ``2 mean|w| / sqrt(q_max)``, for a
        symmetric integer grid, ``MSE()`` for an asymmetric one as in LSQ+, ``MeanAbs()`` for the sign, and
        ``AbsMax()`` for a table.
      offset: whether the offset is trained (LSQ+); asymmetric grids want it, others have none.

    Returns:
      The tree, its selected arrays replaced; all other leaves are the same objects.

    Raises:
      TypeError: a grid that has no trained scale, such as ``Log(8)`` or ``Blocked``; a layout or a rule that is none.
      ValueError: offset does not go with the grid, a leaf is learned already, and what
        :func:`~jaxcomp.quantization.transform.quantize` raises.

    >>> params = learned({"kernel": jnp.array([[1.0], [-4.0], [0.2], [2.8]])}, Int(3))
    >>> params["kernel"].scale.round(3), params["kernel"].materialize().T.round(2)
    (Array([[2.309]], dtype=float32), Array([[ 0.  , -4.62,  0.  ,  2.31]], dtype=float32))

    Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 5; the offset: Bhalgat et al. 2020, arXiv:2004.09576;
    tables: Li et al. 2020, arXiv:1909.13144, section 2.3. Deviation: the offset's zero point is rounded, so that zeros
    stay zero.
    """
    _check_grid(grid, offset)
    checked_layout(OWNER, per, (Tensor, Channels, Groups, Tiles))
    checked_roles(OWNER, roles)
    checked_rule(OWNER, scale)
    found = slots(params, selecting(where, roles), OWNER)
    check_finite(found, OWNER)
    nested = {f"{path}/latent" for path, x in _learned_leaves(params)}
    for path in found:
        if any(path == n or path.startswith(f"{n}/") for n in nested):
            raise ValueError(f"{OWNER}: {path!r} belongs to a learned leaf already; leave it out by a rule.")
    new = {}
    for path, slot in found.items():
        x = cut(slot, per, roles=roles, owner=OWNER)
        new[path] = _leaf(slot, x, grid=grid, rule=scale)
    return replace_slots(params, new)


def _learned_leaves(params: Params) -> list[tuple[str, Learned]]:
    named, _ = leaves_with_paths(params, is_leaf=is_compressed)
    return [(path, x) for path, x in named if isinstance(x, Learned)]


def _check_grid(grid: object, offset: bool) -> None:
    if not isinstance(grid, Grid) or not grid.linear:
        raise TypeError(
            f"{OWNER}: a trained scale wants a uniform grid such as Int(4) or a table such as APoT(4), got {grid!r}."
        )
    if offset and not grid.asymmetric:
        raise ValueError(
            f"{OWNER}: offset=True wants an asymmetric grid such as Int(4, symmetric=False), got {grid!r}."
        )
    if grid.asymmetric and not offset:
        raise ValueError(f"{OWNER}: {grid!r} has a zero point; train it by offset=True, or take a symmetric grid.")


def _leaf(slot: Slot, x: Cut, *, grid: Grid, rule: ScaleRule | None) -> Learned:
    latent = x.values if slot.mask is None else Masked(x.values, slot.mask)
    if rule is None and grid.code_range and grid.clips and not grid.asymmetric:
        mean, _ = range_of(x, grid, MeanAbs())
        # The maximum keeps the mean's division and the product two roundings, in jit as in eager.
        return Learned(latent, scale_for(jnp.maximum(mean, 0), grid.top**0.5 / 2), None, grid)
    if rule is None:
        rule = MSE() if grid.asymmetric else None
    scale, zero = grid.scale_of(*range_of(x, grid, rule))
    if not grid.has_zero:  # nor does a block of zeros leap away from them with the first step of the optimizer
        scale = jnp.where(no_weights(x.values, scale.shape), jnp.zeros_like(scale), scale)
    return Learned(latent, scale, None if zero is None else -zero * scale, grid)
