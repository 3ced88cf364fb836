"""What a run's files are in other runtimes: a table, and exports.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxcomp.artifact.files import write_atomically
from train.configs import Config
from train.experiments.exports import Export
from train.reports.terminal import print_table


def write_exports(done: Sequence[Export], config: Config, console: Console) -> None:
    """Prints the table and writes exports.json into the run's folder."""
    table = Table(title="The same files in other runtimes", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, justify in (
        ("row", "left"),
        ("runtime", "left"),
        *((n, "right") for n in ("bytes", "accuracy", "as JAX")),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for one in done:
        figures = (f"{one.bytes:,}", f"{one.accuracy:.2%}", f"{one.agreement:.2%}")
        table.add_row(one.name, one.target, *(("refused", "", "") if one.refused else figures))
    print_table(console, table)
    write_atomically(config.folder / "exports.json", json.dumps([asdict(one) for one in done], indent=1).encode())
