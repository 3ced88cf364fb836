"""Activation functions that ONNX has an operator for are one node, and compute what JAX does."""

from __future__ import annotations

from collections import Counter

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import jaxcomp as jc
from jaxcomp.activations import Act
from jaxcomp.export import to_onnx
from tests.export.models import layer_norm
from tests.export.running import exported, operators, run


def shares(x):
    return x / x.sum(-1, keepdims=True)


ROOT = np.sqrt(2).astype(np.float32)
ONE_NODE = {
    "Gelu": [
        nn.gelu,
        lambda x: nn.gelu(x, approximate=False),
        lambda x: 0.5 * x * (1 + lax.erf(x / ROOT)),
        lambda x: x * 0.5 * (lax.erf(x / ROOT) + 1),
    ],
    "HardSwish": [
        nn.hard_swish,
        lambda x: x * nn.relu6(x + 3) / 6,
        lambda x: nn.relu6(3.0 + x) * x / 6,
        lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    ],
    "HardSigmoid": [nn.hard_sigmoid, lambda x: nn.relu6(x + 3) / 6],
    "Mish": [nn.mish],
    "Softplus": [nn.softplus],
    "Selu": [nn.selu],
    "Elu": [nn.elu, lambda x: nn.elu(x, 0.3), lambda x: jnp.where(x > 0, x, 2.0 * jnp.expm1(x))],
    "Celu": [lambda x: nn.celu(x, 0.5)],
    "LeakyRelu": [nn.leaky_relu, lambda x: nn.leaky_relu(x, 0.3), lambda x: jnp.where(x > 0, x, 0.2 * x)],
    "Softsign": [nn.soft_sign],
    "Softmax": [nn.softmax, lambda x: shares(jnp.exp(x - x.max(-1, keepdims=True)))],
    "LogSoftmax": [nn.log_softmax],
}
CASES = [(op, fn) for op, every in ONE_NODE.items() for fn in every]
X = np.concatenate([np.linspace(-30, 30, 119), [0.0, 1e-6, -1e-6, 3.0, -3.0, np.nan]]).astype(np.float32).reshape(5, -1)


def every(p, x):
    return [fn(x + p["zero"]) for _, fn in CASES]


ZERO = {"zero": jnp.zeros(())}


def test_each_is_one_node_of_what_jax_computes(tmp_path) -> None:
    got = exported(tmp_path, every, ZERO, X)
    for (op, _), one, wanted in zip(CASES, got, every(ZERO, X), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-6, err_msg=op)
    found = Counter(operators(tmp_path / "fn.onnx"))
    assert found.keys() <= {*ONE_NODE, "Add", "Identity"}
    assert {op: found[op] for op in ONE_NODE} == {op: len(fns) for op, fns in ONE_NODE.items()}


def by_hand(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return p["bias"] + p["scale"] * (centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5))


def by_flax(p, x):
    return flax.linen.LayerNorm(epsilon=1e-3).apply({"params": p}, x)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("norm", [by_hand, by_flax, layer_norm], ids=lambda fn: fn.__name__)
def test_norms_of_layers(tmp_path, norm, shape) -> None:
    rng = np.random.default_rng(0)
    p = {k: jnp.asarray(rng.normal(size=6), jnp.float32) for k in ("scale", "bias")}
    x = rng.normal(2, 3, size=shape).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        (got,) = exported(tmp_path, norm, p, x)
        np.testing.assert_allclose(got, norm(p, x), rtol=1e-4, atol=1e-5)
    assert set(operators(tmp_path / "fn.onnx")) == {"LayerNormalization", "Identity"}


def of_another_axis(p, x):
    return flax.linen.LayerNorm(reduction_axes=0, feature_axes=1).apply({"params": p}, x)


def of_groups(p, x):
    return flax.linen.GroupNorm(2).apply({"params": p}, x)


def of_two_axes(p, x):
    return flax.linen.LayerNorm(reduction_axes=(0, 1)).apply({"params": p}, x)


@pytest.mark.parametrize("norm", [of_another_axis, of_groups, of_two_axes], ids=lambda fn: fn.__name__)
def test_other_norms_stay_as_they_are(tmp_path, norm) -> None:
    rng = np.random.default_rng(0)
    p = {k: jnp.asarray(rng.normal(size=6), jnp.float32) for k in ("scale", "bias")}
    x = rng.normal(2, 3, size=(6, 6)).astype(np.float32)
    (got,) = exported(tmp_path, norm, p, x)
    np.testing.assert_allclose(got, norm(p, x), rtol=1e-4, atol=1e-5)
    assert "LayerNormalization" not in operators(tmp_path / "fn.onnx")


def others(p, x):
    """Other numbers, types and operands."""
    x = x + p["zero"]
    half = x.astype(jnp.float16)
    return [
        x * nn.relu6(x + 2) / 6,
        0.5 * x * (1 + lax.erf(x / np.float32(1.5))),
        jnp.where(x > 0.1, x, 0.2 * x),
        jnp.where(x > 0, x, 0.2 * x[::-1]),
        x * nn.relu6(x.T.reshape(x.shape) + 3) / 6,
        nn.elu(x, x[0, 0]),
        nn.softmax(x, axis=0),
        nn.softmax(x, axis=(0, 1)),
        nn.softmax(x, where=x > 0),
        nn.hard_swish(half).astype(jnp.float32),
    ]


def test_what_is_another_function_stays_as_it_is(tmp_path) -> None:
    x = np.nan_to_num(X) / 10
    got = exported(tmp_path, others, ZERO, x)
    for one, wanted in zip(got, others(ZERO, x), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2e-3, atol=2e-3)
    assert ONE_NODE.keys().isdisjoint(operators(tmp_path / "fn.onnx"))


def test_what_is_read_on_the_way_is_kept(tmp_path) -> None:
    def fn(p, x):
        y = jnp.clip(x + 3, 0, 6) + p["zero"]
        return y, nn.hard_swish(nn.gelu(x)), x * (jnp.clip(x + 3, 0, 6) / 6)

    got = exported(tmp_path, fn, ZERO, X)
    for one, wanted in zip(got, fn(ZERO, X), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-6)
    assert {"Gelu", "HardSwish", "Relu", "Min"} <= set(operators(tmp_path / "fn.onnx"))


def test_softmax_of_more_axes_and_of_rows_without_a_number(tmp_path) -> None:
    def fn(p, x):
        by_head = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", x, x) + p["zero"])
        return by_head, nn.softmax(jnp.where(x > 0, x, -jnp.inf)), nn.softmax(x.transpose(0, 3, 1, 2))

    x = np.random.default_rng(0).normal(size=(2, 5, 3, 4)).astype(np.float32)
    x[0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = -1.0, np.nan, np.inf
    got = exported(tmp_path, fn, ZERO, x)
    for one, wanted in zip(got, fn(ZERO, x), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-6)
    assert operators(tmp_path / "fn.onnx").count("Softmax") >= 2


def test_in_loops(tmp_path) -> None:
    def fn(p, x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, nn.gelu(s[1] @ p)), (0, x))[1]

    import onnx

    p = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32) / 2
    x = np.linspace(-2, 2, 32, dtype=np.float32).reshape(4, 8)
    (got,) = exported(tmp_path, fn, p, x)
    np.testing.assert_allclose(got, fn(p, x), rtol=1e-5, atol=1e-5)
    inner = [a.g for n in onnx.load(tmp_path / "fn.onnx").graph.node for a in n.attribute if a.HasField("g")]
    assert any(node.op_type == "Gelu" for graph in inner for node in graph.node)


@pytest.mark.parametrize("activation", [nn.hard_swish, nn.elu])
def test_between_convolutions_on_integers(tmp_path, activation) -> None:
    rng = np.random.default_rng(0)
    numbers = ("NHWC", "HWIO", "NHWC")
    p = {k: jnp.asarray(rng.normal(size=(3, 3, 8, 8)), jnp.float32) / 8 for k in ("first", "second")}
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 8)), jnp.float32)

    def fn(p, x):
        y = activation(lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=numbers))
        return lax.conv_general_dilated(y, p["second"], (1, 1), "SAME", dimension_numbers=numbers)

    tree = jc.pack(jc.quantize(jc.Int(8), where=".*", roles=jc.roles(fn)(p, x)).apply((), p))
    rules, ranges = {".*": Act(8)}, jc.activations.ranges_of(jax.jit(jc.calibrate(fn))(p, x))
    to_onnx(tmp_path / "fn.onnx", fn, tree, x, rules=rules, ranges=ranges, samples=[x])
    assert {"HardSwish", "Elu"} & set(operators(tmp_path / "fn.onnx"))
    (got,) = run(tmp_path / "fn.onnx", x)
    wanted = jax.jit(jc.quantize_function(fn, rules, integer=True))(tree, ranges, x)
    assert float(jnp.abs(got - wanted).max()) < 0.03 * float(jnp.abs(wanted).max())
