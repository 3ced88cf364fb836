"""Weights in every layout run on integers where their scales lie on axes that the product keeps."""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.core import Channels, Groups, leaves_with_paths
from tests.marks import quick
from tests.trace.models import filled, normal, variables_of

KEY = jax.random.key(0)
ACT = Act(8, range=Dynamic())


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def on_grid(params, layouts, bits=8):
    """The leaves on integer grids: scales along the axes, or of the groups, that each is given."""
    per = {where: own if isinstance(own, Groups) else Channels(own) for where, own in layouts.items()}
    t = jc.by_path({where: jc.quantize(jc.Int(bits), per=own) for where, own in per.items()})
    return t.apply(t.init(params), params)


class Case(NamedTuple):
    """A function, its parameters and input, and which axes of each leaf have a scale an index."""

    fn: object
    params: object
    x: jax.Array
    axes: dict


def transposed():
    return Case(lambda p, x: x @ p["w"].T, {"w": normal(1, 6, 16)}, normal(2, 5, 16), {"w": (0,)})


def matrix_first():
    return Case(lambda p, x: p["w"] @ x, {"w": normal(1, 6, 16)}, normal(2, 16, 5), {"w": (0,)})


def equinox_linear():
    model = eqx.nn.MLP(16, 4, 24, 2, key=KEY)
    return Case(lambda m, x: jax.vmap(m)(x), model, normal(2, 5, 16), {r".*/weight": (0,)})


class EquinoxConvs(eqx.Module):
    plain: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    flat: eqx.nn.Conv1d

    def __call__(self, x):
        x = jax.nn.relu(self.grouped(self.plain(x)))
        x = self.up(x)
        return self.flat(x.reshape(x.shape[0], -1))


def equinox_convs():
    keys = jax.random.split(KEY, 4)
    model = EquinoxConvs(
        eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
        eqx.nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, key=keys[1]),
        eqx.nn.ConvTranspose2d(12, 6, 2, stride=2, key=keys[2]),
        eqx.nn.Conv1d(6, 5, 5, dilation=2, key=keys[3]),
    )
    return Case(lambda m, x: jax.vmap(m)(x), model, normal(2, 2, 3, 8, 8), {r".*weight": (0,)})


def equinox_stack():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(jax.random.split(KEY, 3))

    def fn(m, x):
        arrays, rest = eqx.partition(m, eqx.is_array)
        return lax.scan(lambda h, own: (jnp.tanh(jax.vmap(eqx.combine(own, rest))(h)), None), x, arrays)[0]

    return Case(fn, layers, normal(2, 5, 16), {"weight": (0, 1)})


def flax_stack():
    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    return Case(fn, {"w": normal(1, 3, 16, 16) / 4}, normal(2, 5, 16), {"w": (0, 2)})


def dense_general():
    model, x = nn.DenseGeneral((2, 8)), normal(2, 5, 16)
    return Case(model.apply, variables_of(model, x), x, {r".*/kernel": (1, 2)})


def heads_apart():
    """One scale a head."""
    model, x = nn.DenseGeneral((2, 8)), normal(2, 5, 16)
    return Case(model.apply, variables_of(model, x), x, {r".*/kernel": (1,)})


def attention():
    model, x = nn.MultiHeadDotProductAttention(2), normal(2, 2, 5, 16)
    axes = {r".*/(query|key|value)/kernel": (1, 2), r".*/out/kernel": (2,)}
    return Case(model.apply, variables_of(model, x), x, axes)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(11, 16)
        return table.attend(jnp.tanh(table(x)))


def tied():
    model, x = Tied(), jnp.array([[1, 0, 10], [3, 3, 7]])
    return Case(model.apply, filled(jax.eval_shape(model.init, KEY, x)), x, {r".*/embedding": (0,)})


CASES = [
    transposed, matrix_first, equinox_linear, equinox_convs, equinox_stack, flax_stack, dense_general, heads_apart,
    attention, tied,
]  # fmt: skip


def on_integers(fn, rules, tree, x):
    """Whether the integer mode has products, and all of them sum int8 codes in int32.

    As lowered for a TPU: a CPU multiplies some narrow convolutions' codes as floats.
    """
    run = partial(quantize_function(fn, rules, integer=True), tree, None)
    text = jax.jit(run).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    return bool(products) and all(len(re.findall(r"xi8>", line)) == 2 and "xi32>" in line for line in products)


def on(fn, rules, tree, x, integer):
    """The result; the tree is no argument of jit, for an Equinox module holds functions too."""
    run = quantize_function(fn, rules, integer=integer, strict=integer)
    return jax.jit(lambda x: run(tree, None, x))(x)


def check(fn, rules, tree, x):
    fake, real = (on(fn, rules, tree, x, integer) for integer in (False, True))
    np.testing.assert_allclose(real, fake, rtol=0, atol=1e-5 * float(jnp.abs(fake).max()))
    assert on_integers(fn, rules, tree, x)
    report = coverage(fn, rules, integer=True)(tree, x)
    assert not report.left
    return {row.done for row in report.rows}


@pytest.mark.parametrize("case", quick(CASES, equinox_convs, flax_stack, attention), ids=lambda make: make.__name__)
def test_scales_on_the_axes_that_are_kept_run_on_integers(case):
    fn, params, x, axes = case()
    tree = on_grid(params, axes)
    done = check(fn, {".*": ACT}, jc.pack(tree), x)
    assert done == ({"integer", "lookup"} if case is tied else {"integer"})
    trained, packed = (on(fn, {".*": ACT}, t, x, True) for t in (tree, jc.pack(tree)))
    np.testing.assert_allclose(trained, packed, rtol=0, atol=1e-5 * float(jnp.abs(packed).max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_out_of_bounds_are_filled_as_those_of_a_float_table(symmetric):
    t = jc.quantize(jc.Int(8, symmetric=symmetric), per=Channels(0), where=jc.core.everything)
    tree, tokens = t.apply((), {"w": normal(1, 7, 16)}), jnp.array([2, 11, 6])
    for given in (None, 2.5):
        fn = partial(lambda p, at, given: jnp.take(p["w"], at, axis=0, fill_value=given), given=given)
        real = quantize_function(fn, {}, integer=True)(jc.pack(tree), None, tokens)
        np.testing.assert_array_equal(real, fn(jc.materialize(tree), tokens))
        assert np.isnan(real[1]).all() if given is None else (real[1] == 2.5).all()


@pytest.mark.parametrize("case", CASES, ids=lambda make: make.__name__)
def test_what_the_program_says_of_its_axes_puts_scales_there(case):
    fn, params, x, axes = case()
    roles = jc.roles(fn)(params, x)
    t = jc.quantize(jc.Int(8), roles=roles)
    tree = t.apply(t.init(params), params)
    check(fn, {".*": ACT}, jc.pack(tree), x)
    if case is not heads_apart:
        named, said = (leaves_with_paths(t, is_leaf=jc.core.is_compressed)[0] for t in (on_grid(params, axes), tree))
        pairs = [(a, b) for (_, a), (path, b) in zip(named, said, strict=True) if path in roles]
        assert pairs
        for a, b in pairs:
            np.testing.assert_array_equal(a.scale, b.scale)


GROUPED = {
    "x @ w.T": (lambda p, x: x @ p["w"].T, (6, 32), (5, 32), 1),
    "out of heads": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (4, 16, 6), (5, 4, 16), 1),
    "scanned": (lambda p, x: lax.scan(lambda h, w: (h + x @ w, None), 0 * x, p["w"])[0], (3, 16, 16), (5, 16), 1),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_along_the_summed_axis_run_on_integers(name):
    fn, w, x, axis = GROUPED[name]
    tree = jc.pack(on_grid({"w": normal(1, *w)}, {"w": Groups(8, axis)}, 4))
    groups = Act(8, symmetric=True, range=Dynamic(), per=Groups(8))
    for act in (ACT, groups):
        assert check(fn, {"w": act}, tree, normal(2, *x)) == {"integer"}
