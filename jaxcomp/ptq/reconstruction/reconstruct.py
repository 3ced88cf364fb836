"""``reconstruct``: a network's blocks, one after another, learn to give what the float network's give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcomp.activations.planning import Rules, assigned, checked_ranges
from jaxcomp.core.leaves import materialize
from jaxcomp.core.specs import check_key
from jaxcomp.core.types import Key, Params, PyTree
from jaxcomp.ptq.reconstruction.batches import check_trees, read
from jaxcomp.ptq.reconstruction.blockwise import BlockError, Blockwise, Calibration, Importance
from jaxcomp.ptq.reconstruction.learning import Training
from jaxcomp.trace.cut_specs import Cuts, Single
from jaxcomp.trace.cuts import arrays_in, cut
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.walk import Fn

OWNER = "reconstruct"


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """What :func:`reconstruct` gives.

    Attributes:
      params: the tree with ``Quantized`` leaves in the places of softly rounded ones.
      ranges: of activations, as ``quantize_function`` takes them; those that rules train are new.
      blocks: the errors of each block, in order.
    """

    params: Params
    ranges: dict[str, Range]
    blocks: tuple[BlockError, ...]

    def __repr__(self) -> str:
        return "\n".join(f"{b.before:.3e} -> {b.after:.3e}  {b.name}" for b in self.blocks)


def reconstruct(
    fn: Fn,
    params: Params,
    rounded: Params,
    *,
    batches: Iterable[PyTree],
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
    cuts: Cuts = Single(),  # noqa: B008 - frozen
    training: Training = Training(),  # noqa: B008 - frozen
    importance: Importance | None = None,
    key: Key | None = None,
) -> Reconstructed:
    """The softly rounded weights of ``rounded`` decided so that each block gives what it gives in ``fn(params, …)``.

    Block after block: what enters is what the blocks before give, compressed as they are by then; the target is what
    the float network's block gives on its own input; what is learned is V of each leaf of
    :func:`~jaxcomp.quantization.adaround.adaround` and the ranges that rules train (``Act(range=LSQ())``):

        ``Σ (ẑ - z)² / Σ (ẑ₀ - z)² + λ mean(1 - |2 h(V) - 1|^β)``,   ``ẑ₀`` of the rounding to nearest

    A block that would end farther from the target than it began, on these batches, is left as it began. No labels are
    used. With ``Layers()`` this is AdaRound, with ``Single()`` BRECQ, and with ``Training(drop=0.5)`` QDrop.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      params: its parameters, whose results are the target.
      rounded: the tree that is run: ``params`` with some leaves as ``adaround`` makes them, others compressed in any
        way or as they are.
      batches: of what ``fn`` takes behind the parameters: a tuple of arguments, or the only one, all of the same
        shapes.
      rules, ranges: of activations, as of ``quantize_function``.
      cuts: where a block begins.
      training: steps, rates, the regularizer's weight, dropping, the optimizer.
      importance: from the result and a key to a number, such as :func:`sampled_loss`; a value's error counts times the
        square of this number's gradient, in the float network. None counts all alike.
      key: of dropping and of ``importance``.

    Raises:
      TypeError: a rule, range or cut of another kind.
      ValueError: nothing is to be learned, trees or batches of other shapes than the first, no batch, no key where one
        is used, or values that are not finite; names the block.

    >>> from jaxcomp.quantization.adaround import adaround
    >>> from jaxcomp.quantization import Int
    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> p = {k: jax.random.normal(jax.random.key(i), (8, 8)) for i, k in enumerate(("up", "down"))}
    >>> x = jax.random.normal(jax.random.key(2), (64, 8)) @ jax.random.normal(jax.random.key(3), (8, 8))
    >>> found = reconstruct(f, p, adaround(p, Int(3)), batches=[x], training=Training(steps=50))
    >>> [b.after < b.before for b in found.blocks]
    [True, True]

    Sources: AdaRound, Nagel et al. 2020, arXiv:2004.10568; BRECQ, Li et al. 2021, arXiv:2102.05426; QDrop, Wei et al.
    2022, arXiv:2203.05740. Deviations: see :class:`Training`.
    """
    cases = read(batches, OWNER)
    blocks = cut(fn, cuts)(params, *cases[0])
    planned = assigned(blocks.whole, rules or {})
    given = checked_ranges(planned, ranges)
    check_trees(params, rounded, OWNER, "rounded")
    if key is None:
        if training.drop or importance is not None:
            raise ValueError(f"{OWNER}: dropping and importance draw random numbers; give key=jax.random.key(0).")
        key = jax.random.key(0)
    check_key(OWNER, key)
    work = Blockwise(blocks, planned, materialize(params), training)
    if not work.learns(rounded):
        raise ValueError(
            f"{OWNER}: there is nothing to learn: no leaf is softly rounded, and no rule trains a range; make the tree "
            "with adaround(params, grid)."
        )
    arrays = [arrays_in(case) for case in cases]
    weighed = None if importance is None else work.importances(importance, arrays, key)
    new, found, errors = work.all(rounded, given, Calibration(arrays, weighed, key))
    return Reconstructed(new, {**(ranges or {}), **found}, errors)


def sampled_loss(logits: jax.Array, key: Key) -> jax.Array:
    """``-Σ log p(y)`` of classes ``y`` drawn from the logits' own distribution: its gradient's square is Fisher's.

    Args:
      logits: (…, classes).
      key: of the draw.

    >>> abs(float(sampled_loss(jnp.array([[100.0, 0.0]]), jax.random.key(0))))
    0.0
    """
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1))
