"""Ranges from histograms against plain computations on all of the data, at any magnitude, count and sparsity."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxcomp.trace import ranges
from jaxcomp.trace.calibrate import merge, observe

RNG = np.random.default_rng(0)
N = 4000
NORMAL = RNG.normal(size=N)
DATA = {
    "normal": NORMAL,
    "laplace": RNG.laplace(size=N),
    "after relu": np.maximum(NORMAL, 0),
    "half zero": np.where(RNG.random(N) < 0.5, 0, NORMAL),
    "sparse": np.where(RNG.random(N) < 0.999, 0, np.abs(NORMAL)),
    "constant": np.full(100, 5.0),
    "outlier": np.append(NORMAL, 1e4),
    "one magnitude": np.where(RNG.random(100) < 0.5, 3.0, -3.0),
    "1e-30": NORMAL * 1e-30,
    "1e30": NORMAL * 1e30,
    "2**26": NORMAL * 2**26,
    "integers": RNG.integers(-3, 20, N) * 1.0,
    "away from zero": RNG.uniform(3, 5, N),
    "negative": -np.abs(NORMAL),
    "gelu": NORMAL * scipy.stats.norm.cdf(NORMAL),
}
DATA = {name: x.astype(np.float32) for name, x in DATA.items()}
BIN = 1 / 16


def ends(found):
    return float(found.low), float(found.high)


def on_grid(x, low, high, bits, symmetric):
    """The values of an activation's grid, in float64."""
    x, low, high = np.asarray(x, np.float64), min(low, 0.0), max(high, 0.0)
    if symmetric:
        step, below = max(-low, high) / (2 ** (bits - 1) - 0.5), 2 ** (bits - 1)
        return np.clip(np.round(x / step), -below, below - 1) * step
    step = (high - low) / (2**bits - 1)
    zero = np.ceil(-low / step - 0.5 - 1e-6)
    return np.clip(np.round(x / step), -zero, 2**bits - 1 - zero) * step


def error(x, found, bits, symmetric):
    return np.mean((on_grid(x, *found, bits, symmetric) - np.asarray(x, np.float64)) ** 2)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("q", [99.0, 99.9, 100])
def test_fault_5_percentile_is_the_nearest_rank_of_what_is_not_zero(name, q):
    x = DATA[name]
    low, high = ends(ranges.percentile(q)(observe(jnp.asarray(x))))
    there = np.sort(x[x != 0].astype(np.float64))
    out = there.size * round(1000 * (100 - q)) // 100_000
    wanted = there[there.size - 1 - out], there[out]
    if (x == 0).any():
        wanted = max(wanted[0], 0), min(wanted[1], 0)
    np.testing.assert_allclose((high, low), wanted, rtol=BIN)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_fault_5_mse_is_the_least_error_of_the_grid_in_use(name, bits, symmetric):
    x = DATA[name]
    stats = observe(jnp.asarray(x))
    found = error(x, ends(ranges.mse(bits, symmetric=symmetric)(stats)), bits, symmetric)
    scale = np.abs(x).max().astype(np.float64) ** 2
    assert found <= 1.01 * error(x, ends(ranges.min_max(stats)), bits, symmetric) + 1e-6 * scale
    ratios = np.linspace(1, 0, 16, endpoint=False)
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    tried = [(low * a, high * b) for a in (ratios if low and high and not symmetric else [1]) for b in ratios]
    tried += [(low * a, high * a) for a in ratios]
    best = min(error(x, t, bits, symmetric) for t in tried if t[0] < t[1])
    assert found <= 1.05 * best + 1e-6 * scale


def published(x, bits, unsigned):
    """The end that Migacz 2017 finds, on all of the data, zeros apart."""
    counts, edges = np.histogram(np.abs(x[x != 0]), bins=2048, range=(0, np.abs(x).max()))
    levels, found = 2 ** (bits - 1 + unsigned), {}
    for end in range(128, 2049, 16):
        p = counts[:end].astype(np.float64)
        level = np.arange(end) * levels // end
        q = np.zeros(end)
        for i in range(levels):
            here = (level == i) & (p > 0)
            q[here] = p[here].sum() / max(here.sum(), 1)
        p[-1] += counts[end:].sum()
        found[edges[end]] = scipy.stats.entropy(p, q) if q.any() else np.inf
    least = min(found.values())
    return max(end for end, divergence in found.items() if divergence == least), found


@pytest.mark.parametrize("of", [scipy.stats.norm, scipy.stats.laplace, scipy.stats.expon], ids=lambda d: d.name)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 2.0**26])
def test_fault_5_entropy_finds_what_the_published_algorithm_finds(of, scale):
    x = (of.ppf((np.arange(200_000) + 0.5) / 200_000) * scale).astype(np.float32)
    _, found = published(x, 4, False)
    end = ends(ranges.entropy(4, symmetric=True)(observe(jnp.asarray(x))))[1]
    near = [d for e, d in found.items() if abs(e - end) <= 0.02 * np.abs(x).max()]
    assert min(near) <= 1.05 * min(found.values())


@pytest.mark.parametrize("name", ["constant", "one magnitude", "away from zero", "integers"])
def test_fault_5_entropy_covers_magnitudes_far_from_zero(name):
    x = DATA[name]
    low, high = ends(ranges.entropy(8)(observe(jnp.asarray(x))))
    assert (low, high) == (x.min(), x.max())


def test_fault_5_entropy_of_sparse_values_is_not_that_of_zeros():
    dense, few = DATA["normal"], np.append(DATA["normal"], np.zeros(50 * N, np.float32))
    assert ends(ranges.entropy(4)(observe(jnp.asarray(few)))) == ends(ranges.entropy(4)(observe(jnp.asarray(dense))))
    low, high = ends(ranges.entropy(8)(observe(jnp.asarray(DATA["outlier"]))))
    assert -6 < low < -2.5
    assert 2.5 < high < 10


@pytest.mark.parametrize("method", [ranges.percentile(99.9), ranges.mse(4), ranges.entropy(4), ranges.averaged])
def test_fault_5_ranges_scale_with_the_values_at_any_magnitude(method):
    low, high = ends(method(observe(jnp.asarray(DATA["normal"]))))
    for exponent in (-90, 40, 100):
        scaled = ends(method(observe(jnp.asarray(DATA["normal"] * np.float32(2.0**exponent)))))
        np.testing.assert_allclose(scaled, (low * 2.0**exponent, high * 2.0**exponent), rtol=1e-6)


def test_ranges_are_the_same_in_jit_and_for_each_layer():
    a, b = (observe(jnp.asarray(DATA[name])) for name in ("normal", "gelu"))
    stacked = jax.tree.map(lambda *s: jnp.stack(s), a, b)
    for method in (ranges.percentile(99.9), ranges.mse(4), ranges.entropy(8), ranges.averaged):
        for found in (method(stacked), jax.jit(method)(stacked), jax.vmap(method)(stacked)):
            for layer, alone in enumerate((a, b)):
                assert [float(r[layer]) for r in found] == list(ends(method(alone)))


@pytest.mark.parametrize("method", [ranges.percentile(99.9), ranges.mse(4), ranges.entropy(8), ranges.averaged])
def test_what_was_not_seen_or_is_not_finite_has_no_range(method):
    nothing = observe(jnp.zeros((0, 4)))
    for x in (jnp.zeros((0, 4)), jnp.array([1.0, jnp.nan]), jnp.array([1.0, jnp.inf])):
        assert not np.isfinite(ends(method(observe(x)))).all()
    seen = observe(jnp.array([-1.0, 2.0]))
    assert ends(method(merge(nothing, seen))) == ends(method(seen))
    assert ends(method(observe(jnp.zeros(3)))) == (0, 0)


def test_percentages_are_decimal_fractions():
    x = np.arange(1, 1001, dtype=np.float32)
    assert float(ranges.percentile(99.9)(observe(jnp.asarray(x))).low) == pytest.approx(2, rel=BIN / 2)
    assert 1 - Fraction("99.9") / 100 == Fraction(1, 1000)
    for bad in (50, 101, "99"):
        with pytest.raises(ValueError, match="percentile: q must be in"):
            ranges.percentile(bad)
