"""What of adapted parameters trains and what is frozen, and how both become plain parameters again."""

from __future__ import annotations

import jax

from jaxcomp.adapters.leaves import Adapted, adapted_leaves
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import Where, describe, is_float_array, leaves_with_paths, matches, meant, path_str, some_paths
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Leaf, Params, PyTree


def merge(params: Params, transform: Transform | None = None) -> Params:
    """The parameters without adapters: an array of the very bits that ``materialize`` gives for each adapted leaf.

    Args:
      params: with the leaves that :func:`~jaxcomp.adapters.adapt.adapt` made.
      transform: compresses those arrays, ``quantize(Int(4))`` say. The sum of a quantized base and its adapter lies on
        no grid, so that rounds anew and is exact no longer; without it the arrays stay float.

    Raises:
      ValueError: no leaf is adapted, and what the transform raises.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.adapters import adapt
    >>> adapted = adapt({"kernel": jnp.eye(4)}, 2, key=jax.random.key(0))
    >>> bool((merge(adapted)["kernel"] == jnp.eye(4)).all())
    True
    """
    arrays = {path: dense(leaf) for path, leaf in adapted_leaves(params, "merge").items()}
    return replace_slots(
        params, arrays if transform is None else _compressed(checked_transform("merge", transform), arrays)
    )


def _compressed(transform: Transform, arrays: Params) -> Params:
    return transform.apply(transform.init(arrays), arrays)


def trainable(params: Params, where: Where | None = None) -> PyTree:
    """A tree of booleans like the parameters: True where an array trains, which are the adapters' factors.

    It is what ``optax.partition`` takes as labels, and what :func:`partition` splits by.

    Args:
      params: with the leaves that :func:`~jaxcomp.adapters.adapt.adapt` made.
      where: other leaves that train too, such as biases, norms or a head; a rule.

    Raises:
      ValueError: no leaf is adapted, or ``where`` matches nothing that could train.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.adapters import adapt
    >>> adapted = adapt({"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, 2, key=jax.random.key(0))
    >>> jax.tree.leaves(trainable(adapted)), jax.tree.leaves(trainable(adapted, "bias"))
    ([False, False, True, True], [True, False, True, True])
    """
    adapted_leaves(params, "trainable")
    named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
    also = {
        path
        for path, leaf in named
        if where is not None and is_float_array(leaf) and not is_compressed(leaf) and matches(where, path, leaf)
    }
    if where is not None and not also:
        raise ValueError(
            f"trainable: rule {describe(where)} matches no float array beside the adapters; the paths are"
            f" {some_paths(path for path, _ in named)}{meant(where, [path for path, _ in named])}."
        )
    marks = [_marked(leaf, path in also) for path, leaf in named]
    return treedef.unflatten(marks)


def _marked(leaf: Leaf, also: bool) -> Leaf:
    if not isinstance(leaf, Adapted):
        return jax.tree.map(lambda _: also, leaf)
    base = jax.tree.map(lambda _: False, leaf.base)
    return Adapted(base, jax.tree.map(is_float_array, leaf.delta), leaf.scaling)


def partition(params: Params, where: Where | None = None) -> tuple[Params, Params]:
    """What trains, and what is frozen: two trees like the parameters, None where an array is in the other one.

    An optimizer of the first has a state for it alone, and the codes of a packed base, which no gradient is taken of,
    stay out of the way: ``jax.grad(lambda trained: loss(combine(trained, frozen)))``.

    Args:
      params: with the leaves that :func:`~jaxcomp.adapters.adapt.adapt` made.
      where: other leaves that train too.

    Raises:
      ValueError: as :func:`trainable`.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.adapters import adapt
    >>> adapted = adapt({"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, 2, key=jax.random.key(0))
    >>> trained, frozen = partition(adapted)
    >>> [x.shape for x in jax.tree.leaves(trained)], [x.shape for x in jax.tree.leaves(frozen)]
    ([(4, 2), (2, 4)], [(4,), (4, 4)])

    Source: Equinox's ``partition`` and ``combine``.
    """
    marks = trainable(params, where)
    trained = jax.tree.map(lambda mark, x: x if mark else None, marks, params)
    frozen = jax.tree.map(lambda mark, x: None if mark else x, marks, params)
    return trained, frozen


def combine(trained: Params, frozen: Params) -> Params:
    """The parameters again, of the two trees that :func:`partition` gave.

    Args:
      trained, frozen: trees alike, each None where the other has an array.

    Raises:
      ValueError: trees that differ, or a place that both fill.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.adapters import adapt
    >>> adapted = adapt({"kernel": jnp.eye(4)}, 2, key=jax.random.key(0))
    >>> bool((combine(*partition(adapted))["kernel"].materialize() == jnp.eye(4)).all())
    True
    """

    def one(key_path: jax.tree_util.KeyPath, a: Leaf, b: Leaf) -> Leaf:
        if a is not None and b is not None:  # where both are None the parameters are, as a symmetric grid's zero point
            raise ValueError(
                f"combine: both trees have an array at {path_str(key_path)!r}; give the two trees of one partition."
            )
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(one, trained, frozen, is_leaf=lambda x: x is None)
