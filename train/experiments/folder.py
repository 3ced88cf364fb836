"""The folder of a run: whose it is, and that one run at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from jaxcomp.artifact.files import write_atomically
from train.configs import Config, difference, identity_of
from train.errors import RunError
from train.loop.history import FILE
from train.loop.processes import Processes
from train.loop.progress import say

LOCK = ".lock"
"""Its name in the folder. The system's lock on it ends with the process, however that ends; the file stays."""


def check_folder(config: Config) -> str | None:
    """In what the run that the folder holds differs, where that one made nothing yet; else None.

    Raises:
      RunError: the folder holds work of a run with other settings, or cannot be read.
    """
    folder, note = config.folder, config.folder / "settings.json"
    try:
        found = dict(json.loads(note.read_text())) if note.exists() else None
    except OSError as e:
        raise _unusable(folder, e) from e
    except (ValueError, TypeError) as e:
        if _holds_work(folder):
            raise RunError(
                f"{str(note)!r}, which says whose work is beside it, is damaged ({e}); choose another folder with"
                " --out, or remove that file if the work is of this command."
            ) from e
        found = None
    k = None if found is None else difference(found, _settings(config))
    if found is None or k is None:
        return None
    said = f"a run with {k} = {found.get(k)}, this one has {_settings(config).get(k)}"
    if _holds_work(folder):
        raise RunError(f"{str(folder)!r} holds {said}; choose another folder with --out, or remove that one.")
    return said


@contextmanager
def claimed(
    config: Config, rows: Collection[str], console: Console, processes: Processes | None = None
) -> Iterator[None]:
    """The run's folder, made and kept from other runs, while the block lasts; says what of an earlier run is in it.

    Args:
      config: the settings.
      rows: the names of the run's rows.
      console: where to say it.
      processes: of the run; the first one claims the folder, the others look that they see it.

    Raises:
      RunError: another run works in it; what :func:`check_folder` raises; it cannot be written, or not be seen.
    """
    processes = processes or Processes()
    with ExitStack() as stack:
        mark = processes.first(lambda: stack.enter_context(_claimed(config, rows, console)))
        processes.together(lambda: check_shared(config.folder, str(mark), processes))
        yield


@contextmanager
def _claimed(config: Config, rows: Collection[str], console: Console) -> Iterator[str]:
    """As :func:`claimed`, by one process; what it wrote into the lock."""
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise _unusable(folder, e) from e
    try:
        mark = _lock(handle, folder, console)
        _greet(config, rows, console)
        yield mark
    finally:
        os.close(handle)


def check_shared(folder: Path, mark: str, processes: Processes, *, tries: int = 20) -> None:
    """Looks, for ten seconds, for what the first process wrote into the lock.

    Raises:
      RunError: it is not there.
    """
    if processes.writes:
        return
    for _ in range(tries):
        with suppress(OSError):
            if (folder / LOCK).read_text() == mark:
                return
        time.sleep(0.5)
    raise RunError(
        f"on {socket.gethostname()} the folder {str(folder.absolute())!r} does not hold what process 0 wrote there;"
        " all processes must see one folder: choose one on a shared file system with --out."
    )


def _lock(handle: int, folder: Path, console: Console) -> str:
    """What it writes into the lock: who has it.

    Raises:
      RunError: another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        other = os.pread(handle, 200, 0).decode(errors="replace").strip()
        raise RunError(
            f"another run{other and f', {other},'} works in {str(folder)!r}; wait for its end, or choose another folder"
            " with --out."
        ) from e
    except OSError as e:  # a network's file system, say
        say(console, f"{folder} cannot be locked ({e.strerror}): see to it that no other run works in it.")
    mark = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with suppress(OSError):  # who it is helps, and the other processes of this run look for it
        os.ftruncate(handle, 0)
        os.pwrite(handle, mark.encode(), 0)
        os.fsync(handle)
    return mark


def _greet(config: Config, rows: Collection[str], console: Console) -> None:
    """Says what of an earlier run there is, and writes whose the folder is now."""
    folder, other = config.folder, check_folder(config)
    try:
        if other is not None:
            say(console, f"{folder} held {other}; that one had made nothing, and this one takes its place.")
            for left in folder.glob(f"*/{FILE}"):  # of epochs that no checkpoint holds
                left.unlink()
        elif _holds_work(folder):
            say(console, f"{folder} holds a run with these settings: this one goes on with it.")
            beside = {p.stem for p in folder.glob("*.safetensors")} - {*rows}
            if beside:
                say(console, f"Also there, and not in this table: {', '.join(sorted(beside))}.")
        write_atomically(folder / "settings.json", json.dumps(_settings(config), indent=1).encode())
    except OSError as e:
        raise _unusable(folder, e) from e


def _unusable(folder: Path, e: OSError) -> RunError:
    return RunError(f"the folder {str(folder)!r} cannot be used: {e}; choose another with --out.")


def _settings(config: Config) -> dict[str, object]:
    """As JSON gives them back."""
    return dict(json.loads(json.dumps(identity_of(config), default=str)))


def _holds_work(folder: Path) -> bool:
    """Whether there is a finished file or a whole checkpoint, also one of an older version."""
    return any(folder.glob("*.safetensors")) or any(p.stem.isdigit() for p in folder.glob("*/checkpoints/*"))
