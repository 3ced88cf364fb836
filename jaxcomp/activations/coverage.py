"""``coverage``: what a quantized function does at each site, and where it does nothing, why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps

import jax
import jax.numpy as jnp

from jaxcomp.activations.demands import Done, Seen, put
from jaxcomp.activations.execution import Mode
from jaxcomp.activations.function import Call
from jaxcomp.activations.planning import Planned, Rules, assigned
from jaxcomp.core.leaves import is_compressed, method_of
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.trace.program import is_array_like, shapes_of, trace
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.sites import sites_of, unread


@dataclass(frozen=True)
class Covered:
    """What is done at one site.

    Attributes:
      path: of the site, or of the scope of an operation that nothing can look into, or that no rule reads.
      kind: "dot", "ragged", "conv", "embed", or that operation's primitive.
      done: "integer" or "float8" (the product runs on codes), "fake" (activations rounded in float), "lookup" (rows of
        a table of codes), "factored" or "fake, factored" (thin products), "weight-only" (the product reads the packed
        bytes of a prepared weight), or "exact" (activations as they are; the weight as the tree has it).
      weight: what the tree holds; empty between activations.
      activations: the rule's ``Act`` or ``Float8``, or empty.
      why: why no more was done.
      form: how the product runs, where there are several ways and jaxcomp chooses.
    """

    path: str
    kind: str
    done: str
    weight: str
    activations: str
    why: str
    form: str = ""


@dataclass(frozen=True)
class Coverage:
    """The rows of a coverage report; ``print`` it for a table."""

    rows: tuple[Covered, ...]

    @property
    def left(self) -> tuple[Covered, ...]:
        """The sites where less was done than the rules can ask for."""
        return tuple(row for row in self.rows if row.why)

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("site", "kind", "done", "form", "weight", "activations", "why no more")
        return [head, *((r.path, r.kind, r.done, r.form, r.weight, r.activations, r.why) for r in self.rows)]

    def __str__(self) -> str:
        return columns(self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._cells())


def coverage(fn: Callable[..., PyTree], rules: Rules, *, integer: bool = False) -> Callable[..., Coverage]:
    """What ``quantize_function(fn, rules, integer=integer)`` does with ``(params, *args)``, site by site.

    Nothing is computed and no ranges are needed; leaves may be ``jax.ShapeDtypeStruct``.

    Raises (the function that it gives): what ``quantize_function`` raises of rules.

    >>> from jaxcomp.activations.specs import Act
    >>> f = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> print(coverage(f, {"a": Act(8)})(p, jnp.ones((1, 2))))
    site  kind  done   weight   activations                 why no more
    a     dot   fake   float32  8 bits, asymmetric, Static
    b     dot   exact  float32                              no rule matches it
    """

    @wraps(fn)
    def covered(params: Params, *args: PyTree, **kwargs: PyTree) -> Coverage:
        program = trace(fn, shapes_of(params), *args, **kwargs)
        others = [Covered(path, name, "exact", "", "", why) for path, name, why in unread(program)]
        if others and not sites_of(program):
            return Coverage(tuple(others))  # no rule could match
        call = Call(program, assigned(program, rules), params, args, kwargs)
        seen = _seen(call, integer)
        leaves = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
        rows = [_covered(p, seen, leaves) for p in call.planned]
        return Coverage((*rows, *others))

    return covered


def _seen(call: Call, integer: bool) -> Seen:
    """What is done at each site, found by running the quantized function on shapes."""
    leaves, tree = jax.tree.flatten((call.params, call.args, call.kwargs))
    arrays = [leaf for leaf in leaves if is_array_like(leaf)]
    seen: Seen = {}

    def flat(values: list[jax.Array]) -> PyTree:
        left = iter(values)
        filled = [next(left) if is_array_like(leaf) else leaf for leaf in leaves]
        params, args, kwargs = jax.tree.unflatten(tree, filled)
        ranges = {}
        for p in call.planned:
            for name in p.ranges.values():
                end = jnp.zeros(p.site.layer_steps, jnp.float32)
                ranges[name] = Range(end, end)
        given = replace(call, params=params, args=args, kwargs=kwargs)
        return given.run(ranges, Mode(integer), partial(put, seen))

    jax.eval_shape(flat, arrays)
    return seen


def _covered(p: Planned, seen: Seen, leaves: dict[str, Leaf]) -> Covered:
    done, why, form = seen.get(p.site.path, Done("exact", p.why))
    acts = "" if p.act is None else str(p.act)
    return Covered(p.site.path, p.site.kind, done, _weight(p, leaves), acts, "" if why is None else why.reason, form)


def _weight(p: Planned, leaves: dict[str, Leaf]) -> str:
    """What the tree holds for a site."""
    if p.site.weight is None:
        return ""
    leaf = leaves.get(p.site.leaf or "")
    if leaf is None:
        return "computed from " + ", ".join(p.site.operands[p.site.weight].params)
    return method_of(leaf)
