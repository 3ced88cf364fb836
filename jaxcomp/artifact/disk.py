"""Files that appear whole or not at all, and the one error of files."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Protocol

_PREFIX = ".jaxcomp-"


class FileError(ValueError):
    """A file that cannot be read as a compressed tree, or written."""


class Sink(Protocol):
    """Where a file's bytes go."""

    def write(self, data: memoryview, /) -> int | None:
        """Takes some of the bytes; how many."""

    def seek(self, place: int, /) -> int:
        """Goes to a place."""


class Counted:
    """A sink that keeps nothing, for what wants to know a file's size."""

    def write(self, data: memoryview, /) -> int:
        """Takes all."""
        return data.nbytes

    def seek(self, place: int, /) -> int:
        """Goes nowhere."""
        return place


@contextlib.contextmanager
def reading_file(name: str, *, owner: str = "load") -> Iterator[None]:
    """Turns what a wrong file raises inside into a FileError that names the file, after who reads it."""
    try:
        yield
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{owner}: cannot read {os.fspath(e.filename or name)!r}: {e.strerror or e}.") from e
    except ValueError as e:
        raise FileError(f"{owner}: {name!r} {e}.") from e


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, owner: str = "save") -> Iterator[FileIO]:
    """A file beside ``path`` to write to, which takes its place when the block ends and all of it is on disk.

    Args:
      path: of the file.
      owner: who writes it, for messages.

    Raises:
      FileError: it cannot be written. Then, and whatever else the block raises, the old file is as it was and nothing
        else is left.
    """
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    temporary: Path | None = None
    try:
        handle, temporary = _begun(target.parent)
        with FileIO(handle, "wb") as f:
            yield f
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), 0o644)
            if temporary is None:
                temporary = _named(f, target.parent)
        os.replace(temporary, target)
        temporary = None
        _synced(target.parent)
    except OSError as e:
        raise FileError(f"{owner}: cannot write {os.fspath(path)!r}: {e.strerror or e}.") from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _begun(folder: Path) -> tuple[int, Path | None]:
    """An open file in a folder, without a name where the system has such: then nothing is left of a killed process."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not every file system has it; what else is wrong, the next lines say
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), None
    handle, name = tempfile.mkstemp(dir=folder, prefix=_PREFIX)
    return handle, Path(name)


def _synced(folder: Path) -> None:
    """Puts the names in a folder on disk, where the system does that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _named(f: FileIO, folder: Path) -> Path:
    """A name for a file that has none."""
    name = folder / f"{_PREFIX}{secrets.token_hex(8)}"
    # Without a folder's handle, which an absolute path ignores, Python 3.12 does not follow the link on Linux.
    os.link(f"/proc/self/fd/{f.fileno()}", name, src_dir_fd=f.fileno(), follow_symlinks=True)
    return name


@contextlib.contextmanager
def spooled(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A file without a name beside ``path``, for what waits to be written there; it is gone when the block ends."""
    with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent, buffering=0) as f:
        yield f


def write_all(f: Sink, data: memoryview | bytes) -> None:
    """Writes all of it: one call may take less, at most 2 GB of it on Linux."""
    left = memoryview(data)
    while len(left):
        left = left[f.write(left) or 0 :]
