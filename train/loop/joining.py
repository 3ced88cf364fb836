"""How a process comes into a run of several, and how it leaves one that has lost a process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from train.configs import Config
from train.errors import RunError
from train.loop.mesh import data_mesh
from train.loop.processes import Processes
from train.loop.progress import say
from train.loop.stopping import Stop


def joined(config: Config) -> Processes:
    """The processes of the run, when all of them have come: `jax.distributed` brings them together.

    A line says that it waits: where one does not come within five minutes, JAX aborts the others, and names none.

    Raises:
      RunError: no cluster is found, or what the options say does not fit.
    """
    if config.processes == 1:
        return Processes()
    where = f" at {config.coordinator}" if config.coordinator else ""
    say(Console(stderr=True), f"waits for all processes of this run{where}, five minutes at most.")
    named = {} if config.processes == "auto" else _named(config)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it waits, Python would not see the keyboard's
    try:
        jax.distributed.initialize(**named)
    except (ValueError, RuntimeError) as e:
        raise RunError(f"the processes do not come together: {_first_line(e)} {_mend(config)}") from e
    finally:
        signal.signal(signal.SIGINT, before)
    if jax.process_count() == 1:
        return Processes()
    vote = make_vote()
    int(vote(None))  # their devices find each other now: XLA on CPUs waits no more than 30 seconds for that
    return Processes(jax.process_count(), jax.process_index(), Stop(vote))


def _named(config: Config) -> dict[str, Any]:
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.processes,
        "process_id": config.process_id,
        "cluster_detection_method": "deactivate",
    }


def _mend(config: Config) -> str:
    if config.processes == "auto":
        return "Without SLURM, a TPU pod, Kubernetes or Open MPI: --processes N --process-id I --coordinator HOST:PORT"
    return f"Each of {config.processes} must be started with its own --process-id and the same --coordinator."


def _first_line(e: Exception) -> str:
    return f"{(str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')}."


def make_vote() -> Callable[[int | None], jax.Array]:
    """``vote(signal or None)``: the largest that any process gave, 0 for none; it is under way when it returns."""
    mesh = data_mesh()
    largest = jax.jit(jnp.max, out_shardings=mesh.copied)

    def vote(number: int | None) -> jax.Array:
        return largest(mesh.place(np.full(mesh.devices, number or 0, np.int32)))

    return vote


GONE = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")
"""What an error says when another process is gone; XLA has no type of its own for it."""


def lost(e: Exception) -> str | None:
    """How an error says that another process is gone; None if it says something else."""
    known = isinstance(e, ValueError | jax.errors.JaxRuntimeError) and any(word in str(e) for word in GONE)
    return _first_line(e) if known else None


def leave(code: int) -> int:
    """Ends this process at once, if it is one of several: it would wait for others that wait for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
