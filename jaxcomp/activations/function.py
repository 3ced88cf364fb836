"""``quantize_function``: the same function with its activations on integer grids, fake or real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import NamedTuple, cast

import jax

from jaxcomp.activations.adapted import Beside, apart, put_beside, with_adapters
from jaxcomp.activations.backward import Gradients, checked_key
from jaxcomp.activations.between import claims_between
from jaxcomp.activations.chained import Made, claims_of, links_of
from jaxcomp.activations.codes import LAYOUT, Codes, codes_of, joined, moved, of_float8
from jaxcomp.activations.demands import Seen, demand, put, unmet
from jaxcomp.activations.execution import Around, Mode, claim_of
from jaxcomp.activations.held import Held, held, held_layouts, holdable
from jaxcomp.activations.lookups import Table, table_claims, tables
from jaxcomp.activations.planning import OWNER, Planned, Rules, assigned, checked_ranges
from jaxcomp.activations.prepared import Carried, carried, checked, layout_claims
from jaxcomp.activations.reasons import IN_FLOAT, MULTIPLIED_OUT, Record, Why
from jaxcomp.activations.specs import Backward
from jaxcomp.activations.thin_claims import (
    joins,
    kept_factors,
    stepped_axes,
    thin_layouts,
    thin_products,
    thinned,
)
from jaxcomp.activations.thin_values import ThinFactors
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.kernels.grouped import GroupedOp, form_of, grouped
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED, JOINS
from jaxcomp.trace.program import Program, shapes_of, trace
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.tags import Tag
from jaxcomp.trace.walk import Location


def quantize_function(
    fn: Callable[..., PyTree],
    rules: Rules,
    *,
    integer: bool = False,
    strict: bool = False,
    backward: Backward | None = None,
) -> Callable[..., PyTree]:
    """``q(params, ranges, *args)``: ``fn`` with the activations that enter its products quantized.

    The tree says what the weights are: compressed leaves are run as they are. The rules say what the activations are.
    In fake mode both are rounded in float, with straight-through gradients, and their codes are multiplied, scales
    outside, so that it is the same on a backend that rounds what it multiplies. With ``integer=True`` a product of a
    ``Quantized`` leaf, or of two activations, runs on int8 codes with sums in int32, zero points exact, and one
    rescale; it equals the fake mode within rounding, and its gradient is the fake mode's, in reverse mode alone, so
    that a tree which is not packed trains on integers. A site that was asked for (a rule quantizes its activations, and
    its weight is quantized or it has none) and cannot is run as in fake mode, with one warning, or an error where
    ``strict``; ``coverage`` lists them all. Leaves of factors (``LowRank``, …) run as thin products in float, in both
    modes.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``.
      rules: ``{where: Act(...), Float8(...) or None}`` over the paths of ``sites(fn)``, the first match wins; None, or
        no match, leaves a site's activations alone (weight-only). Products of two activations (``"attn/dot_0"``)
        quantize both.
      integer: run on integers.
      strict: raise where a site that was asked for does not run on integers; else warn once of each such site and
        reason (:class:`NotOnIntegers`).
      backward: run the products of the gradient on rounded codes too, at the sites whose activations a rule quantizes.
        The quantized function is then ``q(params, ranges, key, *args)``, and differentiable in reverse mode alone;
        ``key`` is None where nothing is stochastic.

    Raises:
      ValueError: ``strict`` without ``integer``.

    Raises (the quantized function):
      TypeError: a rule, a range or a key of another kind.
      ValueError: a rule that matches no site, groups that do not divide, ranges that are missing or foreign, or, with
        ``strict``, sites that do not run on integers.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.activations.specs import Act, Dynamic
    >>> f = lambda p, x: x @ p["w"]
    >>> q = quantize_function(f, {"w": Act(2, symmetric=True, range=Dynamic())})
    >>> q({"w": jnp.eye(2)}, None, jnp.array([[0.1, 3.0]]))
    Array([[0., 2.]], dtype=float32)

    Source: Jacob et al. 2018, arXiv:1712.05877, sections 2.2 and 3.
    """

    if strict and not integer:
        raise ValueError(f"{OWNER}: strict=True asks that sites run on integers, which needs integer=True.")
    told: set[tuple[str, Why]] = set()

    @wraps(fn)
    def quantized(params: Params, ranges: Mapping[str, Range] | None, *args: PyTree, **kwargs: PyTree) -> PyTree:
        gradients = Gradients()
        if backward is not None:
            gradients, args = Gradients(backward, checked_key(OWNER, backward, args)), args[1:]
        call = Call.of(fn, rules, params, args, kwargs)
        given = checked_ranges(call.planned, ranges)
        seen: Seen = {}
        result = call.run(given, Mode(integer, gradients), partial(put, seen))
        if integer:
            demand(unmet(call.planned, seen, apart(params)[0]), told, strict=strict)
        return result

    return quantized


@dataclass(frozen=True)
class Call:
    """One call of the quantized function: the program, what is asked of its sites, and what it is called with."""

    program: Program
    planned: tuple[Planned, ...]
    params: Params
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]

    @classmethod
    def of(
        cls,
        fn: Callable[..., PyTree],
        rules: Rules,
        params: Params,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
    ) -> Call:
        """Traces the function and reads the rules."""
        program = trace(fn, shapes_of(params), *args, **kwargs)
        return cls(program, assigned(program, rules), params, args, kwargs)

    def run(self, ranges: Mapping[str, Range], mode: Mode, record: Record) -> PyTree:
        """The result; ``record`` learns what was done at each site."""
        program = self.program
        params, adapters = apart(self.params)
        factors = kept_factors(program, params, mode.gradients.spec is not None)
        planned = list(self.planned)
        if mode.gradients.spec is None:  # whose products are looked for in JAX's own gradients
            planned = [replace(p, op=grouped(p.op)) for p in planned]
        planned = [thinned(p, factors, integer=mode.integer, record=record) for p in planned]
        prepared = checked(program, params)
        looked_up = tables(program, planned, params)
        kept: dict[str, Kept] = {
            **factors.kept,
            **looked_up,
            **{path: carried(leaf) for path, leaf in prepared.items()},
        }
        waiting = {path: n for path, n in holdable(program, planned, params).items() if path not in kept}
        leaves = Leaves(kept, waiting, None if mode.integer else _entering(self.planned))
        tree, reasons = _placed(program, params, leaves)
        # A tree that is prepared is not trained, where a gradient asks for the floats.
        made = Made(links_of(program, planned) if mode.integer and prepared else {})
        around = Around(mode, ranges, reasons, record, prepared, waiting, made)
        found = ((p, claim_of(p, i, around)) for i, p in enumerate(planned))
        claims = {p.site.location: claim for p, claim in found if claim is not None}
        claims |= {**_layout_claims(program), **layout_claims(program, prepared), **table_claims(program, looked_up)}
        claims |= held_layouts(program, waiting)
        claims = {
            **claims_of(made, _dense),
            **_group_claims(planned, record),
            **thin_products(planned),
            **claims,
            **thin_layouts(program, factors.kept),
        }
        claims |= claims_between(program, planned, {*claims}, around, _dense) if prepared else {}
        joined_up = joins(program, {**factors.kept, **looked_up})
        claims = {at: claim for at, claim in claims.items() if at not in joined_up}
        values = program.flatten(tree, *self.args, **self.kwargs)
        if adapters:
            claims = with_adapters(program, planned, claims, adapters=adapters, to_array=_dense)
            values = put_beside(program, values, adapters)
        return evaluate(program, claims, values, to_array=_dense).out


def _group_claims(planned: Iterable[Planned], record: Record) -> dict[Location, Claim]:
    """Claims on convolutions of which nothing else is asked."""

    def run(p: Planned, *values: Leaf | Kept | Codes | Held) -> list[jax.Array]:
        record(p.site.path, "exact", p.why, form_of(p.op))
        return p.op.bind(*(_dense(v) for v in values))

    found = [p for p in planned if isinstance(p.op, GroupedOp) and BARRED.isdisjoint(p.site.inside)]
    return {p.site.location: Claim(partial(run, p)) for p in found}


Kept = ThinFactors | Carried | Table
"""What stands where a leaf of factors, a prepared one, or a table that is looked up did."""


class Leaves(NamedTuple):
    """How leaves enter the program.

    Attributes:
      kept: those that something else stands for, by path.
      waiting: those that are held, with the number of axes that scans step over.
      wanted: those whose codes are; None is all.
    """

    kept: Mapping[str, Kept]
    waiting: Mapping[str, int]
    wanted: frozenset[str] | None


@on_any_mesh
def _dense(value: Leaf | Kept | Codes | Held | Beside) -> jax.Array:
    if isinstance(value, Beside):
        return value.dense(_dense)
    return value.dense() if isinstance(value, Kept | Codes | Held) else dense(value)


def _placed(program: Program, params: Params, how: Leaves) -> tuple[PyTree, dict[str, Why]]:
    """The tree with factors and codes where leaves have them; and why others reach no site as codes."""
    stepped = stepped_axes(program)
    named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
    leaves: list[Leaf | Kept | Codes | Held] = []
    reasons: dict[str, Why] = {}
    for path, leaf in named:
        found: Codes | Why | None = None
        if path in how.kept:
            value = how.kept[path]
            leaves.append(value)
            reasons[path] = MULTIPLIED_OUT if isinstance(value, Carried) else IN_FLOAT
            continue
        wanted = how.wanted is None or path in how.wanted
        if path in how.waiting:
            coded = wanted and leaf.grid.code_range is not None
            leaves.append(on_any_mesh(held)(leaf, how.waiting[path], coded=coded))
            if wanted:
                reasons[path] = MULTIPLIED_OUT if coded else cast(Why, codes_of(leaf))
            continue
        if wanted:
            axes = frozenset(stepped.get(path, ()))
            found = on_any_mesh(codes_of)(leaf, axes) if is_compressed(leaf) else of_float8(leaf)
        if isinstance(found, Codes):
            leaves.append(found)
            reasons[path] = MULTIPLIED_OUT
            continue
        leaves.append(dense(leaf))
        if found is not None:
            reasons[path] = found
    return treedef.unflatten(leaves), reasons


def _entering(planned: Iterable[Planned]) -> frozenset[str]:
    """The leaves that enter products whose activations are quantized."""
    operands = (operand for p in planned if p.act is not None for operand in p.site.operands)
    return frozenset(path for o in operands for path in (o.params if o.leaf is None else (o.leaf,)))


def _layout_claims(program: Program) -> dict[Location, Claim]:
    """Claims that let codes pass through the layout operations between a leaf and its product."""
    found = {}
    for op in program.flow.ops:
        if not BARRED.isdisjoint(op.inside):
            continue
        if op.name in LAYOUT and _is_exact(op.tags[0]):
            found[op.location] = Claim(partial(moved, op))
        elif op.name in JOINS and all(map(_is_exact, op.tags)):
            found[op.location] = Claim(partial(joined, op))
    return found


def _is_exact(tag: Tag) -> bool:
    """Whether a value is a leaf, moved or cast at most."""
    return tag.origin is not None and tag.origin.exact


def factored(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
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
    def thin(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return run_thin(params, None, *args, **kwargs)

    return thin
