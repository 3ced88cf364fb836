"""The compilation cache: only while it is wanted, of every program, and one that is damaged is made anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.loop.compilation import kept

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def settings() -> list[object]:
    return [getattr(jax.config, name) for name in SETTINGS]


def compiled(factor: float) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: jnp.sin(x) * factor)(np.float32([1, 2, 3])))


def test_programs_are_kept_while_it_is_wanted(tmp_path) -> None:
    before = settings()
    with kept(None):
        assert settings() == before
    with kept(tmp_path / "cache"):
        first = compiled(2.0)
        files = {p.name for p in (tmp_path / "cache").glob("*-cache")}
        assert files
    assert settings() == before
    compiled(3.0)
    assert {p.name for p in (tmp_path / "cache").glob("*-cache")} == files
    jax.clear_caches()
    with kept(tmp_path / "cache"):
        np.testing.assert_array_equal(compiled(2.0), first)
    assert {p.name for p in (tmp_path / "cache").glob("*-cache")} == files


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2]])
def test_a_damaged_program_is_compiled_anew(tmp_path, damage) -> None:
    with kept(tmp_path):
        first = compiled(4.0)
        for file in tmp_path.glob("*-cache"):
            file.write_bytes(damage(file.read_bytes()))
    jax.clear_caches()
    with kept(tmp_path), pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        np.testing.assert_array_equal(compiled(4.0), first)
