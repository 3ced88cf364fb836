"""The factors of what products sum over, and of what they give: dots and convolutions, beside the other rules."""

from __future__ import annotations

from dataclasses import replace

from jax.extend import core

from jaxcomp.ptq.rewrites.labels import Block, Factors, Label, tied
from jaxcomp.ptq.rewrites.rules import RULES, inverse, product, rule, unknown
from jaxcomp.trace.products import dot_numbers
from jaxcomp.trace.walk import shape_of

__all__ = ["RULES"]


@rule("dot_general")
def dotted(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """What is summed over is multiplied by a factor in one operand and by its inverse in the other."""
    contract, batch = dot_numbers(eqn)
    if any(label.null for label in ins):
        return [Label(shape_of(eqn.outvars[0]), (), True)]
    inner: list[Label] = []
    outer: list[Label] = []
    shape = shape_of(eqn.outvars[0])
    first = len(batch[0])
    for side, x in enumerate(ins):
        shared = [*batch[side], *contract[side]]
        free = [d for d in range(len(x.shape)) if d not in shared]
        summed = [b for b in x.blocks if set(b.dims) & set(contract[side])]
        lost = [b for b in summed if set(b.dims) & set(free)]
        factors.freeze(*lost)
        held = replace(x, blocks=tuple(b for b in summed if b not in lost))
        inner.append(held.moved([x.shape[d] for d in shared], {d: i for i, d in enumerate(shared)}))
        at = {d: i for i, d in enumerate(batch[side])} | {d: first + i for i, d in enumerate(free)}
        outer.append(replace(x, blocks=tuple(b for b in x.blocks if b not in summed)).moved(shape, at))
        first += len(free)
    tied(factors, [inner[0], inverse(inner[1])])
    return [product(factors, (outer[0], outer[1]), shape)]


@rule("conv_general_dilated")
def convolved(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """As a dot over the features; along a window, and where features are in groups, factors stay one."""
    p, (x, w) = eqn.params, ins
    numbers = p["dimension_numbers"]
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return unknown(factors, eqn, ins)
    parts = []
    for label, keep in ((x, (numbers.lhs_spec[1],)), (w, (numbers.rhs_spec[1],)), (w, (numbers.rhs_spec[0],))):
        parts.append([block for block in label.blocks if block.dims == keep])
    factors.freeze(*(b for label in ins for b in label.blocks if not any(b in part for part in parts)))
    size = (x.shape[numbers.lhs_spec[1]],)
    front = [Label(size, tuple(Block((0,), b.ids) for b in part)) for part in parts[:2]]
    tied(factors, [front[0], inverse(front[1])])
    return [Label(shape_of(eqn.outvars[0]), tuple(Block((numbers.out_spec[1],), b.ids) for b in parts[2]))]
