"""Adapted leaves in a program: each product runs on the base as it is, and on the adapter's factors beside it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.codes import LAYOUT
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.thin_products import ThinOp
from jaxcomp.activations.thin_values import ThinValue, factors_of, moved
from jaxcomp.adapters.leaves import Adapted
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Params
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, Value

ToArray = Callable[[Any], jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=["base", "delta"], meta_fields=["scaling"])
@dataclass(frozen=True)
class Beside:
    """``value == base + scaling * delta``, each moved and cast as the value was.

    Attributes:
      base: whatever stands for the frozen leaf.
      delta: the adapter's factors.
      scaling: a number, static.
    """

    base: Value
    delta: ThinValue
    scaling: float

    def dense(self, to_array: ToArray) -> jax.Array:
        """The array that both stand for."""
        base = to_array(self.base)
        wide = compute_dtype(base.dtype)
        return (base.astype(wide) + to_array(self.delta).astype(wide) * self.scaling).astype(base.dtype)


def apart(params: Params) -> tuple[Params, dict[str, Adapted]]:
    """The tree with frozen bases in place of the adapted leaves that run thin, and those leaves by path."""
    named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
    found = {path: leaf for path, leaf in named if isinstance(leaf, Adapted) and factors_of(leaf.delta) is not None}
    if not found:
        return params, found
    bases = [jax.lax.stop_gradient(found[path].base) if path in found else leaf for path, leaf in named]
    return treedef.unflatten(bases), found


def put_beside(program: Program, values: Sequence[Value], adapters: Mapping[str, Adapted]) -> list[Value]:
    """The program's inputs with each adapter beside its base."""
    paths = (*program.param_paths, *("",) * (len(values) - len(program.param_paths)))
    return [
        Beside(value, cast(ThinValue, factors_of(adapters[path].delta)), adapters[path].scaling)
        if path in adapters
        else value
        for path, value in zip(paths, values, strict=True)
    ]


def with_adapters(
    program: Program,
    planned: Iterable[Planned],
    claims: Mapping[Location, Claim],
    *,
    adapters: Container[str],
    to_array: ToArray,
) -> dict[Location, Claim]:
    """Claims as they are made for the bases, so that they take adapters along; others on adapted leaves are dropped."""
    sites = {p.site.location: p for p in planned}
    changed = dict(claims)
    for op in program.flow.ops:
        origins = [t.origin for t in op.tags if t.origin is not None and t.origin.path in adapters]
        if not origins:
            continue
        found = changed.pop(op.location, None)
        if not BARRED.isdisjoint(op.inside):
            continue
        run = _Both(op, found, to_array)
        if op.location in sites:
            changed[op.location] = Claim(run.product) if found is None else Claim(run.product, found.side)
        elif op.name in LAYOUT and op.tags[0].origin in origins and op.tags[0].origin.exact:
            changed[op.location] = Claim(run.layout)
    return changed


@dataclass(frozen=True)
class _Both:
    """An equation done for the base, as its claim does it, and for the adapter.

    Attributes:
      op: the equation.
      claim: how it is done for a base, if in another way than as it stands.
      to_array: gives what stands for an array as one.
    """

    op: Op
    claim: Claim | None
    to_array: ToArray

    def layout(self, value: Value, *rest: Value) -> Sequence[Value]:
        """A value moved: its base and its adapter alike."""
        if not isinstance(value, Beside):
            return self._of_base(value, *rest)
        bases = self._of_base(value.base, *rest)
        deltas = moved(self.op, value.delta, *cast(Sequence[jax.Array], rest))
        return [Beside(base, delta, value.scaling) for base, delta in zip(bases, deltas, strict=True)]

    def product(self, *given: Value) -> Sequence[Value]:
        """A product with the base, and beside it one with the adapter; the adapter meets activations as they are."""
        side, values = ((), given) if self.claim is None or self.claim.side is None else (given[:1], given[1:])
        at = [i for i, v in enumerate(values) if isinstance(v, Beside)]
        if len(at) != 1:  # both operands are adapted, or neither is any more
            return self._of_base(*side, *(self._dense(v) for v in values))
        beside = cast(Beside, values[at[0]])
        (base,) = self._of_base(*side, *(v.base if isinstance(v, Beside) else v for v in values))
        thin = ThinOp.of(self.op, lambda why: None, "")
        (delta,) = thin.bind(*(v.delta if isinstance(v, Beside) else v for v in values))
        dtype = result_of(self.op).dtype
        wide = compute_dtype(dtype)
        total = self.to_array(base).astype(wide) + self.to_array(delta).astype(wide) * beside.scaling
        return [total.astype(dtype)]

    def _of_base(self, *given: Value) -> Sequence[Value]:
        if self.claim is not None:
            results = self.claim.run(*given)
            assert not isinstance(results, Emitted)  # nothing is gathered here
            return results
        return self.op.bind(*(v if v is None else self.to_array(v) for v in given))

    def _dense(self, value: Value) -> Value:
        return value.dense(self.to_array) if isinstance(value, Beside) else value
