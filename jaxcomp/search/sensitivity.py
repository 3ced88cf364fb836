"""What a network loses when one of its units is compressed and all others stay: measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.batches import Batch, as_batch, checked_batches
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import is_float_array, leaves_with_paths, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import progress
from jaxcomp.core.specs import check_positive
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.search.batches import parts_of
from jaxcomp.search.measures import Measure, kl
from jaxcomp.search.options import Table
from jaxcomp.search.products import Opened
from jaxcomp.search.trying import leaves_of, made_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Losses = Mapping[tuple[str, str], float]
"""By unit and label."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of each unit's options; ``print`` it, or leave it at the end of a notebook's cell.

    Args:
      units: the table that was measured, without losses.
      values: by the measure's name, then by unit and label; infinite where the network gave no number.
    """

    units: Table
    values: Mapping[str, Losses]

    def table(self, measure: str | None = None) -> Table:
        """The units with a measure as their options' losses, as allocation takes them.

        Args:
          measure: its name; the first by default.

        Raises:
          KeyError: it was not measured.
        """
        name = self._name(measure)
        return self.units.with_losses(self.values[name], name)

    def cells(self, measure: str | None = None) -> list[tuple[str, ...]]:
        """A measure in words: a row a unit, a column a label.

        Args:
          measure: its name; the first by default.
        """
        values = self.values[self._name(measure)]
        labels = self.labels
        rows = [(u.name, *(_number(values.get((u.name, label))) for label in labels)) for u in self.units]
        return [("unit", *labels), *rows]

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all options, in their order."""
        return tuple(dict.fromkeys(option.label for unit in self.units for option in unit.options))

    def __repr__(self) -> str:
        sides = "l" + "r" * len(self.labels)
        return "\n\n".join(f"{name}\n{columns(self.cells(name), sides)}" for name in self.values)

    def _repr_html_(self) -> str:
        sides = "l" + "r" * len(self.labels)
        return "".join(f"<p>{name}</p>{html_table(self.cells(name), sides)}" for name in self.values)

    def plot(self, measure: str | None = None) -> Figure:
        """A measure as a picture, a line a label, a place a unit. Wants the extra ``report``.

        Args:
          measure: its name; the first by default.
        """
        from jaxcomp.search.pictures import lines

        name = self._name(measure)
        return lines(self.values[name], [u.name for u in self.units], labels=self.labels, measure=name)

    def _name(self, measure: str | None) -> str:
        name = next(iter(self.values)) if measure is None else measure
        if name not in self.values:
            raise KeyError(f"{name!r} was not measured, only {some_paths(self.values)}.")
        return name


def sensitivity(
    fn: Callable[..., PyTree],
    params: Params,
    table: Table,
    batches: Iterable[PyTree],
    *,
    measures: Sequence[Measure] = (kl,),
    at_once: int = 1,
) -> Sensitivity:
    """What ``fn`` loses by each option of each unit, all others as they are.

    One program measures everything: which unit is changed is an argument of it, so that it is compiled once, and not
    once for each unit and option.

    Args:
      fn: ``fn(params, *batch)`` to outputs; compressed, a leaf is the array that it stands for.
      params: the parameters that it takes.
      table: the units and their options, such as of ``units_of``. Of a transform its state at ``init`` counts. A
        unit without leaves is not measured.
      batches: of each the arguments behind the parameters, as a tuple, or the only one. They are kept.
      measures: what is measured, all in one pass.
      at_once: of how many units the changed networks run side by side, under ``vmap``; each takes memory for itself.

    Raises:
      ValueError: a unit's leaf that the parameters do not have, or that an option gives another shape or type; no
        batch; outputs of the network as it was that are not finite, in which nothing can be compared.

    >>> import jaxcomp as jc
    >>> from jaxcomp.search import units_of
    >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> options = {f"int{b}": jc.quantize(jc.Int(b)) for b in (2, 4, 8)}
    >>> x = jax.random.normal(jax.random.key(1), (32, 8))
    >>> found = sensitivity(lambda p, x: x @ p["w"], params, units_of(params, options), [x])
    >>> losses = [option.loss for option in found.table()["w"].options]
    >>> losses[0] > losses[1] > losses[2] > 0
    True
    """
    owner = "sensitivity"
    check_positive(owner, at_once, "at_once")
    names = [m.name for m in measures]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{owner}: measures= wants one or more, each of its own name, got {names}.")
    leaves = leaves_of(owner, params, table)
    kept = [as_batch(batch) for batch in checked_batches(owner, batches)]
    parts = parts_of(owner, kept)
    program = _Program(fn, Opened(params), table, tuple(measures))
    found: dict[str, dict[tuple[str, str], float]] = {name: {} for name in names}
    labels = list(dict.fromkeys(option.label for unit in table for option in unit.options))
    with progress(owner, len(labels) * len(kept)) as advance:
        for label in labels:
            made, order = _changed(owner, leaves, table, label)
            means = []
            for i, batch in enumerate(kept):
                means.append(program.means(made, order, batch, at_once=at_once, number=i))
                advance(1)
            for measure, rows in zip(measures, zip(*means, strict=True), strict=True):
                totals = np.einsum("b,bun->un", parts, np.stack(rows))
                values = [measure.value(*map(float, row)) for row in totals]
                named = {(table.units[u].name, label): x for u, x in zip(order, values, strict=True)}
                found[measure.name] |= {at: x if math.isfinite(x) else math.inf for at, x in named.items()}
    return Sensitivity(table, found)


class _Program:
    """Two programs, each compiled once: of the network as it was, and of that with some unit changed.

    The units are gone through here and not in a loop of the program, in which XLA runs convolutions many times slower
    on CPU (jax 0.12).
    """

    def __init__(self, fn: Callable[..., PyTree], opened: Opened, table: Table, measures: tuple[Measure, ...]) -> None:
        self._fn, self._opened, self._measures = fn, opened, measures
        self._owner_of = {path: i for i, unit in enumerate(table) for path in unit.leaves}
        self._reference = on_any_mesh(jax.jit(self._as_it_was))
        self._changed = on_any_mesh(jax.jit(self._with_changes))

    def means(
        self, made: Mapping[str, jax.Array], order: Sequence[int], batch: Batch, *, at_once: int, number: int
    ) -> list[np.ndarray]:
        """Of each measure its means over a batch, ``(units, numbers)``, each unit of ``order`` changed alone.

        Raises:
          ValueError: the outputs of the network as it was are not finite.
        """
        reference, fine = self._reference(self._opened.arrays, batch)
        if not fine:
            raise ValueError(
                f"sensitivity: in batch {number} the outputs of the network as it was are not finite, and nothing"
                " compares with them; leave that batch out, or mend the network."
            )
        padded = [*order, *[order[-1]] * (-len(order) % at_once)]
        found = []
        for start in range(0, len(padded), at_once):
            units = np.array(padded[start : start + at_once], np.int32)
            found.append(self._changed(self._opened.arrays, made, units, (batch, reference)))
        return [
            np.concatenate([np.asarray(x, np.float64) for x in rows])[: len(order)] for rows in zip(*found, strict=True)
        ]

    def _as_it_was(self, arrays: list[jax.Array], batch: Batch) -> tuple[PyTree, jax.Array]:
        outputs = self._fn(self._opened.rebuilt(arrays, {}), *batch)
        floats = [x for x in jax.tree.leaves(outputs) if is_float_array(x)]
        return outputs, jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))

    def _with_changes(
        self, arrays: list[jax.Array], made: Mapping[str, jax.Array], units: jax.Array, seen: tuple[Batch, PyTree]
    ) -> list[jax.Array]:
        batch, reference = seen
        named, treedef = leaves_with_paths(self._opened.rebuilt(arrays, {}), is_leaf=is_compressed)

        def one(unit: jax.Array) -> list[jax.Array]:
            new = [jnp.where(unit == self._owner_of[p], made[p], dense(x)) if p in made else x for p, x in named]
            outputs = self._fn(treedef.unflatten(new), *batch)
            return [jnp.stack([*m.of(outputs, reference, batch)]).astype(jnp.float32) for m in self._measures]

        if len(units) == 1:  # vmap of one makes grouped convolutions of plain ones
            return [x[None] for x in one(units[0])]
        return jax.vmap(one)(units)


def _changed(
    owner: str, leaves: Mapping[str, Leaf], table: Table, label: str
) -> tuple[dict[str, jax.Array], list[int]]:
    """All leaves under the options of a label, or as they are where none has it; and the places of units that do."""
    made: dict[str, jax.Array] = {path: dense(leaf) for path, leaf in leaves.items()}
    order = []
    for i, unit in enumerate(table):
        option = next((o for o in unit.options if o.label == label), None)
        if option is not None and unit.leaves:
            order.append(i)
            made |= made_of(owner, leaves, unit, option)
    return made, order


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
