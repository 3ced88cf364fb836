"""One run at a time in a folder, whose settings are known: the second refuses, and a kill leaves no lock behind."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from train.configs import DIGITS, Config
from train.errors import RunError
from train.experiments.folder import LOCK, check_folder, claimed

HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.pwrite(handle, b"process 7 on elsewhere", 0)
print("held", flush=True)
time.sleep(60)
"""


def of(out: Path) -> Config:
    return dataclasses.replace(DIGITS, out=out)


def claim(config: Config) -> None:
    with claimed(config, (), Console(quiet=True)):
        pass


def test_a_second_run_is_refused_in_one_line(tmp_path) -> None:
    config = of(tmp_path / "run")
    with claimed(config, (), Console(quiet=True)), pytest.raises(RunError) as e:
        claim(config)
    assert str(e.value).startswith(f"another run, process {os.getpid()} on ")
    assert str(e.value).endswith(
        f" works in {str(config.folder)!r}; wait for its end, or choose another folder with --out."
    )
    claim(config)


def test_a_killed_run_leaves_no_lock(tmp_path) -> None:
    config = of(tmp_path)
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another run, process 7 on elsewhere, works in"):
            claim(config)
        assert not (tmp_path / "settings.json").exists()  # the second run changed nothing
        holder.send_signal(signal.SIGKILL)
    claim(config)


def test_where_there_are_no_locks_it_says_so(tmp_path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    console = Console(file=io.StringIO(), record=True, width=200)
    with claimed(of(tmp_path), (), console):
        assert "cannot be locked (Operation not supported): see to it that no other run works in it." in " ".join(
            console.export_text().split()
        )


@pytest.mark.parametrize("text", ["", '{"seed": ', "[1]", "\0\0"])
def test_damaged_settings(tmp_path, text) -> None:
    config = of(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    assert check_folder(config) is None  # nothing was made: nothing can be mixed up
    (tmp_path / "baseline.safetensors").write_bytes(b"work")
    with pytest.raises(RunError, match=r"settings.json', which says whose work is beside it, is damaged .*--out, or"):
        check_folder(config)
