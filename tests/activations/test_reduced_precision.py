"""What is trained is what is shipped where a backend rounds what it multiplies: fake equals integer there too.

``jax.default_matmul_precision`` changes nothing on CPU, so a handler of the evaluator rounds the operands of each
float32 product as a TPU (bfloat16) and a GPU (TF32) do, but for those that ask for the highest precision.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import LSQ, PACT, Act, Dynamic, Float8, coverage, quantize_function, ranges_of
from jaxcomp.core import Groups, Tokens
from jaxcomp.pruning import Cut, StraightThrough
from jaxcomp.quantization import learned
from jaxcomp.trace import Claim, rewrite
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.program import trace
from jaxcomp.trace.ranges import Range
from tests.activations.test_backward import FAST
from tests.marks import quick
from tests.trace.models import normal

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
MANTISSAS = {"bfloat16": 7, "TF32": 10}


def on(backend, fn):
    """``fn`` as a backend runs it at its default precision."""

    def rounding(op):
        if op.name not in PRODUCTS or op.eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2:
            return None
        return Claim(lambda *values: op.bind(*map(cut, values)))

    def cut(v):
        return lax.reduce_precision(v, 8, MANTISSAS[backend]) if v.dtype == jnp.float32 else v

    return rewrite(fn, rounding)


def conv(strides=(1, 1), holes=(1, 1), spacing=(1, 1), groups=1):
    def run(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["w"], strides, [(1, 1), (2, 0)], holes, spacing, numbers, groups)

    return run


def dense(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def attention(p, x):
    q, k, v = jnp.split((x @ p["w"]).reshape(2, 5, 2, 24), 3, -1)
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v)


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def ragged(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([3, 0, 5], jnp.int32))


IMAGE = normal(0, 2, 6, 5, 8)
NETWORKS = {
    "dense": (dense, {"w": normal(1, 32, 16), "v": normal(2, 16, 6)}, normal(3, 7, 32) + 0.3),
    "conv": (conv((2, 1)), {"w": normal(1, 3, 3, 8, 6)}, IMAGE),
    "depthwise": (conv(groups=8), {"w": normal(1, 3, 3, 1, 16)}, IMAGE),
    "grouped": (conv(spacing=(2, 1), groups=2), {"w": normal(1, 3, 3, 4, 6)}, IMAGE),
    "transposed": (conv(holes=(2, 2)), {"w": normal(1, 3, 3, 8, 6)}, IMAGE),
    "attention": (attention, {"w": normal(1, 16, 48)}, normal(3, 2, 5, 16)),
    "stacked": (layers, {"w": 0.4 * normal(1, 3, 16, 16)}, normal(3, 5, 16)),
    "ragged": (ragged, {"w": normal(1, 3, 16, 6)}, normal(3, 8, 16)),
}
ACTS = {
    "asymmetric": Act(8),
    "symmetric": Act(8, symmetric=True),
    "dynamic": Act(7, range=Dynamic()),
    "tokens": Act(8, symmetric=True, range=Dynamic(), per=Tokens()),
    "groups": Act(8, symmetric=True, range=Dynamic(), per=Groups(8)),
    "LSQ": Act(4, range=LSQ()),
    "PACT": Act(4, range=PACT()),
}


def weights(bits, p, *, symmetric=True, prune=False, per=jc.Channels(-1), straight=False):  # noqa: B008 - frozen
    t = jc.quantize(jc.Int(bits, symmetric=symmetric), per=per, where=jc.core.everything)
    t = (
        jc.chain(jc.prune(0.5, where=jc.core.everything, gradient=StraightThrough() if straight else Cut()), t)
        if prune
        else t
    )
    state = t.init(p)
    return partial(t.apply, state)


def stepped(fn, act, make, *, integer, through=lambda fn: fn):
    """``(p, ranges, x)`` to the result and the gradients of a loss in all three, ``through`` another transformation."""
    q = quantize_function(through(fn), {".*": act}, integer=integer)

    def loss(p, ranges, x):
        y = q(make(p), ranges if act.needs_range else None, x)
        return jnp.sum(jnp.sin(1.0 + jnp.arange(float(y.size)).reshape(y.shape)) * y), y

    def run(p, ranges, x):
        (_, y), found = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(p, ranges, x)
        return y, found

    return run


def apart(found, wanted):
    """The largest difference of two trees, each array's over its largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-6)) for a, b in pairs)


def both(name, act, backend, **how):
    fn, p, x = NETWORKS[name]
    through = how.pop("through", lambda fn: fn)
    ranges = ranges_of(calibrate(fn)(p, x))
    if how.pop("learned", False):
        p, make = learned(p, jc.Int(4), per=jc.Channels(-1), where=jc.core.everything), lambda p: p
    else:
        make = weights(how.pop("bits", 8), p, **how)
    runs = (stepped(fn, act, make, integer=integer, through=through) for integer in (False, True))
    return [jax.jit(on(backend, run), compiler_options=FAST)(p, ranges, x) for run in runs]


CASES = [(name, act) for name in NETWORKS for act in ACTS if act != "groups" or name in ("dense", "stacked")]


@pytest.mark.parametrize("backend", MANTISSAS)
@pytest.mark.parametrize("case", quick(CASES, ("dense", "asymmetric"), ("conv", "symmetric"), ("ragged", "tokens")))
def test_fake_equals_integer_in_value_and_gradient(case, backend):
    name, act = case
    (fake, of_fake), (real, of_real) = both(name, ACTS[act], backend)
    assert apart(fake, real) < 1e-6
    assert apart(of_fake, of_real) < 5e-5  # what lies halfway between two numbers of a backend goes either way
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(of_fake[0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", quick(range(2, 9), 2, 8))
def test_on_every_grid(bits, symmetric):
    for act in (Act(bits), Act(bits, symmetric=True)):
        fake, real = both("ragged", act, "bfloat16", bits=bits, symmetric=symmetric)
        assert apart(fake, real) < 1e-5


WAYS = {
    "masked": {"prune": True},
    "masked, straight": {"prune": True, "straight": True},
    "shifted and masked": {"prune": True, "symmetric": False},
    "groups": {"per": jc.Groups(8)},
    "a scale for each element of the sum": {"per": jc.Channels(1)},
    "one scale": {"per": jc.Tensor()},
    "learned": {"learned": True},
    "remat": {"through": jax.checkpoint},
    "vmap": {"through": lambda fn: jax.vmap(fn, (None, 0))},
}


@pytest.mark.filterwarnings("ignore:quantize_function. these sites were asked")
@pytest.mark.parametrize("way", quick(WAYS, "shifted and masked", "groups", "remat"))
def test_masked_grouped_and_transformed(way):
    fake, real = both("dense", ACTS["symmetric"], "bfloat16", **WAYS[way])
    assert apart(fake, real) < 1e-5


def product(x, act, leaf, backend, *, integer, ranges=None):
    def dot(p, x):
        return x @ p["w"].astype(x.dtype)

    q = quantize_function(dot, {"w": act}, integer=integer)
    return on(backend, q)({"w": leaf}, ranges, x)


LEAF = weights(8, {"w": normal(1, 64, 16)})({"w": normal(1, 64, 16)})["w"]
TOKENS = ACTS["tokens"]


@pytest.mark.parametrize("backend", MANTISSAS)
def test_codes_are_multiplied_exactly_and_values_are_not(backend):
    """Against sums in float64; the values that the same codes stand for err by what the backend rounds."""
    x = normal(2, 8, 64)
    act, ranges, scale = ACTS["symmetric"], {"w": Range(jnp.float32(-3), jnp.float32(3))}, 3 / 127.5
    w = np.asarray(LEAF.materialize(), np.float64)
    exact = np.clip(np.round(np.asarray(x, np.float64) / scale), -128, 127) * scale @ w
    codes = product(x, act, LEAF, backend, integer=False, ranges=ranges)
    values = product(x, act, LEAF.materialize(), backend, integer=False, ranges=ranges)
    size = np.abs(exact).max()
    assert np.abs(codes - exact).max() < 1e-6 * size < 1e-5 * size < np.abs(values - exact).max()


def test_in_bfloat16_codes_are_multiplied_and_the_result_is_rounded_once():
    x = normal(2, 8, 64).astype(jnp.bfloat16)
    fake, real = (product(x, TOKENS, LEAF, "bfloat16", integer=integer) for integer in (False, True))
    assert fake.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fake, real)


def test_float8_too():
    x, w = normal(2, 8, 64), normal(1, 64, 16).astype("float8_e4m3fn")
    fake, real = (product(x, Float8(per=Tokens()), w, "bfloat16", integer=integer) for integer in (False, True))
    assert apart(fake, real) < 1e-6


def dot_products(fn, *args):
    return [op.eqn for op in trace(fn, *args).flow.ops if op.name == "dot_general"]


def test_coverage_says_where_values_are_multiplied_and_they_are_at_the_highest_precision():
    q, tree = quantize_function(NETWORKS["dense"][0], {".*": TOKENS}), {"w": normal(1, 32, 16), "v": normal(2, 16, 6)}
    grouped = weights(8, tree, per=jc.Groups(8))(tree)
    x = normal(3, 7, 32)
    for leaves, precision in ((grouped, (lax.Precision.HIGHEST,) * 2), (weights(8, tree)(tree), None)):
        assert {eqn.params["precision"] for eqn in dot_products(lambda p, x: q(p, None, x), leaves, x)} == {precision}
    rows = coverage(NETWORKS["dense"][0], {".*": TOKENS})(grouped, x).rows
    assert all("a scale varies along what the product sums over" in row.why for row in rows)
    long = {"w": jax.ShapeDtypeStruct((2048, 4), "float32")}
    leaves = jax.eval_shape(lambda p: weights(8, p)(p), long)
    (row,) = coverage(lambda p, x: x @ p["w"], {"w": Act(8)})(leaves, jax.ShapeDtypeStruct((1, 2048), "float32")).rows
    assert (row.done, row.why) == ("fake", "its sums may leave 2^24, beyond which float32 rounds them")


def test_every_order_of_derivative_is_that_of_the_values():
    """Forward mode, second derivatives, and a function that another handler opened before it is differentiated."""
    fn, p, x = NETWORKS["dense"]
    make = weights(8, p)

    def loss(p, x, dense=False):
        leaves = make(p)
        q = quantize_function(fn, {".*": ACTS["dynamic"]})
        return jnp.sum(jnp.sin(q(jc.materialize(leaves) if dense else leaves, None, x)))

    values = partial(loss, dense=True)
    assert apart(jax.grad(loss)(p, x), jax.grad(values)(p, x)) < 1e-4
    assert apart(jax.jvp(loss, (p, x), (p, x)), jax.jvp(values, (p, x), (p, x))) < 1e-4

    def curvature(f):
        return jax.jvp(jax.grad(f, (0, 1)), (p, x), (p, x))[1]

    assert apart(curvature(loss), curvature(values)) < 1e-3
    assert apart(jax.grad(on("TF32", loss))(p, x), jax.grad(values)(p, x)) < 0.02
