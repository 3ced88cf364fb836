"""The walk that finds by which rotations the parameters of a program may be turned, its results staying the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcomp.core.roles import CONTRACTED, OUTPUT
from jaxcomp.ptq.rewrites.labels import Factors
from jaxcomp.ptq.rewrites.walking import roles_of
from jaxcomp.trace import nested, walk
from jaxcomp.trace.primitives import COPIES, PASSES, SUMS
from jaxcomp.trace.products import dot_numbers
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, aval_of, shape_of

EVEN = 0
"""Along this dimension nothing is turned."""


@dataclass(frozen=True)
class Turn:
    """Along each dimension of an array: the rotation that it may be turned by, and whether it is the same everywhere.

    A negative name is the square, element by element, of what is turned: only its sum stays.
    """

    shape: tuple[int, ...]
    by: tuple[int, ...]
    uniform: tuple[bool, ...]


def _still(shape: Sequence[int], *, uniform: bool = False) -> Turn:
    return Turn(tuple(shape), (EVEN,) * len(shape), tuple(uniform or n == 1 for n in shape))


class Axis(NamedTuple):
    """An axis of a leaf, and the name of its rotation."""

    path: str
    axis: int
    size: int
    name: int


def turns_of(program: Program, ones: set[str]) -> list[Axis]:
    """The axes of leaves that may be turned, all of one name together; ``ones`` are leaves that hold nothing else.

    Any orthogonal matrix that keeps the vector of ones will do: it keeps sums of squares, and means.
    """
    factors = Factors()
    known = roles_of(program)
    axes: list[Axis] = []
    ins = []
    for i, v in enumerate(program.jaxpr.jaxpr.invars):
        shape = shape_of(v)
        path = program.param_paths[i] if i < len(program.param_paths) else ""
        if not path or not jnp.issubdtype(aval_of(v).dtype, jnp.floating) or path in ones:
            ins.append(_still(shape, uniform=path in ones and bool(path)))
            continue
        roles = known.get(path, (OUTPUT,) * len(shape)) or ()
        wide = [a for a, n in enumerate(shape) if n > 1 and a < len(roles) and roles[a] in (CONTRACTED, OUTPUT)]
        own = [Axis(path, a, shape[a], int(factors.fresh(()))) for a in wide]
        axes += own
        names = {a.axis: a.name for a in own}
        ins.append(Turn(shape, tuple(names.get(a, EVEN) for a in range(len(shape))), tuple(n == 1 for n in shape)))
    outs = _Walk(factors).run(program.jaxpr, ins)
    for out in outs:
        _freeze(factors, *out.by)
    (solved,) = factors.solved(np.array([a.name for a in axes], np.int64))
    return [a._replace(name=int(name)) for a, name in zip(axes, solved, strict=True) if name]


def _freeze(factors: Factors, *names: int) -> None:
    for name in names:
        _tie(factors, abs(name), EVEN)


def _tie(factors: Factors, a: int, b: int) -> None:
    factors.tie(np.array([a], np.int64), np.array([b], np.int64))


class _Walk:
    """One walk."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def run(self, jaxpr: nested.Closed, ins: Sequence[Turn]) -> list[Turn]:
        return walk.run(jaxpr, ins, self.equation, constant=lambda v: _still(np.shape(v), uniform=np.ndim(v) == 0))

    def equation(self, eqn: core.JaxprEqn, location: Location, ins: list[Turn]) -> list[Turn]:
        body = nested.call_body(eqn)
        if body is not None:
            return self.run(body, ins)
        rule = _RULES.get(eqn.primitive.name)
        found = None if rule is None else rule(self.factors, eqn, ins)
        return self.unknown(eqn, ins) if found is None else found

    def unknown(self, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn]:
        """What goes in is not turned; what is the same everywhere stays so."""
        for x in ins:
            _freeze(self.factors, *x.by)
        (first, *more) = eqn.outvars
        shape = shape_of(first)
        alike = [x for x in ins if len(x.shape) == len(shape)]
        elementwise = not more and all(len(x.shape) in (len(shape), 0) for x in ins) and bool(ins)
        elementwise = elementwise and eqn.primitive.name in _EACH
        even = tuple(n == 1 or (elementwise and all(x.uniform[d] for x in alike)) for d, n in enumerate(shape))
        return [Turn(shape, (EVEN,) * len(shape), even), *(_still(shape_of(v)) for v in more)]


_EACH = {"rsqrt", "sqrt", "max", "min", "pow", "exp", "log", "integer_pow", "square", "add", "sub", "mul", "div", "neg"}
"""Elementwise: where all operands are the same along a dimension, the result is."""
_Rule = Callable[[Factors, core.JaxprEqn, list[Turn]], list[Turn] | None]


def _same(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    floats = all(jnp.issubdtype(aval_of(v).dtype, jnp.inexact) for v in eqn.outvars)
    return ins if floats else None


def _wide(x: Turn, shape: tuple[int, ...]) -> Turn:
    """An operand as it is used, where one index is stretched and a number stands for all."""
    return Turn(shape, x.by, x.uniform) if len(x.shape) == len(shape) else _still(shape, uniform=True)


def _sum(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    shape = shape_of(eqn.outvars[0])
    a, b = (_wide(x, shape) for x in ins)
    by = []
    for d in range(len(shape)):
        if b.uniform[d] and not a.uniform[d] and a.by[d] >= 0:
            by.append(a.by[d])
        elif a.uniform[d] and not b.uniform[d] and b.by[d] >= 0:
            by.append(b.by[d])
        else:
            squares = a.by[d] < 0 or b.by[d] < 0
            _tie(factors, abs(a.by[d]), EVEN if squares else b.by[d])
            _tie(factors, abs(b.by[d]), EVEN if squares else a.by[d])
            by.append(EVEN if squares or EVEN in (a.by[d], b.by[d]) else a.by[d])
    return [Turn(shape, tuple(by), tuple(x and y for x, y in zip(a.uniform, b.uniform, strict=True)))]


def _product(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    shape = shape_of(eqn.outvars[0])
    if eqn.invars[0] is eqn.invars[1] and eqn.primitive.name == "mul":
        return _square(factors, eqn, ins[:1])
    a, b = (_wide(x, shape) for x in ins)
    by = []
    for d in range(len(shape)):
        if b.uniform[d]:
            by.append(a.by[d])
        elif a.uniform[d] and eqn.primitive.name == "mul":
            by.append(b.by[d])
        else:
            _freeze(factors, a.by[d], b.by[d])
            by.append(EVEN)
    return [Turn(shape, tuple(by), tuple(x and y for x, y in zip(a.uniform, b.uniform, strict=True)))]


def _square(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    if eqn.params.get("y", 2) != 2 or any(name < 0 for name in ins[0].by):
        return None
    turned = [d for d, name in enumerate(ins[0].by) if name]
    if len(turned) > 1:
        _freeze(factors, *(ins[0].by[d] for d in turned[:-1]))
    last = turned[-1] if turned else -1
    return [Turn(ins[0].shape, tuple(-n if d == last else EVEN for d, n in enumerate(ins[0].by)), ins[0].uniform)]


def _reduced(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    """Sums over what is turned, and over its squares, stay; a square over which is not summed does not."""
    (x,), axes = ins, eqn.params["axes"]
    kept = [d for d in range(len(x.shape)) if d not in axes]
    _freeze(factors, *(x.by[d] for d in kept if x.by[d] < 0))
    by = tuple(max(x.by[d], EVEN) for d in kept)
    return [Turn(shape_of(eqn.outvars[0]), by, tuple(x.uniform[d] for d in kept))]


def _moved(x: Turn, shape: Sequence[int], at: Mapping[int, int]) -> Turn:
    by, uniform = [EVEN] * len(shape), [True] * len(shape)
    for d, e in at.items():
        if x.shape[d] == shape[e]:
            by[e], uniform[e] = x.by[d], x.uniform[d]
    return Turn(tuple(shape), tuple(by), tuple(uniform))


def _transposed(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    return [_moved(ins[0], shape_of(eqn.outvars[0]), {d: i for i, d in enumerate(eqn.params["permutation"])})]


def _broadcast(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    return [_moved(ins[0], eqn.params["shape"], dict(enumerate(eqn.params["broadcast_dimensions"])))]


def _reshaped(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    """A dimension that is neither merged nor split stays as it is."""
    x, new = ins[0], shape_of(eqn.outvars[0])
    at: dict[int, int] = {}
    for d, n in enumerate(x.shape):
        before = int(np.prod(x.shape[:d], dtype=np.int64))
        for e, m in enumerate(new):
            if n == m and n > 1 and int(np.prod(new[:e], dtype=np.int64)) == before:
                at[d] = e
    _freeze(factors, *(name for d, name in enumerate(x.by) if d not in at))
    whole = all(d in at or n == 1 for d, n in enumerate(x.shape))
    return [_moved(x, new, at) if whole else _loose(_moved(x, new, at), at)]


def _loose(x: Turn, at: Mapping[int, int]) -> Turn:
    known = set(at.values())
    return Turn(x.shape, x.by, tuple(u if d in known else x.shape[d] == 1 for d, u in enumerate(x.uniform)))


def _cut(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    """What is taken whole along a dimension stays as it is there."""
    outs = []
    for v in eqn.outvars:
        shape = shape_of(v)
        if len(shape) != len(ins[0].shape):
            return None
        _freeze(factors, *(n for n, a, b in zip(ins[0].by, ins[0].shape, shape, strict=True) if a != b))
        at = {d: d for d, n in enumerate(shape) if n == ins[0].shape[d]}
        outs.append(_loose(_moved(ins[0], shape, at), at))
    return outs


def _squeezed(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    gone = {d % len(ins[0].shape) for d in eqn.params["dimensions"]}
    at = {d: i for i, d in enumerate(d for d in range(len(ins[0].shape)) if d not in gone)}
    return [_moved(ins[0], shape_of(eqn.outvars[0]), at)]


def _joined(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    axis, shape = eqn.params["dimension"], shape_of(eqn.outvars[0])
    by = []
    for d in range(len(shape)):
        names = [x.by[d] for x in ins]
        bad = d == axis or min(names) < 0 or EVEN in names
        for name in names:
            _tie(factors, abs(name), EVEN if bad else names[0])
        by.append(EVEN if bad else names[0])
    return [Turn(shape, tuple(by), _still(shape).uniform)]


def _looked_up(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (table, *rest), shape = ins, shape_of(eqn.outvars[0])
    apart = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(table.shape)) if d not in apart]
    at = {d: e for d, e in zip(kept, numbers.offset_dims, strict=True) if sizes[d] == table.shape[d]}
    _freeze(factors, *(n for d, n in enumerate(table.by) if d not in at), *(n for x in rest for n in x.by))
    return [_loose(_moved(table, shape, at), at)]


def _dotted(factors: Factors, eqn: core.JaxprEqn, ins: list[Turn]) -> list[Turn] | None:
    contract, batch = dot_numbers(eqn)
    if any(name < 0 for x in ins for name in x.by):
        return None
    for a, b in zip(*contract, strict=True):
        _tie(factors, ins[0].by[a], ins[1].by[b])
    _freeze(factors, *(ins[side].by[d] for side in (0, 1) for d in batch[side]))
    by = [EVEN] * len(batch[0])
    for side, x in enumerate(ins):
        by += [x.by[d] for d in range(len(x.shape)) if d not in (*batch[side], *contract[side])]
    shape = shape_of(eqn.outvars[0])
    return [Turn(shape, tuple(by), _still(shape).uniform)]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys((*COPIES, *PASSES, "neg"), _same),
    **dict.fromkeys((*SUMS, "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(("slice", "dynamic_slice", "split"), _cut),
    "reduce_sum": _reduced,
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "concatenate": _joined,
    "gather": _looked_up,
    "dot_general": _dotted,
}


def turned(leaf: jax.Array, axis: int, q: jax.Array) -> jax.Array:
    """``leaf`` with its ``axis`` turned by ``q``."""
    wide = jnp.moveaxis(leaf.astype(jnp.float32), axis, -1)
    return jnp.moveaxis(jnp.matmul(wide, q, precision="highest"), -1, axis).astype(leaf.dtype)
