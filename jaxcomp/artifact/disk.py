"""Files that appear whole or not at all, and the one error of files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Protocol


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
def replacing(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A file beside ``path`` to write to, which takes its place when the block ends and all of it is on disk.

    Raises:
      FileError: it cannot be written. Then, and whatever else the block raises, the old file is as it was and nothing
        else is left.
    """
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with FileIO(handle, "wb") as f:
            yield f
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        temporary = None
    except OSError as e:
        raise FileError(f"save: cannot write {os.fspath(path)!r}: {e.strerror or e}.") from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_all(f: Sink, data: memoryview | bytes) -> None:
    """Writes all of it: one call may take less, at most 2 GB of it on Linux."""
    left = memoryview(data)
    while len(left):
        left = left[f.write(left) or 0 :]
