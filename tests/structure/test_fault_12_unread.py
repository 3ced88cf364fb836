"""Fault 12: what the traced call does not read stays, with a reason, so that a call that does read it can run."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.structure import channel_groups, check_shrink, mask, plan, shrink
from tests.marks import quick
from tests.structure.models import filled, normal, plain

SHAPES = {"pos": (16, 8), "up": (8, 12), "down": (12, 8), "out": (8, 2)}


def body(p, x, positions):
    x = x @ p["in"] if "in" in p else x
    x = x + positions
    return (x + jnp.tanh(x @ p["up"]) @ p["down"]) @ p["out"]


READERS = {
    "a slice": lambda p, x: body(p, x, p["pos"][: len(x)]),
    "a cast and a scale before the slice": lambda p, x: body(
        p, x, (p["pos"].astype(jnp.bfloat16).astype(jnp.float32) * 2)[: len(x)]
    ),
    "known indices": lambda p, x: body(p, x, p["pos"][np.arange(len(x))]),
    "a dynamic slice": lambda p, x: body(p, x, lax.dynamic_slice_in_dim(p["pos"], 0, len(x))),
    "the second half": lambda p, x: body(p, x, p["pos"][::-1][: len(x)]),
    "a split": lambda p, x: body(p, x, jnp.split(p["pos"], [len(x)])[0]),
    "inside jit": lambda p, x: body(p, x, jax.jit(lambda t: t[: len(x)])(p["pos"])),
    "inside a checkpoint": lambda p, x: jax.checkpoint(lambda p: body(p, x, p["pos"][: len(x)]))(p),
    "inside a branch": lambda p, x: lax.cond(
        x.sum() > 0, lambda: body(p, x, p["pos"][: len(x)]), lambda: body(p, x, p["pos"][: len(x)] * 2)
    ),
    "inside a scan": lambda p, x: lax.scan(
        lambda c, _: (c + body(p, x, p["pos"][: len(x)]), None), jnp.zeros((len(x), 2)), None, 2
    )[0],
    "inside a loop": lambda p, x: lax.fori_loop(
        0, 2, lambda i, c: c + body(p, x, p["pos"][: len(x)]), jnp.zeros((len(x), 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", quick(READERS, "a slice", "known indices", "inside a checkpoint", "inside a loop"))
def test_fault_12_rows_that_are_not_read_stay_and_longer_inputs_run(name):
    fn, params = READERS[name], plain(SHAPES)
    groups = channel_groups(fn)(params, normal(5, 8))
    assert not groups.of("pos", 0)
    assert groups.of("up", 1)
    half = plan(groups, params, sparsity=0.5)
    small = half.take(params)
    assert small["pos"].shape[0] == 16
    for length in (3, 5, 11, 16):
        x = normal(length, 8)
        np.testing.assert_allclose(shrink(fn, half)(small, x), fn(mask(half)(params), x), atol=1e-4)


def test_fault_12_the_reason_tells_rows_that_are_read_from_rows_that_are_not():
    groups = channel_groups(READERS["a slice"])(plain(SHAPES), normal(5, 8))
    rows = {f.indices: f for f in groups.frozen if (f.path, f.axis) == ("pos", 0)}
    assert "does not read it" in rows[11].why
    assert "input" in rows[5].why
    assert rows[5].primitive == "add"


def test_fault_12_channels_of_the_positions_still_go():
    params = plain(SHAPES | {"in": (4, 8)})
    groups = channel_groups(READERS["a slice"])(params, normal(5, 4))
    (stream,) = [g for g in groups if g.units == 8]
    assert set(stream.paths) == {"pos", "in", "up", "down", "out"}
    assert check_shrink(READERS["a slice"], plan(groups, params, sparsity=0.5), params, normal(5, 4)) < 1e-4


def test_fault_12_what_no_result_needs_stays():
    """An unused leaf, the columns of a head that is not called, and a result that is thrown away."""

    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        _ = jnp.tanh(h @ p["aux"])
        return h @ p["both"][:, :2]

    params = plain({"up": (3, 6), "aux": (6, 4), "both": (6, 5), "never": (7, 7)})
    groups = channel_groups(fn)(params, normal(4, 3))
    assert [(g.units, set(g.paths)) for g in groups] == [(6, {"up", "aux", "both"})]
    why = {(f.path, f.axis, f.indices): f.why for f in groups.frozen}
    for at in (("aux", 1, 4), ("both", 1, 3), ("never", 0, 7), ("never", 1, 7)):
        assert "does not read it" in why[at]


def test_fault_12_a_call_that_reads_less_runs_on_a_plan_of_one_that_reads_more():
    def fn(p, x, full):
        h = jnp.tanh(x @ p["up"])
        return h @ p["out"] + (jnp.tanh(h @ p["a"]) @ p["b"] if full else 0)

    params, x = plain({"up": (3, 6), "out": (6, 2), "a": (6, 8), "b": (8, 2)}), normal(4, 3)
    half = plan(channel_groups(fn)(params, x, True), params, sparsity=0.5)
    assert half.widths["a"] == (3, 4)
    small = half.take(params)
    for full in (True, False):
        want = fn(mask(half)(params), x, full)
        np.testing.assert_allclose(shrink(fn, half)(small, x, full), want, atol=1e-5)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 8)(tokens)
        x = x + self.param("positions", nn.initializers.normal(), (1, 12, 8))[:, : tokens.shape[1]]
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


def test_fault_12_a_module_of_flax_runs_on_longer_inputs():
    tokens = jnp.zeros((2, 5), jnp.int32)
    params = filled(jax.eval_shape(Positions().init, jax.random.key(0), tokens))
    half = plan(channel_groups(Positions().apply)(params, tokens), params, sparsity=0.5)
    assert half.widths["params/positions"] == (1, 12, 4)
    longer = jnp.arange(24).reshape(2, 12) % 20
    want = Positions().apply(mask(half)(params), longer)
    np.testing.assert_allclose(shrink(Positions().apply, half)(half.take(params), longer), want, atol=1e-5)
