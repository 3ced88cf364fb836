"""Scores: how much an element, or a unit, matters. The lowest are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.paths import key_of_leaf
from jaxcomp.core.records import named, recorded
from jaxcomp.core.specs import Spec, check_key, is_number
from jaxcomp.pruning.masks.units import pooled_axes
from jaxcomp.pruning.specs import Filters

Known = Literal["path", "step", "structure"]


@dataclass(frozen=True)
class Score(Spec):
    """A score and what it needs.

    Args:
      name: for messages.
      fn: ``fn(w, **{name: statistic})`` to scores of w's shape; a larger one is kept longer.
      needs: names of the statistics, which are passed to ``update`` as trees like the parameters; each entry has w's
        shape, or 1 along some axes.
      maker: who makes them, for messages.
      takes: what the pruning itself passes on by name: "path" (of the leaf), "step" (0 at init) or "structure".
      signed: scores below zero are worse than zero, so a unit's score is the sum of its elements' (order 1), and no
        other norm.
      of_units: ``fn`` gives a score a unit, not an element; it takes the structure.
      normalize: changes the scores of one leaf's units, to compare them with other leaves'.
    """

    name: str
    fn: Callable[..., jax.Array]
    needs: tuple[str, ...] = ()
    maker: str = ""
    takes: tuple[Known, ...] = ()
    signed: bool = False
    of_units: bool = False
    normalize: Callable[[jax.Array], jax.Array] | None = None


def as_score(score: object) -> Score:
    """A score, or a function of the weights alone as one.

    Raises:
      TypeError: neither.
    """
    if isinstance(score, Score):
        return score
    if not callable(score):
        raise TypeError(f"prune: score must be a Score such as magnitude, or a function of the weights, got {score!r}.")
    return Score(getattr(score, "__name__", "score"), score)


def _f32(*arrays: jax.Array) -> list[jax.Array]:
    """Products of half-precision numbers would underflow."""
    return [x.astype(jnp.float32) for x in arrays]


def _magnitude(w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.abs(w)


def _sensitivity(w: Float[Array, "*shape"], grads: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.abs(grads)


def _taylor(w: Float[Array, "*shape"], grads: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    w, grads = _f32(w, grads)
    return jnp.abs(grads * w)


def _fisher(w: Float[Array, "*shape"], fisher: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    w, fisher = _f32(w, fisher)
    return fisher * (w * w) * 0.5


def _wanda(w: Float[Array, "*shape"], input_norms: Float[Array, "*units"]) -> Float[Array, "*shape"]:
    w, input_norms = _f32(w, input_norms)
    return jnp.abs(w) * input_norms


def _movement(w: Float[Array, "*shape"], movement: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return movement


def _importance(w: Float[Array, "*shape"], importance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return importance


def _redundancy(w: Float[Array, "*shape"], structure: object) -> Float[Array, "*units"]:
    if not isinstance(structure, Filters):
        raise ValueError("is scored by the distances between slices; give prune a structure=Filters(axis)")
    pooled = pooled_axes(w.ndim, structure)
    own = [i for i in range(w.ndim) if i not in pooled]
    units = jnp.transpose(w.astype(jnp.float32), (*own, *pooled)).reshape(math.prod(w.shape[i] for i in own), -1)
    distances = jax.lax.map(lambda u: jnp.sum(jnp.sqrt(jnp.sum((units - u[None]) ** 2, axis=1))), units)
    return distances.reshape([1 if i in pooled else s for i, s in enumerate(w.shape)])


magnitude = named("scores.magnitude", Score("magnitude", _magnitude))
"""``|w|``: l1 pruning. Source: Han et al. 2015, arXiv:1506.02626."""

sensitivity = named("scores.sensitivity", Score("sensitivity", _sensitivity, ("grads",), "jax.grad of the loss"))
"""``|∂L/∂w|``: what moves the loss least goes first. Source: Mozer and Smolensky 1988 (skeletonization)."""

taylor = named("scores.taylor", Score("taylor", _taylor, ("grads",), "jax.grad of the loss"))
"""``|w · ∂L/∂w|``: first-order change of the loss when w goes. Source: Molchanov et al. 2016, arXiv:1611.06440; as a
score at initialization, SNIP, Lee et al. 2018, arXiv:1810.02340."""

fisher = named(
    "scores.fisher",
    Score(
        "fisher",
        _fisher,
        ("fisher",),
        "jaxcomp.pruning.statistics.accumulate(prune(...), jaxcomp.pruning.statistics.fisher)",
    ),
)
"""``F w² / 2`` with the diagonal Fisher information ``F = E[(∂L/∂w)²]``: the loss's second-order change when w goes.
Source: LeCun et al. 1989 (optimal brain damage); Theis et al. 2018, arXiv:1801.05787 (F for the Hessian)."""

wanda = named("scores.wanda", Score("wanda", _wanda, ("input_norms",), "jaxcomp.trace.input_norms(fn)(params, inputs)"))
"""``|w| ‖x‖₂`` with the norm of the activation that w multiplies. The paper compares within each output:
``structure=NM(n, m)``, with m the axis's size for a plain sparsity. Source: Sun et al. 2023, arXiv:2306.11695."""

movement = named(
    "scores.movement",
    Score(
        "movement",
        _movement,
        ("movement",),
        "jaxcomp.pruning.statistics.accumulate(prune(...), jaxcomp.pruning.statistics.movement)",
        signed=True,
    ),
)
"""``-Σ w ∂L/∂w`` over steps: what moves toward zero goes first. Source: Sanh et al. 2020, arXiv:2005.07683; the paper
lets the gradient pass the mask: ``gradient=StraightThrough()``."""

importance = named(
    "scores.importance",
    Score("importance", _importance, ("importance",), "you: any tree of scores like the parameters"),
)
"""Scores that are given."""

redundancy = named("scores.redundancy", Score("redundancy", _redundancy, takes=("structure",), of_units=True))
"""``Σ_j ‖w_i - w_j‖₂`` over the slices of a leaf: one near all others is replaceable. Needs ``Filters(axis)``.
Source: He et al. 2018 (FPGM), arXiv:1811.00250, in its practical form, the sum of distances."""


@recorded
def norm(p: float | int) -> Score:
    """``|w|**p``: as magnitude, but summed or averaged in units and groups it weighs large entries more.

    >>> norm(2).fn(jnp.array([-3.0])).tolist()
    [9.0]

    Raises:
      ValueError: p is not a positive number.
    """
    if not (is_number(p) and 0 < p < math.inf):
        raise ValueError(f"norm: p must be a positive number, got {p!r}.")
    return Score(f"norm({p})", lambda w: jnp.abs(w.astype(jnp.float32)) ** p)


@recorded
def random_score(key: Any) -> Score:
    """Uniform noise, the same at every step: a growing sparsity only adds to the mask.

    Args:
      key: from ``jax.random.key``; each leaf draws with the key folded with its path.

    >>> random_score(jax.random.key(0)).fn(jnp.zeros((2, 2)), path="kernel").shape
    (2, 2)

    Raises:
      ValueError: not a key.
    """
    check_key("random_score", key)

    def fn(w: Float[Array, "*shape"], path: str) -> Float[Array, "*shape"]:
        return jax.random.uniform(key_of_leaf(key, path), w.shape, jnp.float32)

    return Score("random", fn, takes=("path",))


@recorded
def lamp(score: Score = magnitude) -> Score:
    """Makes scores of different leaves comparable: ``s_i² / Σ_j s_j²`` over the j of one leaf that score at least s_i.

    For ``scope=Global()``: the last unit of a leaf scores 1, so no leaf is lost as a whole. The order inside a leaf
    stays. Sorts each leaf.

    >>> [round(float(x), 3) for x in lamp().normalize(jnp.array([1.0, 2.0, 2.0]))]
    [0.111, 0.5, 1.0]

    Raises:
      ValueError: a score that may be negative, or is normalized already.

    Source: Lee et al. 2020, arXiv:2010.07611; of equal scores the lower index counts as the smaller one.
    """
    if score.signed or score.normalize is not None:
        raise ValueError(f"lamp: wants a score that is not negative and not normalized, got {score.name!r}.")
    return replace(score, name=f"lamp({score.name})", normalize=_lamp)


def _lamp(units: Float[Array, "*units"]) -> Float[Array, "*units"]:
    flat = jnp.abs(units.astype(jnp.float32)).reshape(-1)
    square = (flat / jnp.maximum(jnp.max(flat), jnp.finfo(jnp.float32).tiny)) ** 2
    order = jnp.argsort(flat, stable=True)
    ascending = square[order]
    above = jax.lax.cumsum(ascending, reverse=True)
    share = jnp.where(above > 0, ascending / jnp.where(above > 0, above, 1.0), 0.0)
    return jnp.zeros_like(flat).at[order].set(share, unique_indices=True).reshape(units.shape)
