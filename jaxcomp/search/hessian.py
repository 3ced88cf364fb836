"""Traces of a loss's curvature, a leaf each: how much a loss minds that weights are moved, in the mean direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from jaxcomp.core.paths import Where, matrices
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Key, Params, PyTree
from jaxcomp.search.estimates import Curvature, Estimate
from jaxcomp.search.prepared import Prepared, check_asked, prepared
from jaxcomp.search.products import Curved

Samples = Callable[..., tuple[jax.Array, jax.Array]]
LEAST = 16
"""Products behind a trace before its standard error is believed."""


def traces(
    loss: Callable[..., jax.Array] | Curved,
    params: Params,
    batches: Iterable[PyTree],
    *,
    key: Key,
    where: Where = matrices,
    probes: int = 4,
    rtol: float = 0.05,
    atol: float = 0.0,
    most: int = 512,
) -> Curvature:
    """The trace of each leaf's block of the Hessian of the batches' mean loss, by Hutchinson's estimator.

    ``trace ≈ mean of vᵀ H v`` over random signs v. One vector goes through all leaves at once, whose coupling is noise
    of mean 0, and each batch has vectors of its own. A leaf whose error is small enough leaves the vector, so that it
    disturbs the others no more. Errors are estimated within batches: they tell how well the Hessian of these batches
    is known, and nothing of other batches.

    Args:
      loss: ``loss(params, *batch)``, a mean over the examples of a batch, or ``GaussNewton(model, loss)``.
      params: any tree; inside compressed leaves the open arrays are meant, as for transforms.
      batches: of each the loss's other arguments, as a tuple, or the only one. They count by the length of their
        arrays' first axis where they agree on one, or else alike. They are kept, for each is visited many times.
      key: of the vectors.
      where: which leaves.
      probes: vectors for each batch and visit, 2 or more; they share one gradient.
      rtol, atol: a leaf is done where its standard error is at most ``atol + rtol * |trace|``.
      most: products for a leaf, of all batches together, after which it is done anyway; ``met`` says so.

    Raises:
      ValueError: what :func:`~jaxcomp.core.slots.slots` raises; no batch; a loss that is no scalar or not finite; a
        curvature that is not finite.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> found = traces(lambda p, x: jnp.mean((x @ p["w"]) ** 2), {"w": jnp.ones((2, 1))}, [x], key=jax.random.key(0))
    >>> abs(found["w"].value - 14) < 4 * found["w"].error < 4
    True

    Source: Dong et al. 2019, arXiv:1911.03852 (HAWQ-V2), section 3.2; Yao et al. 2019, arXiv:1912.07145 (PyHessian).
    These stop after a fixed number of vectors, or where the mean moves little, and know no error.
    """
    owner = "traces"
    check_asked(owner, key, rtol=rtol, atol=atol, most=most)
    if probes < 2:
        raise ValueError(f"{owner}: probes must be 2 or more, for of one no error is known, got {probes!r}.")
    ready = prepared(owner, loss, params, batches, where=where)
    run = on_any_mesh(jax.jit(ready.samples(probes)))
    rounds: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    active = np.ones(len(ready.slots), bool)
    with progress(owner, most) as advance:
        while True:
            numbers = probes * (len(rounds) * len(ready.batches) + np.arange(len(ready.batches), dtype=np.int32))
            value, found = _round(ready, run, key, active=active, numbers=numbers)
            ready.check_curvature(found.sum((0, 1)), ready.slots)
            rounds.append(found)
            taken.append(active)
            means, errors, counts = statistics(np.stack(rounds), np.stack(taken), ready.parts)
            met = errors <= atol + rtol * np.abs(means)
            active = active & ~(met & (counts >= LEAST))
            advance(len(ready.batches) * probes)
            if not active.any() or len(rounds) * len(ready.batches) * probes >= most:
                break
    rows = zip(ready.sizes().items(), means, errors, counts, met, strict=True)
    estimates = (Estimate(p, (p,), n, float(m), float(e), int(c), met=bool(ok)) for (p, n), m, e, c, ok in rows)
    return Curvature("trace", tuple(estimates), value)


def _round(
    ready: Prepared,
    run: Callable[..., tuple[jax.Array, jax.Array]],
    key: Key,
    *,
    active: np.ndarray,
    numbers: np.ndarray,
) -> tuple[float, np.ndarray]:
    """The mean loss, and samples ``(batches, probes, leaves)``; ``numbers`` are those of the batches' first vectors."""
    losses, samples = [], []
    for i, batch in enumerate(ready.batches):
        value, found = run(ready.opened.arrays, key, active, numbers[i], batch)
        losses.append(ready.checked(value, i))
        samples.append(np.asarray(found, np.float64))
    return float(np.dot(losses, ready.parts)), np.stack(samples)


def statistics(
    samples: np.ndarray, taken: np.ndarray, parts: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, standard errors and counts, a leaf each; batches are strata, each with its own mean and spread.

    Args:
      samples: ``(rounds, batches, probes, leaves)``.
      taken: ``(rounds, leaves)``, where a leaf took part.
      parts: of the batches in the mean.

    >>> means, errors, counts = statistics(np.array([[[[1.0], [3.0]]]]), np.array([[True]]), [1.0])
    >>> float(means[0]), float(errors[0]), int(counts[0])
    (2.0, 1.0, 2)
    """
    on = taken[:, None, None, :]
    each = taken.sum(0) * samples.shape[2]
    centers = np.where(on, samples, 0).sum((0, 2)) / each
    spread = (np.where(on, samples - centers[None, :, None], 0) ** 2).sum((0, 2)) / (each - 1) / each
    shares = np.array(parts)[:, None]
    return (shares * centers).sum(0), np.sqrt((shares**2 * spread).sum(0)), each * samples.shape[1]
