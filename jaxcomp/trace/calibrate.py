"""``calibrate``: statistics of the activations that enter each site, in a form that merges in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.paths import Where, matches, some_paths
from jaxcomp.trace.collect import Nothing, Observer, collect
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Monoid, zeros
from jaxcomp.trace.primitives import SEALED
from jaxcomp.trace.sites import Site
from jaxcomp.trace.walk import Fn

LOWEST, HIGHEST = -40, 24
_MANTISSA_BITS = 4
PER_OCTAVE = 2**_MANTISSA_BITS
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
EDGES = np.concatenate([np.ldexp(1 + np.arange(PER_OCTAVE) / PER_OCTAVE, e) for e in range(LOWEST, HIGHEST)])
"""Lower edges of the bins of |x|: sixteen equal steps in each octave from 2**-40 to 2**24."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
    """What calibration keeps of one activation; of a layer scan, with the layers' axes in front of every field.

    Invariant: ``counts[..., 0, :]`` and ``[..., 1, :]`` are histograms of ``-x`` for negative and ``x`` for other
    finite elements over bins that do not depend on the data, so that adding histograms is exact; what lies outside
    is counted in the first or the last bin.

    Attributes:
      counts: (…, 2, BINS), float32.
      low, high: (…), smallest and largest element.
      low_sum, high_sum: (…), sums of the batches' smallest and largest elements.
      batches: (…), how often the site was reached.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array
    low_sum: jax.Array
    high_sum: jax.Array
    batches: jax.Array


def observe(x: jax.Array) -> Stats:
    """The statistics of one array, of any shape.

    >>> s = observe(jnp.array([-1.0, 0.5, 2.0, 0.0]))
    >>> float(s.low), float(s.high), s.counts.sum(-1).tolist()
    (-1.0, 2.0, [1.0, 3.0])
    """
    x = jnp.ravel(x).astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    index = (bits >> (23 - _MANTISSA_BITS)) - ((LOWEST + 127) << _MANTISSA_BITS)
    index = jnp.clip(index, 0, BINS - 1) + jnp.where(x < 0, 0, BINS)
    counts = jnp.zeros(2 * BINS, jnp.float32).at[index].add(jnp.isfinite(x).astype(jnp.float32))
    low, high = jnp.min(x, initial=jnp.inf), jnp.max(x, initial=-jnp.inf)
    return Stats(counts.reshape(2, BINS), low, high, low, high, jnp.ones((), jnp.float32))


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of two sets of batches together; associative and commutative to rounding."""
    return Stats(
        a.counts + b.counts,
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.low_sum + b.low_sum,
        a.high_sum + b.high_sum,
        a.batches + b.batches,
    )


def _zero(shapes: Stats) -> Stats:
    z: Stats = zeros(shapes)
    return Stats(z.counts, z.low + jnp.inf, z.high - jnp.inf, z.low_sum, z.high_sum, z.batches)


MERGED = Monoid(_zero, merge)
"""Statistics as emissions of an evaluation."""


def merge_all(*calibrations: dict[str, Stats]) -> dict[str, Stats]:
    """Calibrations of several batches as one.

    Raises:
      ValueError: none is given, or they name different sites.
    """
    if not calibrations:
        raise ValueError("merge_all: wants at least one calibration, got none.")
    names = [set(c) for c in calibrations]
    partial = sorted(names[0].union(*names) - names[0].intersection(*names))
    if partial:
        raise ValueError(f"merge_all: wants calibrations of the same sites, got {some_paths(partial)} in some only.")
    return {name: reduce(merge, (c[name] for c in calibrations)) for name in calibrations[0]}


def activation_name(site: Site, operand: int) -> str:
    """How an activation is named: its site's path, and the operand's number where both are activations.

    The leaf's own path at the site of a weight: "Dense_0/kernel". Between activations: "attn/dot_0:0" and ":1".
    """
    return site.path if len(site.activations) == 1 else f"{site.path}:{operand}"


def calibrate(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, Stats]]:
    """Statistics of the activations that enter the dots and convolutions of ``fn(params, *args)``.

    Runs under ``jit`` and on sharded inputs; ``merge_all`` joins the results of batches in any order. Sites in a
    scan over stacked layers have statistics for each layer; those in other loops, of all steps together. A site in the
    condition of a while loop, or in a shard_map, is not seen.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which sites, by path or as a predicate of ``(path, site)``.

    Raises:
      ValueError: ``where`` matches no site.

    >>> stats = jax.jit(calibrate(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]))(
    ...     {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.array([[1.0, -3.0]]))
    >>> {name: round(float(s.low), 3) for name, s in stats.items()}
    {'a': -3.0, 'b': -0.995}
    """

    def observer(site: Site, op: Op) -> Observer | None:
        sealed = not (SEALED | {"while_cond"}).isdisjoint(site.inside)
        if site.kind == "embed" or sealed or not site.activations:
            return None
        if not matches(where, site.path, site):
            return None
        return lambda values: {activation_name(site, i): observe(values[i]) for i in site.activations}

    found = collect(fn, observer, merged=MERGED, nothing=Nothing("calibrate", where, "site with an activation"))
    return wraps(fn)(lambda params, *args, **kwargs: found(params, *args, **kwargs).seen)
