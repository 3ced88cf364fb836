"""What devices hold, counted by hand, and trees of billions of weights of which only shapes are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jaxcomp as jc
from jaxcomp.artifact import file_size, save
from jaxcomp.scale import device_memory
from tests.marks import quick

GIB = 2**30


def shapes(layers: int, width: int, hidden: int, vocabulary: int):
    """Those of a transformer's weights, in bfloat16."""
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    layer = lambda: {  # noqa: E731
        **{name: {"kernel": s(width, width)} for name in "qkvo"},
        "up": {"kernel": s(width, hidden)},
        "down": {"kernel": s(hidden, width)},
        "norm": {"scale": s(width)},
    }
    return {"embed": {"embedding": s(vocabulary, width)}, **{f"layer_{i}": layer() for i in range(layers)}}


SIZES = {"1B": (16, 2048, 8192, 32000), "70B": (80, 8192, 32768, 128000)}
LAY = {
    ".*norm.*": PartitionSpec(),
    ".*(down|o)/kernel": PartitionSpec(("data", "model"), None),
    ".*": PartitionSpec("model", "data"),
}
INT4 = jc.quantize(jc.Int(4), per=jc.Groups(128), where=".*kernel")
SPARSE = jc.chain(jc.prune(0.5, scope=jc.Global(), where=".*kernel"), INT4)


@pytest.mark.parametrize("name", quick(SIZES, "1B"))
def test_billions_of_weights_are_sized_from_shapes(name) -> None:
    layers, width, hidden, vocabulary = SIZES[name]
    params = shapes(*SIZES[name])
    mesh = AbstractMesh((8, 4), ("data", "model"))
    found = device_memory(params, mesh=mesh, lay=LAY, compress=SPARSE, optimizer=optax.adam(1e-3))
    kernels, norms, table = layers * (4 * width**2 + 2 * width * hidden), layers * width, vocabulary * width
    size = kernels + norms + table
    assert found["weights"].whole == 2 * size == jc.nbytes(params) == found["gradients"].whole
    assert found["weights"].device == 2 * ((kernels + table) // 32 + norms) == sum(found.leaves.values())
    assert found["optimizer state"].whole == 4 * size + 4
    assert found["optimizer state"].device == 2 * found["weights"].device + 4
    assert found["transform state"].whole == kernels, "a mask of a byte a weight"
    assert found["transform state"].device == kernels // 32
    packed = kernels // 2 + kernels // 8 + 2 * (norms + table) + 4 * kernels // 128
    assert found["compressed, packed"].whole == packed
    assert f"{found['weights'].device / GIB:.3g}" in repr(found)
    assert jc.summary(jax.eval_shape(lambda p: jc.pack(INT4.apply((), p)), params)).size == size


def test_scales_and_codes_lie_as_their_weight() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((512, 64), jnp.float32)}
    mesh = AbstractMesh((4,), ("x",))
    for spec, scales in ((PartitionSpec(None, "x"), 4 * 4 * 64 // 4), (PartitionSpec("x"), 4 * 4 * 64)):
        t = jc.quantize(jc.Int(4), per=jc.Groups(128))
        found = device_memory(params, mesh=mesh, lay={"kernel": spec}, compress=t)
        assert found["compressed, packed"].whole == 512 * 64 // 2 + 4 * 4 * 64
        assert found["compressed, packed"].device == 512 * 64 // 2 // 4 + scales


@pytest.mark.parametrize(
    ("lay", "text"),
    [
        ({"nowhere": PartitionSpec()}, "device_memory: rule 'nowhere' matches"),
        ({".*": PartitionSpec("y")}, "the mesh has no axis 'y', only x"),
        ({".*": PartitionSpec("x")}, r"'kernel' of shape \(6, 4\) is not divided by .* on a mesh of \{'x': 4\}"),
        ({".*": PartitionSpec(None, None, "x")}, "has fewer axes"),
        ({".*": PartitionSpec("x", "x")}, "names an axis of the mesh twice"),
    ],
)
def test_a_layout_that_cannot_be_is_an_error(lay, text) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    with pytest.raises(ValueError, match=text):
        device_memory(params, mesh=AbstractMesh((4,), ("x",)), lay=lay)
    with pytest.raises(TypeError, match=r"lay wants a jax.sharding.PartitionSpec for each rule, got 'x'"):
        device_memory(params, mesh=AbstractMesh((4,), ("x",)), lay={".*": "x"})
    with pytest.raises(TypeError, match="give mesh=, an AbstractMesh is enough"):
        device_memory(params, lay=lay)


def test_a_number_and_an_array_alone_are_counted() -> None:
    mesh = AbstractMesh((4,), ("x",))
    assert device_memory({"a": np.ones((4, 4), np.float32), "n": 3})["weights"].whole == 68
    assert device_memory(np.ones((4, 4), np.float32), mesh=mesh, lay={".*": PartitionSpec("x")})["weights"].device == 16


FILES = {
    "float": lambda p: p,
    "int4": lambda p: jc.pack(jc.quantize(jc.Int(4), per=jc.Groups(4)).apply((), p)),
    "training": lambda p: jc.quantize(jc.Int(3)).apply((), p),
    "nf4": lambda p: jc.recipes.nf4(4).apply((), p),
    "tables": lambda p: jc.share(4).apply(jc.share(4).init(p), p),
    "factors": lambda p: jc.low_rank(2).apply(jc.low_rank(2).init(p), p),
    "other types": lambda p: {"a": p["a"]["kernel"].astype(jnp.complex64), "b": p["b"]["kernel"].astype(jnp.int4)},
}


@pytest.mark.parametrize("name", quick(FILES, "float", "int4"))
def test_the_size_of_a_file_from_shapes_is_that_of_the_file(name, tmp_path) -> None:
    rng = np.random.default_rng(0)
    params = {x: {"kernel": jnp.asarray(rng.normal(size=(16, 8)) * 9, jnp.float32)} for x in "ab"}
    tree = FILES[name](params)
    assert file_size(jax.eval_shape(FILES[name], params), metadata={"a": 1}) == save(
        tmp_path / "f", tree, metadata={"a": 1}
    )


def test_what_is_in_values_is_not_sized_from_shapes() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((128, 8), jnp.float32)}
    masked = jax.eval_shape(lambda p: SPARSE.apply(SPARSE.init(p), p), params)
    with pytest.raises(ValueError, match="'kernel' is masked, and its shape does not say how much its mask keeps"):
        file_size(masked)
    with pytest.raises(ValueError, match="what a code takes is in the values"):
        file_size(params, coding="zstd")
