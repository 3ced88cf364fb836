"""The walk that finds by which factors the parameters of a program may be multiplied, its results staying the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcomp.core.roles import BATCH, CONTRACTED, OUTPUT, STACKED
from jaxcomp.ptq.rewrites.labels import Block, Factors, Ids, Label, tied
from jaxcomp.ptq.rewrites.product_rules import RULES
from jaxcomp.ptq.rewrites.rules import plain, unknown
from jaxcomp.trace import nested, walk
from jaxcomp.trace.program import Program
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Location, aval_of, shape_of

_SMALL = 1 << 22
"""A leaf that no product reads has a factor for each element, up to this many."""


@dataclass(frozen=True)
class Slice:
    """Factors of a leaf: ``ids`` over its ``axes``; ``input`` says that they multiply what a product sums over."""

    path: str
    axes: tuple[int, ...]
    ids: Ids
    input: bool
    kernel: bool


def slices_of(program: Program) -> list[Slice]:
    """Every factor that some leaf may have, equal ones with equal names; 0 is one, and ``-k`` the inverse of ``k``."""
    factors = Factors()
    kinds = roles_of(program)
    slices: list[Slice] = []
    ins = []
    for i, v in enumerate(program.jaxpr.jaxpr.invars):
        if i >= len(program.param_paths) or not jnp.issubdtype(aval_of(v).dtype, jnp.floating):
            ins.append(plain(v))
            continue
        path, shape = program.param_paths[i], shape_of(v)
        parts = _parts(kinds.get(path), shape)
        own = [Slice(path, axes, factors.fresh([shape[a] for a in axes]), *kind) for axes, *kind in parts]
        slices += own
        ins.append(Label(shape, tuple(Block(s.axes, s.ids) for s in own)))
    outs = _Walk(factors).run(program.jaxpr, ins)
    factors.freeze(*(block for label in outs for block in label.blocks))
    solved = factors.solved(*(s.ids for s in slices))
    return [replace(s, ids=ids) for s, ids in zip(slices, solved, strict=True)]


def roles_of(program: Program) -> dict[str, tuple[str, ...] | None]:
    """The roles of the axes of each leaf that a product or lookup reads; None where two do not agree."""
    kinds: dict[str, tuple[str, ...] | None] = {}
    for site in sites_of(program):
        for operand in site.operands:
            if operand.leaf is not None:
                roles = operand.leaf_roles
                kinds[operand.leaf] = roles if kinds.get(operand.leaf, roles) == roles else None
    return kinds


def _parts(roles: tuple[str, ...] | None, shape: Sequence[int]) -> list[tuple[tuple[int, ...], bool, bool]]:
    """The sets of a leaf's axes that have factors together; whether they are summed over; whether it is a weight."""
    if roles is None:
        wide = [i for i, n in enumerate(shape) if n > 1]
        if not wide:
            return []
        return [(tuple(wide) if int(np.prod(shape)) <= _SMALL else (wide[-1],), False, False)]
    front = [i for i, role in enumerate(roles) if role in (STACKED, BATCH)]
    found = []
    for role in (CONTRACTED, OUTPUT):
        own = [i for i, r in enumerate(roles) if r == role and shape[i] > 1]
        if own:
            found.append((tuple(sorted(front + own)), role == CONTRACTED, True))
    return found


class _Walk:
    """One walk; ``depth`` is how many scans are around."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def run(self, jaxpr: nested.Closed, ins: Sequence[Label]) -> list[Label]:
        return walk.run(jaxpr, ins, self.equation, constant=_constant)

    def equation(self, eqn: core.JaxprEqn, location: Location, ins: list[Label]) -> list[Label]:
        body = nested.call_body(eqn)
        if body is not None:
            return self.run(body, ins)
        match eqn.primitive.name:
            case "scan":
                return self.scan(eqn, ins)
            case "cond":
                choice, *operands = ins
                self.factors.freeze(*choice.blocks)
                results = [self.run(branch, operands) for branch in nested.branches(eqn)]
                return [tied(self.factors, alike) for alike in zip(*results, strict=True)]
        return list(RULES.get(eqn.primitive.name, unknown)(self.factors, eqn, ins))

    def scan(self, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
        """The body once, for all steps: each has factors of its own, and what is carried the same at every step."""
        parts = nested.scan_parts(eqn)
        split = parts.consts + parts.carry
        outer = [_entered(x) for x in ins[:split]]
        results = self.run(parts.body, [*outer, *(_step(x) for x in ins[split:])])
        carried = [replace(x, null=False) for x in outer[parts.consts :]]
        for before, after in zip(carried, results, strict=False):
            tied(self.factors, [before, replace(after, null=False)])
        ys = [_stacked(x, parts.length) for x in results[parts.carry :]]
        return [*(replace(x, null=False) for x in ins[parts.consts : split]), *ys]


def _entered(x: Label) -> Label:
    """A value from outside a scan, the same at every step."""
    return replace(x, blocks=tuple(Block(b.dims, _more(b)) for b in x.blocks))


def _more(b: Block) -> Ids:
    front = b.ids.ndim - len(b.dims)
    return b.ids.reshape(*b.ids.shape[:front], 1, *b.ids.shape[front:])


def _step(x: Label) -> Label:
    """One step's slice of what is scanned."""
    blocks = []
    for b in x.blocks:
        front = b.ids.ndim - len(b.dims)
        ids = np.moveaxis(b.ids, front + b.dims.index(0), front) if 0 in b.dims else _more(b)
        blocks.append(Block(tuple(d - 1 for d in b.dims if d != 0), ids))
    return Label(x.shape[1:], tuple(blocks), x.null)


def _stacked(x: Label, length: int) -> Label:
    """What the steps gave, side by side."""
    blocks = []
    for b in x.blocks:
        front = b.ids.ndim - len(b.dims) - 1
        if b.ids.shape[front] == 1:
            blocks.append(Block(tuple(d + 1 for d in b.dims), b.ids.squeeze(front)))
        else:
            blocks.append(Block((0, *(d + 1 for d in b.dims)), b.ids))
    return Label((length, *x.shape), tuple(blocks), x.null)


def _constant(value: jax.Array) -> Label:
    """The label of a number or a constant array: of zero any factor is one."""
    zero = np.ndim(value) == 0 and not isinstance(value, jax.core.Tracer) and _is_zero(value)
    return Label(np.shape(value), (), zero)


def _is_zero(value: jax.Array) -> bool:
    dtype = getattr(value, "dtype", np.dtype(np.float32))
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and bool(value == 0)
