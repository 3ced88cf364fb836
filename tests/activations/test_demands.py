"""A site that was asked to run on integers and does not is an error, or one warning that names it."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, Float8, NotOnIntegers, quantize_function
from tests.activations.test_layouts import on_grid
from tests.trace.models import normal

ACT = Act(8, range=Dynamic())
X = normal(9, 5, 16)
OUT_IN = {"w": normal(1, 6, 16)}


def transposed(p, x):
    return x @ p["w"].T


def dot(p, x):
    return x @ p["w"]


def conv(p, x):
    image = x.reshape(1, 4, 4, 5)
    return jax.lax.conv_general_dilated(image, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def guarded(x, w):
    return x @ w


guarded.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def on_log(p):
    t = jc.quantize(jc.Log(4))
    return t.apply(t.init(p), p)


def asymmetric(p):
    t = jc.quantize(jc.Int(8, symmetric=False), per=jc.Channels(-1))
    return t.apply(t.init(p), p)


def factors(p):
    t = jc.chain(jc.low_rank({"w": 2}), jc.quantize(jc.Int(8)))
    return t.apply(t.init(p), p)


W, KERNEL = {"w": normal(1, 16, 6)}, {"w": normal(1, 3, 3, 5, 6)}
CASES = {
    "scales along the sum": (
        transposed, on_grid(OUT_IN, {"w": (1,)}), ACT,
        ("'w' (output, contracted): the contracted axis of 16 has 16 scales", "per=Channels(axes), or roles="),
    ),
    "scales along the window": (
        conv, on_grid(KERNEL, {"w": (2,)}), ACT, ("a scale varies along what the convolution sums", "per=Channels"),
    ),
    "zero points of a kernel": (conv, asymmetric(KERNEL), ACT, ("needs a symmetric grid", "quantize it with Int(b")),
    "no integers": (dot, on_log(W), ACT, ("Companded codes are not proportional", "quantize it with Int(bits)")),
    "arithmetic": (
        lambda p, x: x @ (p["w"] * 2), on_grid(W, {"w": (1,)}), ACT, ("the weight is computed, not a leaf", "before"),
    ),
    "float8": (dot, on_grid(W, {"w": (1,)}), Float8(), ("one operand is integers, the other float8", "Act(8) beside")),
    "large sum": (
        lambda p, x: jnp.broadcast_to(x[:1, :1], (1, 2**18)) @ p["w"],
        on_grid({"w": jnp.ones((2**18, 1))}, {"w": (1,)}), ACT, ("the sum may leave int32", "fewer bits"),
    ),
    "factors": (dot, factors(W), ACT, ("its factors run in float", "merge the factors with materialize")),
    "custom rule": (
        lambda p, x: guarded(x, p["w"]), on_grid(W, {"w": (1,)}), ACT, ("inside a custom_vjp_call", "rule None"),
    ),
    "barrier": (
        lambda p, x: x @ jax.lax.optimization_barrier(p["w"]), on_grid(W, {"w": (1,)}), ACT,
        ("its codes were multiplied out on the way", "rule None"),
    ),
    "mixed join": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
        {**on_grid(W, {"w": (1,)}), "v": normal(2, 16, 6)}, ACT, ("'v+w': the weight is computed, not a leaf",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_was_asked_for_and_is_not_done_is_named_with_its_mend(name):
    fn, tree, act, says = CASES[name]
    with pytest.warns(NotOnIntegers) as told:
        real = quantize_function(fn, {".*": act}, integer=True)(tree, None, X)
    with pytest.raises(ValueError, match="asked to run on integers, and cannot") as raised:
        quantize_function(fn, {".*": act}, integer=True, strict=True)(tree, None, X)
    assert len(told) == 1
    for text in (str(told[0].message), str(raised.value)):
        assert all(part in text for part in says), text
    assert jnp.array_equal(real, quantize_function(fn, {".*": act})(tree, None, X))


def test_every_site_is_named_and_each_once_however_often_jit_traces():
    def fn(p, x):
        return transposed({"w": p["a"]}, x) @ transposed({"w": p["v"]}, x).T @ (x @ p["c"])

    p = {"a": normal(1, 6, 16), "v": normal(2, 6, 16), "c": normal(3, 16, 6)}
    tree = on_grid(p, {"a|v": (1,), "c": (1,)})
    q = quantize_function(fn, {".*": ACT}, integer=True)
    with pytest.warns(NotOnIntegers) as told:
        _ = [jax.jit(q)(tree, None, normal(9, rows, 16)) for rows in (5, 6, 7)]
    assert len(told) == 1
    lines = str(told[0].message).splitlines()
    assert [line.split(" ")[2] for line in lines[1:]] == ["'a'", "'v'"]
    with pytest.warns(NotOnIntegers):  # another object has told nothing yet
        quantize_function(fn, {".*": ACT}, integer=True)(tree, None, X)


@pytest.mark.parametrize(
    ("fn", "tree", "rules"),
    [
        (transposed, on_grid(OUT_IN, {"w": (0,)}), {".*": ACT}),  # it runs on integers
        (transposed, OUT_IN, {".*": ACT}),  # a float weight was left so
        (transposed, on_grid(OUT_IN, {"w": (1,)}), {".*": None}),  # the rule leaves it
        (transposed, on_grid(OUT_IN, {"w": (1,)}), {}),  # no rule
        (lambda p, x: p["w"][jnp.array([1, 2])] + x[:2], on_grid(OUT_IN, {"w": (0,)}), {".*": ACT}),  # a lookup
        (lambda p, x: p["w"].sum() + jnp.arange(5) @ jnp.asarray(x, "int32"), OUT_IN, {".*": ACT}),  # integers as it is
    ],
)
def test_what_was_not_asked_for_is_no_fault(fn, tree, rules):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("error")
        quantize_function(fn, rules, integer=True, strict=True)(tree, None, X)
        quantize_function(fn, rules, integer=True)(tree, None, X)


def test_products_of_activations_are_asked_for_too():
    def fn(p, x):
        return guarded(x, x.T) * p["s"]

    with pytest.raises(ValueError, match=r"'dot_0': it is inside a custom_vjp_call.*; give the site the rule None\."):
        quantize_function(fn, {".*": ACT}, integer=True, strict=True)({"s": jnp.ones((1, 1))}, None, X)
