"""Running statistics made anew for a network that changed, from what its own function says of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.batches import all_batches, as_batch
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import is_float_array, leaves_with_paths, path_str, some_paths
from jaxcomp.core.types import Leaf, Params, PyTree


def recalibrated(update: Callable[..., PyTree], params: Params, batches: Iterable[PyTree]) -> Params:
    """The parameters with batch norms' statistics as the mean over batches, of this network and no other.

    What ``update`` gives are running averages, ``m old + (1 - m) batch``; ``m`` is found by trying, so that the mean is
    that of the batches alone, each as heavy as any other. Not for use in ``jit``: it looks at values.

    Args:
      update: ``update(params, *batch)``: new values of some of the parameters, at their paths, as a network in training
        gives them: ``lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])[1]``. Under ``jit`` one compiled
        program serves all widths of a ``Supernet``, whose masked trees have one shape.
      params: the tree: shrunk, or masked, and then the statistics of what went are 0.
      batches: arrays, or tuples of what the function takes.

    Raises:
      ValueError: no batch; a new value at no parameter's path; one that is no running average.

    >>> x = jnp.array([[1.0], [3.0]])
    >>> def update(p, x):
    ...     return {"mean": 0.9 * p["mean"] + 0.1 * x.mean(0)}
    >>> found = recalibrated(update, {"w": jnp.ones(1), "mean": jnp.zeros(1)}, [x, x + 2])
    >>> found["w"].tolist(), found["mean"].round(4).tolist()
    ([1.0], [3.0])

    Source: statistics after training, Yu and Huang 2019 (US-Nets), arXiv:1903.05134, section 3.2: the exact average
    over a part of the training images.
    """
    found = all_batches("recalibrated", batches)
    new = {path for path, _ in leaves_with_paths(jax.eval_shape(update, params, *as_batch(found[0])))[0]}
    known = {path for path, _ in leaves_with_paths(params)[0]}
    if not new or not new <= known:
        raise ValueError(
            f"recalibrated: update gives {some_paths(sorted(new - known)) if new else 'nothing'}, and there must be a "
            f"parameter at each path, among {some_paths(sorted(known))}."
        )

    def told(start: float, batch: PyTree) -> dict[str, np.ndarray]:
        tree = _with(params, dict.fromkeys(new, start), wide=True)  # few bits would say another m
        return {path: np.asarray(x) for path, x in leaves_with_paths(update(tree, *as_batch(batch)))[0]}

    parts = [told(0.0, batch) for batch in found]
    fresh = {path: _fresh(path, parts[0][path], x) for path, x in told(1.0, found[0]).items()}
    means = {path: sum(p[path].astype(np.float64) for p in parts) / (len(parts) * fresh[path]) for path in new}
    return _with(params, means)


def _with(params: Params, values: Mapping[str, float | np.ndarray], *, wide: bool = False) -> Params:
    def changed(path: str, leaf: Leaf) -> Leaf:
        dtype = compute_dtype(leaf.dtype) if wide and is_float_array(leaf) else leaf.dtype
        return jnp.broadcast_to(jnp.asarray(values[path], dtype), leaf.shape) if path in values else leaf

    return jax.tree_util.tree_map_with_path(lambda path, leaf: changed(path_str(path), leaf), params)


def _fresh(path: str, zero: np.ndarray, one: np.ndarray) -> float:
    """The weight of a batch in a running average, from its values that start at 0 and at 1."""
    at = int(np.argmin(np.abs(zero)))  # the least is rounded least
    fresh = 1.0 - (float(one.reshape(-1)[at]) - float(zero.reshape(-1)[at]))
    if not 1e-5 < fresh < 1 + 1e-5 or not np.allclose(one - zero, 1 - fresh, atol=1e-3 * (1 + np.abs(zero).max())):
        raise ValueError(
            f"recalibrated: update makes {path!r} no running average of its old value and the batch's: a batch weighs "
            f"{fresh:.4g}; use the function as in training, with its statistics mutable."
        )
    return fresh
