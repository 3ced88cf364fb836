"""``calibrate``: statistics of the activations that enter each site, in a form that merges in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.batches import no_batch, results_of
from jaxcomp.core.paths import Where, matches, some_paths
from jaxcomp.core.reductions import nan_in
from jaxcomp.core.types import Params, PyTree
from jaxcomp.core.words import on_hand, shape_words
from jaxcomp.trace.collect import Nothing, Observer, collect
from jaxcomp.trace.exact import Count, Sum, counted, summed
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Monoid, zeros
from jaxcomp.trace.primitives import UNSEEN
from jaxcomp.trace.sites import Site
from jaxcomp.trace.walk import Fn

SIDE = 2**12
"""Bins of one sign: the leading twelve bits of a float32's magnitude, its exponent and four bits of its mantissa."""
BINS = 255 * 2**4
"""Those of finite numbers: sixteen equal steps in each octave from ``2**-126`` on, and as many below it."""
EDGES = np.append((np.arange(BINS, dtype=np.uint32) << np.uint32(19)).view(np.float32).astype(np.float64), 2.0**128)
"""Edges of these bins; what lies in the first, below 1e-39, is taken for zero."""
_AT_ONCE = 2**31


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
    """What calibration keeps of one activation; of a layer scan, with the layers' axes in front of every field.

    Invariant: ``counts[..., 0, :]`` and ``[..., 1, :]`` are histograms of the magnitudes of the elements with a minus
    sign and without one, over bins that do not depend on the data and leave out no number. So histograms add exactly,
    whatever the magnitudes, however many elements there are, in any order and on any number of devices.

    Attributes:
      counts: (…, 2, SIDE); the bins from ``BINS`` on hold infinities and, behind the first of them, NaN.
      low, high: (…), smallest and largest element.
      low_sum, high_sum: (…), sums of the batches' smallest and largest elements.
      batches: (…), how often the site was reached with an element or more.
    """

    def __repr__(self) -> str:
        """One line: the range that was seen, where its values are few and known."""
        low, high = on_hand(self.low), on_hand(self.high)
        layers = f", layers {shape_words(self.low.shape)}" if getattr(self.low, "shape", ()) else ""
        seen = "" if low is None or high is None or not low.size else f" {low.min():.4g} to {high.max():.4g}"
        return f"<Stats{seen}{layers}>"

    counts: Count
    low: jax.Array
    high: jax.Array
    low_sum: Sum
    high_sum: Sum
    batches: Count


def observe(x: jax.Array) -> Stats:
    """The statistics of one array, of any shape.

    >>> s = observe(jnp.array([-1.0, 0.5, 2.0, 0.0]))
    >>> float(s.low), float(s.high), s.counts.total().sum(-1).tolist()
    (-1.0, 2.0, [1, 3])
    """
    x = jnp.asarray(x).astype(jnp.float32)
    unknown = nan_in(x)
    low, high = jnp.min(x, initial=jnp.inf) + unknown, jnp.max(x, initial=-jnp.inf) + unknown
    some = x.size > 0  # a batch without elements has no extremes to average
    low_sum, high_sum = (summed(end if some else jnp.zeros_like(end)) for end in (low, high))
    return Stats(_histogram(x), low, high, low_sum, high_sum, counted(jnp.uint32(some)))


def _histogram(x: jax.Array) -> Count:
    """How many elements there are of each sign, exponent and leading bits; so many at once that no word runs over."""
    if x.size >= _AT_ONCE:
        axis = int(np.argmax(x.shape))
        halves = jnp.split(x, [x.shape[axis] // 2], axis)
        return _histogram(halves[0]).plus(_histogram(halves[1]))
    bits = lax.bitcast_convert_type(jnp.ravel(x), jnp.uint32)
    index = (bits ^ jnp.uint32(2**31)) >> 19
    counts = jnp.zeros(2 * SIDE, jnp.uint32).at[index].add(jnp.uint32(1), mode="promise_in_bounds")
    return counted(counts.reshape(2, SIDE))


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of two sets of batches together: the same in any order, sums of extremes to 48 bits.

    Args:
      a, b: of the same activation.

    >>> s = merge(observe(jnp.array([1.0, 2.0])), observe(jnp.array([-3.0])))
    >>> float(s.low), float(s.high), int(s.batches.total())
    (-3.0, 2.0, 2)
    """
    return Stats(
        a.counts.plus(b.counts),
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.low_sum.plus(b.low_sum),
        a.high_sum.plus(b.high_sum),
        a.batches.plus(b.batches),
    )


def _zero(shapes: Stats) -> Stats:
    z: Stats = zeros(shapes)
    return replace(z, low=z.low + jnp.inf, high=z.high - jnp.inf)


MERGED = Monoid(_zero, merge)
"""Statistics as emissions of an evaluation."""


_merge = jax.jit(merge)


def merge_all(*calibrations: dict[str, Stats]) -> dict[str, Stats]:
    """Calibrations of several batches as one.

    Args:
      calibrations: what :func:`calibrate` gave, by site.

    Raises:
      ValueError: none is given, or they name different sites.

    >>> a, b = {"w": observe(jnp.array([1.0, 2.0]))}, {"w": observe(jnp.array([-3.0]))}
    >>> float(merge_all(a, b)["w"].low)
    -3.0
    """
    if not calibrations:
        raise ValueError("merge_all: wants at least one calibration, got none.")
    names = [set(c) for c in calibrations]
    partial = sorted(names[0].union(*names) - names[0].intersection(*names))
    if partial:
        raise ValueError(f"merge_all: wants calibrations of the same sites, got {some_paths(partial)} in some only.")
    return {name: reduce(_merge, (c[name] for c in calibrations)) for name in calibrations[0]}


def activation_name(site: Site, operand: int) -> str:
    """How an activation is named: its site's path, and the operand's number where both are activations.

    The leaf's own path at the site of a weight: "Dense_0/kernel". Between activations: "attn/dot_0:0" and ":1".

    Args:
      site: from :func:`~jaxcomp.trace.sites`.
      operand: 0 or 1.

    >>> from jaxcomp.trace import sites
    >>> found = sites(lambda p, x: x @ p["w"] @ x.T)({"w": jnp.ones((2, 2))}, jnp.ones((3, 2)))
    >>> [activation_name(site, 0) for site in found]
    ['w', 'dot_0:0']
    """
    return site.path if len(site.activations) == 1 else f"{site.path}:{operand}"


def calibrate(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, Stats]]:
    """Statistics of the activations that enter the dots and convolutions of ``fn(params, *args)``.

    Runs under ``jit`` and on sharded inputs; ``merge_all`` joins the results of batches in any order. Sites in a
    scan over stacked layers have statistics for each layer; those in other loops, of all steps together. A site in the
    condition of a while loop, or in a shard_map, is not seen, nor are complex activations.

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
        unseen = not UNSEEN.isdisjoint(site.inside)
        if site.kind == "embed" or unseen or not site.activations:
            return None
        seen = [i for i in site.activations if "complex" not in site.operands[i].dtype]
        if not seen or not matches(where, site.path, site):
            return None
        return lambda values: {activation_name(site, i): observe(values[i]) for i in seen}

    found = collect(fn, observer, merged=MERGED, nothing=Nothing("calibrate", where, "site with an activation"))
    return wraps(fn)(lambda params, *args, **kwargs: found(params, *args, **kwargs).seen)


def calibrate_over(fn: Fn, where: Where = r".*") -> Callable[[Params, Iterable[PyTree]], dict[str, Stats]]:
    """:func:`calibrate` of many batches, compiled once for each shape and merged as they come.

    The result takes ``(params, batches)``; a batch is what ``fn`` takes behind the parameters: a tuple of arguments, or
    the only one. It shows how far it is.

    Args:
      fn, where: as for :func:`calibrate`.

    Raises:
      ValueError: ``where`` matches no site, or there is no batch.

    >>> stats = calibrate_over(lambda p, x: x @ p["a"])({"a": jnp.eye(2)}, [jnp.ones((1, 2)), jnp.zeros((3, 2))])
    >>> float(stats["a"].low), float(stats["a"].high), stats["a"].counts.total().sum().tolist()
    (0.0, 1.0, 8)
    """
    observed = jax.jit(calibrate(fn, where))

    def over(params: Params, batches: Iterable[PyTree]) -> dict[str, Stats]:
        found: dict[str, Stats] | None = None
        for one in results_of(observed, params, batches, owner="calibrate_over", words="calibrate: batches"):
            # Waiting keeps no more than one batch on the device, and the bar honest.
            found = jax.block_until_ready(one if found is None else merge_all(found, one))
        if found is None:
            raise no_batch("calibrate_over")
        return found

    return over
