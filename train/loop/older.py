"""Checkpoints as orbax wrote them for older versions of this program, one folder for each epoch; they are only read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax

from jaxcomp.core.types import State
from train.errors import RunError
from train.loop.history import FILE, Epoch, parsed


def restore(folder: Path, like: State, say: Callable[[str], None]) -> tuple[State, float, list[Epoch]] | None:
    """The newest state with its seconds and epochs, the latter from the file beside the folder; None without one.

    What cannot be read is named by a line.

    Raises:
      RunError: there is one, and several processes, which orbax would wait for.
    """
    epochs = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir()]
    if not epochs:
        return None
    if jax.process_count() > 1:
        raise RunError(f"{str(folder)!r} is of an older version: go on as one process until it has saved once.")
    import orbax.checkpoint as ocp  # a second, for what is seldom there

    logging.getLogger("absl").setLevel(logging.ERROR)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), facts=ocp.args.JsonRestore())
    epoch = max(epochs)
    try:
        with ocp.CheckpointManager(folder.resolve()) as manager:
            found = manager.restore(epoch, args=args)
    except Exception as e:  # of many kinds, and of many lines
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        say(f"{str(folder / str(epoch))!r}, a checkpoint of an older version, is damaged ({reason}); it is not used.")
        return None
    return found["state"], found["facts"]["seconds"], _history(folder.parent / FILE, say)[:epoch]


def _history(file: Path, say: Callable[[str], None]) -> list[Epoch]:
    """The epochs of a file; none, by a line, of one that is damaged."""
    try:
        return parsed(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as e:
        say(f"{str(file)!r} {e}; it begins anew, and the training goes on.")
        return []
