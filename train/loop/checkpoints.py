"""Checkpoints of one training with orbax: the newest complete one, or none."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxcomp.core.types import State

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints under a folder; orbax makes each appear whole or not at all.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as d, Checkpoints(d) as c:
    ...     c.save({"x": jnp.ones(2)}, epoch=3, seconds=1.5)
    ...     state, epoch, seconds = c.restore({"x": jnp.zeros(2)})
    >>> state["x"].tolist(), epoch, seconds
    ([1.0, 1.0], 3, 1.5)
    """

    def __init__(self, folder: str | Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: State, *, epoch: int, seconds: float) -> None:
        """Writes a state as it is after ``epoch`` epochs and ``seconds`` of training."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave({"seconds": seconds}))
        self._manager.save(epoch, args=args, force=True)

    def restore(self, like: State) -> tuple[State, int, float]:
        """The newest state, its epochs and seconds; ``like`` itself, 0 and 0 where there is none."""
        epoch = self._manager.latest_step()
        if epoch is None:
            return like, 0, 0.0
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), facts=ocp.args.JsonRestore())
        found = self._manager.restore(epoch, args=args)
        return found["state"], epoch, found["facts"]["seconds"]
