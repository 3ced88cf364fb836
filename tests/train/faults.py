"""Kills of the main job at toy size: whatever happens to it, the same command ends with the same table and files.

``python -m tests.train.faults`` runs all thirty and prints a line for each; about ten minutes on two idle cores.

Faults: SIGKILL at a random time, imports included; SIGTERM at a random time of the run; a disk that is full after a
random number of bytes (a small tmpfs, or a limit on the size of a file where none can be mounted); SIGKILL, and a
damaged newest checkpoint or a damaged file of a finished row. After every three of them the run goes to its end.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from train.__main__ import PREEMPTED
from train.experiments.folder import LOCK

OPTIONS = [
    "digits",
    *("--model.name", "mlp", "--batch", "64", "--checkpoint-seconds", "0.05"),
    *("--baseline.epochs", "16", "--baseline.learning-rate", "3e-3"),
    *("--finetune.epochs", "8", "--finetune.learning-rate", "1e-3"),
    *("--methods", "l1", "joint"),
]
FAULTS = ("kill",) * 11 + ("term",) * 9 + ("full",) * 4 + ("damage",) * 6
PATIENCE = 600.0
"""Seconds that a run may take on a busy machine."""


@dataclass
class Ended:
    """How a run ended: its code, what it printed, and its seconds; ``by`` the fault, or by itself."""

    code: int
    out: str
    err: str
    seconds: float
    by_fault: bool


@dataclass
class Harness:
    """Runs of one job in folders under ``disk``, which may be full, beside a cache of programs that is not."""

    disk: Path
    beside: Path
    mounted: bool
    draw: random.Random
    say: Callable[[str], None]
    folder: Path = field(init=False)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    seconds: float = 0.0
    wanted: object = None

    def __post_init__(self) -> None:
        self.anew()

    def anew(self) -> None:
        """The next run begins in an empty folder."""
        for old in self.disk.glob("run*"):
            shutil.rmtree(old)
        self.folder = self.disk / f"run{next(self.numbers)}"

    def run(self, fault: Callable[[subprocess.Popen[str]], None] | None = None, limit: int | None = None) -> Ended:
        """The command, ended by a fault that gets its process, or with a limit on the size of its files."""
        cache = ["--compilation-cache", str(self.beside / "cache")]
        command = [sys.executable, "-m", "train", *OPTIONS, "--out", str(self.folder), *cache]
        began = time.monotonic()

        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, preexec_fn=limited, **pipes) as process:  # type: ignore[call-overload]
            try:
                if fault is not None:
                    fault(process)
                by_fault = process.poll() is None or process.returncode in (-signal.SIGKILL, PREEMPTED)
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        by_fault = by_fault and process.returncode in (-signal.SIGKILL, PREEMPTED)
        return Ended(process.returncode, out, err, time.monotonic() - began, by_fault)

    def claimed(self, process: subprocess.Popen[str]) -> None:
        """Waits until the process works in the folder."""
        lock, mark = self.folder / LOCK, f"process {process.pid} on"
        while process.poll() is None and not (lock.exists() and mark in lock.read_text()):
            time.sleep(0.01)

    def finish(self) -> None:
        """To the end; what is there then is what was there without a fault."""
        ended = self.run()
        assert ended.code == 0, ended.err[-2000:]
        self.compare()
        self.say(f"  ended in {ended.seconds:.1f} s with the same table, files and epochs")
        self.anew()

    def compare(self) -> None:
        """Asserts that the folder holds what the run without faults gave, clocks apart."""
        found = self.table()
        assert found == self.wanted, f"{found}\n{self.wanted}"

    def table(self) -> object:
        """What a finished run gave, clocks apart."""
        rows = json.loads((self.folder / "report.json").read_text())["rows"]
        files = {p.name: p.read_bytes() for p in sorted(self.folder.glob("*.safetensors"))}
        lines = [json.loads(x) for p in sorted(self.folder.glob("*/metrics.jsonl")) for x in p.read_text().splitlines()]
        left = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        clocks = {"seconds", "examples_per_second"}
        without = [{k: v for k, v in line.items() if k not in clocks} for line in (*rows, *lines)]
        return without, files, left


# Faults: each returns what it did, or None where the run ended before


def kill(harness: Harness) -> str | None:
    """SIGKILL at any time of the process."""
    after = harness.draw.uniform(0, harness.seconds)

    def fault(process: subprocess.Popen[str]) -> None:
        _wait(process, after)
        process.kill()

    return f"SIGKILL after {after:.2f} s" if harness.run(fault).by_fault else None


def term(harness: Harness) -> str | None:
    """SIGTERM at any time of the run or, since a small job mostly compiles, when it has just saved a step."""
    after, training = harness.draw.uniform(0, harness.seconds * 0.6), harness.draw.random() < 0.5

    def fault(process: subprocess.Popen[str]) -> None:
        harness.claimed(process)
        _wait(process, after / 3 if training else after)
        newest = _target(harness.folder, "checkpoint")
        while training and process.poll() is None and _target(harness.folder, "checkpoint") in (None, newest):
            time.sleep(0.002)
        process.terminate()

    ended = harness.run(fault)
    if not ended.by_fault:
        return None
    assert ended.code == PREEMPTED, (ended.code, ended.err)
    assert ended.err.startswith("stopped by SIGTERM"), ended.err
    assert ended.err.endswith("the same command goes on.\n"), ended.err
    assert ended.err.count("\n") == 1, ended.err
    return f"SIGTERM after {after:.2f} s: {ended.code}, {ended.err.strip()}"


def full(harness: Harness) -> str | None:
    """A disk with room for some bytes."""
    room = harness.draw.randrange(0, 900_000)
    ballast = harness.disk / "ballast"
    harness.folder.mkdir(exist_ok=True)
    if harness.mounted:
        free = shutil.disk_usage(harness.disk).free
        with open(ballast, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, free - room))
    before = {p: p.read_bytes() for p in harness.folder.rglob("checkpoints/*.safetensors")}
    try:
        ended = harness.run(limit=None if harness.mounted else room)
    finally:
        ballast.unlink(missing_ok=True)
    if ended.code == 0:
        return None
    reason = "No space left on device" if harness.mounted else "File too large"
    assert ended.code == 2, (ended.code, ended.err)
    errors = [line for line in ended.err.splitlines() if "compilation cache" not in line]
    assert len(errors) == 1, ended.err
    assert reason in errors[0], ended.err
    left = [p for p in harness.folder.rglob("*") if p.name.startswith(".jaxcomp-")]
    assert not left, left
    for p, data in before.items():
        assert not p.exists() or p.read_bytes() == data, p
    return f"room for {room:,} bytes: {errors[0]}"


def damage(harness: Harness) -> str | None:
    """SIGKILL when there are checkpoints, and the newest, or a finished row, is damaged."""
    wait = harness.draw.uniform(0, harness.seconds * 0.5)
    what = harness.draw.choice(["checkpoint", "checkpoint", "checkpoint", "row.json", "file", "metrics.jsonl"])

    def fault(process: subprocess.Popen[str]) -> None:
        harness.claimed(process)
        _wait(process, wait)
        while process.poll() is None and _target(harness.folder, what) is None:
            time.sleep(0.005)
        process.kill()

    ended = harness.run(fault)
    file = _target(harness.folder, what)
    if not ended.by_fault or file is None:
        return None
    data = file.read_bytes()
    how = harness.draw.choice(["cut", "flip", "zeros", "empty"])
    at = harness.draw.randrange(len(data) * 8)
    bit = data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]
    file.write_bytes({"cut": data[: len(data) // 2], "flip": bit, "zeros": bytes(len(data)), "empty": b""}[how])
    again = harness.run()
    said = [line for line in again.out.splitlines() if str(file) in line]
    assert again.code == 0, again.err[-2000:]
    assert said, (file, how, again.out)
    harness.compare()
    harness.anew()
    return f"{what} damaged ({how}), then to the end: {said[0]}"


def _target(folder: Path, what: str) -> Path | None:
    """The newest file of a kind; while it is looked for, others may go."""
    if what == "checkpoint":
        found = [
            (int(p.stem), p)
            for p in folder.glob("*/checkpoints/*.safetensors")
            if not (p.parent.parent / "row.json").exists()
        ]
    else:
        rows = list(folder.glob("*/row.json"))
        made = [folder / f"{p.parent.name}.safetensors" if what == "file" else p.with_name(what) for p in rows]
        found = [(number, p) for number, p in enumerate(made)]
    return max(found)[1] if found else None


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 16 MB at a folder, if this process may mount one."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(options, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def thirty(scratch: Path, say: Callable[[str], None], *, seed: int = 0, faults: tuple[str, ...] = FAULTS) -> int:
    """Runs the faults in an order drawn by the seed, and the ends of their runs; how many there were."""
    draw = random.Random(seed)
    order, done = draw.sample(faults, len(faults)), 0
    kinds = {"kill": kill, "term": term, "full": full, "damage": damage}
    with small_disk(scratch / "disk") as mounted:
        harness = Harness(scratch / "disk", scratch, mounted, draw, say)
        say("a tmpfs of 16 MB is mounted" if mounted else "no tmpfs can be mounted: the size of a file is limited")
        assert harness.run().code == 0  # compiles
        harness.anew()
        ended = harness.run()
        harness.seconds, harness.wanted = ended.seconds, harness.table()
        harness.anew()
        say(f"without faults the run takes {ended.seconds:.1f} s")
        for name in order:
            while (what := kinds[name](harness)) is None:
                if (harness.folder / "report.json").exists():
                    harness.compare()
                harness.anew()  # it ended before: once more, from the beginning
            done += 1
            say(f"{done:2} {what}")
            if done % 3 == 0 and harness.folder.exists():
                harness.finish()
        if harness.folder.exists():
            harness.finish()
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        count = thirty(Path(scratch), lambda text: print(text, flush=True))
        print(f"{count} faults, and every run that went on ended with the same table")
