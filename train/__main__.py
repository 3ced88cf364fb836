"""The command line: ``python -m train [digits | fashion_mnist | cifar10] [options]``."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console

from jaxcomp.artifact.files import FileError
from train.configs import PRESETS, Config
from train.errors import DataError, ProgressError, RunError, TrainingError
from train.experiments.main_job import run
from train.reports.main_job import write_report
from train.reports.terminal import make_console, print_error

DESCRIPTION = """Train a network, compress it by every method, and print what each one costs and gains.

Without a data set's name it is digits. The same command resumes a run that was stopped."""


def parse(arguments: list[str]) -> Config:
    """The settings of a command line; a preset is chosen by name and any field of it can be overridden."""
    names = {"-h", "--help", *PRESETS}
    if not arguments or arguments[0] not in names:
        arguments = ["digits", *arguments]
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments, description=DESCRIPTION, prog="python -m train")


def main(arguments: list[str]) -> int:
    """Runs the main job; 0 when the table is printed, 2 when an error was, 130 when stopped from the keyboard."""
    config = parse(arguments)
    console = make_console()
    try:
        write_report(run(config, console), config, console)
    except (RunError, DataError, TrainingError, FileError, ProgressError, OSError) as e:
        print_error(e)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from the last checkpoint.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
