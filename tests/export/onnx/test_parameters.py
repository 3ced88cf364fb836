"""Every kind of compressed leaf in a file: it computes what the leaf stands for, and is as small as the leaf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.export import to_onnx
from jaxcomp.factorization import LowRank
from jaxcomp.quantization import E2M1, E4M3, NF4, PoT
from jaxcomp.sharing import Codebook
from tests.export.running import operators, session
from tests.marks import quick

ROOM = 9_000
"""Bytes of a file beside its leaf's."""


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"w": jnp.asarray(draws(256, 128))}
X = draws(3, 256, seed=1)


def by(transform: jc.Transform) -> Callable[[], Any]:
    return lambda: jc.pack(transform.apply(transform.init(PARAMS), PARAMS))


def codebook(entries: int) -> Any:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, entries, (256, 128)).astype(np.uint8)
    return {"w": jc.pack(Codebook(jnp.asarray(draws(entries, 1)), jnp.asarray(codes), None))}


def factors(transform: jc.Transform) -> Any:
    """A product of two thin matrices, each of them transformed."""
    thin = {"u": jnp.asarray(draws(256, 8)), "v": jnp.asarray(draws(8, 128))}
    made = transform.apply(transform.init(thin), thin)
    return {"w": jc.pack(LowRank(made["u"], made["v"]))}


KEPT = np.abs(draws(256, 128)) > 1.645
LEAVES: dict[str, Callable[[], Any]] = {
    "16 shared values": lambda: codebook(16),
    "200 shared values": lambda: codebook(200),
    "NVFP4": by(jc.recipes.nvfp4()),
    "MXFP4": by(jc.recipes.mx()),
    "NF4": by(jc.quantize(NF4(), per=jc.Groups(32))),
    "E2M1": by(jc.quantize(E2M1)),
    "E4M3": by(jc.quantize(E4M3)),
    "powers of two": by(jc.quantize(PoT(4))),
    "int8": by(jc.quantize(jc.Int(8))),
    "int4 in groups": by(jc.quantize(jc.Int(4), per=jc.Groups(16))),
    "asymmetric int4": by(jc.quantize(jc.Int(4, symmetric=False))),
    "int3": by(jc.quantize(jc.Int(3))),
    "pruned": lambda: {"w": jc.core.Masked(jnp.where(KEPT, PARAMS["w"], 0), jnp.asarray(KEPT))},
    "pruned int8": by(jc.chain(jc.prune(0.5), jc.quantize(jc.Int(8)))),
    "pruned, then shared": lambda: {"w": jc.core.Masked(codebook(16)["w"], jnp.asarray(draws(256, 128)) > 1)},
    "rank 8": lambda: factors(jc.chain()),
    "rank 8, int8": lambda: factors(jc.quantize(jc.Int(8))),
    "float8": lambda: {"w": jnp.asarray(PARAMS["w"], jnp.float8_e4m3fn)},
    "bfloat16": lambda: {"w": jnp.asarray(PARAMS["w"], jnp.bfloat16)},
}
PRUNED = {"pruned": 0.1 * 256 * 128 * 4 + 256 * 128 / 8}
"""Bytes of leaves of which a file keeps less than memory does: values under the mask, and a bit for each element."""
NIBBLES = {"int3": 256 * 128 / 2}


def product(p: Any, x: Any) -> Any:
    return x @ jnp.asarray(p["w"]).astype(x.dtype)


@pytest.mark.parametrize(
    "name", quick(LEAVES, "16 shared values", "pruned", "rank 8, int8", "float8", "int4 in groups")
)
def test_leaves(tmp_path: Path, name: str) -> None:
    params = LEAVES[name]()
    size = to_onnx(tmp_path / "w.onnx", product, params, X)
    leaf = sum(np.asarray(a).nbytes for a in jax.tree.leaves(params))
    leaf = NIBBLES.get(name, 0) + 600 if name in NIBBLES else PRUNED.get(name, leaf)
    assert size <= leaf + ROOM, (size, leaf)
    run = session(tmp_path / "w.onnx", optimized=tmp_path / "o.onnx", **{"session.qdq_matmulnbits_accuracy_level": "0"})
    (got,) = run.run(None, {"input": X})
    want = X @ np.asarray(jc.materialize(params)["w"]).astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert set(operators(tmp_path / "o.onnx")) <= {"MatMul", "MatMulNBits", "Cast", "Gemm", "DequantizeLinear"}


def test_lookups_take_rows(tmp_path: Path) -> None:
    """A table in 4 bits stays so: rows are unpacked and dequantized when they are taken."""
    ids = np.array([[5, 0], [255, 5]], np.int32)
    grids, groups = (jc.Int(4), jc.Int(4, symmetric=False), jc.Int(8), jc.Int(2)), jc.Groups(32, -1)
    for grid, per in [*((grid, jc.Channels(0)) for grid in grids), *((grid, groups) for grid in grids[:2])]:
        leaf = by(jc.quantize(grid, per=per))()
        size = to_onnx(tmp_path / "t.onnx", lambda p, i: jnp.take(p["w"], i, 0, mode="clip"), leaf, ids)
        assert size < 256 * 128 * (grid.bits / 8 + (per == groups) / 4) + 5000
        (rows,) = session(tmp_path / "t.onnx").run(None, {"input": ids})
        np.testing.assert_array_equal(rows, np.asarray(jc.materialize(leaf)["w"])[ids])


def test_factors_run_thin(tmp_path: Path) -> None:
    to_onnx(tmp_path / "w.onnx", lambda p, x: x @ p["w"], factors(jc.chain()), X)
    assert operators(tmp_path / "w.onnx").count("MatMul") == 2


def test_a_weight_in_front_stays_in_codes(tmp_path: Path) -> None:
    """As in all of Equinox: ``w @ row``, and an embedding that is a slice, under vmap over a free dimension."""
    params = {"w": jnp.asarray(draws(128, 256)), "table": jnp.asarray(draws(50, 256, seed=2))}

    def rows(p, ids):
        return jax.vmap(lambda i: p["w"] @ jax.lax.dynamic_slice(p["table"], (i, 0), (1, 256))[0])(ids)

    leaves = jc.pack(jc.quantize(jc.Int(4), per=jc.Groups(32, -1)).apply((), params))
    free = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), jnp.int32)
    ids = np.array([3, 0, 49, 7, 3], np.int32)
    size = to_onnx(tmp_path / "fn.onnx", rows, leaves, free)
    assert size < jc.nbytes(leaves) + ROOM
    assert "DequantizeLinear" in operators(tmp_path / "fn.onnx")
    (got,) = session(tmp_path / "fn.onnx", **{"session.qdq_matmulnbits_accuracy_level": "1"}).run(None, {"input": ids})
    dense = {name: np.asarray(leaf, np.float64) for name, leaf in jc.materialize(leaves).items()}
    np.testing.assert_allclose(got, dense["table"][ids] @ dense["w"].T, rtol=1e-4, atol=1e-4)
