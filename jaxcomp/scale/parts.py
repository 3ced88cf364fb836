"""Transforms taken apart by the record of the calls that made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jaxcomp.core.paths import first_matches
from jaxcomp.core.records import made_of
from jaxcomp.core.specs import Local
from jaxcomp.core.transform import Transform, by_path, chain
from jaxcomp.core.types import Leaf
from jaxcomp.pruning.specs import NM, Given
from jaxcomp.pruning.transform import prune

Seen = Mapping[str, Leaf]
"""Leaves by path, of shapes."""


def stand_in(t: Transform) -> Transform:
    """A transform whose states and leaves have the same shapes, and which counts no more units than a leaf has.

    Inside jit a threshold is of 2^31 - 1 units at most, which shapes alone have no need to meet.

    >>> from jaxcomp import Global, prune
    >>> stand_in(prune(0.5, scope=Global()))
    prune(0.0, scope=Local())
    """
    arguments = arguments_of(t)
    match name_of(t):
        case "chain":
            return chain(*map(stand_in, arguments["transforms"]))  # type: ignore[call-overload]
        case "by_path":
            return by_path({rule: stand_in(x) for rule, x in arguments["table"].items()})  # type: ignore[attr-defined]
        case "prune" if not isinstance(arguments.get("scope"), Given) and not isinstance(
            arguments.get("structure"), NM
        ):
            return prune(**{**arguments, "sparsity": 0.0, "scope": Local()})  # type: ignore[arg-type]
    return t


def atoms(t: Transform, seen: Seen, leaves: tuple[str, ...]) -> Iterator[tuple[Transform, tuple[str, ...]]]:
    """Transforms that are no table and no chain, in order, with the leaves that each is given."""
    name, arguments = name_of(t), arguments_of(t)
    if name == "chain":
        for inner in arguments["transforms"]:  # type: ignore[attr-defined]
            yield from atoms(inner, seen, leaves)
    elif name == "by_path":
        table: Mapping[str, Transform] = arguments["table"]  # type: ignore[assignment]
        named = [(path, seen[path]) for path in leaves]
        first = list(first_matches(list(table), named, owner="by_path"))
        for i, inner in enumerate(table.values()):
            yield from atoms(inner, seen, tuple(p for (p, _), n in zip(named, first, strict=True) if n == i))
    else:
        yield t, leaves


def name_of(t: Transform) -> str:
    """Of the constructor that made it, or nothing."""
    made = made_of(t)
    return made.name if made is not None else ""


def arguments_of(t: Transform) -> Mapping[str, object]:
    """Those that its constructor was given, by name."""
    made = made_of(t)
    return {} if made is None or made.arguments is None else made.arguments
