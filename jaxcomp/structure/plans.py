"""``Plan``: which units of each group stay, and what that does to trees of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.optimizers import map_owned
from jaxcomp.core.paths import leaves_with_paths, path_str, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Leaf, Params, PyTree, Shape, State
from jaxcomp.structure.groups import Groups
from jaxcomp.trace.program import shape_like

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units stay. ``kept[g]``: the units of group g in rising order, shape (k,), or (layers, k) of a stack."""

    groups: Groups
    kept: tuple[Array, ...]

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.groups):
            raise ValueError(f"Plan: {len(self.groups)} groups need as many entries of kept, got {len(self.kept)}.")
        for i, (group, kept) in enumerate(zip(self.groups, self.kept, strict=True)):
            rows = np.atleast_2d(kept)
            wanted = {1} if group.layers is None else {1, group.layers}
            if kept.ndim not in (1, 2) or len(rows) not in wanted or rows.shape[1] == 0:
                raise ValueError(f"Plan: kept[{i}] must list at least one unit of {group!r}, got shape {kept.shape}.")
            if rows.min() < 0 or rows.max() >= group.units or (np.diff(rows, axis=1) <= 0).any():
                raise ValueError(f"Plan: kept[{i}] must be rising unit numbers below {group.units}, got {kept}.")

    @cached_property
    def masks(self) -> Mapping[tuple[str, int], NDArray[np.bool_]]:
        """True where an index stays: shape (n,), or (layers, n), for each (path, axis) of which something goes."""
        masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
        for group, kept in zip(self.groups, self.kept, strict=True):
            if kept.shape[-1] == group.units:
                continue
            stays = np.zeros((*kept.shape[:-1], group.units + 1), bool)
            np.put_along_axis(stays, kept, True, -1)
            stays[..., -1] = True  # unit -1: an index of another group, or of none
            for s in group.slices:
                mask = stays[..., s.unit_of]
                masks[s.path, s.axis] = masks[s.path, s.axis] & mask if (s.path, s.axis) in masks else mask
        return masks

    @cached_property
    def indices(self) -> Mapping[tuple[str, int], Array]:
        """The indices that stay, shape (k,) or (layers, k), for each (path, axis) of which something goes."""
        return {
            at: np.flatnonzero(m) if m.ndim == 1 else np.stack([np.flatnonzero(row) for row in m])
            for at, m in self.masks.items()
        }

    @cached_property
    def widths(self) -> Mapping[str, Shape]:
        """Every parameter's new shape by path: the widths at which to build the same model again."""
        shapes = {path: list(shape) for path, shape in self.groups.shapes.items()}
        for (path, axis), kept in self.indices.items():
            shapes[path][axis] = kept.shape[-1]
        return {path: tuple(shape) for path, shape in shapes.items()}

    @property
    def counts(self) -> list[int]:
        """How many units of each group stay."""
        return [k.shape[-1] for k in self.kept]

    @property
    def parameters(self) -> int:
        """How many parameters stay."""
        return self.groups.parameters(self.counts)

    @property
    def macs(self) -> int:
        """How many multiply-adds of the traced call stay."""
        return self.groups.macs(self.counts)

    def take(self, params: Params) -> Params:
        """The smaller tree: ``params`` without the slices of removed units. Leaves may be shapes.

        Raises:
          ValueError: the tree is not the one that the plan was made for; names the path.
        """
        self.check(params, self.groups.shapes)
        return self._map(params, self._take_leaf)

    def take_like(self, tree: State, params: Params) -> State:
        """The smaller optimizer state: leaves of ``tree`` that belong to a parameter are sliced as it is.

        A leaf belongs to the parameter whose path its own path ends with ("0/mu/Dense_0/kernel").

        Args:
          tree: any state made from ``params``, as ``optax.adam(...).init(params)``.
          params: the tree that the state was made from: all of the plan's tree or a part of it, at full size.

        Raises:
          ValueError: a parameter is unknown to the plan, or a leaf that belongs to one has another shape.
        """
        named = jax.tree_util.tree_leaves_with_path(params)
        owners = {at: self._owner(path_str(at), leaf) for at, leaf in named if hasattr(leaf, "shape")}

        def smaller(path: str, leaf: Leaf, mine: str) -> Leaf:
            if not hasattr(leaf, "shape") or math.prod(leaf.shape) <= 1:
                return leaf
            if tuple(leaf.shape) != self.groups.shapes[mine]:
                raise ValueError(
                    f"take_like: {path!r} has shape {tuple(leaf.shape)} and its parameter {mine!r} has "
                    f"{self.groups.shapes[mine]}; state of another shape (factored moments) cannot be sliced: "
                    "initialise the optimizer anew on plan.take(params)."
                )
            return self._take_leaf(mine, leaf)

        return map_owned(smaller, tree, owners)

    def full(self, params: Params) -> Params:
        """The shapes of the tree before shrinking, from the smaller tree.

        Raises:
          ValueError: ``params`` is not a tree that ``take`` gives; names the path.
        """
        self.check(params, self.widths)
        shapes = self.groups.shapes

        def grown(path: str, leaf: Leaf) -> Leaf:
            if path not in shapes:  # functions, strings and numbers, as an Equinox module holds
                return leaf
            dtype = shape_like(leaf).dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
            return jax.ShapeDtypeStruct(shapes[path], dtype)

        return self._map(params, grown)

    def check(self, params: Params, shapes: Mapping[str, Shape]) -> None:
        """Raises ValueError unless the array leaves of ``params`` have these shapes."""
        named, _ = leaves_with_paths(params)
        found = {path: np.shape(leaf) if not hasattr(leaf, "shape") else tuple(leaf.shape) for path, leaf in named}
        for path, shape in shapes.items():
            if path not in found:
                raise ValueError(
                    f"plan: the tree has no {path!r} (it has {some_paths(found)}); this plan was made for another "
                    "tree: make one with channel_groups(fn)(params, ...) on this one."
                )
            if found[path] != shape:
                raise ValueError(
                    f"plan: {path!r} has shape {found[path]}, the plan expects {shape}; this plan was made for another "
                    "tree, or the tree was shrunk already."
                )

    def take_leaf(self, path: str, leaf: Leaf) -> Leaf:
        """One full-size array of the shape of the parameter ``path``, without what goes."""
        return self._take_leaf(path, leaf)

    @on_any_mesh
    def _take_leaf(self, path: str, leaf: Leaf) -> Leaf:
        if path not in self.widths or not hasattr(leaf, "shape"):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.widths[path], leaf.dtype)
        for axis in range(len(self.widths[path])):
            kept = self.indices.get((path, axis))
            if kept is not None and kept.ndim == 1:
                leaf = jnp.take(leaf, kept, axis)
            elif kept is not None:
                spread = [len(kept) if d == 0 else kept.shape[1] if d == axis else 1 for d in range(leaf.ndim)]
                leaf = jnp.take_along_axis(leaf, jnp.asarray(kept.reshape(spread)), axis)
        return leaf

    def _owner(self, path: str, leaf: Leaf) -> str:
        found = [p for p in self.groups.shapes if p == path or p.endswith("/" + path)]
        if path in found:
            found = [path]
        if len(found) != 1 or self.groups.shapes[found[0]] != tuple(leaf.shape):
            raise ValueError(
                f"take_like: params holds {path!r} of shape {tuple(leaf.shape)}; the plan knows "
                f"{some_paths(f'{p} {self.groups.shapes[p]}' for p in found) or 'none of that name'}; pass the "
                "full-size tree that the state was made from."
            )
        return found[0]

    def _map(self, tree: PyTree, f: Callable[[str, Leaf], Leaf]) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_str(path), leaf), tree)

    def __repr__(self) -> str:
        full_parameters, full_macs = self.groups.parameters(), self.groups.macs()
        rows = [
            f"  {k:>6} of {g.units:<6} {g!r}".replace(f"{g.units} units", "units", 1)
            for g, k in zip(self.groups, self.counts, strict=True)
        ]
        head = (
            f"Plan({self.parameters:,} of {full_parameters:,} parameters ({_ratio(self.parameters, full_parameters)}), "
            f"{self.macs:,} of {full_macs:,} MACs ({_ratio(self.macs, full_macs)})"
        )
        return "\n".join([head, *rows]) + ")"


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def mask(plan: Plan) -> Callable[[Params], Params]:
    """The masked network's parameters: ``mask(plan)(params)`` has zeros in every slice of every removed unit.

    Raises (on call):
      ValueError: the tree is not the one that the plan was made for.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups, plan
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> mask(plan(groups, params, sparsity=0.5))(params)["up"].tolist()
    [[3.0, 0.0, 2.0, 0.0]]
    """

    def masked(params: Params) -> Params:
        plan.check(params, plan.groups.shapes)

        def zeroed(path: str, leaf: Leaf) -> Leaf:
            for axis in range(np.ndim(leaf)):
                stays = plan.masks.get((path, axis))
                if stays is None:
                    continue
                shape = [n if d == axis or (d == 0 and stays.ndim == 2) else 1 for d, n in enumerate(leaf.shape)]
                leaf = jnp.where(jnp.asarray(stays.reshape(shape)), leaf, jnp.zeros((), leaf.dtype))
            return leaf

        return jax.tree_util.tree_map_with_path(lambda path, leaf: zeroed(path_str(path), leaf), params)

    return masked
