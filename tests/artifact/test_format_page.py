"""docs/artifact.md says enough to read a file: a reader that was written from it sees what jaxcomp sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact import save
from tests.artifact.page_reader import File

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
QUANTIZED = ("int1", "int3", "int4_group", "int4_group_asymmetric", "int8_asymmetric", "tile", "bfloat16", "float16")
BOOKS = ("tensor", "channels", "buckets", "quantized")


@pytest.fixture(scope="module")
def tree() -> Any:
    """Leaves of the classes on the page."""
    held = {n: jc.load(GOLDEN / f"{n}.safetensors") for n in ("integers", "masks")}
    books = jc.load(Path(__file__).parent / "saved" / "codebooks.safetensors")
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((50, 40)).astype(np.float32)
    arrays = {np.dtype(t).name: floats.astype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float64, np.int32)}
    few = np.where(rng.random((300, 300)) < 0.01, 1, 0).astype(np.float32)
    pairs = np.argsort(rng.random((64, 4, 64)), 1) < 2
    keep = {"few": few != 0, "pairs": pairs.reshape(256, 64)}
    masks = {
        k: jc.core.Masked(
            jnp.asarray(floats.repeat(9, 0)[:1].repeat(m.size // 40 + 1)[: m.size].reshape(m.shape)), jnp.asarray(m)
        )
        for k, m in keep.items()
    }
    return {
        "q": {n: held["integers"][n] for n in QUANTIZED},
        "m": {
            n: held["masks"][n] for n in ("elements", "int4", "filters", "filters_int4", "codebook", "int8_asymmetric")
        },
        "b": {n: books[n] for n in BOOKS},
        "a": [arrays, (floats, few, np.zeros((0, 3)), np.float32(2), "x", None, 7)],
        "n": jc.pack(masks),
        "f": jc.factorization.LowRank(jnp.asarray(floats[:, :2].round(1)), jnp.asarray(floats[:2].round(1))),
        "codes": rng.choice([0, 0, 0, 0, 1, 7, 200], (3000,)).astype(np.uint8),
    }


@pytest.mark.parametrize("coding", [None, "zstd", "ans"])
def test_a_reader_from_the_page_sees_the_same(coding, tree, tmp_path) -> None:
    save(tmp_path / "f", tree, coding=coding, metadata={"n": [1]})
    found = File(tmp_path / "f")
    assert found.metadata == {"n": [1]}
    assert_same(found.tree, jc.materialize(jc.load(tmp_path / "f")), "")


def assert_same(a: Any, b: Any, path: str) -> None:
    if isinstance(b, dict):
        assert sorted(a) == sorted(b)  # jax sorts
        for k in b:
            assert_same(a[k], b[k], f"{path}/{k}")
    elif isinstance(b, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif hasattr(b, "dtype"):
        y = np.asarray(b)
        assert (a.dtype, a.shape) == (y.dtype, y.shape), path
        assert a.tobytes() == y.tobytes() or (a == y).all(), path
    else:
        assert a == b
