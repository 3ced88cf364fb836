"""Names of leaves: key paths as "block/Dense_0/kernel" strings, and rules that select them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Where = str | Callable[[str, Any], bool]
"""Selects leaves: a regular expression that must match the whole path, or a predicate of ``(path, leaf)``."""

# Last path components that hold a per-feature vector, not a matrix, even when layers are stacked in front.
_VECTORS = re.compile(r"(.*_)?(bias|b|scale|offset|mean|var|gamma|beta)")


def path_str(key_path: Iterable[Any]) -> str:
    """A key path as a "/"-joined string.

    The last ``value`` of an ``nnx.State`` entry is dropped, so linen and NNX name a weight alike.

    >>> tree = {"block": [{"kernel": 1.0}]}
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['block/0/kernel']
    """
    keys = tuple(key_path)
    if (
        len(keys) > 1
        and isinstance(keys[-1], GetAttrKey)
        and keys[-1].name == "value"
        and isinstance(keys[-2], DictKey)
    ):
        keys = keys[:-1]
    return "/".join(_key_name(k) for k in keys)


def _key_name(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return str(key.name)
    return str(key)


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], jax.tree_util.PyTreeDef]:
    """``tree_flatten_with_path`` with string paths.

    Raises:
      ValueError: two leaves have the same path, as in ``{1: x, "1": y}``; rules could not tell them apart.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = [(path_str(p), leaf) for p, leaf in flat]
    seen: set[str] = set()
    for path, _ in named:
        if path in seen:
            raise ValueError(f"two leaves are both named {path!r}: rules could not tell them apart; rename a key.")
        seen.add(path)
    return named, treedef


def is_float_array(leaf: Any) -> bool:
    """Whether ``leaf`` is an array (or a shape of one) of a floating type."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def matrices(path: str, leaf: Any) -> bool:
    """The default rule: floating arrays with two or more dimensions that are not named as a bias or a norm's scale.

    Those names are bias, b, scale, offset, mean, var, gamma and beta, also after an underscore: such an array has one
    dimension more where layers are stacked.

    >>> matrices("Dense_0/kernel", jnp.zeros((3, 4))), matrices("layers/bias", jnp.zeros((12, 4)))
    (True, False)
    """
    return is_float_array(leaf) and len(leaf.shape) >= 2 and not _VECTORS.fullmatch(path.rsplit("/", 1)[-1])


def everything(path: str, leaf: Any) -> bool:
    """A rule that selects every floating array."""
    return is_float_array(leaf)


def matches(where: Where, path: str, leaf: Any) -> bool:
    """Whether the rule ``where`` selects this leaf; a regular expression must match the whole path.

    >>> matches(r".*/kernel", "Dense_0/kernel", None), matches("kernel", "Dense_0/kernel", None)
    (True, False)
    """
    if isinstance(where, str):
        return _compiled(where).fullmatch(path) is not None
    return bool(where(path, leaf))


def describe(where: Where) -> str:
    """A rule as error messages show it."""
    return repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(
            f"rule {pattern!r} is not a regular expression: {e}; paths look like 'block/Dense_0/kernel'."
        ) from e


def some_paths(paths: Iterable[str], limit: int = 6) -> str:
    """A few paths for an error message."""
    every = list(paths)
    return ", ".join(repr(p) for p in every[:limit]) + (f", … ({len(every)} in all)" if len(every) > limit else "")


def key_of_leaf(key: Any, path: str) -> Any:
    """A key of its own for each path, whatever else is in the tree."""
    return None if key is None else jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
