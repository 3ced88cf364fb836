"""The table of a menu: of each unit's options what they take and what the network loses, kept on disk as it is made."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxcomp.artifact.files import write_atomically
from jaxcomp.core.progress import progress
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.types import PyTree
from jaxcomp.search.judging import Judge
from jaxcomp.search.menus import Choosing
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.plans import Plan


def measured(menus: Choosing, judge: Judge, file: Path | None = None, *, mark: str = "") -> Table:
    """What each option of each unit takes, and how far the network is from the original by it alone.

    Args:
      menus: units and options.
      judge: of the distance.
      file: where it goes on after a kill; None keeps nothing.
      mark: the :func:`fingerprint` of what is measured, for the file.
    """
    done = _read(file, mark)
    units = []
    with progress("compress: measuring", sum(map(len, menus.options.values()))) as advance:
        for name, options in menus.options.items():
            rows = done.get(name)
            if rows is None or set(rows) != set(options):
                rows = {}
                for label in options:
                    made = menus.made(name, label)
                    rows[label] = {**menus.costs(made), "loss": judge(replace_slots(menus.params, made))}
                    advance(1)
                done[name] = rows
                if file is not None:
                    write_atomically(file, json.dumps({"of": mark, "units": done}, indent=1).encode())
            else:
                advance(len(options))
            units.append(_unit(menus, name, rows))
    return Table((*units, menus.rest()), judge.measure.name)


def around(menus: Choosing, judge: Judge, plan: Plan) -> Table:
    """The table measured again with all other units as the plan has them, by which errors that meet are seen.

    Args:
      menus, judge: as of :func:`measured`.
      plan: the others' options.
    """
    chosen = {name: menus.made(name, plan.choice[name]) for name in menus.units}
    base = replace_slots(menus.params, {path: leaf for made in chosen.values() for path, leaf in made.items()})
    losses = {}
    with progress("compress: measuring around the plan", sum(len(u.options) for u in plan.table)) as advance:
        for unit in plan.table:
            for option in unit.options:
                if unit.name in menus.units:
                    losses[unit.name, option.label] = judge(replace_slots(base, menus.made(unit.name, option.label)))
                advance(1)
    return plan.table.with_losses(losses)


def fingerprint(menus: Choosing, judge: Judge) -> str:
    """What must be equal for measurements to be taken over: parameters, data, options and the measure."""
    crc = checksum((menus.params, list(judge.batches)))
    return f"{crc:08x} {zlib.crc32(repr(menus.options).encode()):08x} {menus.terms!r} {judge.measure.name}"


def same_as_before(file: Path | None, mark: str) -> bool:
    """Whether what lies in a folder was measured of this network on these data, or nothing was."""
    return file is None or not file.exists() or bool(_read(file, mark))


def checksum(tree: PyTree) -> int:
    """Of all bytes of a tree's arrays."""
    crc = 0
    for x in jax.tree.leaves(tree):
        array = np.asarray(x)
        crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"", crc)
    return crc


def _read(file: Path | None, mark: str) -> dict[str, dict[str, dict[str, float]]]:
    """What an earlier run measured of the same; of another, nothing."""
    if file is None or not file.exists():
        return {}
    try:
        held = json.loads(file.read_text())
        return dict(held["units"]) if held["of"] == mark else {}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"compress: {str(file)!r} cannot be read ({e!r}); remove it to measure again.") from e


def _unit(menus: Choosing, name: str, rows: Mapping[str, Mapping[str, float]]) -> Unit:
    def option(label: str) -> Option:
        costs = {k: float(v) for k, v in rows[label].items() if k != "loss"}
        loss = rows[label]["loss"]
        return Option(label, menus.options[name][label], costs, loss=loss if not math.isnan(loss) else math.inf)

    return Unit(name, menus.units[name], tuple(map(option, menus.options[name])))
