"""The ``jaxcomp`` command run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcomp import cli

Run = Callable[[str], tuple[int, str, str]]


def runner(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """From a line of words to the exit code, output and errors of the command in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")

    def run(line: str) -> tuple[int, str, str]:
        try:
            code = cli.main(line.split())
        except SystemExit as e:  # tyro's own
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run
