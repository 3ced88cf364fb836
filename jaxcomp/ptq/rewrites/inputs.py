"""What enters the products, channel by channel: the largest magnitudes, and factors put in front of a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import dense
from jaxcomp.core.paths import Where, matches
from jaxcomp.core.roles import BATCH, CONTRACTED, STACKED
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.collect import Nothing, Observer, collect
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Monoid, zeros
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.products import dot_numbers
from jaxcomp.trace.program import shapes_of, trace
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn


class Entry(NamedTuple):
    """Where the channels that a weight sums over lie in the activation, in the order of the leaf's axes.

    ``apart`` are the activation's axes that are the leaf's batch axes, and ``axes`` those of the leaf, stacked layers
    apart: the batch axes and then the channels.
    """

    operand: int
    apart: tuple[int, ...]
    summed: tuple[int, ...]


def entry_of(site: Site, op: Op) -> Entry | None:
    """Where a site's channels enter; None where they cannot be told from others."""
    if site.weight is None or len(site.activations) != 1 or site.kind not in ("dot", "conv"):
        return None
    if not BARRED.isdisjoint(site.inside) or site.groups != 1 or site.leaf is None:
        return None
    x = site.activations[0]
    if site.kind == "conv":
        return Entry(x, (), (site.operands[x].roles.index(CONTRACTED),))
    contract, batch = dot_numbers(op.eqn)
    origin = op.tags[site.weight].origin
    assert origin is not None
    summed = sorted(zip(contract[site.weight], contract[x], strict=True), key=lambda pair: origin.axes[pair[0]])
    shared = sorted(zip(batch[site.weight], batch[x], strict=True), key=lambda pair: origin.axes[pair[0]])
    if any(len(origin.axes[i]) != 1 for i, _ in (*summed, *shared) if site.operands[site.weight].shape[i] != 1):
        whole = len(summed) == 1 and not shared  # a view that merges the leaf's axes, summed over at once
        if not whole:
            return None
    return Entry(x, tuple(j for _, j in shared), tuple(j for _, j in summed))


_LARGEST = Monoid(zeros, lambda a, b: jax.tree.map(jnp.maximum, a, b))


def input_peaks(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, jax.Array]]:
    """The largest magnitude of each channel that each leaf sums over in ``fn(params, *args)``, by the leaf's path.

    They have the axes of the leaf that products sum over, in its order, with those of stacked layers and batches in
    front; a convolution's window is left out. Several batches together have ``jax.tree.map(jnp.maximum, a, b)``.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which sites, by path or as a predicate of ``(path, site)``.

    Raises:
      ValueError: no site is left.

    >>> p = {"w": jnp.ones((2, 3))}
    >>> input_peaks(lambda p, x: x @ p["w"])(p, jnp.array([[1.0, -2.0], [0.5, 1.0]]))["w"].tolist()
    [1.0, 2.0]
    """

    def observer(site: Site, op: Op) -> Observer | None:
        entry = entry_of(site, op)
        return _peaks(site, entry) if entry is not None and matches(where, site.path, site) else None

    found = collect(fn, observer, merged=_LARGEST, nothing=Nothing("input_peaks", where, "site with a weight"))

    @wraps(fn)
    def peaks(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        return found(params, *args, **kwargs).seen

    return peaks


def _peaks(site: Site, entry: Entry) -> Observer:
    weight = site.operands[site.weight or 0]
    sizes = [weight.leaf_shape[i] for i in (*weight.leaf_axes(BATCH), *weight.leaf_axes(CONTRACTED))]

    def look(values: Sequence[jax.Array]) -> dict[str, jax.Array]:
        x = jnp.abs(values[entry.operand])
        kept = (*entry.apart, *entry.summed)
        top = jnp.max(jnp.moveaxis(x, kept, range(len(kept))), axis=tuple(range(len(kept), x.ndim)))
        return {str(site.leaf): top.astype(jnp.float32).reshape(sizes)}

    return look


def with_factors(fn: Fn) -> Fn:
    """``fn`` over ``{"params": params, "inputs": factors}``: what enters each leaf named there is multiplied.

    ``inputs`` holds, by the paths of ``params``, factors in the shape of :func:`input_peaks`.

    >>> f = with_factors(lambda p, x: x @ p["w"])
    >>> f({"params": {"w": jnp.ones((2, 1))}, "inputs": {"w": jnp.array([2.0, 3.0])}}, jnp.ones((1, 2))).tolist()
    [[5.0]]
    """

    @wraps(fn)
    def multiplied(tree: Mapping[str, PyTree], *args: PyTree, **kwargs: PyTree) -> PyTree:
        params, inputs = tree["params"], dict(tree["inputs"])
        program = trace(fn, shapes_of(params), *args, **kwargs)
        ops = {op.location: op for op in program.flow.ops}
        claims = {}
        for site in sites_of(program):
            entry = entry_of(site, ops[site.location])
            if entry is not None and site.leaf in inputs:
                side = inputs[site.leaf].reshape(*site.layer_steps, *_sizes(site, entry))
                claims[site.location] = Claim(_scaling(ops[site.location], entry), side)
        return evaluate(program, claims, program.flatten(params, *args, **kwargs), to_array=dense).out

    return multiplied


def _sizes(site: Site, entry: Entry) -> list[int]:
    return [site.operands[entry.operand].shape[i] for i in (*entry.apart, *entry.summed)]


def _scaling(op: Op, entry: Entry) -> Callable[..., list[jax.Array]]:
    axes = (*entry.apart, *entry.summed)

    def run(factors: jax.Array, *values: jax.Array) -> list[jax.Array]:
        x = values[entry.operand]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        shape = [x.shape[i] if i in axes else 1 for i in range(x.ndim)]
        scaled = x * factors.transpose(order).reshape(shape).astype(x.dtype)
        return op.bind(*(scaled if i == entry.operand else v for i, v in enumerate(values)))

    return run


def layers_in_front(site: Site) -> bool:
    """Whether the leaf has an axis for each scan around it, so that each layer has factors of its own."""
    weight = site.operands[site.weight or 0]
    return tuple(weight.leaf_shape[i] for i in weight.leaf_axes(STACKED)) == site.layer_steps
