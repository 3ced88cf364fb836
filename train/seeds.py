"""The command line: ``python -m train.seeds FOLDERS``, several seeds of one run as one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from train.errors import RunError
from train.experiments.main_job import BASELINE
from train.reports.seeds import make_table, read
from train.reports.terminal import make_console, print_error, print_table


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    against: str | None = None,
) -> int:
    """Prints what several seeds of one run gave, and each method's change against a row of the same seed.

    Args:
      folders: of the runs.
      against: name of the row to compare with; by default `float`, the baseline fine-tuned alike, where there is one.
    """
    try:
        runs = read(folders)
        names = {row.name for rows in runs.values() for row in rows}
        table = make_table(runs, against or ("float" if "float" in names else BASELINE))
    except RunError as e:
        print_error(e)
        return 2
    print_table(make_console(), table)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m train.seeds"))
