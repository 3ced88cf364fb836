"""``quantize_function``: the same function with its activations on integer grids, fake or real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import jax

from jaxcomp.activations.backward import Gradients, checked_key
from jaxcomp.activations.codes import LAYOUT, Codes, codes_of, joined, moved, of_float8
from jaxcomp.activations.execution import Mode, Record, claim_of
from jaxcomp.activations.planning import BARRED, OWNER, Planned, Rules, checked_ranges, plan
from jaxcomp.activations.specs import Backward
from jaxcomp.activations.thin_claims import (
    IN_FLOAT,
    joins,
    kept_factors,
    stepped_axes,
    thin_layouts,
    thin_products,
    thinned,
)
from jaxcomp.activations.thin_products import Factors
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.tags import Tag
from jaxcomp.trace.walk import Location


def quantize_function(
    fn: Callable[..., Any], rules: Rules, *, integer: bool = False, backward: Backward | None = None
) -> Callable[..., Any]:
    """``q(params, ranges, *args)``: ``fn`` with the activations that enter its products quantized.

    The tree says what the weights are: compressed leaves are run as they are. The rules say what the activations are.
    In fake mode both are rounded in float, with straight-through gradients. With ``integer=True`` a product of a
    ``Quantized`` leaf, or of two activations, runs on int8 codes with sums in int32, zero points exact, and one
    rescale; it equals the fake mode within rounding, and its gradient is the fake mode's, in reverse mode alone, so
    that a tree which is not packed trains on integers. What cannot is run as in fake mode; ``coverage`` says so.
    Leaves of factors (``LowRank``, …) run as thin products in float, in both modes.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``.
      rules: ``{where: Act(...), Float8(...) or None}`` over the paths of ``sites(fn)``, the first match wins; None, or
        no match, leaves a site's activations alone (weight-only). Products of two activations (``"attn/dot_0"``)
        quantize both.
      integer: run on integers.
      backward: run the products of the gradient on rounded codes too, at the sites whose activations a rule quantizes.
        The quantized function is then ``q(params, ranges, key, *args)``, and differentiable in reverse mode alone;
        ``key`` is None where nothing is stochastic.

    Raises (the quantized function):
      TypeError: a rule, a range or a key of another kind.
      ValueError: a rule that matches no site, groups that do not divide, or ranges that are missing or foreign.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.activations.specs import Act, Dynamic
    >>> f = lambda p, x: x @ p["w"]
    >>> q = quantize_function(f, {"w": Act(2, symmetric=True, range=Dynamic())})
    >>> q({"w": jnp.eye(2)}, None, jnp.array([[0.1, 3.0]]))
    Array([[0., 2.]], dtype=float32)

    Source: Jacob et al. 2018, arXiv:1712.05877, sections 2.2 and 3.
    """

    @wraps(fn)
    def quantized(params: Any, ranges: Mapping[str, Range] | None, *args: Any, **kwargs: Any) -> Any:
        gradients = Gradients()
        if backward is not None:
            gradients, args = Gradients(backward, checked_key(OWNER, backward, args)), args[1:]
        program = trace(fn, shapes_of(params), *args, **kwargs)
        planned = plan(program, rules)
        given = checked_ranges(planned, ranges)
        return run(program, planned, given, params, (args, kwargs), Mode(integer, gradients), lambda *_: None)

    return quantized


def shapes_of(params: Any) -> Any:
    """The tree with a shape in the place of each compressed leaf."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_compressed(x) else x, params, is_leaf=is_compressed
    )


def run(
    program: Program,
    planned: tuple[Planned, ...],
    ranges: Mapping[str, Range],
    params: Any,
    inputs: tuple[Any, Any],
    mode: Mode,
    record: Record,
) -> Any:
    """The quantized function's result; ``record`` learns what was done at each site."""
    kept, thick = kept_factors(program, params, mode.gradients.spec is not None)
    planned = thinned(planned, kept, thick, mode.integer, record)
    tree, reasons = _placed(program, params, kept, mode.integer)
    found = ((p, claim_of(p, i, ranges, mode, reasons, record)) for i, p in enumerate(planned))
    claims = {p.site.location: claim for p, claim in found if claim is not None}
    if mode.integer:
        claims |= _layout_claims(program)
    claims = {**thin_products(planned), **claims, **thin_layouts(program, kept)}
    apart = joins(program, kept)
    claims = {at: claim for at, claim in claims.items() if at not in apart}
    values = program.flatten(tree, *inputs[0], **inputs[1])
    return evaluate(program, claims, values, to_array=_dense).out


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Codes | Factors) else dense(value)


def _placed(program: Program, params: Any, kept: Mapping[str, Factors], integer: bool) -> tuple[Any, dict[str, str]]:
    """The tree with factors and, for integers, codes where leaves have them; and why other leaves have no codes."""
    stepped = stepped_axes(program) if integer else {}
    named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
    leaves: list[Any] = []
    reasons: dict[str, str] = {}
    found: Any
    for path, leaf in named:
        if path in kept:
            reasons[path], found = IN_FLOAT, kept[path]
        elif integer:
            found = codes_of(leaf, frozenset(stepped.get(path, ()))) if is_compressed(leaf) else of_float8(leaf)
        else:
            found = dense(leaf)
        if isinstance(found, str):
            reasons[path], found = found, dense(leaf)
        leaves.append(found)
    return treedef.unflatten(leaves), reasons


def _layout_claims(program: Program) -> dict[Location, Claim]:
    """Claims that let codes pass through the layout operations between a leaf and its product."""
    found = {}
    for op in program.flow.ops:
        if not BARRED.isdisjoint(op.inside):
            continue
        if op.name in LAYOUT and _is_exact(op.tags[0]):
            found[op.location] = Claim(partial(moved, op))
        elif op.name == "concatenate" and all(map(_is_exact, op.tags)):
            found[op.location] = Claim(partial(joined, op))
    return found


def _is_exact(tag: Tag) -> bool:
    """Whether a value is a leaf, moved or cast at most."""
    return tag.origin is not None and tag.origin.exact


def factored(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` run on leaves of factors as they are: thin dots, chains of convolutions, lookups in thin tables.

    Other compressed leaves are materialized. Where factors cannot be kept apart (a sum over rows and columns at once, a
    grouped convolution, arithmetic on the weight) they are multiplied out, and ``coverage(fn, {})`` says why.
    ``quantize_function`` runs its products so too.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``, as it is written for arrays.

    >>> import jax.numpy as jnp
    >>> from jaxcomp import cost, factorize
    >>> f = lambda p, x: x @ p["w"]
    >>> p = factorize({"w": jnp.ones((64, 64))}, 4)
    >>> cost(f)({"w": jnp.ones((64, 64))}, jnp.ones((1, 64))).macs, cost(factored(f))(p, jnp.ones((1, 64))).macs
    (4096, 512)
    """
    run_thin = quantize_function(fn, {})

    @wraps(fn)
    def thin(params: Any, *args: Any, **kwargs: Any) -> Any:
        return run_thin(params, None, *args, **kwargs)

    return thin
