"""A deep network is traced as one of its layers; what differs is kept apart."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Static, quantize_function
from jaxcomp.activations.memory import Memory
from jaxcomp.trace.ranges import Range
from tests.trace.models import normal

X = normal(0, 3, 8)
ONE = Range(jnp.float32(-2), jnp.float32(3))


def deep(layers):
    params = {f"layer_{i}": 0.3 * normal(i, 8, 8) for i in range(layers)}

    def fn(p, x):
        for i in range(layers):
            with jax.named_scope(f"layer_{i}"):
                x = jnp.tanh(x @ p[f"layer_{i}"])
        return x

    return fn, params, {f"layer_{i}": Range(*(end + 0.1 * i for end in ONE)) for i in range(layers)}


def step(fn):
    t, q = jc.quantize(jc.Int(8)), quantize_function(fn, {".*": Act(8)})
    return jax.grad(lambda p, r, x: jnp.sum(q(t.apply((), p), r, x) ** 2))


def inner(jaxpr, seen):
    """Every jaxpr inside, each once."""
    for eqn in jaxpr.eqns:
        for v in eqn.params.values():
            for one in v if isinstance(v, tuple | list) else [v]:
                body = getattr(one, "jaxpr", one if hasattr(one, "eqns") else None)
                if body is not None and id(body) not in seen:
                    seen[id(body)] = body
                    inner(body, seen)
    return seen


def size(layers):
    """Equations outside, and all those inside that are not the same objects."""
    fn, params, ranges = deep(layers)
    jaxpr = jax.make_jaxpr(step(fn))(params, ranges, X).jaxpr
    return len(jaxpr.eqns), sum(len(body.eqns) for body in inner(jaxpr, {}).values())


def test_more_layers_are_no_more_to_trace_inside():
    (outside, inside), (more_outside, more_inside) = size(4), size(8)
    assert more_inside == inside
    assert (more_outside - outside) / 4 < 40  # a layer in float has 11, and a quantizer's pieces are calls


def test_a_network_of_many_layers_is_lowered_as_functions_of_one():
    texts = []
    for layers in (4, 8):
        fn, params, ranges = deep(layers)
        texts.append(jax.jit(step(fn)).lower(params, ranges, X).as_text())
    functions = [text.count("func.func") for text in texts]
    assert functions[0] == functions[1]


def test_each_layer_keeps_its_own_name():
    fn, params, ranges = deep(3)
    tree = jc.quantize(jc.Int(8)).apply((), params)
    text = jax.jit(quantize_function(fn, {".*": Act(8)})).lower(tree, ranges, X).as_text(debug_info=True)
    assert all(f"layer_{i}/jit(_product)" in text for i in range(3))
    assert not re.search(r'"[^"]*layer_1/[^"]*layer_0', text)


@pytest.mark.parametrize("integer", [False, True])
def test_products_that_differ_in_a_parameter_alone_do_not_share(integer):
    """The same shapes, other axes: each gives what it gives on its own, though the other was traced first."""
    first = lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))  # noqa: E731
    second = lambda p, x: lax.dot_general(x, p["w"], (((1,), (1,)), ((), ())))  # noqa: E731
    params = {"w": normal(1, 8, 8)}
    tree = jc.quantize(jc.Int(8), per=jc.Tensor()).apply((), params)
    x = normal(2, 8, 8)
    for fn, w in ((first, tree["w"].materialize()), (second, tree["w"].materialize().T)):
        got = quantize_function(fn, {"w": Act(8)}, integer=integer)(jc.pack(tree), {"w": ONE}, x)
        # Independent: the grid of a range, by numpy.
        scale = np.float32(5 / 255)
        zero = np.round(2 / 5 * 255)
        rounded = (np.clip(np.round(np.asarray(x) / scale), -zero, 255 - zero)) * scale
        np.testing.assert_allclose(got, rounded @ np.asarray(w), atol=2e-4 * 8)


def test_a_range_that_learns_nothing_gives_what_one_that_is_not_known_before_gives():
    """As an argument and as a constant, in jit and out of it, bit by bit."""
    fn, params, ranges = deep(2)
    q = quantize_function(fn, {".*": Act(8, range=Static())})
    eager = q(params, ranges, X)
    np.testing.assert_array_equal(jax.jit(q)(params, ranges, X), eager)
    np.testing.assert_array_equal(jax.jit(lambda p, x: q(p, ranges, x))(params, X), eager)


def test_memory_asks_once_a_value_and_rule():
    made = []
    memory = Memory(lambda value, act, at: made.append(value) or len(made))
    values = [jnp.full(3, float(i)) for i in range(50)]
    at = jc.activations.fake.Entry(("contracted",))
    first = [memory(v, Act(8), at) for v in values]
    assert [memory(v, Act(8), at) for v in values] == first
    assert len(made) == 50
    memory(values[0], Act(4), at)
    assert len(made) == 51


def test_a_scan_over_layers_keeps_the_codes_of_its_weights_alone_for_the_backward_pass():
    layers, width = 3, 8
    params, x = {"layers": 0.3 * normal(0, layers, width, width)}, normal(1, 2, width)

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]

    t, q = jc.quantize(jc.Int(8), roles=jc.roles(fn)(params, x)), quantize_function(fn, {".*": Act(8)})
    ranges = {"layers": ONE}
    run = jax.grad(lambda p: jnp.sum(q(t.apply((), p), ranges, x) ** 2))
    scans = [e for e in jax.make_jaxpr(run)(params).jaxpr.eqns if e.primitive.name == "scan"]
    made = [v.aval.shape for v in scans[0].outvars]
    assert len(scans) == 2
    assert (layers, width, width) not in made

    def unrolled(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p[f"layer_{i}"])
        return x

    apart = {f"layer_{i}": params["layers"][i] for i in range(layers)}
    loop = quantize_function(unrolled, {".*": Act(8)})
    each = jc.quantize(jc.Int(8), roles=jc.roles(unrolled)(apart, x))
    want = jax.grad(lambda p: jnp.sum(loop(each.apply((), p), dict.fromkeys(apart, ONE), x) ** 2))(apart)
    np.testing.assert_allclose(run(params)["layers"], jnp.stack([*want.values()]), rtol=1e-5, atol=1e-6)
