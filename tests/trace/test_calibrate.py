"""Calibration: statistics in place, in any order, and ranges against plain computations."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.trace import ranges
from jaxcomp.trace.calibrate import BINS, EDGES, calibrate, merge_all, observe
from tests.trace.models import CASES, normal


def test_every_activation_is_seen_once():
    fn, params, x = CASES["linen_scan_remat"]()
    stats = jax.jit(calibrate(fn))(params, x)
    dense = [s for name, s in stats.items() if name.endswith("Dense_0/kernel")]
    assert [s.counts.shape for s in dense] == [(3, 2, BINS)]
    assert sum(":" in name for name in stats) == 4
    for s in stats.values():
        np.testing.assert_array_equal(s.batches, jnp.ones(3))


def test_loops_count_their_steps_and_branches_only_when_taken():
    fn, params, x = CASES["recurrent"]()
    stats = calibrate(fn)(params, x)
    assert stats["wx"].batches == 5
    assert stats["wx"].counts.sum() == x.size
    assert stats["wx"].low == x.min()
    fn, params, x = CASES["branching"]()
    stats = calibrate(fn)(params, jnp.abs(x))
    assert (stats["a"].batches, stats["b"].batches) == (1, 0)


def test_any_order_of_batches_gives_the_same():
    fn, params, x = CASES["linen_mlp"]()
    run = jax.jit(calibrate(fn, r".*layers_2/kernel"))
    parts = [run(params, x * s) for s in (0.1, 1.0, -3.0)]
    (name,) = parts[0]
    assert name == "params/layers_2/kernel"
    chex.assert_trees_all_close(merge_all(*parts), merge_all(*parts[::-1]), rtol=1e-6)
    whole = run(params, jnp.concatenate([x * s for s in (0.1, 1.0, -3.0)]))
    np.testing.assert_array_equal(merge_all(*parts)[name].counts, whole[name].counts)


def test_bins_are_those_of_the_edges():
    x = normal(0, 4000) * 10.0 ** normal(1, 4000)
    magnitudes = np.abs(np.asarray(x))
    for side, part in enumerate((magnitudes[x < 0], magnitudes[x >= 0])):
        expected = np.histogram(part, np.append(EDGES, np.inf))[0]
        np.testing.assert_array_equal(observe(x).counts[side], expected)
    outside = observe(jnp.array([0.0, 1e-30, 1e30, -1e30, jnp.inf, jnp.nan]))
    assert outside.counts[1, 0] == 2
    assert outside.counts[:, -1].tolist() == [1, 1]
    assert outside.counts.sum() == 4


def test_ranges_of_a_gaussian():
    x = normal(0, 200_000)
    stats = observe(x)
    np.testing.assert_allclose(ranges.min_max(stats), [x.min(), x.max()])
    np.testing.assert_allclose(ranges.absmax(stats).high, jnp.abs(x).max())
    for q in (99.0, 99.9):
        np.testing.assert_allclose(ranges.percentile(q)(stats), np.percentile(np.asarray(x), [100 - q, q]), rtol=0.02)
    # The optimal clipping of a unit Gaussian as Banner et al. 2019 (arXiv:1810.05723) give it.
    for bits, clip in ((2, 1.71), (3, 2.15), (4, 2.55)):
        np.testing.assert_allclose(ranges.mse(bits)(stats).high, clip, rtol=0.12)
    assert 2.0 < ranges.entropy(8)(stats).high <= jnp.abs(x).max()


def measured_error(x, end, bits):
    step = end / (2 ** (bits - 1) - 0.5)
    return jnp.mean((jnp.clip(jnp.round(x / step) * step, -end, end) - x) ** 2)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_finds_the_measured_optimum(bits):
    x = normal(3, 50_000) * jnp.exp(normal(4, 50_000))
    found = measured_error(x, ranges.mse(bits)(observe(x)).high, bits)
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
