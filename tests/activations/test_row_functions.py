"""Residual sums, norms and gates between products of a prepared tree: one pass each, and the same in every program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, between, quantize_function
from jaxcomp.core.layouts import Tokens
from jaxcomp.kernels import llvm_panels
from tests.marks import quick

pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes())),
]
RNG = np.random.default_rng(0)
SHAPES = {"a": (32, 64), "b": (64, 32), "g": (32, 64), "c": (64,), "d": (32,), "scale": (32,), "shift": (32,)}


def norm(p, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["shift"]


def rms(p, x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]


def behind(p, x):
    """As BERT has it: norms behind the sums."""
    y = jax.nn.gelu(x @ p["a"] + p["c"], approximate=False) @ p["b"] + p["d"]
    return norm(p, x + y) @ p["g"]


def before(p, x):
    """As GPT-2 has it: the sum goes on beside the norm."""
    for _ in range(2):
        x = x + jax.nn.gelu(norm(p, x) @ p["a"] + p["c"]) @ p["b"] + p["d"]
    return x


def gated(p, x):
    """As Llama has it."""
    y = rms(p, x)
    return x + (jax.nn.silu(y @ p["g"]) * (y @ p["a"])) @ p["b"]


def scanned(p, x):
    def layer(x, p):
        return norm(p, x + jax.nn.silu(x @ p["a"]) @ p["b"]), None

    return lax.scan(layer, x, p)[0]


def weighed(p, x):
    """A softmax of what a product gives, and of nothing else."""
    return jax.nn.softmax(x @ p["a"] / 3, axis=-1) @ p["b"]


def plain(p, x):
    return jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"] + x


PROGRAMS = {behind: (2, 2), before: (4, 4), gated: (2, 2), scanned: (2, 1), weighed: (1, 1)}
"""How many passes there are in each, and how many of them end in codes that alone are read."""
ids = {"ids": lambda fn: fn.__name__}
ACT = Act(8, range=Dynamic(), per=Tokens())


class Case:
    def __init__(self, fn, rows=20) -> None:
        lead = (3,) if fn is scanned else ()
        params = {k: jnp.asarray(RNG.normal(0, 0.3, (*lead, *shape)), jnp.float32) for k, shape in SHAPES.items()}
        self.x = jnp.asarray(RNG.normal(size=(2, rows, 32)), jnp.float32)
        roles = jc.roles(fn)(params, self.x)
        where = "|".join(path for path in roles if path in "abg")
        packed = jc.pack(jc.quantize(jc.Int(8), where=where, roles=roles).apply((), params))
        self.fn, self.packed, self.tree = fn, packed, jc.prepare(packed, fn, self.x)

    def run(self, *, integer=True):
        q = quantize_function(self.fn, {".*": ACT}, integer=integer)
        return jax.jit(lambda tree, x: q(tree, None, x))


def passes(run, *given) -> int:
    """Those that give floats."""
    return count(r"jaxcomp_rows_(?!of_codes)\w*", run, *given)


def roundings(run, *given) -> int:
    return count(r"jaxcomp_rows_of_codes_\w*", run, *given)


def count(name, run, *given) -> int:
    return len(re.findall(f'custom_call_target="{name}"', run.lower(*given).compile().as_text()))


@pytest.fixture
def without(monkeypatch):
    """The same programs as XLA has them, from when it is called."""
    yield lambda: monkeypatch.setattr(between, "row_functions", lambda *_, **how: [])
    jax.clear_caches()


@pytest.mark.parametrize("integer", quick([True, False], True))
@pytest.mark.parametrize("fn", PROGRAMS, **ids)
def test_it_gives_the_same(fn, integer, without) -> None:
    case = Case(fn)
    run = case.run(integer=integer)
    many, rounded = PROGRAMS[fn]
    assert passes(run, case.tree, case.x) == many - (rounded if integer else 0)
    got = run(case.tree, case.x)
    without()
    plain = case.run(integer=integer)
    assert passes(plain, case.tree, case.x) == 0
    expected = plain(case.tree, case.x)
    assert float(jnp.abs(got - expected).max()) < (0.02 if integer else 1e-4) * float(jnp.abs(expected).max())


def test_a_tree_that_is_not_prepared_keeps_its_equations() -> None:
    case = Case(behind)
    assert passes(case.run(), case.packed, case.x) == 0


def seen_by_others(p, x):
    y = jax.nn.gelu(x @ p["a"])
    return y @ p["b"], y


def seen_by_another_product(p, x):
    """One rounds it, and another does not."""
    y = jax.nn.gelu(x @ p["a"])
    return y @ p["b"], y @ p["c"]


def twice_in_one(p, x):
    y = jax.nn.silu(x @ p["b"].T)
    return jnp.einsum("btd,bsd->bts", y, y)


@pytest.mark.parametrize(
    ("fn", "floats", "codes"),
    [(gated, 0, 2), (seen_by_others, 1, 2), (seen_by_another_product, 1, 2), (twice_in_one, 0, 2), (plain, 0, 2)],
)
def test_what_is_rounded_alone_is_rounded_where_it_is_made(fn, floats, codes, without) -> None:
    """Others round what they are given, in one pass, too: a product's argument."""
    case = Case(fn)
    run = case.run()
    assert passes(run, case.tree, case.x) == floats
    assert roundings(run, case.tree, case.x) == codes
    got = run(case.tree, case.x)
    without()
    expected = case.run()(case.tree, case.x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(a - b).max()) < 0.02 * float(jnp.abs(b).max())


@pytest.mark.parametrize("fn", [behind, gated], **ids)
def test_gradients_are_those_of_the_equations(fn, without) -> None:
    case = Case(fn)
    loss = lambda run: jax.jit(jax.grad(lambda x: (run(case.tree, x) ** 2).sum()))(case.x)  # noqa: E731
    got = loss(case.run(integer=False))
    without()
    expected = loss(case.run(integer=False))
    assert float(jnp.abs(got - expected).max()) < 1e-3 * float(jnp.abs(expected).max())


def test_mapped_and_run_at_once() -> None:
    case = Case(behind)
    run = case.run()
    expected = run(case.tree, case.x)
    one = jax.vmap(lambda x: run(case.tree, x[None])[0])(case.x)
    q = quantize_function(case.fn, {".*": ACT}, integer=True)
    for got in (one, q(case.tree, None, case.x)):
        assert float(jnp.abs(got - expected).max()) < 0.02 * float(jnp.abs(expected).max())


@pytest.mark.parametrize("platform", quick(["cpu", "tpu"], "cpu"))
def test_a_program_that_is_kept_holds_the_equations(platform) -> None:
    case = Case(behind)
    kept = export.export(case.run(), platforms=[platform])(case.packed, case.x)
    assert "jaxcomp_rows" not in kept.mlir_module()


def test_a_token_that_is_none_stays_alone() -> None:
    case = Case(before)
    got = case.run()(case.tree, case.x.at[1, 3, 5].set(jnp.nan))
    lost = np.isnan(np.asarray(got)).any(-1)
    assert lost[1, 3]
    assert lost.sum() == 1


def two_results(p, x):
    y = x @ p["a"]
    e = jnp.exp(y - y.max(-1, keepdims=True))
    return e, e / e.sum(-1, keepdims=True)


def other_axis(p, x):
    return jax.nn.softmax(x @ p["a"], axis=1)


def unread(p, x):
    return jnp.sin(x @ p["a"]) @ p["b"]


def of_the_future(p, x):
    """The sum of the rows meets what was made of them elsewhere."""
    y = x @ p["a"]
    return jnp.tanh(y) * jnp.cumsum(y, -1)


def looked_at(p, x):
    """Somebody prints what is between, and somebody what comes of it."""
    y = x @ p["a"]
    jax.debug.callback(lambda *_: None, y)
    y = jax.nn.gelu(y)
    jax.debug.callback(lambda *_: None, y)
    return y @ p["b"]


def constants(p, x):
    """They stand in the program, broadcast before they are met."""
    y = x @ p["a"]
    least = lax.broadcast_in_dim(jnp.float32(1e-3), (*y.shape[:-1], 1), ())
    return y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + least) @ p["b"]


def half_used(p, x):
    """A call gives two values, and one is read."""
    y, _ = jax.jit(lambda y: (jax.nn.silu(y), y.sum(-1)))(x @ p["a"])
    return y @ p["b"]


def other_half_used(p, x):
    _, y = jax.jit(lambda y: (y.sum(-1), jax.nn.silu(y)))(x @ p["a"])
    return y @ p["b"]


@pytest.mark.parametrize(
    ("fn", "many"),
    [
        (looked_at, 1),
        (half_used, 1),
        (other_half_used, 0),
        (two_results, 1),
        (other_axis, 1),
        (unread, 0),
        (plain, 0),
        (of_the_future, 1),
    ],
)
def test_what_is_done_in_a_pass(fn, many, without) -> None:
    """What one value makes that others read, along the last axis, of what is worth it."""
    case = Case(fn)
    run = case.run(integer=False)
    assert passes(run, case.tree, case.x) == many
    got = run(case.tree, case.x)
    without()
    expected = case.run(integer=False)(case.tree, case.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
