"""Two and four real processes over loopback are one run: what they make, how they end, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcomp as jc
from tests.processes import free_port, ran
from tests.train.processes import files_of, rows_of, trained
from train.__main__ import PREEMPTED

pytestmark = pytest.mark.slow

LONG = ("--baseline.epochs", "500")
ABORTED = -signal.SIGABRT
"""JAX's own end of a process that has lost process 0, where it is sooner than ours."""


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    (ended,) = trained(1, out)
    assert ended.code == 0, ended.err[-2000:]
    return out


def leaves_of(out: Path, name: str) -> list[np.ndarray]:
    params = jc.materialize(jc.load(out / f"{name}.safetensors")["params"])
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]


def history_of(out: Path) -> list[list[float]]:
    lines = map(json.loads, (out / "baseline" / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in ("step", "loss", "grad_norm")] for line in lines]


def check_same(many: Path, one: Path) -> None:
    """The same files and table.

    Sums of gradients are rounded in another order, so that weights differ by 1e-4 of the largest of their leaf at most,
    a quantized one by a step of its grid, and of 450 test images no more than 4 go to another class.
    """
    assert files_of(many) == files_of(one)
    for found, wanted in zip(rows_of(many), rows_of(one), strict=True):
        for key in ("test_accuracy", "untuned_accuracy"):
            assert (found[key] is None) == (wanted[key] is None)
            assert abs((found.pop(key) or 0) - (wanted.pop(key) or 0)) <= 4.5 / 450
        assert found.pop("zeros") == pytest.approx(wanted.pop("zeros"), abs=1e-3)
        assert found.pop("file_bytes") == pytest.approx(wanted.pop("file_bytes"), rel=0.01)
        assert found.pop("note").split(",")[0] == wanted.pop("note").split(",")[0]
        assert found == wanted
    histories = [
        [json.loads(x) for x in (out / "baseline/metrics.jsonl").read_text().splitlines()] for out in (many, one)
    ]
    for found, wanted in zip(*histories, strict=True):
        assert found["step"] == wanted["step"]
        np.testing.assert_allclose(
            [found["loss"], found["grad_norm"]], [wanted["loss"], wanted["grad_norm"]], rtol=1e-4
        )
    pairs = {
        name: zip(leaves_of(many, name), leaves_of(one, name), strict=True) for name in ("baseline", "joint", "w8a8")
    }
    for found, wanted in pairs["baseline"]:
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    for found, wanted in pairs["joint"]:
        assert ((found == 0) != (wanted == 0)).sum() <= 1e-3 * wanted.size  # masks
    for found, wanted in pairs["w8a8"]:
        assert np.abs(found - wanted).max() <= 1.01 / 127 * np.abs(wanted).max()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_does(one, tmp_path, count) -> None:
    ended = trained(count, tmp_path / "run")
    assert [e.code for e in ended] == [0] * count, ended[0].err[-2000:] + ended[-1].err[-2000:]
    check_same(tmp_path / "run", one)
    assert "float32 baseline" in ended[0].out
    for other in ended[1:]:  # Gloo greets by itself
        assert [line for line in other.out.splitlines() if not line.startswith("[Gloo]")] == []


@pytest.mark.parametrize("count", [2, 4])
def test_masks_thresholds_and_codes_of_split_weights_are_those_of_one(count) -> None:
    def said(count: int) -> list[str]:
        port = free_port()
        ended = ran([["-m", "tests.train.processes", str(count), str(i), str(port)] for i in range(count)])
        assert [e.code for e in ended] == [0] * count, ended[0].err[-2000:]
        return [line for line in ended[0].out.splitlines() if line.startswith("found")]

    alone = said(1)
    assert len(alone) == 6
    assert said(count) == alone


def in_training(out: Path, act: Callable[[list[subprocess.Popen[str]]], None]) -> Callable:
    """Does something to the processes when the first checkpoint is there."""

    def meanwhile(running: list[subprocess.Popen[str]]) -> None:
        while not list(out.glob("baseline/checkpoints/*.safetensors")):
            assert all(p.poll() is None for p in running), [p.communicate() for p in running]
            time.sleep(0.05)
        act(running)

    return meanwhile


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all_at_one_step_and_others_go_on(one, tmp_path, asked) -> None:
    """Of one process more or less: how many there are is not what a run is known by."""
    out = tmp_path / "run"
    ended = trained(2, out, meanwhile=in_training(out, lambda running: running[asked].terminate()))
    assert [e.code for e in ended] == [PREEMPTED] * 2, ended[0].err[-2000:] + ended[1].err[-2000:]
    lines = [e.err.strip().splitlines()[-1] for e in ended]
    assert lines[0] == lines[1]
    assert lines[0].startswith("stopped by SIGTERM")
    (again,) = trained(1, out)
    assert again.code == 0, again.err[-2000:]
    if "after step" in lines[0]:
        step = lines[0].split("after step ")[1].split()[0]
        assert f"goes on from the checkpoint of step {step} of" in again.out
    check_same(out, one)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path, killed) -> None:
    out = tmp_path / "run"
    ended = trained(2, out, *LONG, meanwhile=in_training(out, lambda running: running[killed].kill()))
    assert ended[killed].code == -signal.SIGKILL
    left = ended[1 - killed]
    assert left.code in ((PREEMPTED,) if killed else (PREEMPTED, ABORTED)), left
    if left.code == PREEMPTED:
        assert "another process of this run ended" in left.err.strip().splitlines()[-1]


def test_a_folder_that_is_not_shared_is_one_error(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ended = trained(2, Path("run"), cwd=[tmp_path / "a", tmp_path / "b"])
    assert [e.code for e in ended] == [2, 2], ended
    for e in ended:
        assert f"{str(tmp_path / 'b' / 'run')!r} does not hold what process 0 wrote there" in e.err
        assert "on a shared file system with --out" in e.err
    assert not (tmp_path / "b" / "run").exists()


def test_on_slurm_they_find_each_other_and_other_options_are_one_error(tmp_path) -> None:
    """In the environment that srun makes; JAX reads it, and nothing is given by hand."""
    port = str(free_port())

    def slurm(index: int) -> dict[str, str]:
        task = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_NTASKS": "2"}
        return {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "JAX_COORDINATOR_PORT": port, **task}

    command = ["-m", "train", "--out", str(tmp_path / "run"), "--processes", "auto"]
    ended = ran([[*command, "--seed", str(i)] for i in range(2)], extra=slurm)
    assert [e.code for e in ended] == [2, 2], ended
    for e in ended:
        assert "The options or versions differ in process 1 from those in process 0" in " ".join(e.err.split())
    assert os.listdir(tmp_path) == []


def test_without_a_cluster_it_says_what_to_write(tmp_path) -> None:
    (ended,) = ran([["-m", "train", "--out", str(tmp_path / "run"), "--processes", "auto"]])
    assert ended.code == 2, ended
    error = " ".join(ended.err.split())
    assert "the processes do not come together: coordinator_address should be defined." in error
    assert "--processes N --process-id I --coordinator HOST:PORT" in error
