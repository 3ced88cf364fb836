"""What enters the products, channel by channel: the largest magnitudes, and factors put in front of a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import materialize
from jaxcomp.core.paths import Where, matches
from jaxcomp.core.roles import BATCH, CONTRACTED, STACKED
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.collect import Nothing, Observer, collect
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Monoid, zeros
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.products import dot_numbers
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn


class Entry(NamedTuple):
    """Where the channels that a weight sums over lie in the activation.

    ``axes`` are those of the activation, in the order of the leaf's own batch and contracted axes; ``sizes`` are the
    leaf's, which a view may have merged.
    """

    operand: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]


def entry_of(site: Site, op: Op) -> Entry | None:
    """Where a site's channels enter; None where they cannot be told from others."""
    if site.weight is None or len(site.activations) != 1 or site.kind not in ("dot", "conv"):
        return None
    weight, x = site.operands[site.weight], site.activations[0]
    stacked = weight.leaf_axes(STACKED)
    layers = tuple(weight.leaf_shape[i] for i in stacked) == site.layer_steps and stacked == (*range(len(stacked)),)
    if site.leaf is None or site.groups != 1 or not layers or not BARRED.isdisjoint(site.inside):
        return None
    own = sorted((*weight.leaf_axes(BATCH), *weight.leaf_axes(CONTRACTED)))
    sizes = tuple(weight.leaf_shape[i] for i in own)
    if site.kind == "conv":
        return Entry(x, (site.operands[x].roles.index(CONTRACTED),), sizes)
    origin = op.tags[site.weight].origin
    assert origin is not None
    pairs = [(w, a) for side in dot_numbers(op.eqn) for w, a in zip(side[site.weight], side[x], strict=True)]
    pairs.sort(key=lambda pair: origin.axes[pair[0]])
    met = [axis for w, _ in pairs for axis in origin.axes[w]]
    return Entry(x, tuple(a for _, a in pairs), sizes) if [i for i in met if i in own] == own else None


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
    def look(values: Sequence[jax.Array]) -> dict[str, jax.Array]:
        x = jnp.abs(values[entry.operand])
        first = range(len(entry.axes))
        top = jnp.max(jnp.moveaxis(x, entry.axes, first), axis=tuple(range(len(entry.axes), x.ndim)))
        return {str(site.leaf): top.astype(jnp.float32).reshape(entry.sizes)}

    return look


def name_of(path: str) -> str:
    """What the factors in front of a weight are called."""
    return f"{path}/scale"


def with_factors(fn: Fn) -> Fn:
    """``fn`` over ``{"params": params, "inputs": factors}``: what enters each leaf named there is multiplied.

    ``inputs`` holds factors in the shape of :func:`input_peaks`, by the path in ``params`` and "/scale": so no rule
    that selects the weight selects them.

    >>> f = with_factors(lambda p, x: x @ p["w"])
    >>> f({"params": {"w": jnp.ones((2, 1))}, "inputs": {"w/scale": jnp.array([2.0, 3.0])}}, jnp.ones((1, 2))).tolist()
    [[5.0]]
    """

    @wraps(fn)
    def multiplied(tree: Mapping[str, PyTree], *args: PyTree, **kwargs: PyTree) -> PyTree:
        params, inputs = materialize(tree["params"]), dict(tree["inputs"])
        program = trace(fn, params, *args, **kwargs)
        ops = {op.location: op for op in program.flow.ops}
        claims = {}
        for site in sites_of(program):
            entry = entry_of(site, ops[site.location])
            if entry is not None and name_of(site.leaf or "") in inputs:
                sizes = [site.operands[entry.operand].shape[i] for i in entry.axes]
                side = inputs[name_of(site.leaf or "")].reshape(*site.layer_steps, *sizes)
                claims[site.location] = Claim(_scaling(ops[site.location], entry), side)
        return evaluate(program, claims, program.flatten(params, *args, **kwargs)).out

    return multiplied


def _scaling(op: Op, entry: Entry) -> Callable[..., list[jax.Array]]:
    order = sorted(range(len(entry.axes)), key=entry.axes.__getitem__)

    def run(factors: jax.Array, *values: jax.Array) -> list[jax.Array]:
        x = values[entry.operand]
        shape = [n if i in entry.axes else 1 for i, n in enumerate(x.shape)]
        scaled = x * factors.transpose(order).reshape(shape).astype(x.dtype)
        return op.bind(*(scaled if i == entry.operand else v for i, v in enumerate(values)))

    return run
