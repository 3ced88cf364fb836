"""The command line: ``python -m train.sparse [options]``, ways of training sparse from the start, side by side."""

from __future__ import annotations

import sys

import tyro

from train.errors import DataError, TrainingError
from train.experiments import sparse
from train.reports.sparse import write_report
from train.reports.terminal import make_console, print_error, print_stopped


def main(arguments: list[str]) -> int:
    """Prints the table and writes sparse.json; 2 after an error."""
    config = tyro.cli(sparse.Sparse, args=arguments, description=sparse.__doc__, prog="python -m train.sparse")
    console = make_console()
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_report(sparse.compare(config, console), config, console)
    except (DataError, TrainingError, ValueError, OSError) as e:
        print_error(e)
        return 2
    except KeyboardInterrupt:
        print_stopped("starts anew")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
