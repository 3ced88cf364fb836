"""Checkpoints of one training: files of this package, with a checksum for each array; the newest two are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxcomp.artifact.disk import FileError
from jaxcomp.artifact.files import load, load_metadata, save
from jaxcomp.core.types import State
from train.loop import older
from train.loop.history import Epoch

SUFFIX = ".safetensors"
KEPT = 2


@dataclass
class Reached:
    """How far a training is, besides its state.

    ``seconds`` of all resumptions; the epochs that are done; of the one that is not, ``(loss, accuracy, grad_norm)`` of
    each step.
    """

    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    steps: list[tuple[float, ...]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints under a folder, ``STEP.safetensors``; each appears whole or not at all.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as d:
    ...     Checkpoints(d, print).save({"x": jnp.ones(2)}, Reached(1.5), step=3)
    ...     state, reached = Checkpoints(d, print).restore({"x": jnp.zeros(2)})
    >>> state["x"].tolist(), reached.seconds
    ([1.0, 1.0], 1.5)

    Args:
      folder: of the checkpoints.
      say: takes a line for each that cannot be used.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = Path(folder), say

    def save(self, state: State, reached: Reached, *, step: int) -> None:
        """Writes a state as it is after ``step`` steps; only then are older ones removed.

        Raises:
          FileError: it cannot be written; nothing of it is left, and the older ones stay.
        """
        metrics = np.asarray(reached.steps, np.float64).reshape(-1, 3)
        tree = {"state": dict(_arrays(state)), "metrics": metrics}
        about = {"seconds": reached.seconds, "history": [asdict(line) for line in reached.history]}
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as e:
            raise FileError(f"save: cannot make {str(self._folder)!r}: {e.strerror}.") from e
        save(self._folder / f"{step:09}{SUFFIX}", tree, metadata=about)
        for old in self.files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = [p for p in self._folder.glob(f"*{SUFFIX}") if p.stem.isdigit()]
        return sorted(found, key=lambda p: int(p.stem))

    def restore(self, like: State) -> tuple[State, Reached]:
        """The newest state that is whole; ``like`` itself where there is none.

        What is damaged, or of another network, is named by a line and set aside as ``….damaged``.
        """
        files = self.files()
        while files:
            file = files.pop()
            try:
                return _restored(file, like)
            except ValueError as e:
                aside = file.with_name(f"{file.name}.damaged")
                os.replace(file, aside)
                then = f"{files[-1].name}, the one before, is used" if files else "there is none before it"
                self._say(f"{str(e).rstrip('.')}; it is now {aside.name}, and {then}.")
        found = older.restore(self._folder, like, self._say)
        return (like, Reached()) if found is None else (found[0], Reached(*found[1:]))

    def at(self, step: int, like: State) -> tuple[State, Reached]:
        """The state after ``step`` steps, which another process found whole; ``like`` itself for none.

        Raises:
          FileError, ValueError: it is not there, or is another.
        """
        return _restored(self._folder / f"{step:09}{SUFFIX}", like) if step else (like, Reached())

    def remove(self) -> None:
        """All of them: the training is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _arrays(tree: State) -> list[tuple[str, np.ndarray]]:
    """The leaves by their paths."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(jax.device_get(leaf))) for path, leaf in named]


def _restored(file: Path, like: State) -> tuple[State, Reached]:
    """The state of a file, placed as ``like`` is.

    Raises:
      FileError: it is damaged.
      ValueError: it is whole, and of another network or version.
    """
    tree, about = load(file), load_metadata(file)
    try:
        saved: Mapping[str, np.ndarray] = tree["state"]
        steps = [tuple(step) for step in tree["metrics"].tolist()]
        reached = Reached(float(about["seconds"]), [Epoch(**line) for line in about["history"]], steps)
    except (TypeError, KeyError) as e:
        raise ValueError(f"{str(file)!r} is of another version ({e})") from e
    named, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    kinds, found = ({path: (x.shape, x.dtype) for path, x in tree.items()} for tree in (wanted, saved))
    if differs := [path for path in {**kinds, **found} if kinds.get(path) != found.get(path)]:
        raise ValueError(f"{str(file)!r} is of another network or version, which differs in {differs[0]!r}")
    leaves = [jax.device_put(saved[path], leaf.sharding) for path, leaf in wanted.items()]
    return jax.tree.unflatten(structure, leaves), reached
