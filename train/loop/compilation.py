"""Compiled programs kept on disk, for later runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import jax
from jax.experimental.compilation_cache import compilation_cache

from train.errors import RunError

Settings = dict[str, str | float | None]


@contextmanager
def kept(folder: Path | None) -> Iterator[None]:
    """JAX's persistent compilation cache in a folder while the block lasts, every program of it; without one, nothing.

    JAX takes a cache at its first compilation and keeps it, so that it is told to look again. What is damaged in the
    folder it compiles anew, by a warning.

    Raises:
      RunError: the folder cannot be made or written; JAX would warn of every program.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise RunError(
            f"the folder {str(folder)!r} cannot be used: {e.strerror}; choose another with --compilation-cache."
        ) from e
    settings: Settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before: Settings = {name: getattr(jax.config, name) for name in settings}
    try:
        _take(settings)
        yield
    finally:
        _take(before)


def _take(settings: Settings) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
