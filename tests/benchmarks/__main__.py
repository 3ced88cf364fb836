"""``python -m tests.benchmarks [NAME ...] [--json FILE]``: runs benchmarks and prints their tables."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

NAMES = (
    "qat_step",
    "global_mask",
    "nm_mask",
    "quantize_bandwidth",
    "activations",
    "shrink",
    "kmeans",
    "low_rank",
    "analysis",
    "save_load",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; all by default: {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no benchmark is called {name!r}; there are {', '.join(NAMES)}")
    console = Console(width=None if Console().is_terminal else 150)
    figures: dict[str, list[Any]] = {}
    for name in args.names or NAMES:
        figures[name] = []
        for report in importlib.import_module(f"tests.benchmarks.{name}").run():
            console.print(report.table())
            figures[name].append(report.json())
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
