"""Cross-layer equalization: the ranges of what makes a channel and of what reads it, made the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np

from jaxcomp.core.paths import Where, matches
from jaxcomp.core.types import Params, PyTree
from jaxcomp.ptq.rewrites.diagonals import Diagonal, Side, Vector
from jaxcomp.ptq.rewrites.results import Rewritten
from jaxcomp.ptq.rewrites.smoothing import Arrays, rewritten, rows
from jaxcomp.trace.walk import Fn


def equalize(fn: Fn, *, rounds: int = 20, where: Where = r".*") -> Callable[..., Rewritten]:
    """Makes the ranges of each channel the same in the weights that make it and in those that read it.

    ``s_j = sqrt(r1_j / r2_j)`` with the largest magnitudes ``r1`` of what makes channel j and ``r2`` of what reads it;
    the former is divided by it and the latter multiplied, so that both are ``sqrt(r1_j r2_j)``, biases and norms
    between them along. Of several weights on one side it is their geometric mean. Repeated in the program's order until
    nothing moves, since a weight belongs to two diagonals. Through relu, pooling, residual sums, gates and attention's
    mixing; queries and keys are evened too. Fold batch norms first (``fold_batch_norm``): what stands before one is
    not rescaled.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      rounds: how often all diagonals are gone through at most.
      where: which diagonals, by the paths of weights: those of which all weights are selected.

    Returns:
      A function of ``(params, *args)`` giving :class:`Rewritten`.

    Raises (the function returned):
      TypeError: a leaf is compressed already.

    >>> import jax, jax.numpy as jnp
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[8.0, 1.0]]), "down": jnp.array([[2.0], [1.0]])}
    >>> done = equalize(fn)(params, jnp.array([[2.0]]))
    >>> done.params["up"].tolist(), done.params["down"].ravel().tolist()
    ([[4.0, 1.0]], [4.0, 1.0])

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.
    """

    @wraps(fn)
    def equalized(params: Params, *args: PyTree, **kwargs: PyTree) -> Rewritten:
        def choice(diagonal: Diagonal, leaves: Arrays) -> Vector | None:
            made = _weights([s for s in diagonal.sides if s.inverse])
            read = _weights([s for s in diagonal.sides if not s.inverse])
            if not made or not read or not all(matches(where, s.path, leaves[s.path]) for s in (*made, *read)):
                return None
            r1, r2 = (_level(sides, diagonal.size, leaves) for sides in (made, read))
            with np.errstate(invalid="ignore"):  # a channel of zeros on both sides
                s = np.exp(0.5 * (r1 - r2))
            return np.where(np.isfinite(s) & (s > 0), s, 1).astype(np.float32)

        return rewritten("equalize", fn, choice, (params, args, kwargs), where=where, insert=False, rounds=rounds)

    return equalized


def _weights(sides: Sequence[Side]) -> list[Side]:
    """Those that products read; where there are none, all: a norm's scale makes a channel too."""
    return [s for s in sides if s.kernel] or list(sides)


def _level(sides: Sequence[Side], size: int, leaves: Arrays) -> Vector:
    """The mean logarithm of each channel's ranges; of a channel of zeros no number."""
    with np.errstate(divide="ignore"):
        levels = [np.log(s.gathered(rows(leaves[s.path], s), size)) for s in sides]
    return np.mean(levels, axis=0, dtype=np.float32)
