"""Adapters against numpy: where they start, what trains, what is merged, saved and refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.adapters import Adapted, Principal, Residual, Zeros, adapt, combine, merge, partition, trainable
from jaxcomp.core.leaves import is_compressed
from tests.laws import assert_same_bits
from tests.marks import quick

KEY = jax.random.key(7)
PARAMS = {
    "first": {"kernel": jnp.sin(jnp.arange(96.0)).reshape(8, 12), "bias": jnp.ones(12)},
    "second": {"kernel": jnp.cos(jnp.arange(48.0) ** 1.5).reshape(12, 4), "bias": jnp.zeros(4)},
}
INT4 = jc.quantize(jc.Int(4))


def fn(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"][None])
    return h @ p["second"]["kernel"] + p["second"]["bias"][None]


def moved(params: Any) -> Any:
    """Adapters that learned something."""
    trained, frozen = partition(params)
    more = lambda x: np.float32(0.1) * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)  # noqa: E731
    return combine(jax.tree.map(lambda x: jnp.asarray(x + more(x)), trained), frozen)


BASES: dict[str, Any] = {
    "float": lambda p: p,
    "int4": lambda p: INT4.apply((), p),
    "packed": lambda p: jc.pack(INT4.apply((), p)),
    "masked": lambda p: jc.chain(jc.prune(0.5), INT4).apply(jc.chain(jc.prune(0.5), INT4).init(p), p),
    "codebook": lambda p: jc.share(4).apply(jc.share(4).init(p), p),
}


@pytest.mark.parametrize("base", quick(BASES, "float", "packed"))
def test_zeros_change_nothing_at_first_and_their_sum_is_that_of_the_equation(base) -> None:
    before = BASES[base](PARAMS)
    after = adapt(before, 3, key=KEY, alpha=6)
    assert_same_bits(jc.materialize(after), jc.materialize(before))
    assert after["first"]["bias"] is before["first"]["bias"]
    leaf = moved(after)["first"]["kernel"]
    assert (leaf.delta.u.shape, leaf.delta.v.shape, leaf.scaling) == ((8, 3), (3, 12), 2.0)
    want = np.asarray(jc.materialize(before)["first"]["kernel"]) + 2 * np.asarray(leaf.delta.u) @ np.asarray(
        leaf.delta.v
    )
    np.testing.assert_allclose(leaf.materialize(), want, rtol=1e-5, atol=1e-6)


def test_what_is_shipped_is_what_was_trained(tmp_path) -> None:
    tree = moved(adapt(PARAMS, 3, key=KEY, base=INT4, alpha=6))
    packed = jc.pack(tree)
    assert_same_bits(jc.materialize(packed), jc.materialize(tree))
    jc.save(tmp_path / "a.safetensors", packed)
    loaded = jc.load(tmp_path / "a.safetensors")
    assert isinstance(loaded["first"]["kernel"], Adapted)
    assert loaded["first"]["kernel"].scaling == 2.0
    assert_same_bits(jc.materialize(loaded), jc.materialize(tree))
    assert jc.nbytes(packed["first"]["kernel"].base) == 8 * 12 // 2 + 12 * 4


def test_only_the_factors_train() -> None:
    tree = adapt(jc.pack(INT4.apply((), PARAMS)), 2, key=KEY)
    trained, frozen = partition(tree)
    assert [x.shape for x in jax.tree.leaves(trained)] == [(8, 2), (2, 12), (12, 2), (2, 4)]
    assert_same_bits(combine(trained, frozen), tree)
    tx, x = optax.sgd(0.1), jnp.ones((3, 8))
    loss = jax.jit(lambda t: jnp.mean((fn(jc.materialize(combine(t, frozen)), x) - 1.0) ** 2))
    state, first = tx.init(trained), loss(trained)
    for _ in range(20):
        updates, state = tx.update(jax.grad(loss)(trained), state)
        trained = optax.apply_updates(trained, updates)
    assert loss(trained) < 0.2 * first
    with_biases, _ = partition(tree, ".*bias")
    assert len(jax.tree.leaves(with_biases)) == 6
    marks = jc.core.weight_mask(tree)
    assert jax.tree.leaves(marks["first"]["kernel"]) == [False] * 2 + [True] * 2, "weight decay leaves the base alone"


def test_no_gradient_reaches_a_float_base() -> None:
    tree = moved(adapt(PARAMS, 2, key=KEY))
    grads = jax.grad(lambda p: jnp.sum(fn(jc.materialize(p), jnp.ones((2, 8))) ** 2))(tree)
    for leaf in (grads["first"]["kernel"], grads["second"]["kernel"]):
        assert not np.asarray(leaf.base).any()
        assert np.asarray(leaf.delta.u).any()
        assert np.asarray(leaf.delta.v).any()


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_residual_is_loftq(rounds) -> None:
    w = np.asarray(PARAMS["first"]["kernel"], np.float64)
    grid = jc.quantize(jc.Int(4))
    step = np.abs(w[:, 0]).max() / float(grid.apply((), {"w": jnp.float32(w)})["w"].scale[0, 0])  # of AbsMax
    got = adapt({"w": jnp.float32(w)}, 2, base=grid, start=Residual(rounds), alpha=8)["w"]
    low = np.zeros_like(w)
    for _ in range(rounds):
        rest = w - low
        scale = np.abs(rest).max(0) / step
        base = np.clip(np.round(rest / scale), -8, 7) * scale
        u, s, v = np.linalg.svd(w - base, full_matrices=False)
        low = u[:, :2] * s[:2] @ v[:2]
    np.testing.assert_allclose(got.materialize(), base + low, atol=2e-5)
    assert got.scaling == 4.0


@pytest.mark.slow
def test_residual_loses_less_than_the_base_alone_and_more_rounds_less() -> None:
    w = {"w": jax.random.normal(KEY, (64, 48))}
    grid = jc.quantize(jc.Int(2))

    def error(tree: Any) -> float:
        return float(jnp.sum((jc.materialize(tree)["w"] - w["w"]) ** 2))

    errors = [error(grid.apply((), w)), *(error(adapt(w, 8, base=grid, start=Residual(n))) for n in (1, 2, 5))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_principal_takes_the_largest_components() -> None:
    w = np.asarray(PARAMS["first"]["kernel"], np.float64)
    leaf = adapt(PARAMS, 2, start=Principal(), where="first/kernel")["first"]["kernel"]
    u, s, v = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(leaf.delta.materialize(), u[:, :2] * s[:2] @ v[:2], atol=1e-5)
    np.testing.assert_allclose(leaf.materialize(), w, atol=1e-5)


def test_merge_is_exact_or_rounds_anew() -> None:
    tree = moved(adapt(PARAMS, 2, key=KEY, base=INT4))
    assert_same_bits(merge(tree), jc.materialize(tree))
    again = merge(tree, INT4)
    assert isinstance(again["first"]["kernel"], jc.quantization.Quantized)
    assert not is_compressed(again["first"]["bias"])
    assert_same_bits(jc.materialize(again["first"]), jc.materialize(INT4.apply((), merge(tree)["first"])))


def test_outputs_first_stacked_layers_and_several_axes() -> None:
    def wide(p: Any, x: jax.Array) -> jax.Array:
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["weight"].T, p["layers"])[0]
        return jnp.einsum("bi,ihd->bhd", h, p["heads"])

    p = {"weight": jnp.ones((6, 4)), "layers": jnp.ones((3, 6, 6)), "heads": jnp.ones((6, 2, 5))}
    roles = jc.roles(wide)(p, jnp.ones((2, 4)))
    tree = adapt(p, 2, key=KEY, roles=roles)
    shapes = {k: (leaf.delta.u.shape, leaf.delta.v.shape) for k, leaf in tree.items()}
    assert shapes == {"weight": ((6, 2), (2, 4)), "layers": ((3, 6, 2), (3, 2, 6)), "heads": ((6, 2), (2, 2, 5))}
    assert not np.asarray(tree["weight"].delta.u).any(), "the factor that gives outputs starts at 0"
    assert not np.asarray(tree["heads"].delta.v).any()
    assert_same_bits(jc.materialize(tree), p)


def test_a_key_gives_each_leaf_its_own_numbers() -> None:
    a, b = adapt(PARAMS, 2, key=KEY), adapt({"second": PARAMS["second"]}, 2, key=KEY)
    assert_same_bits(a["second"], b["second"])


TWICE = adapt(PARAMS, 2, key=KEY)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adapt(PARAMS, 2), ValueError, r"Zeros\(\) has a random factor; give key="),
        (lambda: adapt(PARAMS, 2, start="loftq"), TypeError, "start must be Zeros"),
        (lambda: adapt(PARAMS, 2, start=Residual()), ValueError, "starts at what a transform lost; give base="),
        (lambda: adapt(PARAMS, 2, key=KEY, alpha=-1), ValueError, "alpha must be a positive number or None, got -1"),
        (lambda: adapt(PARAMS, 2, key=KEY, where="kernel"), ValueError, "'kernel' matches nothing; .*'.*kernel'"),
        (lambda: adapt(PARAMS, 20, key=KEY), ValueError, "'first/kernel'.* of rank 8 at most; got rank 20"),
        (lambda: adapt(TWICE, 2, key=KEY), ValueError, "'first/kernel' has an adapter already; merge it first"),
        (
            lambda: adapt(INT4.apply((), PARAMS), 2, start=Principal()),
            ValueError,
            "'first/kernel' is compressed already .Quantized int4., and what it was is lost",
        ),
        (lambda: adapt(INT4.apply((), PARAMS), 2, key=KEY, base=INT4), ValueError, "'first/kernel' is compressed"),
        (lambda: Residual(0), ValueError, "rounds must be a positive integer, got 0"),
        (lambda: merge(PARAMS), ValueError, "merge: the tree has no adapted leaf"),
        (lambda: trainable(TWICE, "head"), ValueError, "trainable: rule 'head' matches no float array"),
        (lambda: combine(*[partition(TWICE)[0]] * 2), ValueError, "both trees have an array at 'first/kernel/delta/u'"),
        (
            lambda: adapt({"w": jnp.ones((2, 2)).at[0, 0].set(jnp.nan)}, 1, key=KEY),
            ValueError,
            "'w' has 1 values that are not finite",
        ),
    ],
    ids=[
        *("no key", "start", "no base", "alpha", "where", "rank", "twice", "principal", "compressed", "rounds"),
        *("merge", "trainable", "combine", "nan"),
    ],
)
def test_misfits_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_zeros_is_the_default() -> None:
    assert_same_bits(adapt(PARAMS, 2, key=KEY, start=Zeros()), TWICE)
