"""Python processes of this machine that run side by side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ran(
    commands: Sequence[Sequence[str]],
    *,
    meanwhile: Callable[[list[subprocess.Popen[str]]], None] | None = None,
    cwd: Sequence[Path | None] = (),
    extra: Callable[[int], dict[str, str]] = lambda index: {},
) -> list[Ended]:
    """The ends of processes that run side by side, with ``extra(index)`` in their environments; none outlives this."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    folders = [*cwd, *[None] * (len(commands) - len(cwd))]
    running = [
        subprocess.Popen([sys.executable, *command], cwd=folder, env={**env, **extra(index)}, **pipes)
        for index, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    try:
        if meanwhile is not None:
            meanwhile(running)
        said = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return [Ended(p.returncode, *texts) for p, texts in zip(running, said, strict=True)]
