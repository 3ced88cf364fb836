"""Products whose sums become codes where they are made: as with floats between, in every kind of program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, quantize_function
from jaxcomp.activations.chained import Made
from jaxcomp.kernels import llvm_panels
from tests.marks import quick

pytestmark = pytest.mark.usefixtures("jax_defaults")
runs_here = pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes()))
LAST = ("NHWC", "HWIO", "NHWC")
STATIC = Act(8)


def conv(x, w, groups=1, numbers=LAST, strides=(1, 1)):
    return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers, feature_group_count=groups)


def inverted(p, x):
    """As MobileNetV2 has it: wide, depthwise, narrow, and the sum."""
    y = jax.nn.relu6(conv(x, p["wide"]) + p["b1"][None, None, None])
    y = jax.nn.relu6(conv(y, p["deep"], 48) + p["b2"][None, None, None])
    return x + conv(y, p["narrow"])


def residual(p, x):
    """As ResNet has it: the first of two convolutions is followed by nothing but the second."""
    y = jax.nn.relu(conv(x, p["first"]) + p["b1"])
    return jax.nn.relu(x + conv(y, p["second"]) + p["b2"])


def channels_first(p, x):
    numbers = ("NCHW", "OIHW", "NCHW")
    y = jnp.clip(conv(x, p["first"], 1, numbers) + p["b1"][:, None, None], -1.0, 2.0)
    return conv(y, p["second"], 1, numbers)


def swished(p, x):
    """As MobileNetV3 and EfficientNet have it."""
    y = jax.nn.hard_swish(conv(x, p["wide"]) + p["b1"])
    y = conv(y, p["deep"], 48) + p["b2"]
    return x + conv(y * jax.nn.sigmoid(y), p["narrow"])


def transformer(p, x):
    """Its wide layers: the bias with axes of its own, and heads as features."""
    y = jax.nn.gelu(x @ p["wide"] + p["b1"][None, None], approximate=False)
    x = x + y @ p["narrow"]
    y = jnp.einsum("bsd,dhk->bshk", x, p["first"]) + p["b3"]
    return jnp.einsum("bshk,hkd->bsd", jax.nn.silu(y), p["second"])


def scanned_rows(p, x):
    def layer(x, p):
        return x + jax.nn.relu(x @ p["first"] + p["b1"]) @ p["second"], None

    return lax.scan(layer, x, p)[0]


def bare(p, x):
    """Nothing between."""
    return conv(conv(x, p["first"]), p["second"], strides=(2, 2))


def scanned(p, x):
    def layer(x, p):
        return x + conv(jax.nn.relu(conv(x, p["first"]) + p["b1"]), p["second"]), None

    return lax.scan(layer, x, p)[0]


RESIDUAL = {"first": (3, 3, 20, 24), "b1": (24,), "second": (1, 1, 24, 20), "b2": (20,)}
PROGRAMS = {
    inverted: (
        {"wide": (1, 1, 20, 48), "b1": (48,), "deep": (3, 3, 1, 48), "b2": (48,), "narrow": (1, 1, 48, 20)},
        (2, 6, 5, 20),
        2,
    ),
    residual: (RESIDUAL, (2, 6, 5, 20), 1),
    channels_first: (
        {"first": (24, 20, 3, 3), "b1": (24,), "second": (20, 24, 1, 1)},
        (2, 20, 6, 5),
        1,
    ),
    swished: (
        {"wide": (1, 1, 20, 48), "b1": (48,), "deep": (3, 3, 1, 48), "b2": (48,), "narrow": (1, 1, 48, 20)},
        (2, 6, 5, 20),
        2,
    ),
    transformer: (
        {"wide": (20, 96), "b1": (96,), "narrow": (96, 20), "first": (20, 4, 24), "b3": (4, 24), "second": (4, 24, 20)},
        (2, 40, 20),
        2,
    ),
    scanned_rows: ({"first": (3, 20, 48), "b1": (3, 48), "second": (3, 48, 20)}, (80, 20), 1),
    bare: ({"first": (3, 3, 20, 24), "second": (3, 3, 24, 16)}, (1, 8, 8, 20), 1),
    scanned: (
        {"first": (3, 3, 3, 20, 24), "b1": (3, 24), "second": (3, 1, 1, 24, 20)},
        (2, 6, 5, 20),
        1,
    ),
}
ids = {"ids": lambda fn: fn.__name__}


class Case:
    """A program, its prepared tree, ranges and images."""

    def __init__(self, fn, act=STATIC, of_x=None, params=None):
        rng = np.random.default_rng(0)
        shapes, shape = (PROGRAMS[fn][0], PROGRAMS[fn][1]) if params is None else (params, None)
        self.fn, self.act = fn, act
        self.x = jnp.asarray(rng.normal(size=of_x or shape), jnp.float32)
        dense = {k: jnp.asarray(rng.normal(size=s), jnp.float32) / (4 if len(s) > 2 else 1) for k, s in shapes.items()}
        self.dense = dense
        self.ranges = jc.activations.ranges_of(jax.jit(jc.calibrate(fn))(dense, self.x)) if act.needs_range else None
        matrices = r"wide|deep|narrow|first|second|third"
        tree = jc.quantize(jc.Int(8), where=matrices, roles=jc.roles(fn)(dense, self.x)).apply((), dense)
        self.tree = jc.prepare(jc.pack(tree), fn, self.x)

    def run(self):
        """Anew: what was traced is not met again."""
        jax.clear_caches()
        q = quantize_function(self.fn, {".*": self.act}, integer=True)
        return jax.jit(lambda tree, ranges, x: q(tree, ranges, x))

    def given(self):
        return self.tree, self.ranges, self.x


def calls(run, *given) -> tuple[int, int]:
    """Products that write codes, and those that write sums."""
    text = run.lower(*given).compile().as_text()
    found = re.findall(r'custom_call_target="jaxcomp_((?:panels|depthwise)\w*)"', text)
    return sum("codes" in name for name in found), sum("codes" not in name for name in found)


@pytest.fixture
def without(monkeypatch):
    """The same programs, floats between, from when it is called."""
    yield lambda: monkeypatch.setattr(Made, "of", lambda *_: None)
    jax.clear_caches()


EXACT = [inverted, residual, channels_first, bare, scanned, scanned_rows]
"""Of functions that are done in exact steps."""


@runs_here
@pytest.mark.parametrize("symmetric", quick([False, True], False))
@pytest.mark.parametrize("fn", EXACT, **ids)
def test_it_gives_the_same_bits(fn, symmetric, without) -> None:
    case = Case(fn, Act(8, symmetric=symmetric))
    run, coded = case.run(), PROGRAMS[fn][2]
    found, sums = calls(run, *case.given())
    assert found == coded
    got = run(*case.given())
    without()
    run = case.run()
    assert calls(run, *case.given()) == (0, found + sums)
    np.testing.assert_array_equal(got, run(*case.given()))


@runs_here
@pytest.mark.parametrize("fn", [swished, transformer], **ids)
def test_functions_that_are_approximated_give_the_same_but_for_ties(fn, without) -> None:
    case = Case(fn)
    run = case.run()
    assert calls(run, *case.given())[0] == PROGRAMS[fn][2]
    got = run(*case.given())
    without()
    plain = case.run()
    assert calls(plain, *case.given())[0] == 0
    expected = plain(*case.given())
    same = got == expected
    assert same.mean() > 0.9
    assert float(jnp.abs(got - expected).max()) < 0.01 * float(jnp.abs(expected).max())


@runs_here
@pytest.mark.parametrize("fn", [inverted, swished, transformer], **ids)
def test_it_is_near_the_fake_mode(fn) -> None:
    case = Case(fn)
    fake = jax.jit(quantize_function(fn, {".*": STATIC}))(*case.given())
    got = case.run()(*case.given())
    assert float(jnp.abs(got - fake).max()) < 0.02 * float(jnp.abs(fake).max())


def two_readers(p, x):
    y = jax.nn.relu(conv(x, p["first"]))
    return conv(y, p["second"]) + conv(y, p["third"])


def given_back(p, x):
    y = jax.nn.relu(conv(x, p["first"]))
    return y, conv(y, p["second"])


def other_function(p, x):
    return conv(jnp.sin(conv(x, p["first"]) + p["b1"]), p["second"])


def of_neighbours(p, x):
    return conv(jax.nn.softmax(conv(x, p["first"]) + p["b1"]), p["second"])


def may_be_no_number(p, x):
    y = conv(x, p["first"])
    return conv(jnp.exp(y) - jnp.exp(-y), p["second"])


def bias_of_pixels(p, x):
    return conv(conv(x, p["first"]) + p["b3"], p["second"])


def scaled(p, x):
    return conv(conv(x, p["first"]) * p["b1"], p["second"])


def bias_behind_the_clamp(p, x):
    return conv(jax.nn.relu(conv(x, p["first"])) + p["b1"], p["second"])


@runs_here
@pytest.mark.parametrize(
    "fn",
    [
        two_readers,
        given_back,
        other_function,
        of_neighbours,
        may_be_no_number,
        bias_of_pixels,
        scaled,
        bias_behind_the_clamp,
    ],
    **ids,
)
def test_floats_that_are_read_are_made_once(fn) -> None:
    """Whoever reads them beside the rounding, and whatever else is done on the way."""
    shapes = {**RESIDUAL, "b3": (1, 6, 5, 24)} | ({"third": (1, 1, 24, 20)} if fn is two_readers else {})
    case = Case(fn, of_x=(2, 6, 5, 20), params=shapes)
    found, sums = calls(case.run(), *case.given())
    assert found == 0
    assert sums == (3 if fn is two_readers else 2)


@runs_here
def test_a_tree_that_trains_has_its_floats() -> None:
    """A gradient reads them, and would have each convolution run twice."""
    case = Case(inverted)
    case.tree = jc.quantize(jc.Int(8), where="wide|deep|narrow", roles=jc.roles(inverted)(case.dense, case.x)).apply(
        (), case.dense
    )
    assert calls(case.run(), *case.given())[0] == 0


@runs_here
@pytest.mark.parametrize("act", [Act(8, range=Dynamic()), Act(8, symmetric=True, range=Dynamic())], ids=str)
def test_ranges_that_are_found_as_they_come_need_the_floats(act) -> None:
    case = Case(residual, act)
    assert calls(case.run(), *case.given())[0] == 0


@runs_here
@pytest.mark.parametrize("where", ["an image", "a bias", "a scale"])
def test_numbers_that_are_none(where, without) -> None:
    case = Case(residual)
    if where == "an image":
        case.x = case.x.at[1, 2, 3, 4].set(jnp.nan)
    elif where == "a bias":
        case.tree["b1"] = case.tree["b1"].at[3].set(jnp.nan)
    else:
        case.tree["first"] = jax.tree.map(
            lambda v: v.at[3].set(jnp.nan) if v.dtype == jnp.float32 else v, case.tree["first"]
        )
    got = case.run()(*case.given())
    without()
    np.testing.assert_array_equal(got, case.run()(*case.given()))
    assert np.isnan(got[1]).all()
    assert np.isnan(got[0]).all() == (where != "an image")


@runs_here
def test_a_token_that_is_none(without) -> None:
    case = Case(transformer)
    case.x = case.x.at[1, 7, 3].set(jnp.nan)
    got = case.run()(*case.given())
    without()
    expected = case.run()(*case.given())
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got[1, 7]).all()
    assert np.isfinite(got[0]).all()


@runs_here
@pytest.mark.parametrize("fn", [inverted, transformer], **ids)
def test_infinite_biases_are_clipped_or_none(fn, without) -> None:
    """What ReLU6 cuts off, and of minus infinity GELU makes no number."""
    case = Case(fn)
    case.tree["b1"] = case.tree["b1"].at[3].set(jnp.inf).at[4].set(-jnp.inf)
    got = case.run()(*case.given())
    without()
    expected = case.run()(*case.given())
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isfinite(got).all() == (fn is inverted)


@runs_here
@pytest.mark.parametrize("fn", quick([inverted, residual, transformer], residual), **ids)
def test_gradients_and_maps(fn, without) -> None:
    case = Case(fn)

    def found():
        jax.clear_caches()
        q = quantize_function(fn, {".*": STATIC}, integer=True)
        of_x = jax.jit(jax.value_and_grad(lambda x: (q(case.tree, case.ranges, x) ** 2).sum()))(case.x)
        mapped = jax.jit(jax.vmap(lambda x: q(case.tree, case.ranges, x)))(jnp.stack([case.x, -case.x]))
        kept = jax.jit(jax.checkpoint(lambda x: q(case.tree, case.ranges, x)))(case.x)
        return of_x, mapped, kept, q(case.tree, case.ranges, case.x)

    got = found()
    assert float(jnp.abs(got[0][1]).max()) > 0
    without()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(found()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(other).max()))


@runs_here
@pytest.mark.parametrize("fn", quick([inverted, transformer], transformer), **ids)
def test_readers_of_programs_and_kept_ones_see_what_they_saw(fn) -> None:
    case = Case(fn)
    run = case.run()
    assert jc.trace.cost(run)(*case.given()).macs == jc.trace.cost(fn)(case.dense, case.x).macs
    kept = export.export(run, platforms=("cpu", "cuda", "tpu"))(*case.given())
    assert "jaxcomp_" not in kept.mlir_module()
    np.testing.assert_allclose(kept.call(*case.given()), run(*case.given()), atol=1e-4)
