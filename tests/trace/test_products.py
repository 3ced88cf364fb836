"""Faults 12 and 15: what multiplies parameters is a site or is listed; lookups, ragged dots, shards."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.trace import input_moments, input_norms
from jaxcomp.trace.sites import sites
from tests.trace.models import normal
from tests.trace.test_fold import check

EXPERTS, INPUTS, HIDDEN, ROWS = 4, 8, 16, 12
SIZES = np.array([5, 0, 4, 1], np.int32)  # an expert without a row, and two rows without an expert


def moe(p, x):
    """A mixture of experts: the second weight lies the other way round."""
    hidden = jax.nn.relu(lax.ragged_dot(x, p["up"], jnp.asarray(SIZES)))
    return lax.ragged_dot(hidden, jnp.swapaxes(p["down"], 1, 2), jnp.asarray(SIZES))


PARAMS = {"up": normal(1, EXPERTS, INPUTS, HIDDEN), "down": normal(2, EXPERTS, INPUTS, HIDDEN)}
X = normal(3, ROWS, INPUTS)


def by_loop(p, x):
    """A loop over the experts."""
    out = np.zeros((ROWS, INPUTS))
    ends = np.cumsum(SIZES)
    for expert, (start, end) in enumerate(zip(ends - SIZES, ends, strict=True)):
        hidden = np.maximum(np.asarray(x, np.float64)[start:end] @ np.asarray(p["up"], np.float64)[expert], 0)
        out[start:end] = hidden @ np.asarray(p["down"], np.float64)[expert].T
    return out


def test_fault_12_ragged_dots_are_sites():
    up, down = sites(moe)(PARAMS, X)
    assert (up.path, up.kind, down.path, down.kind) == ("up", "ragged", "down", "ragged")
    assert up.operands[1].leaf_roles == ("batch", "contracted", "output")
    assert down.operands[1].leaf_roles == ("batch", "output", "contracted")
    assert up.macs == down.macs == ROWS * INPUTS * HIDDEN  # each row meets one expert
    cost = jc.cost(moe)(PARAMS, X)
    assert (cost.macs, cost.unread) == (2 * ROWS * INPUTS * HIDDEN, ())
    assert set(jc.calibrate(moe)(PARAMS, X)) == {"up", "down"}


def test_fault_12_moments_and_norms_of_each_expert():
    moment, norm = input_moments(moe)(PARAMS, X)["up"], input_norms(moe)(PARAMS, X)["up"]
    assert (moment.shape, norm.shape) == ((EXPERTS, INPUTS, INPUTS), (EXPERTS, INPUTS, 1))
    ends = np.cumsum(SIZES)
    for expert, (start, end) in enumerate(zip(ends - SIZES, ends, strict=True)):
        rows = np.asarray(X, np.float64)[start:end]
        np.testing.assert_allclose(moment[expert], rows.T @ rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm[expert, :, 0], np.linalg.norm(rows, axis=0), rtol=1e-5, atol=1e-6)


def test_fault_12_moments_and_norms_of_batched_weights():
    fn = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"])  # noqa: E731
    p, x = {"w": normal(1, 3, 4, 5)}, normal(2, 3, 6, 4)
    moment, norm = input_moments(fn)(p, x)["w"], input_norms(fn)(p, x)["w"]
    for e in range(3):
        rows = np.asarray(x, np.float64)[e]
        np.testing.assert_allclose(moment[e], rows.T @ rows, rtol=1e-5)
        np.testing.assert_allclose(norm[e, :, 0], np.linalg.norm(rows, axis=0), rtol=1e-5)


@pytest.mark.parametrize("act", [Act(8, symmetric=True, range=Dynamic()), Act(8, range=Dynamic())], ids=str)
@pytest.mark.parametrize("grid", [jc.Int(8), jc.Int(4, symmetric=False)], ids=repr)
def test_fault_12_ragged_dots_run_on_integers(act, grid):
    roles = jc.roles(moe)(PARAMS, X)
    packed = jc.pack(jc.quantize(grid, roles=roles).apply((), PARAMS))
    assert packed["up"].scale.shape == (EXPERTS, 1, HIDDEN)
    assert [row.done for row in coverage(moe, {".*": act}, integer=True)(packed, X).rows] == ["integer", "integer"]
    fake = quantize_function(moe, {".*": act})(packed, None, X)
    exact = quantize_function(moe, {".*": act}, integer=True, strict=True)(packed, None, X)
    np.testing.assert_allclose(exact, fake, rtol=1e-5, atol=1e-5 * float(jnp.abs(fake).max()))
    wanted = by_loop(jc.materialize(packed), X)
    assert np.abs(np.asarray(fake) - wanted).max() < 0.03 * np.abs(wanted).max()
    assert (np.asarray(exact)[SIZES.sum() :] == 0).all()


def test_fault_12_ragged_gradients_on_integers():
    roles, rules = jc.roles(moe)(PARAMS, X), {".*": Act(8, range=Dynamic())}
    compress = jc.quantize(jc.Int(8), roles=roles)

    def loss(integer):
        q = quantize_function(moe, rules, integer=integer)
        return jax.jit(jax.grad(lambda p: jnp.sum(q(compress.apply((), p), None, X) ** 2)))(PARAMS)

    for fake, exact in zip(*(jax.tree.leaves(loss(i)) for i in (False, True)), strict=True):
        np.testing.assert_allclose(exact, fake, rtol=1e-4, atol=1e-5 * float(jnp.abs(fake).max()))


def test_fault_12_ragged_gradients_on_rounded_codes():
    roles, rules = jc.roles(moe)(PARAMS, X), {".*": Act(8, range=Dynamic())}
    compress, backward = jc.quantize(jc.Int(8), roles=roles), jc.activations.Backward(stochastic=False)
    q = quantize_function(moe, rules, backward=backward)
    plain = quantize_function(moe, rules)
    rounded = jax.jit(jax.grad(lambda p: jnp.sum(q(compress.apply((), p), None, None, X) ** 2)))(PARAMS)
    wanted = jax.jit(jax.grad(lambda p: jnp.sum(plain(compress.apply((), p), None, X) ** 2)))(PARAMS)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=0.03 * float(jnp.abs(b).max()))


def test_fault_12_experts_in_factors_and_folded():
    roles = jc.roles(moe)(PARAMS, X)
    factors = jc.factorize(PARAMS, 3, roles=roles)
    thin = jc.activations.factored(moe)
    np.testing.assert_allclose(thin(factors, X), by_loop(jc.materialize(factors), X), rtol=1e-4, atol=1e-4)
    assert jc.cost(thin)(factors, X).macs == 2 * ROWS * 3 * (INPUTS + HIDDEN)

    def scaled(p, x):
        return lax.ragged_dot(x, p["up"], jnp.asarray(SIZES)) * p["s"] + p["b"]

    params = {"up": PARAMS["up"], "s": normal(4, HIDDEN), "b": normal(5, HIDDEN)}
    assert [f.path for f in check(scaled, params, X).folds] == ["up"]


def test_fault_12_what_runs_in_float_says_so():
    """A batch of ragged dots: XLA has one, integers are not for it."""
    sizes = jnp.stack([jnp.asarray(SIZES)] * 2)
    fn = lambda p, x: jax.vmap(lax.ragged_dot)(x, p["w"], sizes)  # noqa: E731
    p, x = {"w": normal(1, 2, EXPERTS, INPUTS, HIDDEN)}, normal(2, 2, ROWS, INPUTS)
    (site,) = sites(fn)(p, x)
    assert site.macs == 2 * ROWS * INPUTS * HIDDEN
    quantized = jc.quantize(jc.Int(8), roles=jc.roles(fn)(p, x)).apply((), p)
    rules = {".*": Act(8, range=Dynamic())}
    (row,) = coverage(fn, rules, integer=True)(quantized, x).rows
    assert (row.done, row.why) == ("fake", "integers are for ragged dots of rows, each by one group's matrix")
    with pytest.raises(ValueError, match="integers are for ragged dots of rows"):
        quantize_function(fn, rules, integer=True, strict=True)(quantized, None, x)


@pytest.mark.parametrize(
    ("fn", "roles"),
    [
        (lambda t, i: t[i], ("indexed", "output", "output")),
        (lambda t, i: jnp.take(t, i, axis=1), ("output", "indexed", "output")),
        (lambda t, i: t[i, i], ("indexed", "indexed", "output")),
        (lambda t, i: jax.vmap(lambda t, i: t[i])(t, i), ("batch", "indexed", "output")),
    ],
)
def test_fault_12_lookups_in_tables_of_any_index(fn, roles):
    (site,) = sites(lambda p, i: fn(p["t"], i))({"t": normal(1, 2, 3, 4)}, jnp.array([0, 1]))
    assert (site.kind, site.operands[0].leaf_roles) == ("embed", roles)


def double(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]


def by_pallas(p, x):
    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    return pl.pallas_call(double, out_shape=shape, interpret=True)(x, p["w"])


def by_callback(p, x):
    return jax.pure_callback(np.matmul, jax.ShapeDtypeStruct((2, 4), jnp.float32), x, p["w"])


def by_solve(p, x):
    return jax.scipy.linalg.solve_triangular(p["w"], x.T, lower=True)


@pytest.mark.parametrize(
    ("fn", "kind", "why"),
    [
        (by_pallas, "pallas_call", "nothing can look into it"),
        (by_callback, "pure_callback", "nothing can look into it"),
        (by_solve, "triangular_solve", "no rule reads what it multiplies"),
    ],
)
def test_fault_12_what_no_rule_reads_is_listed(fn, kind, why):
    p, x = {"w": jnp.eye(4)}, normal(2, 2, 4)
    found = coverage(fn, {".*": Act(8)})(p, x)
    assert [(row.kind, row.done, row.why) for row in found.rows] == [(kind, "exact", why)]
    assert [u.primitive for u in jc.cost(fn)(p, x).unread] == [kind]
    with pytest.raises(ValueError, match=rf"no rule can match, for the function has no site; {kind} \({why}\)"):
        quantize_function(fn, {".*": Act(8)})(p, None, x)


def test_fault_12_a_gather_that_takes_no_rows_is_listed():
    fn = lambda p, x: x @ p["w"] + p["b"][jnp.array([1, 0])]  # noqa: E731
    found = coverage(fn, {})({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((1, 3)))
    assert [(row.path, row.kind, row.why) for row in found.rows[1:]] == [("b", "gather", "it takes no whole rows")]


def sharded(mesh):
    def fn(p, x):
        specs = (P(None, "d"), P("d", None))
        return jax.shard_map(lambda x, w: lax.psum(x @ w, "d"), mesh=mesh, in_specs=specs, out_specs=P())(x, p["w"])

    return fn


def test_fault_15_coverage_of_one_shard_map():
    fn = sharded(jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)))
    p, x, rules = {"w": normal(1, 8, 4)}, normal(2, 2, 8), {".*": Act(8, range=Dynamic())}
    (row,) = coverage(fn, rules)(p, x).rows
    wanted = ("w", "dot", "exact", "it is inside a shard_map, where nothing is rewritten")
    assert (row.path, row.kind, row.done, row.why) == wanted
    assert jc.roles(fn)(p, x)["w"].names == ("contracted", "output")
    np.testing.assert_allclose(quantize_function(fn, rules)(p, None, x), x @ p["w"], rtol=1e-5)
    with pytest.raises(ValueError, match="inside a shard_map"):
        quantize_function(fn, rules, integer=True, strict=True)(jc.quantize(jc.Int(8)).apply((), p), None, x)
    assert jc.trace.rewrite(fn, lambda op: 1 / 0 if op.name == "dot_general" else None)(p, x).shape == (2, 4)


@pytest.mark.slow
def test_fault_15_a_shard_map_costs_what_all_devices_multiply():
    code = """
    import jax, jax.numpy as jnp, jaxcomp as jc
    from tests.trace.test_products import sharded
    fn = sharded(jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)))
    assert jc.cost(fn)({"w": jnp.ones((8, 4))}, jnp.ones((2, 8))).macs == 2 * 8 * 4
    """
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env)
