"""A global magnitude mask over 10 million weights in two leaves: one threshold, exactly half of them pruned.

Command: ``python -m tests.benchmarks global_mask``
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from tests.benchmarks.timing import Report, Row, measure

SHAPES = {"a": {"kernel": (2000, 2000)}, "b": {"kernel": (2000, 3000)}}
SIZE = 10_000_000
PRUNED = SIZE // 2
PEER = "jaxpruner's method"


def by_argsort(params: Any) -> Any:
    """A mask by jaxpruner's published method: the score of rank k in a stable descending argsort is the threshold.

    Of those equal to it, the ones up to its own index are kept. Source: Lee et al. 2023, arXiv:2304.14082.
    """
    leaves, treedef = jax.tree.flatten(params)
    scores = jnp.concatenate([jnp.abs(x).reshape(-1) for x in leaves])
    last_kept = jnp.argsort(-scores)[SIZE - PRUNED - 1]
    threshold = scores[last_kept]
    keep = (scores > threshold) | ((scores == threshold) & (jnp.arange(SIZE) <= last_kept))
    return treedef.unflatten(_split(keep, leaves))


def by_sort(params: Any) -> Any:
    """A mask by sorting the scores; ties are all pruned."""
    leaves, treedef = jax.tree.flatten(params)
    scores = jnp.concatenate([jnp.abs(x).reshape(-1) for x in leaves])
    return treedef.unflatten(_split(scores > jnp.sort(scores)[PRUNED - 1], leaves))


def by_partition(leaves: list[np.ndarray]) -> list[np.ndarray]:
    """The same on the host, by numpy's selection."""
    scores = np.concatenate([np.abs(x).reshape(-1) for x in leaves])
    return _split(scores > np.partition(scores, PRUNED - 1)[PRUNED - 1], leaves)


def by_torch(leaves: list[np.ndarray]) -> Callable[[], Any]:
    """A call of torch's own global pruning."""
    import torch
    from torch.nn.utils import prune

    def call() -> float:
        modules = [torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.from_numpy(x.copy()))}) for x in leaves]
        pairs = [(m, "w") for m in modules]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=PRUNED)
        return float(modules[0].w_mask[0, 0])

    return call


def _split(flat: Any, leaves: list[Any]) -> list[Any]:
    ends = np.cumsum([x.size for x in leaves])
    return [flat[e - x.size : e].reshape(x.shape) for e, x in zip(ends, leaves, strict=True)]


def run() -> Iterator[Report]:
    """The reports."""
    keys = iter(jax.random.split(jax.random.key(0), 2))
    params = jax.tree.map(lambda s: jax.random.normal(next(keys), s), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    host = [np.array(x) for x in jax.tree.leaves(params)]
    transform = jc.prune(0.5, scope=jc.Global())
    ours = jax.jit(lambda p: transform.update(None, p, step=jnp.int32(0)))
    argsort, sort = jax.jit(by_argsort), jax.jit(by_sort)
    counted = sum(int(jnp.sum(~m)) for m in jax.tree.leaves(ours(params)))

    fast: dict[str, Callable[[], Any]] = {
        "ours, in jit": lambda: ours(params),
        "np.partition on the host": lambda: by_partition(host),
        "ours, in jit, again (control)": lambda: ours(params),
    }
    close = measure(fast, rounds=15)
    slow = {PEER: lambda: argsort(params), "jnp.sort": lambda: sort(params), **fast}
    if importlib.util.find_spec("torch"):
        slow["torch global_unstructured"] = by_torch(host)
    far = measure(slow, rounds=5)

    rows = [far.row(name, PEER, target="<= 0.05" if name == "ours, in jit" else "") for name in slow if name != PEER]
    temp = ours.lower(params).compile().memory_analysis().temp_size_in_bytes / (4 * SIZE)
    near = "np.partition on the host"
    close_rows = [
        close.row("ours, in jit", near, target="<= 1.5"),
        close.row("ours, in jit, again (control)", "ours, in jit"),
        Row("pruned, counted", counted / PRUNED, counted / PRUNED, counted / PRUNED, f"{counted} of {SIZE}"),
        Row("temp memory over the weights'", temp, temp, temp, "masks not counted", "<= 1.2"),
    ]
    title = "Global magnitude mask, 10M weights, half pruned"
    yield Report(title, f"{PEER} ({far.median(PEER):.2f} s)", rows, far.notes())
    yield Report(f"{title}: against selection on the host", "the other", close_rows, close.notes())
