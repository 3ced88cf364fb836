"""What a file holds, in the containers of another tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import path_keys
from jaxcomp.core.types import Leaf, PyTree


def shaped_like(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves of ``tree`` in the containers of ``like``, whose leaves have the same paths and shapes.

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
    return jax.tree.unflatten(treedef, [found[p] for p, _ in wanted])


def _named(tree: PyTree) -> list[tuple[tuple[str, ...], Leaf]]:
    """Leaves by the keys of their paths, which no other leaf has, as a path may be that of two."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [(path_keys(p), leaf) for p, leaf in flat]


def _path(keys: tuple[str, ...]) -> str:
    return "/".join(keys)


def _shape_of(x: Leaf) -> tuple[int, ...]:
    return tuple(x.shape) if is_compressed(x) else tuple(jnp.shape(x))
