"""Thirty faults of the main job, and what its command says of signals."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from tests.train.faults import FAULTS, thirty
from tests.train.signals import as_in_a_terminal  # noqa: F401 - a fixture
from train import __main__ as command
from train.errors import RunError


@pytest.mark.slow
def test_whatever_stops_a_run_it_ends_with_the_same_table(tmp_path) -> None:
    said: list[str] = []
    assert thirty(tmp_path, said.append) == len(FAULTS) == 30, "\n".join(said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_end_the_command_with_codes_of_their_own(number, code, monkeypatch, capsys, tmp_path) -> None:
    def train(config, console, processes):
        stop = processes.stop
        with stop.at_steps():
            stop.now()
            os.kill(os.getpid(), number)
            assert stop.now()
            raise stop.stopped(" after step 3 of l1, which is saved")

    monkeypatch.setattr(command, "run", train)
    assert command.main(["--out", str(tmp_path / "run")]) == code
    wanted = f"stopped by {number.name} after step 3 of l1, which is saved; the same command goes on.\n"
    assert capsys.readouterr() == ("", wanted)


def test_the_options_of_a_run_reach_it(monkeypatch, capsys, tmp_path) -> None:
    seen = SimpleNamespace()

    def train(config, console, processes):
        import jax

        seen.config, seen.cache = config, jax.config.jax_compilation_cache_dir
        raise RunError("enough")

    monkeypatch.setattr(command, "run", train)
    assert command.main(["--accumulate", "4", "--compilation-cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err == "error: enough\n"
    assert seen.config.accumulate == 4
    assert seen.cache == str(tmp_path / "cache")
