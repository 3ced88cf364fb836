"""A transform of a whole tree as stages that take one leaf at a time, and what they must know of all leaves before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import order_keys
from jaxcomp.core.errors import naming
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.records import text_of
from jaxcomp.core.roles import selecting
from jaxcomp.core.slots import Slot, check_finite, slots
from jaxcomp.core.specs import Global, Local, share_of
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Leaf, Shape
from jaxcomp.factorization.specs import Budget
from jaxcomp.pruning import notices
from jaxcomp.pruning.criterion import Criterion
from jaxcomp.pruning.masks.select import Resolved, amounts_of, select
from jaxcomp.pruning.masks.thresholds import MAX_COUNT, fraction_of
from jaxcomp.pruning.specs import NM, Given, Tied
from jaxcomp.pruning.transform import criterion_of
from jaxcomp.scale.parts import Seen, arguments_of, atoms, name_of, stand_in
from jaxcomp.scale.thresholds import Keys, Threshold, below, threshold

LEAFWISE = ("quantize", "share", "low_rank", "identity", "recipes.mx", "recipes.nvfp4", "recipes.nf4")
"""The transforms that do with a leaf the same whatever others there are; what they draw is by path."""

Read = Callable[[str], Leaf]
Ties = dict[int, int]
"""How many keys equal to each threshold are still to be pruned, in the order of the leaves."""
_jitted_keys = jax.jit(order_keys)


@dataclass(frozen=True)
class Stage:
    """One transform, and which leaves it changes.

    Fields:
      transform: of the whole tree.
      leaves: the paths that it selects.
    """

    transform: Transform
    leaves: frozenset[str]

    def state(self, path: str, leaf: Leaf, found: Found) -> object:
        """The transform's state for one leaf."""
        return self.transform.init({path: leaf})

    def run(self, path: str, leaf: Leaf, found: Found) -> Leaf:
        """What the transform makes of one leaf."""
        if path not in self.leaves:
            return leaf
        return self.transform.apply(self.state(path, leaf, found), {path: leaf})[path]


@dataclass(frozen=True)
class Pruning(Stage):
    """A pruning whose scope is settled: an amount for each slot, or a threshold that several share.

    Fields:
      criterion: of the transform.
      selected: what finds the leaf's slots.
      amounts: of the slots that have one of their own.
      shared: the number of the threshold of the others.
    """

    criterion: Criterion
    selected: Callable[[Seen], dict[str, Slot]]
    amounts: Mapping[str, Resolved]
    shared: Mapping[str, int]

    def scored(self, path: str, leaf: Leaf) -> tuple[dict[str, jax.Array], dict[str, jax.Array | None]]:
        """Scores of the leaf's units by slot, and which are there to prune."""
        found = self.selected({path: leaf})
        check_finite(found, "prune")
        units, alive = self.criterion.scored(found, jnp.int32(0), {})
        normal = self.criterion.score.normalize
        return (units if normal is None else {name: normal(x) for name, x in units.items()}), dict(alive)

    def state(self, path: str, leaf: Leaf, found: Found) -> object:
        """The leaf's masks."""
        if isinstance(self.criterion.structure, NM):
            return self.transform.init({path: leaf})
        units, alive = self.scored(path, leaf)
        amounts = {name: self.amounts[name] for name in units if name in self.amounts}
        for name in units.keys() - amounts.keys():
            amounts[name] = found.count(self.shared[name], _keys(units[name]), _host(alive[name]))
        with naming("prune", path):
            return select(units, alive, dict.fromkeys(units), [([name], x) for name, x in amounts.items()])


@dataclass
class Found:
    """What is known of all leaves: the thresholds, and how many ties of each the leaves so far have left."""

    thresholds: list[Threshold]
    ties: Ties

    @classmethod
    def of(cls, thresholds: list[Threshold]) -> Found:
        """Before the first leaf."""
        return cls(thresholds, {i: t.ties for i, t in enumerate(thresholds)})

    def count(self, number: int, keys: Keys, alive: np.ndarray | None) -> int:
        """How many of a leaf's keys a shared threshold prunes; ties go to the leaves that come first."""
        less, ties = below(keys, alive, self.thresholds[number])
        taken = min(ties, self.ties[number])
        self.ties[number] -= taken
        return less + taken


@dataclass(frozen=True)
class Stages:
    """All stages of a transform, in their order.

    Fields:
      all: the stages.
      groups: of each threshold the stage that wants it, the leaves that share it, and the amount.
      made: what the transform makes of the tree, in shapes.
    """

    all: tuple[Stage, ...]
    groups: tuple[tuple[Pruning, tuple[str, ...], Resolved], ...]
    made: Seen

    def run(self, path: str, leaf: Leaf, found: Found, *, until: Stage | None = None) -> Leaf:
        """What the transform makes of one leaf; or the stages before one of them."""
        for stage in self.all:
            if stage is until:
                break
            leaf = stage.run(path, leaf, found)
        return leaf

    def thresholds(self, read: Read, advance: Callable[[int], None] = lambda leaves: None) -> list[Threshold]:
        """The thresholds that leaves share, each from two readings of these leaves."""
        known: list[Threshold] = []
        for number, (stage, leaves, amount) in enumerate(self.groups):

            def keys(stage: Pruning = stage, leaves: tuple[str, ...] = leaves, number: int = number) -> Iterator[Keys]:
                found = Found.of(known)
                for path in leaves:
                    leaf = self.run(path, read(path), found, until=stage)
                    units, alive = stage.scored(path, leaf)
                    for name in units:
                        if stage.shared.get(name) == number:
                            host, among = _keys(units[name]), _host(alive[name])
                            yield host if among is None else host[among]
                    advance(1)

            known.append(threshold(keys, lambda total, amount=amount: _count(total, amount)))  # type: ignore[misc]
        return known


def stages_of(transform: Transform, shapes: Seen) -> Stages:
    """A transform as stages, checked on shapes alone.

    Raises:
      ValueError: what the transform raises of this tree; or it needs statistics, or the whole tree at once.
      TypeError: it is no transform.

    >>> from jaxcomp import Int, prune, quantize
    >>> shapes = {"a/kernel": jax.ShapeDtypeStruct((4, 2), "float32"), "a/bias": jax.ShapeDtypeStruct((2,), "float32")}
    >>> stages_of(quantize(Int(4)), shapes).all[0].leaves
    frozenset({'a/kernel'})
    """
    seen = {path: jax.ShapeDtypeStruct(s.shape, jax.dtypes.canonicalize_dtype(s.dtype)) for path, s in shapes.items()}
    stages: list[Stage] = []
    groups: list[tuple[Pruning, tuple[str, ...], Resolved]] = []
    for one, leaves in atoms(checked_transform("compress_file", transform), seen, tuple(seen)):
        part = {path: seen[path] for path in leaves}
        stage, sharing, made = _pruning(one, part, len(groups)) if name_of(one) == "prune" else _plain(one, part)
        seen.update(made)
        stages.append(stage)
        groups += sharing
    return Stages(tuple(stages), tuple(groups), seen)


def _plain(t: Transform, part: Seen) -> tuple[Stage, list, dict[str, Leaf]]:
    name, arguments = name_of(t), arguments_of(t)
    whole = isinstance(arguments.get("per"), Global) or any(isinstance(x, Budget) for x in arguments.values())
    if name not in LEAFWISE or whole:
        raise ValueError(
            f"compress_file: {text_of(t)} may need the whole tree at once, which is not held; those that do not"
            f" are prune and {', '.join(LEAFWISE)}, in chain and by_path."
        )
    if name == "identity":
        return Stage(t, frozenset()), [], dict(part)
    made, found = _on_shapes(t, part, _selected(t))
    return Stage(t, frozenset(path for path, _ in found.values())), [], made


def _pruning(t: Transform, part: Seen, first: int) -> tuple[Stage, list, dict[str, Leaf]]:
    arguments = arguments_of(t)
    criterion = criterion_of(**{k: v for k, v in arguments.items() if k != "where"})  # type: ignore[arg-type]
    if criterion.score.needs or isinstance(criterion.structure, Tied):
        what = f"score {criterion.score.name!r} needs statistics" if criterion.score.needs else "Tied joins leaves"
        raise ValueError(f"compress_file: {text_of(t)}: its {what}, which no leaf has by itself; prune in memory.")
    said = isinstance(criterion.structure, NM) or isinstance(criterion.scope, Given | Local)
    selected = _selected(t)
    units: dict[str, jax.ShapeDtypeStruct] = {}

    def noted(found: dict[str, Slot]) -> None:
        scores, _ = criterion.scored(found, jnp.int32(0), {})
        units.update({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in scores.items()})

    made, found = _on_shapes(t if said else stand_in(t), part, selected, noted)
    leaves = frozenset(path for path, _ in found.values())
    if isinstance(criterion.structure, NM):
        return Pruning(t, leaves, criterion, selected, {}, {}), [], made
    shapes = {name: shape for name, (_, shape) in found.items()}
    amounts = amounts_of(criterion.scope, shapes, criterion.amount, jnp.int32(0))
    if not said:
        notices.of_amounts(amounts, units)  # type: ignore[arg-type]
    joint = [(names, amount) for names, amount in amounts if len(names) > 1]
    alone = {names[0]: amount for names, amount in amounts if len(names) == 1}
    shared = {name: first + i for i, (names, _) in enumerate(joint) for name in names}
    stage = Pruning(t, leaves, criterion, selected, alone, shared)
    return stage, [(stage, _paths(names, found), amount) for names, amount in joint], made


def _on_shapes(
    t: Transform,
    part: Seen,
    selected: Callable[[Seen], dict[str, Slot]],
    noted: Callable[[dict[str, Slot]], None] = lambda found: None,
) -> tuple[dict[str, Leaf], dict[str, tuple[str, Shape]]]:
    """What a transform makes of leaves, in shapes, and of each of their slots the leaf and the shape."""
    found: dict[str, tuple[str, Shape]] = {}

    def run(part: Seen) -> dict[str, Leaf]:
        inside = selected(part)
        noted(inside)
        found.update({name: (slot.leaf_path, slot.array.shape) for name, slot in inside.items()})
        return dict(leaves_with_paths(t.apply(t.init(part), part), is_leaf=is_compressed)[0])

    return jax.eval_shape(run, dict(part)), found


def _selected(t: Transform) -> Callable[[Seen], dict[str, Slot]]:
    arguments = arguments_of(t)
    rule = selecting(arguments.get("where"), arguments.get("roles"))  # type: ignore[arg-type]
    return lambda leaves: slots(leaves, rule, name_of(t))


def _paths(names: list[str], found: Mapping[str, tuple[str, Shape]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found[name][0] for name in names))


def _count(total: int, amount: Resolved) -> int:
    if isinstance(amount, int):
        return amount
    if isinstance(amount, float):
        return share_of(amount, total)
    if total > MAX_COUNT:
        raise ValueError(f"prune: a schedule's fraction of {total} units is not exact; write the fraction as a float.")
    return int(fraction_of(jnp.uint32(total), amount))


def _keys(units: jax.Array) -> Keys:
    return np.asarray(_jitted_keys(units))


def _host(alive: jax.Array | None) -> np.ndarray | None:
    return None if alive is None else np.asarray(alive)
