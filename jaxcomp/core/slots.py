"""Slots: the arrays of a tree that a transform may rewrite, inside compressed leaves too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import CHUNK, in_host_memory
from jaxcomp.core.errors import count_known, naming
from jaxcomp.core.layouts import Blocks, Layout
from jaxcomp.core.leaves import CompressedLeaf, is_compressed
from jaxcomp.core.packed import Packed, unpacked
from jaxcomp.core.paths import Where, describe, is_float_array, leaves_with_paths, matches, matrices, meant, some_paths
from jaxcomp.core.roles import AxisRoles, Roles, roles_of
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.wrappers import Masked

S = TypeVar("S")
L = TypeVar("L", bound=CompressedLeaf)


@dataclass(frozen=True)
class Slot:
    """One array that is still open to change.

    Fields:
      path: the parameter's path, followed by the field's name inside a compressed leaf ("Dense_0/kernel/u").
      leaf_path: the parameter's path.
      array: the values.
      mask: of an earlier prune, or None.
      known: the roles of the array's axes, where the compressed leaf that holds it settles them.
    """

    path: str
    leaf_path: str
    array: jax.Array
    mask: jax.Array | None
    known: AxisRoles | None = None

    @property
    def full_mask(self) -> jax.Array | None:
        """The mask at the array's own shape, or None."""
        return None if self.mask is None else jnp.broadcast_to(self.mask, self.array.shape)

    def axes(self, roles: Roles | None) -> AxisRoles:
        """What the array's axes do: see :func:`~jaxcomp.core.roles.roles_of`, whose ValueError it raises."""
        return roles_of(self.leaf_path, len(self.array.shape), roles, self.known)

    def blocks(self, per: Layout, roles: Roles | None, owner: str) -> Blocks:
        """How ``per`` cuts the array.

        Raises:
          ValueError: it does not fit, or needs roles that are not known; the message names the path.
        """
        with naming(owner, self.path):
            return per.layout(tuple(self.array.shape), lambda: self.axes(roles))


def slots(tree: Params, where: Where, owner: str) -> dict[str, Slot]:
    """The slots that ``where`` selects, by path, in the tree's order.

    A rule is tried on the parameter's path and, inside a compressed leaf, on the slot's path.

    Args:
      tree: parameters, some of them perhaps compressed.
      where: a rule.
      owner: the transform's name, for messages.

    Raises:
      ValueError: nothing is selected, or a selected leaf is closed, not floating, empty, or (where its values are
        known) not finite. The message names the path.

    >>> list(slots({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, ".*", "mine"))
    ['bias', 'kernel']
    """
    named, _ = leaves_with_paths(tree, is_leaf=is_compressed)
    found: dict[str, Slot] = {}
    for leaf_path, leaf in named:
        for slot in _open_slots(leaf_path, leaf_path, leaf, None):
            if _selected(where, slot):
                _check(slot, owner)
                found[slot.path] = slot
    if not found:
        raise ValueError(
            f"{owner}: rule {describe(where)} matches nothing; the paths are {some_paths(p for p, _ in named)}"
            f"{meant(where, [p for p, _ in named])}."
        )
    return found


def replace_slots(tree: Params, new: Mapping[str, Leaf]) -> Params:
    """The tree with the leaves at the given slot paths replaced; all others are the same objects.

    Args:
      tree: parameters, some of them perhaps compressed.
      new: what takes the place, by the paths that :func:`slots` gives.

    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> new = replace_slots(params, {"kernel": jnp.zeros((2, 2))})
    >>> float(new["kernel"].sum()), new["bias"] is params["bias"]
    (0.0, True)
    """
    named, treedef = leaves_with_paths(tree, is_leaf=is_compressed)
    return treedef.unflatten([_replaced(path, leaf, new) for path, leaf in named])


def state_of(state: Mapping[str, S], path: str, owner: str) -> S:
    """What a transform's state holds for a path.

    Raises:
      ValueError: nothing; the state is of another tree.
    """
    if path not in state:
        raise ValueError(
            f"{owner}: the state has nothing for {path!r}, only for {some_paths(state) or 'no path'}; it was made for"
            " another tree: call init with this one."
        )
    return state[path]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array is of the rank of another, and 1 along an axis where it is not as long."""
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def weight_mask(params: Params, where: Where = matrices) -> PyTree:
    """A tree of booleans like the parameters: True where an array is a weight, which weight decay may shrink.

    False are what ``where`` leaves out (the default: vectors, biases, a norm's scales) and, inside a compressed leaf,
    all that is not open to a later transform: trained scales, offsets, codes, masks. It is what optax calls a mask, and
    optax takes the function itself: ``optax.adamw(1e-3, mask=weight_mask)``.

    Args:
      params: parameters, some of them perhaps compressed.
      where: a rule; inside a compressed leaf it is tried on the parameter's path too.

    >>> weight_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """
    named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
    masks = []
    for path, leaf in named:
        found = _open_slots(path, path, leaf, None) if is_compressed(leaf) else [Slot(path, path, leaf, None)]
        chosen = {s.path: True for s in found if is_float_array(s.array) and _selected(where, s)}
        masks.append(_marked(path, leaf, chosen))
    return treedef.unflatten(masks)


def _marked(path: str, leaf: Leaf, chosen: Mapping[str, bool]) -> Leaf:
    """The leaf with booleans for arrays: True at the chosen slots, which bear the path of what holds the array."""
    if isinstance(leaf, Masked):
        return replace(_all_false(leaf), values=_marked(path, leaf.values, chosen))
    if isinstance(leaf, CompressedLeaf):
        inner = {name: _marked(f"{path}/{name}", getattr(leaf, name), chosen) for name in leaf.open}
        return _all_false(leaf).with_fields(inner)
    return chosen.get(path, False)


def _all_false(leaf: L) -> L:
    return jax.tree.map(lambda _: False, leaf)


def check_finite(found: Mapping[str, Slot], owner: str) -> None:
    """Checks the values of concrete arrays; inside jit or ``eval_shape`` there are none to check.

    Raises:
      ValueError: a leaf holds NaN or infinity.
    """
    for slot in found.values():
        x = slot.array
        bad = _not_finite(x) if is_float_array(x) else 0
        if bad:
            raise ValueError(
                f"{owner}: {slot.path!r} has {bad} values that are not finite, of {x.size}; mend the training that made"
                " them, or leave the leaf out by a rule."
            )


def _not_finite(x: jax.Array) -> int:
    """How many known values are NaN or infinite; of a small array by numpy, for which no program is compiled."""
    host = in_host_memory(x) if x.size <= CHUNK else None
    return count_known(lambda x: ~jnp.isfinite(x), x) if host is None else int(np.sum(~np.isfinite(host)))


def _open_slots(
    path: str, leaf_path: str, leaf: Leaf, mask: jax.Array | None, known: AxisRoles | None = None
) -> list[Slot]:
    if isinstance(leaf, Masked) and not _closed(leaf.values):
        return _open_slots(path, leaf_path, leaf.values, unpacked(leaf.mask), known)
    if isinstance(leaf, CompressedLeaf) and leaf.open and not isinstance(leaf, Masked):
        inner = ((f"{path}/{name}", getattr(leaf, name), leaf.field_roles(name)) for name in leaf.open)
        return [s for p, x, own in inner for s in _open_slots(p, leaf_path, x, None, own or known)]
    return [Slot(path, leaf_path, leaf, mask, known)]


def _closed(leaf: Leaf) -> bool:
    return isinstance(leaf, CompressedLeaf) and not leaf.open


def _selected(where: Where, slot: Slot) -> bool:
    return any(matches(where, path, slot.array) for path in dict.fromkeys((slot.leaf_path, slot.path)))


def _check(slot: Slot, owner: str) -> None:
    x = slot.array
    inside = x.values if isinstance(x, Masked) else x
    if isinstance(inside, CompressedLeaf):
        maker = inside.made_by
        if _is_packed(x):
            raise ValueError(
                f"{owner}: {slot.path!r} is packed, as {maker} and pack or load left it; materialize the tree first:"
                " jaxcomp.materialize(tree)."
            )
        instead = ", or say core.when for gate: it applies at every step and is updated when due" * (maker == "gate")
        raise ValueError(
            f"{owner}: {slot.path!r} was made by {maker} earlier in this chain; put {owner} before {maker}{instead}. If"
            " the tree was compressed before the chain, materialize it first."
        )
    if not is_float_array(x):
        found = f"of type {x.dtype}" if hasattr(x, "dtype") else f"{type(x).__name__}"
        raise ValueError(f"{owner}: {slot.path!r} is {found}, not a floating array; leave it out by a rule.")
    if 0 in x.shape:
        raise ValueError(f"{owner}: {slot.path!r} is empty (shape {tuple(x.shape)}); leave it out by a rule.")


def _is_packed(leaf: CompressedLeaf) -> bool:
    """Whether a part of the leaf is in its smallest storage, which no transform of a chain makes."""
    parts = jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, Packed))
    return any(isinstance(x, Packed) for x in parts)


def _replaced(path: str, leaf: Leaf, new: Mapping[str, Leaf]) -> Leaf:
    if path in new:
        inner = new[path]
        keeps = isinstance(leaf, Masked) and leaf.straight and isinstance(inner, Masked)
        return replace(inner, straight=True) if keeps else inner
    if isinstance(leaf, Masked):
        values = _replaced(path, leaf.values, new)
        return leaf if values is leaf.values else replace(leaf, values=values)
    if isinstance(leaf, CompressedLeaf) and leaf.open:
        inner = {name: _replaced(f"{path}/{name}", getattr(leaf, name), new) for name in leaf.open}
        if any(inner[name] is not getattr(leaf, name) for name in leaf.open):
            return leaf.with_fields(inner)
    return leaf
