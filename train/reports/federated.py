"""The table of a federation: on the terminal, as report.json, and as curves of accuracy against bytes sent up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxcomp.artifact.files import write_atomically
from train.experiments.federated_configs import Config, Row
from train.reports.figures import accuracy_axes, png_of
from train.reports.terminal import devices_line, print_table


def make_table(rows: list[Row], config: Config) -> Table:
    """Bits a value, bytes up and their ratio to the first row's, bytes down, accuracy and its change, seconds."""
    shards = "at random" if config.dirichlet is None else f"by Dirichlet({config.dirichlet})"
    table = Table(title=f"{config.dataset} dealt {shards} to {config.clients} clients, {config.rounds} rounds")
    table.add_column("clients send", no_wrap=True)
    for name in ("bits/value", "MB up", "ratio", "MB down", "test accuracy", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"MB up to {config.target:.0%}", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    base = rows[0]
    for row in rows:
        reached = row.bytes_to(config.target)
        table.add_row(
            row.title,
            f"{row.bits_per_value:.2f}",
            f"{row.bytes_up / 1e6:.2f}",
            f"{base.bytes_up / row.bytes_up:.1f}x",
            f"{row.bytes_down / 1e6:.1f}",
            f"{row.test_accuracy:.2%}",
            "" if row is base else f"{100 * (row.test_accuracy - base.test_accuracy):+.2f} pp",
            "-" if reached is None else f"{reached / 1e6:.2f}",
            f"{row.seconds:.1f}",
        )
    return table


def write_report(rows: list[Row], config: Config, console: Console) -> Path:
    """Prints the table; writes report.json and accuracy_against_bytes.png into the run's folder, which it returns."""
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    report = {"settings": asdict(config), "device": devices_line(), "rows": [asdict(r) for r in rows]}
    write_atomically(folder / "report.json", json.dumps(report, indent=1, default=str).encode())
    write_atomically(folder / "accuracy_against_bytes.png", picture(rows, config))
    print_table(console, make_table(rows, config))
    console.print(f"report.json and accuracy_against_bytes.png are in {folder}.", markup=False, soft_wrap=True)
    return folder


def picture(rows: list[Row], config: Config) -> bytes:
    """A PNG: a curve for each row, its points the evaluations, bytes on a logarithmic axis."""
    title = f"{config.dataset}: {config.clients} clients, {config.per_round} a round, {config.rounds} rounds"
    figure, axes = accuracy_axes(title, "megabytes sent by all clients", (9, 5))
    for i, row in enumerate(rows):
        sent, reached = [p[1] / 1e6 for p in row.history], [100 * p[2] for p in row.history]
        style = ("-", "--")[i // 10 % 2]
        axes.plot(sent, reached, style, marker="o", markersize=3, color=f"C{i % 10}", label=row.title)
    best = max(p[2] for row in rows for p in row.history)
    worst_end = min(row.history[-1][2] for row in rows)
    axes.set_ylim(max(0.0, 100 * worst_end - 15), 100 * best + 1)
    return png_of(figure, axes)
