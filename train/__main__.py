"""The command line: ``python -m train [digits | fashion_mnist | cifar10] [compress --ratio N] [options]``."""

from __future__ import annotations

import sys
import traceback
from signal import SIGTERM

import jax
import tyro
from rich.console import Console

from jaxcomp.artifact.disk import FileError
from train.configs import PRESETS, Config
from train.errors import DataError, ProgressError, RunError, Stopped, ToldError, TrainingError
from train.experiments.main_job import export_all, run
from train.experiments.methods import RATIOS
from train.experiments.records import Row
from train.loop.compilation import kept
from train.loop.joining import joined, leave, lost
from train.loop.processes import Processes
from train.reports.exports import write_exports
from train.reports.main_job import write_report
from train.reports.terminal import make_console, print_error, print_stopped

DESCRIPTION = """Train a network, compress it by every method, and print what each one costs and gains.

`compress --ratio 16` makes one row: a file 16 times smaller.

Without a data set's name it is digits. The same command resumes a run that was stopped."""


def parse(arguments: list[str]) -> Config:
    """The settings of a command line; a preset is chosen by name and any field of it can be overridden."""
    arguments = _without_compress(arguments)
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in PRESETS:
        raise RunError(f"no data set is called {name!r}; there are {', '.join(PRESETS)}.")
    if name not in {"-h", "--help", *PRESETS}:
        name, arguments = "digits", ["digits", *arguments]
    config = tyro.extras.overridable_config_cli(
        PRESETS, args=arguments, description=DESCRIPTION, prog="python -m train"
    )
    if config.dataset != name:
        raise RunError(
            f"--dataset {config.dataset} stands beside the settings of {name}; each data set has its own: write"
            f" `python -m train {config.dataset}`."
        )
    return config


def _without_compress(arguments: list[str]) -> list[str]:
    """``compress --ratio 16`` in the words of the other options: one row, of that name."""
    at = arguments.index("compress") if "compress" in arguments[:2] else -1
    if at < 0 or (at == 1 and arguments[0].startswith("-")):  # a folder of that name, say
        return arguments
    left = [part for word in arguments[:at] + arguments[at + 1 :] for part in _parts(word)]
    if "--methods" in left:
        raise RunError("compress makes one row; for more write their names alone: --methods compress16 int8.")
    ratio = "8"
    if "--ratio" in left:
        at = left.index("--ratio")
        ratio, left = "".join(left[at + 1 : at + 2]), left[:at] + left[at + 2 :]
    if ratio not in map(str, RATIOS):
        raise RunError(f"--ratio must be one of {', '.join(map(str, RATIOS))}, got {ratio!r}.")
    return [*left, "--methods", f"compress{ratio}"]


def _parts(word: str) -> list[str]:
    """``--ratio=16`` is two words."""
    return word.split("=", 1) if word.startswith(("--ratio=", "--methods=")) else [word]


PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command, started again, goes on."""
FROM_KEYBOARD = 130


def main(arguments: list[str]) -> int:
    """Runs the main job.

    0 when the table is printed, 2 when an error was, 75 when SIGTERM or the end of another process of the run, and 130
    when the keyboard stopped it.
    """
    try:
        config = parse(arguments)
        processes = joined(config)
        with processes.stop.signals(), kept(config.compilation_cache):
            _run(config, processes)
    except ToldError as e:
        print_error(e)
        return 2
    except (RunError, DataError, TrainingError, FileError, ProgressError, OSError) as e:
        print_error(e)
        return leave(2)
    except Stopped as e:
        print_stopped("goes on", str(e))
        return PREEMPTED if e.signal == SIGTERM else FROM_KEYBOARD
    except KeyboardInterrupt:
        print_stopped("goes on from the last checkpoint")
        return leave(FROM_KEYBOARD)
    except Exception as e:
        return _unforeseen(e)
    return 0


def _unforeseen(e: Exception) -> int:
    """An error of the program; of several processes, perhaps that one is gone."""
    if not jax.distributed.is_initialized():
        raise e
    if how := lost(e):
        print_stopped("of all processes goes on from the last checkpoint", f"another process of this run ended ({how})")
        return leave(PREEMPTED)
    traceback.print_exception(e)
    return leave(1)


def _run(config: Config, processes: Processes) -> None:
    console = make_console() if processes.writes else Console(quiet=True)
    rows = run(config, console, processes)
    processes.first(lambda: _report(rows, config, console))


def _report(rows: list[Row], config: Config, console: Console) -> None:
    write_report(rows, config, console)
    if config.export:
        write_exports(export_all(config, console), config, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
