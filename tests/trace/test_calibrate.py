"""Calibration: statistics in place, in any order, and ranges against plain computations."""

from __future__ import annotations

import sys
from functools import reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.trace import ranges
from jaxcomp.trace.calibrate import BINS, EDGES, SIDE, calibrate, merge, merge_all, observe
from tests.trace.models import CASES, normal


def test_every_activation_is_seen_once():
    fn, params, x = CASES["linen_scan_remat"]()
    stats = jax.jit(calibrate(fn))(params, x)
    dense = [s for name, s in stats.items() if name.endswith("Dense_0/kernel")]
    assert [s.counts.shape for s in dense] == [(3, 2, SIDE)]
    assert sum(":" in name for name in stats) == 4
    for s in stats.values():
        assert s.batches.total().tolist() == [1, 1, 1]


def test_loops_count_their_steps_and_branches_only_when_taken():
    fn, params, x = CASES["recurrent"]()
    stats = calibrate(fn)(params, x)
    assert stats["wx"].batches.total() == 5
    assert stats["wx"].counts.total().sum() == x.size
    assert stats["wx"].low == x.min()
    fn, params, x = CASES["branching"]()
    stats = calibrate(fn)(params, jnp.abs(x))
    assert (stats["a"].batches.total(), stats["b"].batches.total()) == (1, 0)


def test_any_order_of_batches_gives_the_same():
    fn, params, x = CASES["linen_mlp"]()
    run = jax.jit(calibrate(fn, r".*layers_2/kernel"))
    parts = [run(params, x * s) for s in (0.1, 1.0, -3.0)]
    (name,) = parts[0]
    assert name == "params/layers_2/kernel"
    chex.assert_trees_all_close(merge_all(*parts), merge_all(*parts[::-1]), rtol=1e-6)
    whole = run(params, jnp.concatenate([x * s for s in (0.1, 1.0, -3.0)]))
    chex.assert_trees_all_equal(merge_all(*parts)[name].counts, whole[name].counts)


def test_bins_are_those_of_the_edges():
    x = normal(0, 4000) * 10.0 ** (10 * normal(1, 4000))
    magnitudes = np.abs(np.asarray(x, np.float64))
    for side, part in enumerate((magnitudes[x < 0], magnitudes[x >= 0])):
        expected = np.histogram(part[np.isfinite(part)], EDGES)[0]
        np.testing.assert_array_equal(observe(x).counts.total()[side, :BINS], expected)
    odd = observe(jnp.array([0.0, 1e-30, 1e30, -1e30, jnp.inf, -jnp.inf, jnp.nan])).counts.total()
    assert odd[1, 0] == 1
    assert odd[:, BINS].tolist() == [1, 1]
    assert odd[:, BINS + 1 :].sum() == 1
    assert odd.sum() == 7


def test_fault_5_counts_are_exact_at_any_size(monkeypatch):
    x = jnp.repeat(jnp.array([0.0, 1.0, -2.0]), jnp.array([2000, 30, 1]), total_repeat_length=2031)
    stats = observe(x)
    for _ in range(26):  # doubled beyond what float32, int32 and uint32 count to
        stats = merge(stats, stats)
    counts = stats.counts.total()
    assert (counts[1, 0], counts[0].sum(), counts.sum()) == (2000 * 2**26, 2**26, 2031 * 2**26)
    assert stats.batches.total() == 2**26
    assert ranges.percentile(99.0)(stats) == (-2.0, pytest.approx(1.0, rel=1 / 16))
    assert ranges.percentile(90.0)(stats).low == 0
    assert float(ranges.averaged(stats).high) == 1.0
    monkeypatch.setattr(sys.modules[observe.__module__], "_AT_ONCE", 100)
    chex.assert_trees_all_equal(observe(x.reshape(3, 677)).counts, observe(x).counts)


def test_fault_5_batches_merge_to_the_same_in_any_order():
    parts = [observe(normal(i, 500) * 10.0**i) for i in range(6)]
    whole = reduce(merge, parts)
    for order in (parts[::-1], parts[3:] + parts[:3]):
        chex.assert_trees_all_equal(reduce(merge, order).counts, whole.counts)
        assert reduce(merge, order).low == whole.low
        np.testing.assert_allclose(reduce(merge, order).low_sum.rounded(), whole.low_sum.rounded(), rtol=1e-7)


@pytest.mark.skipif(jax.device_count() < 8, reason="wants 8 devices")
def test_fault_5_eight_devices_count_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(0, 64, 32)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    chex.assert_trees_all_equal(jax.jit(observe)(sharded), jax.jit(observe)(x))


def test_ranges_of_a_gaussian():
    x = normal(0, 200_000)
    stats = observe(x)
    np.testing.assert_allclose(ranges.min_max(stats), [x.min(), x.max()])
    np.testing.assert_allclose(ranges.absmax(stats).high, jnp.abs(x).max())
    for q in (99.0, 99.9):
        np.testing.assert_allclose(ranges.percentile(q)(stats), np.percentile(np.asarray(x), [100 - q, q]), rtol=0.02)
    # The optimal clipping of a unit Gaussian as Banner et al. 2019 (arXiv:1810.05723) give it.
    for bits, clip in ((2, 1.71), (3, 2.15), (4, 2.55)):
        np.testing.assert_allclose(ranges.mse(bits, symmetric=True)(stats).high, clip, rtol=0.12)
    assert 2.0 < ranges.entropy(8)(stats).high <= jnp.abs(x).max()


def measured_error(x, end, bits):
    step = end / (2 ** (bits - 1) - 0.5)
    return jnp.mean((jnp.clip(jnp.round(x / step) * step, -end, end) - x) ** 2)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_finds_the_measured_optimum(bits):
    x = normal(3, 50_000) * jnp.exp(normal(4, 50_000))
    found = measured_error(x, ranges.mse(bits, symmetric=True)(observe(x)).high, bits)
    best = min(measured_error(x, jnp.abs(x).max() * 2.0 ** (-k / 16), bits) for k in range(0, 100, 2))
    assert found <= 1.1 * best


def test_outliers_do_not_stretch_the_entropy_range():
    x = jnp.concatenate([normal(0, 100_000), jnp.full(3, 60.0)])
    assert ranges.entropy(8)(observe(x)).high < 12


def test_averages_and_layers():
    a, b = (observe(jnp.array(v)) for v in ([-1.0, 2.0], [-3.0, 1.0]))
    stats = merge_all({"s": a}, {"s": b})["s"]
    assert ranges.averaged(stats) == (-2.0, 1.5)
    stacked = jax.tree.map(lambda *s: jnp.stack(s), a, b)
    for method in map(jax.jit, (ranges.absmax, ranges.percentile(99.9), ranges.entropy(8))):
        for layer, alone in enumerate((a, b)):
            np.testing.assert_allclose([r[layer] for r in method(stacked)], method(alone), rtol=1e-6)


def test_errors():
    fn, params, x = CASES["matmul"]()
    with pytest.raises(ValueError, match=r"'nowhere' matches no site with an activation; there are 'a', 'b/0'"):
        calibrate(fn, "nowhere")(params, x)
    with pytest.raises(ValueError, match="at least one calibration"):
        merge_all()
    with pytest.raises(ValueError, match="calibrations of the same sites, got 'u' in some only"):
        merge_all({}, {"u": observe(x)})
    with pytest.raises(ValueError, match="q must be in"):
        ranges.percentile(0.999)
    with pytest.raises(ValueError, match=r"bits must be in 2..8"):
        ranges.mse(9)
