"""Compression after training of a checkpoint that does not fit into memory: a leaf at a time, from file to file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxcomp.artifact.coding.blocks import Coding
from jaxcomp.artifact.disk import FileError, replacing, write_all
from jaxcomp.artifact.files import load, load_metadata, save
from jaxcomp.core.leaves import pack
from jaxcomp.core.progress import progress
from jaxcomp.core.records import text_of
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Json, Leaf, PyTree
from jaxcomp.scale.sources import Keys, Leaves, TreeLeaves
from jaxcomp.scale.stages import Found, Stages, stages_of
from jaxcomp.scale.thresholds import Threshold

_JOB = "job.json"


def compress_file(
    path: str | os.PathLike[str],
    source: Leaves | PyTree,
    transform: Transform,
    *,
    work: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Json] | None = None,
    coding: Coding | None = None,
) -> int:
    """Compresses a checkpoint leaf by leaf, and writes the file of the result; returns its size in bytes.

    The file is, byte for byte, what ``save(path, transform.apply(transform.init(params), params))`` writes of the
    checkpoint's arrays in nested dicts. One leaf is in memory at a time, with what its transform makes of it: about
    five times the largest leaf, whatever the number of leaves. A threshold that leaves share, as of
    ``prune(0.5, scope=Global())``, takes two readings of these leaves before, and is exact.

    Args:
      path: of the file to write; its folder needs room for two of it, with ``work`` on the same disk for three.
      source: what :func:`open_safetensors` or :func:`open_orbax` opened, any other :class:`Leaves`, or a tree of nested
        dicts in memory.
      transform: prune, quantize, share, low_rank, and chains and tables (``by_path``) of them.
      work: a folder for finished leaves. A run that was cut off goes on there, and does no finished leaf and no
        threshold again; it is removed when the file is complete. None keeps nothing.
      metadata, coding: as :func:`~jaxcomp.artifact.save` has them.

    Raises:
      FileError: a file cannot be read or written; ``work`` holds another job, or another program's files.
      ValueError: what the transform raises of these leaves; or it needs statistics, or the whole tree at once. Rules
        and layouts are checked on shapes before anything is read. A leaf's path leads to others, too.
      TypeError: the source is a path that nothing opened.

    >>> import tempfile, numpy as np
    >>> import jaxcomp as jc
    >>> rng = np.random.default_rng(0)
    >>> draw = lambda: jax.device_put(rng.normal(size=(64, 32)).astype(np.float32))
    >>> params = {name: {"kernel": draw()} for name in ("down", "up")}
    >>> t = jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4)))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     size = compress_file(f"{d}/small", params, t)
    ...     same = jc.save(f"{d}/same", t.apply(t.init(params), params))
    ...     Path(f"{d}/small").read_bytes() == Path(f"{d}/same").read_bytes()
    True
    """
    leaves = _leaves(source)
    stages = stages_of(transform, leaves.shapes)
    job = None if work is None else _Job.begun(Path(work), _about(leaves, transform))
    found = Found.of(_thresholds(stages, leaves, job))
    with progress("compress", len(leaves)) as advance:
        size = save(path, _made(stages, leaves, found, job, advance), metadata=metadata, coding=coding)
    if job is not None:
        job.removed(len(leaves))
    return size


def _leaves(source: Leaves | PyTree) -> Leaves:
    """The source's leaves, whose keys make nested dicts.

    Raises:
      TypeError, ValueError: they do not, or it is a path.
    """
    if isinstance(source, str | os.PathLike):
        raise TypeError(f"compress_file: source is a path; give open_safetensors({os.fspath(source)!r}) or open_orbax.")
    leaves = source if isinstance(source, Leaves) else TreeLeaves(source)
    ends = {leaves.keys_of(path): path for path in leaves}
    for keys, path in ends.items():
        above = [ends[keys[:n]] for n in range(len(keys)) if keys[:n] in ends]
        if above:
            raise ValueError(f"compress_file: {above[0]!r} is a leaf, and {path!r} is in it; rename one of them.")
    return leaves


def _thresholds(stages: Stages, leaves: Leaves, job: _Job | None) -> list[Threshold]:
    if job is not None and job.thresholds is not None:
        return job.thresholds
    with progress("compress: thresholds", 2 * sum(len(paths) for _, paths, _ in stages.groups)) as advance:
        found = stages.thresholds(lambda path: _here(leaves[path]), advance)
    if job is not None:
        job.keep(found)
    return found


def _made(
    stages: Stages, leaves: Leaves, found: Found, job: _Job | None, advance: Callable[[float], None]
) -> Iterator[tuple[Keys, Leaf]]:
    """The keys and the compressed leaf of each leaf, those that are finished from the job's folder."""
    for number, path in enumerate(leaves):
        done = None if job is None else job.finished(number, found)
        if done is None:
            leaf = pack({path: stages.run(path, _here(leaves[path]), found)})[path]
            if job is not None:
                job.finish(number, leaf, found)
        else:
            leaf = done["leaf"]
        yield leaves.keys_of(path), leaf
        advance(1)


def _here(leaf: Leaf) -> Leaf:
    """An array of numpy as one of jax, which has no type as wide as some of numpy's."""
    stays = not hasattr(leaf, "dtype") or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    return leaf if stays else jax.device_put(leaf)


def _about(leaves: Leaves, transform: Transform) -> dict[str, Json]:
    """What tells one job from another."""
    shapes = [[path, str(s.dtype), list(s.shape)] for path, s in leaves.shapes.items()]
    told = hashlib.sha256(json.dumps([shapes, leaves.about]).encode()).hexdigest()
    return {"version": 1, "leaves": told, "transform": text_of(transform)}


@dataclass
class _Job:
    """What is finished, in a folder: the thresholds, and a file for each leaf."""

    folder: Path
    about: dict[str, Json]
    thresholds: list[Threshold] | None = None

    @classmethod
    def begun(cls, folder: Path, about: dict[str, Json]) -> _Job:
        """A new job, or one that was cut off.

        Raises:
          FileError: the folder holds another job, or something else.
        """
        try:
            folder.mkdir(exist_ok=True)
            inside = {p.name for p in folder.iterdir()}
        except OSError as e:
            raise FileError(f"compress_file: cannot write {os.fspath(folder)!r}: {e.strerror or e}.") from e
        job = cls(folder, about)
        if _JOB not in inside:
            if inside:
                raise FileError(f"compress_file: work={os.fspath(folder)!r} holds other files; give an empty folder.")
            job._write()
            return job
        try:
            said = json.loads((folder / _JOB).read_text())
            found = said.pop("thresholds")
            job.thresholds = None if found is None else [Threshold(*map(int, t)) for t in found]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise FileError(f"compress_file: {os.fspath(folder / _JOB)!r} is damaged; remove the folder.") from e
        other = [name for name in about if said.get(name) != about[name]]
        if other:
            raise FileError(
                f"compress_file: work={os.fspath(folder)!r} holds another job: its {other[0]} were"
                f" {str(said.get(other[0]))[:80]}, these are {str(about[other[0]])[:80]}; remove the folder, or give"
                " another."
            )
        return job

    def keep(self, thresholds: list[Threshold]) -> None:
        """Writes the thresholds."""
        self.thresholds = thresholds
        self._write()

    def finished(self, number: int, found: Found) -> dict[str, Leaf] | None:
        """A leaf that was finished before, or None; one that is damaged counts for none."""
        file = self._file(number)
        if not file.exists():
            return None
        with suppress(FileError):
            tree, ties = load(file), load_metadata(file)["ties"]
            found.ties.update({int(n): left for n, left in ties.items()})
            return tree
        return None

    def finish(self, number: int, leaf: Leaf, found: Found) -> None:
        """Writes a leaf, whole or not at all."""
        save(self._file(number), {"leaf": leaf}, metadata={"ties": {str(n): left for n, left in found.ties.items()}})

    def removed(self, count: int) -> None:
        """Removes what the job wrote, and its folder where nothing else is in it."""
        for file in [*(self._file(i) for i in range(count)), self.folder / _JOB]:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _write(self) -> None:
        said = {**self.about, "thresholds": None if self.thresholds is None else [list(t) for t in self.thresholds]}
        with replacing(self.folder / _JOB, owner="compress_file") as f:
            write_all(f, json.dumps(said).encode())
