"""How far a network is from the one that it was, on batches that are kept, with what that one gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jaxcomp.core.batches import Batch
from jaxcomp.core.leaves import materialize
from jaxcomp.core.paths import is_float_array
from jaxcomp.core.types import Params, PyTree
from jaxcomp.search.batches import parts_of
from jaxcomp.search.measures import Measure

Fn = Callable[..., PyTree]


class Judge:
    """``judge(params)``: how far a network's outputs are from the original's; infinite where they are no numbers.

    Args:
      fn: the original function, and by default the one that is judged.
      params: the original parameters.
      batches: the arguments behind them.
      measure: what is measured.

    Raises:
      ValueError: no batch, or outputs of the original that are not finite.
    """

    def __init__(self, fn: Fn, params: Params, batches: Sequence[Batch], *, measure: Measure) -> None:
        self.fn, self.batches, self.measure = fn, batches, measure
        self.parts = parts_of("compress", batches)
        run = jax.jit(fn)
        dense = materialize(params)
        self.references = [run(dense, *batch) for batch in batches]
        for i, outputs in enumerate(self.references):
            floats = [np.asarray(x) for x in jax.tree.leaves(outputs) if is_float_array(x)]
            if not all(np.isfinite(x.astype(np.float64)).all() for x in floats):
                raise ValueError(
                    f"compress: the outputs of the network as it was are not finite in batch {i} of data; leave that"
                    " batch out, or mend the network."
                )
        self._run = jax.jit(partial(self._means, fn))

    def _means(self, fn: Fn, params: Params, batch: Batch, reference: PyTree) -> tuple[jax.Array, ...]:
        return tuple(self.measure.of(fn(params, *batch), reference, batch))

    def __call__(self, params: Params, fn: Fn | None = None) -> float:
        """The measure of a tree, compressed or not, of ``fn`` or of the original function."""
        run = self._run if fn is None else jax.jit(partial(self._means, fn))
        dense, sums = materialize(params), None
        for batch, part, reference in zip(self.batches, self.parts, self.references, strict=True):
            here = part * np.array([float(x) for x in run(dense, batch, reference)])
            sums = here if sums is None else sums + here
        assert sums is not None
        value = self.measure.value(*map(float, sums))
        return value if math.isfinite(value) else math.inf
