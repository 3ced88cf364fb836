"""``python -m tests.benchmarks [NAME ...] [--json FILE] [--toy]``: runs benchmarks and prints their tables.

``gpu`` is not among those that run by default. It has sections, ``gpu.dots`` say, and wants a GPU; see its docstring.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.timing import Report

NAMES = (
    "qat_step",
    "global_mask",
    "nm_mask",
    "quantize_bandwidth",
    "activations",
    "shrink",
    "kmeans",
    "low_rank",
    "column_solver",
    "analysis",
    "hessian",
    "allocation",
    "save_load",
    "coding",
    "decode",
    "decode_lm",
    "sparse",
    "grouped",
    "integer_networks",
    "integer_encoder",
    "integer_prompt",
    "export_onnx",
    "export_functions",
)
ON_A_DEVICE = (
    "gpu",
    "tune_kernels",
    "export_litert",
    "reconstruction",
    "mixed_precision",
    "sentences",
    "supernet",
    "growth",
)
"""Those that want an accelerator, packages that cannot be declared, trained networks, or much memory: by name only."""
TOY = (
    "gpu",
    "decode",
    "sparse",
    "grouped",
    "integer_networks",
    "integer_encoder",
    "integer_prompt",
    "coding",
    "column_solver",
    "sentences",
    "growth",
)
"""Those that also run at toy size, which shows that they run and no more."""
SECTIONED = ("gpu", "sparse", "mixed_precision", "sentences", "growth")
_WHICH = f"which; all by default: {', '.join(NAMES)}; by name only: {', '.join(ON_A_DEVICE)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=_WHICH)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file, table by table")
    parser.add_argument("--toy", action="store_true", help=f"at toy size, anywhere: {', '.join(TOY)}")
    args = parser.parse_args()
    try:
        wanted = {name: _started(name, toy=args.toy) for name in args.names or NAMES}
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if Console().is_terminal else 150)
    figures: dict[str, list[Any]] = {}
    for name, start in wanted.items():
        figures[name] = []
        for report in start():
            console.print(report.table())
            figures[name].append(report.json())
            if args.json:
                _write(args.json, figures)


def _started(name: str, *, toy: bool) -> Callable[[], Iterator[Report]]:
    """What runs the benchmark of this name, or the section of one."""
    stem, _, section = name.partition(".")
    if stem not in NAMES + ON_A_DEVICE:
        raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(NAMES + ON_A_DEVICE)}")
    if toy and stem not in TOY:
        raise ValueError(f"{stem!r} has no toy size; these have: {', '.join(TOY)}")
    module = importlib.import_module(f"tests.benchmarks.{stem}")
    if stem in SECTIONED:
        return module.sections(section, toy=toy)
    if section:
        raise ValueError(f"{stem!r} has no sections, so there is no {name!r}")
    return partial(module.run, toy=True) if toy else module.run


def _write(file: Path, figures: dict[str, list[Any]]) -> None:
    """The figures so far: whole, whenever the run is cut off."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(figures, indent=2) + "\n")
    part.replace(file)


if __name__ == "__main__":
    main()
