"""StableHLO files: small as the weights, right on both ends of jax, read where there is no jaxcomp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxcomp as jc
from jaxcomp.export import ExportError, to_stablehlo

RNG = np.random.default_rng(0)
WIDE = 512


def f32(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def any_rows(width: int, *constraints: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(export.symbolic_shape(f"rows, {width}", constraints=constraints), jnp.float32)


def dense_net(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": f32(WIDE, WIDE), "down": f32(WIDE, WIDE)}
X = f32(3, WIDE)


def int4_tree():
    return jc.quantize(jc.Int(4), per=jc.Groups(128, 0)).apply((), PARAMS)


def opened(path) -> export.Exported:
    return export.deserialize(bytearray(Path(path).read_bytes()))


def run(path, *args) -> np.ndarray:
    return np.asarray(opened(path).call(*args))


def test_an_int4_program_is_as_small_as_its_weights(tmp_path) -> None:
    tree = int4_tree()
    size = to_stablehlo(tmp_path / "p", dense_net, tree, any_rows(WIDE))
    assert size == os.path.getsize(tmp_path / "p") <= 1.1 * jc.nbytes(jc.pack(tree))
    wanted = jax.jit(lambda x: jc.quantize_function(dense_net, {})(tree, None, x))
    for rows in (1, 3, 7):
        x = X[:1].repeat(rows, 0)
        np.testing.assert_allclose(run(tmp_path / "p", x), wanted(x), rtol=1e-5, atol=1e-4)


READER = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("jaxcomp", "flax", "optax"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import numpy as np
from jax import export
program = export.deserialize(bytearray(open("p", "rb").read()))
np.save("out.npy", program.call(np.load("x.npy")))
assert not {"jaxcomp", "flax"} & set(sys.modules)
"""


def in_a_process(code: str, folder: Path, *words: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(jc.__file__).parents[1])}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_runs_where_there_is_no_jaxcomp(tmp_path) -> None:
    to_stablehlo(tmp_path / "p", dense_net, int4_tree(), X)
    np.save(tmp_path / "x.npy", X)
    in_a_process(READER, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), run(tmp_path / "p", X))


INTEGERS = """
import sys
import jax, jax.numpy as jnp, numpy as np, jaxcomp as jc
from jax import export
from jaxcomp.activations import LSQ, Dynamic
fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
rng = np.random.default_rng(0)
p = {name: jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for name in ("up", "down")}
x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
tree = jc.pack(jc.quantize(jc.Int(8), per=jc.Channels(-1)).apply((), p))
observed = jc.activations.ranges_of(jc.calibrate(fn)(p, x))
act, ranges = {
    "static": (jc.Act(8), observed),
    "learned": (jc.Act(4, range=LSQ()), observed),
    "dynamic": (jc.Act(8, range=Dynamic()), None),
    "groups": (jc.Act(8, per=jc.Groups(16), range=Dynamic()), None),
}[sys.argv[1]]
rules, order = {".*": act}, int(sys.argv[2])
rows = jax.ShapeDtypeStruct(export.symbolic_shape("n, 64"), jnp.float32)
jc.export.to_stablehlo("p", fn, tree, rows, rules=rules, ranges=ranges, gradients=order)
with open("p", "rb") as f:
    program = export.deserialize(bytearray(f.read()))
quantized = jc.quantize_function(fn, rules, integer=True)
wanted = jax.jit(lambda x: quantized(tree, ranges, x))
for some in (x, x[:1]):
    np.testing.assert_allclose(program.call(some), wanted(some), rtol=1e-6, atol=1e-5)
if order:
    slopes = [jax.jit(jax.grad(lambda x: jnp.sum(f(x))))(x) for f in (program.call, wanted)]
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-3)
products = [line for line in program.mlir_module().splitlines() if "stablehlo.dot_general" in line]
assert products and all("xi8>" in line and "xi32>" in line for line in products), products
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "order"), [("static", 0), ("static", 1), ("learned", 1), ("dynamic", 1), ("groups", 1)]
)
def test_integers_run_on_integers_for_any_batch(act, order, tmp_path) -> None:
    in_a_process(INTEGERS, tmp_path, act, str(order))  # the checks of types in tests take no sizes that are expressions


def test_integers_run_on_integers(tmp_path) -> None:
    tree = jc.pack(jc.quantize(jc.Int(8), per=jc.Channels(-1)).apply((), PARAMS))
    rules, ranges = {".*": jc.Act(8)}, {name: jc.trace.Range(jnp.float32(-4), jnp.float32(4)) for name in PARAMS}
    to_stablehlo(tmp_path / "p", dense_net, tree, X, rules=rules, ranges=ranges)
    quantized = jc.quantize_function(dense_net, rules, integer=True)
    np.testing.assert_allclose(run(tmp_path / "p", X), jax.jit(lambda x: quantized(tree, ranges, x))(X), rtol=1e-6)
    products = [line for line in opened(tmp_path / "p").mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("xi8>" in line and "xi32>" in line for line in products)


def test_nothing_of_the_machine_is_in_the_file(tmp_path) -> None:
    tree = jc.quantize(jc.Int(4)).apply((), {"w": f32(8, 4)})
    to_stablehlo(tmp_path / "p", lambda p, x: jnp.tanh(x @ p["w"]), tree, jnp.ones((2, 8)), gradients=1)
    assert b".py" not in (tmp_path / "p").read_bytes()


BITS = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4, "float8_e4m3fn": 8, "bfloat16": 16, "bool": 1}


@pytest.mark.parametrize("dtype", BITS)
def test_arrays_of_every_type_keep_their_bits(dtype, tmp_path) -> None:
    low, high = (0, 4) if dtype.startswith("u") else (-2, 2)
    leaf = RNG.integers(low, high, (257, 255)).astype(jnp.dtype(dtype))
    size = to_stablehlo(tmp_path / "p", lambda p, x: p["w"].astype(x.dtype) + x, {"w": leaf}, jnp.float32(0))
    np.testing.assert_array_equal(run(tmp_path / "p", jnp.float32(0)), leaf.astype(np.float32))
    assert size < 7000 + leaf.size * BITS[dtype] / 8


def nth(f, order: int):
    """A number made of the derivative of this order."""
    return f if order == 0 else nth(lambda x: jnp.sum(jnp.sin(jax.grad(f)(x))), order - 1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gradients_are_kept_as_asked(order, tmp_path) -> None:
    w = f32(8, 4)
    tree = jc.quantize(jc.Int(4)).apply((), {"w": w})

    def fn(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]))

    to_stablehlo(tmp_path / "p", fn, tree, jnp.ones(8), gradients=order)
    call = opened(tmp_path / "p").call
    dense = jc.materialize(tree)
    theirs, ours = nth(call, order), nth(lambda x: fn(dense, x), order)
    x = jnp.linspace(-1.0, 1.0, 8)
    np.testing.assert_allclose(theirs(x), ours(x), rtol=1e-5)
    with pytest.raises(Exception, match=r"vjp|VJP|gradient"):
        jax.grad(theirs)(x)


def test_what_only_jaxcomp_can_make_is_refused(tmp_path) -> None:
    leaf = jc.quantize(jc.Int(4)).apply((), {"w": f32(8, 8)})
    with pytest.raises(ExportError, match="arrays in dicts, lists and tuples"):
        to_stablehlo(tmp_path / "p", lambda p, x: leaf, leaf, jnp.ones(8))
    assert not (tmp_path / "p").exists()


def test_a_question_about_a_free_dimension_says_what_to_do(tmp_path) -> None:
    def fn(p, x):
        return x @ p if x.shape[0] > 2 else x

    with pytest.raises(ExportError, match=r"free dimension.*constraints="):
        to_stablehlo(tmp_path / "p", fn, f32(8, 8), any_rows(8))
    to_stablehlo(tmp_path / "p", fn, f32(8, 8), any_rows(8, "rows >= 3"))
    assert run(tmp_path / "p", jnp.ones((5, 8))).shape == (5, 8)


def test_wrong_words_are_named(tmp_path) -> None:
    with pytest.raises(ExportError, match="gradients must be 0, 1 or 2"):
        to_stablehlo(tmp_path / "p", lambda p, x: x @ p, f32(2, 2), jnp.ones(2), gradients=3)
    with pytest.raises(ExportError, match="platforms"):
        to_stablehlo(tmp_path / "p", lambda p, x: x @ p, f32(2, 2), jnp.ones(2), platforms=("abacus",))
    with pytest.raises(TypeError, match="dot_general"):
        to_stablehlo(tmp_path / "p", lambda p, x: x @ p, f32(2, 2), jnp.ones(3))


def test_prepared_leaves_keep_their_kernels(tmp_path) -> None:
    x = X[:1]
    ready = jc.prepare(int4_tree(), dense_net, x)
    to_stablehlo(tmp_path / "p", dense_net, ready, x, platforms=("cpu",))
    assert os.path.getsize(tmp_path / "p") <= 1.1 * jc.nbytes(ready)
    compiled = jax.jit(opened(tmp_path / "p").call).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < PARAMS["up"].nbytes
    np.testing.assert_allclose(compiled(x), dense_net(jc.materialize(int4_tree()), x), rtol=1e-4, atol=1e-2)
