"""Names of leaves: key paths as "block/Dense_0/kernel" strings, and rules that select them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxcomp.core.meshes import here
from jaxcomp.core.records import named
from jaxcomp.core.types import Key, Leaf, PyTree

Where = str | Callable[[str, Leaf], bool]
"""Selects leaves: a path, a regular expression that must match the whole path, or a predicate of ``(path, leaf)``."""

# Last path components that hold a per-feature vector, not a matrix, even when layers are stacked in front.
_VECTORS = re.compile(r"(.*_)?(bias|scale|offset|mean|var|gamma|beta)")


def path_str(key_path: Iterable[object]) -> str:
    """A key path as a "/"-joined string.

    The last ``value`` of an ``nnx.State`` entry is dropped, so linen and NNX name a weight alike.

    Args:
      key_path: as ``jax.tree_util.tree_leaves_with_path`` gives it.

    >>> tree = {"block": [{"kernel": 1.0}]}
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['block/0/kernel']
    """
    return "/".join(path_keys(key_path))


def path_keys(key_path: Iterable[object]) -> tuple[str, ...]:
    """The components of :func:`path_str`, which tell ``{"a/b": x}`` from ``{"a": {"b": x}}``.

    >>> [path_keys(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a/b": 1.0, "a": {"b": 2.0}})]
    [('a', 'b'), ('a/b',)]
    """
    keys = tuple(key_path)
    if (
        len(keys) > 1
        and isinstance(keys[-1], GetAttrKey)
        and keys[-1].name == "value"
        and isinstance(keys[-2], DictKey)
    ):
        keys = keys[:-1]
    return tuple(_key_name(k) for k in keys)


def _key_name(key: object) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return str(key.name)
    return str(key)


def leaves_with_paths(
    tree: PyTree, is_leaf: Callable[[Leaf], bool] | None = None
) -> tuple[list[tuple[str, Leaf]], jax.tree_util.PyTreeDef]:
    """``tree_flatten_with_path`` with string paths.

    Args:
      tree: any pytree.
      is_leaf: as of ``jax.tree.leaves``.

    Raises:
      ValueError: two leaves have the same path, as in ``{1: x, "1": y}``; rules could not tell them apart.

    >>> [path for path, _ in leaves_with_paths({"Dense_0": {"kernel": 1.0, "bias": 2.0}, "scales": [3.0]})[0]]
    ['Dense_0/bias', 'Dense_0/kernel', 'scales/0']
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = [(path_str(p), leaf) for p, leaf in flat]
    seen: set[str] = set()
    for path, _ in named:
        if path in seen:
            raise ValueError(f"two leaves are both named {path!r}: rules could not tell them apart; rename a key.")
        seen.add(path)
    return named, treedef


def is_float_array(leaf: Leaf) -> bool:
    """Whether ``leaf`` is an array (or a shape of one) of a floating type."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


@partial(named, "matrices")
def matrices(path: str, leaf: Leaf) -> bool:
    """The default rule: floating arrays with two or more axes that are not named as a bias or a norm's scale.

    Those names are bias, scale, offset, mean, var, gamma and beta, also after an underscore: such an array has one axis
    more where layers are stacked.

    Args:
      path: of the leaf, such as "Dense_0/kernel".
      leaf: an array, or its shape.

    Raises:
      ValueError: an array of two or more axes whose whole name is "b", which may be a matrix or stacked biases.

    >>> matrices("Dense_0/kernel", jnp.zeros((3, 4))), matrices("layers/bias", jnp.zeros((12, 4)))
    (True, False)
    """
    name = path.rsplit("/", 1)[-1]
    if not is_float_array(leaf) or len(leaf.shape) < 2 or _VECTORS.fullmatch(name):
        return False
    if name == "b":
        raise ValueError(
            f"matrices: {path!r} of shape {tuple(leaf.shape)} may be a matrix, or the biases of stacked layers; say"
            " which by a rule of your own (where=), or by roles=jaxcomp.roles(fn)(params, *args) where it is taken."
        )
    return True


@partial(named, "everything")
def everything(path: str, leaf: Leaf) -> bool:
    """A rule that selects every floating array.

    Args:
      path: of the leaf, such as "Dense_0/bias".
      leaf: an array, or its shape.

    >>> everything("bias", jnp.zeros(3)), everything("count", jnp.zeros(3, int))
    (True, False)
    """
    return is_float_array(leaf)


def matches(where: Where, path: str, leaf: Leaf) -> bool:
    """Whether the rule ``where`` selects this leaf: it is the path, matches the whole of it, or says so.

    >>> matches(r".*/kernel", "Dense_0/kernel", None), matches("kernel", "Dense_0/kernel", None)
    (True, False)
    """
    if isinstance(where, str):
        return where == path or _compiled(where).fullmatch(path) is not None
    if not callable(where):
        raise TypeError(f"a rule is a regular expression or a predicate of (path, leaf), got {where!r}.")
    return bool(where(path, leaf))


def first_matches(
    rules: Iterable[Where], named: Iterable[tuple[str, Leaf]], *, owner: str, things: str = "paths"
) -> list[int | None]:
    """Reads an ordered table: of each named thing the place of the first rule that matches it, or None.

    Args:
      rules: in order.
      named: what they are tried on, by path.
      owner: whose table it is, for messages.
      things: what the paths name, for messages.

    Raises:
      ValueError: a rule that nothing is left for, or that is not a regular expression.

    >>> first_matches([r"head/.*", r".*kernel"], [("head/kernel", None), ("kernel", None), ("b", None)], owner="f")
    [0, 1, None]
    >>> first_matches([r".*", "head"], [("head", None)], owner="f")
    Traceback (most recent call last):
    ...
    ValueError: f: rule 'head' matches nothing that an earlier rule did not take; the paths are 'head'.
    """
    rules, named = list(rules), list(named)
    found = [next((i for i, where in enumerate(rules) if matches(where, path, x)), None) for path, x in named]
    for i, where in enumerate(rules):
        if i not in found:
            raise ValueError(
                f"{owner}: rule {describe(where)} matches nothing that an earlier rule did not take; the {things} are"
                f" {some_paths(path for path, _ in named)}{meant(where, [path for path, _ in named])}."
            )
    return found


def meant(where: Where, paths: Iterable[str]) -> str:
    """The end of a message on a rule that matches nothing: what to write where it matches a part of some path.

    >>> meant("kernel", ["Dense_0/kernel", "Dense_0/bias"])
    "; a rule matches the whole path, so write '.*kernel'"
    >>> meant("conv", ["kernel"]), meant(".*kernel", ["kernel"])
    ('', '')
    """
    paths = list(paths)
    if not isinstance(where, str) or any(matches(where, path, None) for path in paths):
        return ""
    wider = (f".*{where}", f"{where}.*", f".*{where}.*")
    found = next((rule for rule in wider if any(re.fullmatch(rule, path) for path in paths)), None)
    return "" if found is None else f"; a rule matches the whole path, so write {found!r}"


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
    listed = list(paths)
    return ", ".join(repr(p) for p in listed[:limit]) + (f", … ({len(listed)} in all)" if len(listed) > limit else "")


def key_of_leaf(key: Key, path: str) -> Key:
    """A key of its own for each path, whatever else is in the tree."""
    return jax.random.fold_in(here(key), np.uint32(zlib.crc32(path.encode())))
