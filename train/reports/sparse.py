"""The table of a comparison of sparse trainings: on the terminal, and as sparse.json."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxcomp.artifact.files import write_atomically
from train.experiments.sparse import Result, Sparse
from train.reports.terminal import devices_line, print_table


def make_table(results: list[Result], config: Sparse) -> Table:
    """Method, mean and standard deviation over the seeds, each seed, zeros, seconds."""
    table = Table(
        title=f"{config.dataset}, {config.sparsity:.0%} sparse: accuracy on the test split after the last epoch"
    )
    table.add_column("method", no_wrap=True)
    for column in ("mean", "deviation", *(f"seed {s}" for s in config.seeds), "zeros", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        spread = f"{100 * np.std(r.test_accuracy, ddof=1):.2f} pp" if len(r.test_accuracy) > 1 else ""
        each = [f"{a:.2%}" for a in r.test_accuracy]
        table.add_row(r.method, f"{np.mean(r.test_accuracy):.2%}", spread, *each, f"{r.zeros:.1%}", f"{r.seconds:.0f}")
    return table


def write_report(results: list[Result], config: Sparse, console: Console) -> None:
    """Prints the table, and writes sparse.json into the run's folder."""
    report = {"settings": asdict(config), "device": devices_line(), "rows": [asdict(r) for r in results]}
    write_atomically(config.out / "sparse.json", json.dumps(report, indent=1, default=str).encode())
    print_table(console, make_table(results, config))
    console.print(f"sparse.json is in {config.out}.", markup=False, soft_wrap=True)
