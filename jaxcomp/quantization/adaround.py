"""AdaRound: whether each weight rounds up or down is learned, on what its layer gives."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.layouts import Channels, Groups, Layout, Tensor, Tiles, checked_layout
from jaxcomp.core.leaves import CompressedLeaf, is_compressed
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.paths import Where
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import check_finite, replace_slots, slots
from jaxcomp.core.types import DType, Leaf, Params, PyTree
from jaxcomp.core.words import block_words
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.blocks import Cut, cut, range_of
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import in_steps, in_type, spread
from jaxcomp.quantization.scales import MSE, ScaleRule, checked_rule

OWNER = "adaround"
ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched over [GAMMA, ZETA] and cut to [0, 1], so that both ends are reached."""


@compressed_leaf(meta=("grid", "dense_dtype"))
class SoftRounded(CompressedLeaf):
    """``dense == (clip(floor + h(rounding), low, high) - zero_point) * scale``, with ``h`` between 0 and 1.

    Only ``rounding`` gets a gradient. Where :func:`harden` has to decide, up is ``h >= 1/2``.

    Fields:
      floor: ``floor(w / scale) + zero_point`` of the weights, integers in a float type.
      rounding: the trained variable V, of the same shape.
      scale: of the dense rank, one number a block.
      zero_point: integers in the scale's type and shape, or None for a symmetric grid.
      grid, dense_dtype: static.
    """

    floor: jax.Array
    rounding: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    grid: Int
    dense_dtype: DType

    made_by: ClassVar[str] = OWNER

    @property
    def method(self) -> str:  # noqa: D102
        return f"SoftRounded {self.grid.label}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return (block_words(self.shape, tuple(self.scale.shape)),)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.floor.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.dense_dtype

    @property
    def up(self) -> jax.Array:
        """``h(V) = clip(sigmoid(V) (ζ - γ) + γ, 0, 1)``: how much of a step each weight is above its floor."""
        return jnp.clip(jax.nn.sigmoid(self.rounding) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def materialize(self) -> jax.Array:
        """The weights with soft rounding."""
        floor, scale, zero = jax.lax.stop_gradient((self.floor, self.scale, self.zero_point))
        codes = jnp.clip(floor + self.up, *self.grid.code_range)
        if zero is not None:
            codes = codes - spread(zero, self.shape)
        return in_type(codes * spread(scale, self.shape), scale, self.dense_dtype)

    def harden(self) -> Quantized:
        """The leaf with each weight rounded up or down."""
        codes = jnp.clip(self.floor + (self.rounding >= 0).astype(self.floor.dtype), *self.grid.code_range)
        codes = jnp.where(codes == 0, jnp.zeros_like(codes), codes)
        return Quantized(codes, self.scale, self.zero_point, self.grid, self.dense_dtype)

    def pack(self) -> CompressedLeaf:
        """None: soft rounding has no packed form.

        Raises:
          ValueError: always; what would be shipped is not what is trained.
        """
        raise ValueError(f"{OWNER}: a leaf of shape {self.shape} is still rounded softly; pack harden(params) instead.")


@on_any_mesh
def adaround(
    params: Params,
    grid: Int = Int(4),  # noqa: B008 - frozen
    *,
    per: Layout = Channels(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    scale: ScaleRule = MSE(),  # noqa: B008 - frozen
    where: Where | None = None,
) -> Params:
    """Parameters whose selected arrays are :class:`SoftRounded` leaves, which begin at the weights themselves.

    ``w̃ = s clip(floor(w / s) + h(V), low, high)``, and an optimizer minimizes

        ``|W x - W̃ x|² + λ Σ (1 - |2 h(V) - 1|^β)``

    over V, layer by layer, with :func:`rounding_regularizer` and :func:`annealed_beta`. Then :func:`harden`. Weights
    and scales are fixed: they have no gradient, and :func:`~jaxcomp.core.slots.weight_mask` keeps weight decay from
    them.

    Args:
      params: the parameters.
      grid: ``Int(2..8)``, symmetric or not.
      per: what shares a scale, as in :func:`~jaxcomp.quantization.transform.quantize`, but for ``Buckets``.
      roles, where: of the axes, and which leaves, as there.
      scale: the rule that finds the range.

    Returns:
      The tree, its selected arrays replaced; all other leaves are the same objects.

    Raises:
      TypeError: another grid, a layout or a rule that is none.
      ValueError: what :func:`~jaxcomp.quantization.transform.quantize` raises.

    >>> params = adaround({"kernel": jnp.array([[0.3], [-1.0], [0.6]])}, Int(3))
    >>> params["kernel"].materialize().T.round(3)
    Array([[ 0.3, -1. ,  0.6]], dtype=float32)
    >>> harden(params)["kernel"].codes.T
    Array([[ 1., -4.,  2.]], dtype=float32)

    Source: Nagel et al. 2020, arXiv:2004.10568, equations 21 to 25.
    """
    if not isinstance(grid, Int) or grid.bits < 2:
        raise TypeError(f"{OWNER}: rounds up or down on an integer grid, Int(2..8), got {grid!r}.")
    checked_layout(OWNER, per, (Tensor, Channels, Groups, Tiles))
    checked_roles(OWNER, roles)
    checked_rule(OWNER, scale)
    found = slots(params, selecting(where, roles), OWNER)
    check_finite(found, OWNER)
    new: dict[str, SoftRounded | Masked] = {}
    for path, slot in found.items():
        leaf = _leaf(cut(slot, per, roles=roles, owner=OWNER), grid, scale)
        new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
    return replace_slots(params, new)


def _leaf(x: Cut, grid: Int, rule: ScaleRule) -> SoftRounded:
    w = x.values
    scale, zero = grid.scale_of(*range_of(x, grid, rule))
    steps = in_steps(w, scale)
    floor = jnp.floor(steps)
    rounding = -jnp.log((ZETA - GAMMA) / (steps - floor - GAMMA) - 1)
    if zero is not None:
        floor = floor + spread(zero, w.shape)
    return SoftRounded(floor, rounding, scale, zero, grid, jnp.dtype(w.dtype))


def harden(tree: PyTree) -> PyTree:
    """The tree with a ``Quantized`` leaf for each softly rounded one: up where ``h(V) >= 1/2``, else down.

    Raises:
      ValueError: there is none.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_compressed)
    if not any(isinstance(_bare(x), SoftRounded) for x in leaves):
        raise ValueError("harden: the tree has no softly rounded leaf; give it what adaround made.")
    return jax.tree.map(_hardened, tree, is_leaf=is_compressed)


def _bare(leaf: Leaf) -> Leaf:
    return leaf.values if isinstance(leaf, Masked) else leaf


def _hardened(leaf: Leaf) -> Leaf:
    inner = _bare(leaf)
    if not isinstance(inner, SoftRounded):
        return leaf
    return Masked(inner.harden(), leaf.mask) if isinstance(leaf, Masked) else inner.harden()


def rounding_regularizer(tree: PyTree, beta: float | jax.Array) -> jax.Array:
    """``f_reg = Σ (1 - |2 h(V) - 1|^β)`` over all softly rounded weights: 0 where every one has chosen.

    Args:
      tree: with the leaves that :func:`adaround` made.
      beta: a number; large, it acts near 0 and 1 alone, small everywhere.

    Raises:
      ValueError: there is no such leaf.

    >>> leaf = SoftRounded(jnp.zeros(3), jnp.array([-9.0, 0.0, 9.0]), jnp.ones(1), None, Int(4), jnp.dtype("float32"))
    >>> rounding_regularizer({"w": leaf}, 2.0)
    Array(1., dtype=float32)

    Source: Nagel et al. 2020, arXiv:2004.10568, equation 24.
    """
    soft = [_bare(x) for x in jax.tree.leaves(tree, is_leaf=is_compressed)]
    soft = [x for x in soft if isinstance(x, SoftRounded)]
    if not soft:
        raise ValueError("rounding_regularizer: the tree has no softly rounded leaf; give it what adaround made.")
    power = jax.lax.stop_gradient(jnp.asarray(beta))
    return sum((jnp.sum(1 - jnp.abs(2 * x.up - 1) ** power.astype(x.up.dtype)) for x in soft), jnp.float32(0))


def annealed_beta(steps: int, *, start: float = 20.0, end: float = 2.0, held: float = 0.2) -> optax.Schedule:
    """β of the regularizer, an optax schedule: ``start`` while ``held`` of the steps pass, then a cosine to ``end``.

    Args:
      steps: of the whole reconstruction, at least 2.
      start, end: positive.
      held: a fraction below 1.

    Raises:
      ValueError: another number of steps, or another fraction.

    >>> beta = annealed_beta(100)
    >>> [round(float(beta(i)), 3) for i in (0, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]

    Source: Nagel et al. 2020, arXiv:2004.10568, section 5, and its authors' code. Deviation: while β is held the
    regularizer stays in the loss; at 20 it hardly acts between 0 and 1.
    """
    if steps < 2 or not 0 <= held < 1:
        raise ValueError(f"annealed_beta: wants 2 steps or more and held in [0, 1), got {steps!r} and {held!r}.")
    first = round(held * steps)
    falling = optax.cosine_decay_schedule(start, steps - first, alpha=end / start)
    both = optax.join_schedules([optax.constant_schedule(start), falling], [first])
    return lambda step: both(jnp.asarray(step, jnp.float32))  # optax compares an integer step with floats
