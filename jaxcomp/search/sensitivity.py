"""What a network loses when one of its units is compressed and all others stay: measured, or told by its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import dense, is_compressed, materialize
from jaxcomp.core.paths import is_float_array, leaves_with_paths, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import progress
from jaxcomp.core.specs import check_positive
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.words import shape_words
from jaxcomp.search.batches import Batch, as_batch, parts_of
from jaxcomp.search.estimates import Curvature
from jaxcomp.search.measures import Measure, kl
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.products import Opened

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
    once for each unit and option. The network as it was runs in it too, beside every option.

    Args:
      fn: ``fn(params, *batch)`` to outputs; compressed, a leaf is the array that it stands for.
      params: the parameters that it takes.
      table: the units and their options, such as of :func:`~jaxcomp.search.units.units_of`. Of a transform its state at ``init`` counts. A
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
    leaves = _leaves_of(owner, params, table)
    kept = [as_batch(batch) for batch in batches]
    parts = parts_of(owner, kept)
    program = _Program(fn, Opened(params), table, tuple(measures), at_once)
    run = on_any_mesh(jax.jit(program.run))
    found: dict[str, dict[tuple[str, str], float]] = {name: {} for name in names}
    labels = list(dict.fromkeys(option.label for unit in table for option in unit.options))
    with progress(owner, len(labels) * len(kept)) as advance:
        for label in labels:
            made, order = _changed(owner, leaves, table, label)
            sums = None
            for i, (batch, part) in enumerate(zip(kept, parts, strict=True)):
                fine, means = run(program.opened.arrays, made, order, batch)
                _check_reference(owner, i, bool(fine))
                here = [np.asarray(m, np.float64) * part for m in means]
                sums = here if sums is None else [a + b for a, b in zip(sums, here, strict=True)]
                advance(1)
            assert sums is not None
            for measure, rows in zip(measures, sums, strict=True):
                values = {table.units[u].name: measure.value(*map(float, rows[i])) for i, u in enumerate(order) if u >= 0}
                found[measure.name] |= {(name, label): x if math.isfinite(x) else math.inf for name, x in values.items()}
    return Sensitivity(table, found)


@dataclass(frozen=True)
class _Program:
    fn: Callable[..., PyTree]
    opened: Opened
    table: Table
    measures: tuple[Measure, ...]
    at_once: int

    def run(
        self, arrays: list[jax.Array], made: Mapping[str, jax.Array], order: jax.Array, batch: Batch
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Whether the network as it was gives numbers, and of each measure its means, ``(units, numbers)``."""
        tree = self.opened.rebuilt(arrays, {})
        named, treedef = leaves_with_paths(tree, is_leaf=is_compressed)
        owner_of = {path: i for i, unit in enumerate(self.table) for path in unit.leaves}
        reference = self.fn(tree, *batch)

        def measured(unit: jax.Array) -> list[jax.Array]:
            new = [_switched(unit == owner_of[p], made[p], x) if p in made else x for p, x in named]
            outputs = self.fn(treedef.unflatten(new), *batch)
            return [jnp.stack([*m.of(outputs, reference, batch)]).astype(jnp.float32) for m in self.measures]

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured, order[0]))
        one = lambda unit: jax.lax.cond(unit < 0, lambda _: nothing, measured, unit)  # noqa: E731
        floats = [x for x in jax.tree.leaves(reference) if is_float_array(x)]
        fine = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])) if floats else jnp.array(True)
        return fine, jax.lax.map(one, order, batch_size=None if self.at_once == 1 else self.at_once)


def _switched(on: jax.Array, made: jax.Array, leaf: Leaf) -> jax.Array:
    was = dense(leaf)
    return jnp.where(on, made, was)


def _leaves_of(owner: str, params: Params, table: Table) -> dict[str, Leaf]:
    """The leaves that the table's units name, by path.

    Raises:
      ValueError: one is not there, or no unit has any.
    """
    named = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    wanted = [path for unit in table for path in unit.leaves]
    lost = [path for path in wanted if path not in named]
    if lost or not wanted:
        what = f"the parameters have no {some_paths(lost)}" if lost else "no unit of the table has a leaf"
        raise ValueError(f"{owner}: {what}; the paths are {some_paths(named)}.")
    return {path: named[path] for path in wanted}


def _changed(
    owner: str, leaves: Mapping[str, Leaf], table: Table, label: str
) -> tuple[dict[str, jax.Array], np.ndarray]:
    """All leaves under the options of a label, where there is none as they are; and the places of units that have it."""
    made: dict[str, jax.Array] = {path: dense(leaf) for path, leaf in leaves.items()}
    order = np.full(len(table), -1, np.int32)
    for i, unit in enumerate(table):
        option = next((o for o in unit.options if o.label == label), None)
        if option is not None and unit.leaves:
            order[i] = i
            made |= made_of(owner, leaves, unit, option)
    return made, order


def made_of(owner: str, leaves: Mapping[str, Leaf], unit: Unit, option: Option) -> dict[str, jax.Array]:
    """The arrays that a unit's leaves stand for under an option.

    Raises:
      ValueError: what the option's ``init`` raises, or another shape or type than before.
    """
    own = {path: leaves[path] for path in unit.leaves}
    seen = materialize(option.make.apply(option.make.init(own), own))
    for path, leaf in own.items():
        was, now = ((shape_words(x.shape), str(x.dtype)) for x in (leaf, seen[path]))
        if was != now:
            raise ValueError(
                f"{owner}: option {option.label!r} makes {' '.join(now)} of {path!r}, which is {' '.join(was)}; wanted a"
                " transform that keeps shape and type."
            )
    return dict(seen)


def _check_reference(owner: str, number: int, fine: bool) -> None:
    if not fine:
        raise ValueError(
            f"{owner}: in batch {number} the outputs of the network as it was are not finite, and nothing compares with"
            " them; leave that batch out, or mend the network."
        )


def omega(params: Params, table: Table, curvature: Curvature) -> Table:
    """HAWQ's measure as the losses of options: ``Ω = Σ over leaves (trace / parameters) · ‖Q(W) - W‖²``.

    Half of it is what the loss grows by at a minimum, were the change as likely in all directions.

    Args:
      params: the parameters.
      table: the units and their options.
      curvature: of :func:`~jaxcomp.search.hessian.traces`, of all leaves of units; or of ``eigenvalues``, whose own
        value is taken and not its part of a parameter, as the first HAWQ orders layers.

    Raises:
      ValueError: a unit's leaf that the parameters do not have, or that is changed and has no estimate.

    >>> import jaxcomp as jc
    >>> from jaxcomp.search import traces, units_of
    >>> params = {"w": jnp.array([[1.0, 0.3], [0.2, 1.0]])}
    >>> found = traces(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, [jnp.eye(2)], key=jax.random.key(0))
    >>> omega(params, units_of(params, {"int4": jc.quantize(jc.Int(4))}), found)
    unit  option       loss
    w     int4    0.0009184

    Source: Dong et al. 2019, arXiv:1911.03852 (HAWQ-V2), equation 7.
    """
    leaves = _leaves_of("omega", params, table)
    known = {e.name: e.mean if curvature.what == "trace" else e.value for e in curvature}
    losses = {}
    for unit in table:
        for option in unit.options if unit.leaves else ():
            made = made_of("omega", leaves, unit, option)
            moved = {path: _distance(made[path], leaves[path]) for path in unit.leaves}
            lost = [path for path, far in moved.items() if far and path not in known]
            if lost:
                raise ValueError(
                    f"omega: of {some_paths(lost)} no {curvature.what} is known, only of {some_paths(known)}; estimate"
                    " it with a where= that selects these leaves too."
                )
            losses[unit.name, option.label] = math.fsum(known[p] * far for p, far in moved.items() if far)
    return table.with_losses(losses, f"omega by {curvature.what}")


def _distance(made: jax.Array, leaf: Leaf) -> float:
    wide = jnp.promote_types(made.dtype, jnp.float32)
    return float(jnp.sum((made.astype(wide) - dense(leaf).astype(wide)) ** 2))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
