"""How each primitive hands tags on: layout and casts keep a leaf's axes, arithmetic keeps what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jax.extend import core

from jaxcomp.core.types import Shape
from jaxcomp.trace.primitives import ELEMENTWISE, SAME
from jaxcomp.trace.products import is_row
from jaxcomp.trace.tags import Origin, Tag, mixed
from jaxcomp.trace.walk import shape_of

Move = Callable[[core.JaxprEqn, Origin], Origin | None]


def _transpose(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.permuted(eqn.params["permutation"])


def _broadcast_in_dim(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.broadcast(len(eqn.params["shape"]), eqn.params["broadcast_dimensions"])


def _reshape(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.reshaped(shape_of(eqn.invars[0]), eqn.params["new_sizes"])


def _squeeze(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.without(eqn.params["dimensions"])


def _part(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o if shape_of(eqn.invars[0]) == shape_of(eqn.outvars[0]) else _cut(eqn, o)


def _cut(eqn: core.JaxprEqn, o: Origin) -> Origin:
    """A slice that takes one index of an axis still holds its slice whole."""
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return o if all(a == b or b == 1 for a, b in zip(before, after, strict=True)) else o.sliced()


def _rev(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.sliced() if eqn.params["dimensions"] else o


def _unstack(eqn: core.JaxprEqn, o: Origin) -> Origin:
    return o.without((eqn.params["axis"],))


def _tile(eqn: core.JaxprEqn, o: Origin) -> Origin:
    """Repeating one index is a broadcast; of several, an axis runs over its leaf axis more than once."""
    repeated = any(n > 1 < times for n, times in zip(shape_of(eqn.invars[0]), eqn.params["reps"], strict=True))
    return o.sliced() if repeated else o


def _gather(eqn: core.JaxprEqn, o: Origin) -> Origin | None:
    """One row is a slice; several are no view."""
    return o.without(eqn.params["dimension_numbers"].collapsed_slice_dims) if is_row(eqn) else None


MOVES: dict[str, Move] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _part,
    "dynamic_slice": _part,
    "split": _part,
    "rev": _rev,
    "gather": _gather,
    "tile": _tile,
    "unstack": _unstack,
}


def out_tags(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> list[Tag]:
    """The tags of an equation's results, from those of its operands."""
    name = eqn.primitive.name
    if name in SAME and len(eqn.outvars) == len(tags):
        return list(tags)
    if name in MOVES and tags[0].origin is not None:
        origin = MOVES[name](eqn, tags[0].origin)
        return [mixed(*tags, origin=origin)] * len(eqn.outvars)
    return [mixed(*tags, origin=_elementwise_origin(eqn, tags, shape_of(v))) for v in eqn.outvars]


def _elementwise_origin(eqn: core.JaxprEqn, tags: Sequence[Tag], shape: Shape) -> Origin | None:
    """The leaf that weight arithmetic follows: the first operand that is a leaf of the result's shape."""
    if eqn.primitive.name not in ELEMENTWISE or any(t.args for t in tags):
        return None
    for v, tag in zip(eqn.invars, tags, strict=True):
        if tag.origin is not None and shape_of(v) == shape and _covers(tag.origin, shape):
            return replace(tag.origin, exact=False)
    return None


def _covers(origin: Origin, shape: Shape) -> bool:
    return all(axes or size == 1 for axes, size in zip(origin.axes, shape, strict=True))
