"""What a file holds, in the containers of another tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import path_keys
from jaxcomp.core.types import Leaf, PyTree

Keys = tuple[str, ...]


def shaped_like(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves of ``tree`` in the containers of ``like``, whose leaves have the same paths, shapes and types.

    Lists and tuples are what they are in both; where a file has a dict, ``like`` may have any container of such keys.

    Raises:
      ValueError: the trees differ; names the path.
    """
    found = dict(_named(tree))
    wanted = _named(like)
    treedef = jax.tree.structure(like, is_leaf=is_compressed)
    missing = [p for p, _ in wanted if p not in found]
    extra = sorted(set(found) - {p for p, _ in wanted})
    if missing or extra:
        what = f"lacks {_path(missing[0])!r}" if missing else f"holds {_path(extra[0])!r}, which the tree does not"
        raise ValueError(f"{what}; it is of another model than the tree given as like=")
    for p, leaf in wanted:
        if hasattr(leaf, "shape") and tuple(leaf.shape) != _shape_of(found[p]):
            raise ValueError(f"holds {_path(p)!r} of shape {_shape_of(found[p])}, wanted {tuple(leaf.shape)}")
        if hasattr(leaf, "dtype") and _type_of(leaf) != _type_of(found[p]):
            raise ValueError(f"holds {_path(p)!r} of type {_type_of(found[p])}, wanted {_type_of(leaf)}")
    kinds = dict(_sequences(like, ()))
    for p, kind in _sequences(tree, ()):
        if p in kinds and kinds[p] != kind:
            raise ValueError(f"holds a {kind} at {_path(p)!r}, wanted a {kinds[p]}")
    return jax.tree.unflatten(treedef, [found[p] for p, _ in wanted])


def _named(tree: PyTree) -> list[tuple[Keys, Leaf]]:
    """Leaves by the keys of their paths, which no other leaf has, as a path may be that of two."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [(path_keys(p), leaf) for p, leaf in flat]


def _sequences(tree: PyTree, at: Keys) -> Iterator[tuple[Keys, str]]:
    """Containers that hold something: "list", "tuple", or "dict" for any other."""
    if is_compressed(tree):
        return
    inside, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if not inside or inside[0][0] == ():
        return
    yield at, type(tree).__name__ if type(tree) in (list, tuple) else "dict"
    for keys, x in inside:
        yield from _sequences(x, (*at, *path_keys(keys)))


def _path(keys: Keys) -> str:
    return "/".join(keys)


def _shape_of(x: Leaf) -> tuple[int, ...]:
    return tuple(x.shape) if is_compressed(x) else tuple(jnp.shape(x))


def _type_of(x: Leaf) -> Any:
    return x.dtype if hasattr(x, "dtype") else type(x).__name__
