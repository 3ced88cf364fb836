"""The command line: ``python -m train.federated [options]``, accuracy against bytes sent in a simulated federation."""

from __future__ import annotations

import sys

import tyro

from jaxcomp.artifact.disk import FileError
from train.errors import DataError, FederationError
from train.experiments import federated
from train.experiments.federated_configs import Config
from train.reports.federated import write_report
from train.reports.terminal import make_console, print_error, print_stopped


def main(arguments: list[str]) -> int:
    """Runs all federations; 0 when the table is printed, 2 when an error was."""
    try:
        config = tyro.cli(Config, args=arguments, description=federated.__doc__, prog="python -m train.federated")
        console = make_console(130)
        write_report(federated.run(config, console), config, console)
    except (FederationError, DataError, FileError, ValueError, OSError) as e:
        print_error(e)
        return 2
    except KeyboardInterrupt:
        print_stopped("starts anew")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
