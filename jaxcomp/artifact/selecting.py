"""Parts of a tree, chosen in its JSON, so that nothing else of the file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxcomp.core.paths import matches, some_paths
from jaxcomp.core.types import Json

Only = str | Callable[[str], bool]
"""Selects leaves: a path, a regular expression that must match the whole path, or a predicate of the path."""


def leaves_of(node: Json, path: str = "", depth: int = 0) -> Iterator[tuple[str, Json]]:
    """The leaves of a tree with their paths: what is no dict, list or tuple."""
    items = _items(node)
    if items is None:
        yield path, node
        return
    for key, inner in items:
        yield from leaves_of(inner, f"{path}/{key}" if depth else str(key), depth + 1)


def chosen(tree: Json, only: Only) -> Json:
    """The tree with the leaves that are selected: others are left out of dicts, and are None in lists and tuples.

    Raises:
      ValueError: none is selected.

    >>> chosen({"dict": [["a", {"list": [0, 1]}], ["b", 2]]}, "a/1")
    {'dict': [['a', {'list': [{'value': None}, 1]}]]}
    """
    found = {path for path, _ in leaves_of(tree) if _selects(only, path)}
    if not found:
        raise ValueError(
            f"holds no leaf that only={only!r} selects; it has {some_paths(p for p, _ in leaves_of(tree))}"
        )
    return _kept(tree, found, ("", 0))


def _selects(only: Only, path: str) -> bool:
    return matches(only, path, None) if isinstance(only, str) else bool(only(path))


def _kept(node: Json, found: set[str], at: tuple[str, int]) -> Json:
    path, depth = at
    items = _items(node)
    if items is None:
        return node if path in found else None
    kept = [(k, _kept(v, found, (f"{path}/{k}" if depth else str(k), depth + 1))) for k, v in items]
    if all(v is None for _, v in kept):
        return None
    (kind,) = node
    if kind == "dict":
        return {kind: [[k, v] for k, v in kept if v is not None]}
    return {kind: [{"value": None} if v is None else v for _, v in kept]}


def _items(node: Json) -> list[tuple[Json, Json]] | None:
    if not isinstance(node, dict) or len(node) != 1:
        return None
    ((kind, inside),) = node.items()
    if kind == "dict":
        return [(k, v) for k, v in inside]
    return list(enumerate(inside)) if kind in ("list", "tuple") else None
