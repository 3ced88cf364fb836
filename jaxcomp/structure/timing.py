"""The measured time of a shrunken network, as a cost for ``plan``."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxcomp.core.types import Params, PyTree
from jaxcomp.structure.plans import Plan
from jaxcomp.structure.shrinking import shrink
from jaxcomp.trace.walk import Fn


def measured_seconds(fn: Fn, params: Params, *args: PyTree, runs: int = 5) -> Callable[[Plan], float]:
    """The ``measure`` of ``plan(..., latency=(measure, target))``: the median seconds of a compiled call, here and now.

    Each new plan is compiled, so a search takes about a dozen compilations; plans of equal widths are timed once.

    Args:
      fn: the function, ``fn(params, *args)``, at full size.
      params: the full-size tree of arrays.
      args: arrays of the shapes that matter, such as one batch.
      runs: timed calls, after one that is not.

    Raises:
      ValueError: fewer than one run.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups, plan
    >>> f = lambda p, x: x @ p["up"] @ p["down"]
    >>> params, x = {"up": np.float32([[3, 0.1]]), "down": np.ones((2, 1), np.float32)}, np.ones((1, 1), np.float32)
    >>> half = plan(channel_groups(f)(params, x), params, sparsity=0.5)
    >>> seconds = measured_seconds(f, params, x, runs=1)
    >>> seconds(half) > 0
    True
    """
    if runs < 1:
        raise ValueError(f"measured_seconds: runs must be at least 1, got {runs}.")
    known: dict[tuple[int, ...], float] = {}

    def seconds(plan: Plan) -> float:
        counts = tuple(plan.counts)
        if counts not in known:
            small = plan.take(params)
            call = jax.jit(shrink(fn, plan)).lower(small, *args).compile()
            known[counts] = float(np.median([_timed(call, small, args) for _ in range(runs + 1)][1:]))
        return known[counts]

    return seconds


def _timed(call: Fn, params: Params, args: tuple[PyTree, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(params, *args))
    return time.perf_counter() - start
