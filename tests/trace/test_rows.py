"""Moments of the rows that leaves multiply, against numpy over the rows themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.trace import Moments, row_moments, row_moments_over, rows
from jaxcomp.trace import windows as windows_of
from tests.trace.models import normal


def windows(x, size, stride):
    """The windows of images without padding, as rows: window first, then features."""
    n, height, width, _ = x.shape
    return np.stack(
        [
            x[i, a : a + size, b : b + size].reshape(-1)
            for i in range(n)
            for a in range(0, height - size + 1, stride)
            for b in range(0, width - size + 1, stride)
        ]
    )


@pytest.mark.parametrize("spec", ["HWIO", "OIHW"])
def test_windows_are_whole(spec, monkeypatch):
    order = ["HWIO".index(c) for c in spec]

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (2, 2), "VALID", dimension_numbers=("NHWC", spec, "NHWC"))

    params, x = {"w": jnp.transpose(normal(1, 3, 3, 2, 5), order)}, normal(2, 4, 7, 7, 2)
    monkeypatch.setattr(windows_of, "_PATCHES", 200)  # in parts
    found = row_moments(fn)(params, x)["w"]
    wanted = windows(np.asarray(x, np.float64), 3, 2)
    np.testing.assert_allclose(found.second, wanted.T @ wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.first, wanted.sum(0), rtol=1e-4, atol=1e-4)
    assert (float(found.count), found.apart) == (len(wanted), ())
    assert found.summed == tuple(spec.index(c) for c in "HWI")
    assert found.window == tuple(spec.index(c) for c in "HW")
    assert found.roles(4).names == tuple(
        {"H": "spatial", "W": "spatial", "I": "contracted", "O": "output"}[c] for c in spec
    )


@pytest.mark.parametrize(("groups", "features"), [(4, 4), (4, 12), (2, 6)], ids=["depthwise", "multiplier", "groups"])
@pytest.mark.parametrize("spec", ["HWIO", "OIHW"])
def test_each_output_feature_of_a_grouped_convolution_has_the_rows_of_its_group(groups, features, spec, monkeypatch):
    order = ["HWIO".index(c) for c in spec]

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2, 2), "VALID", dimension_numbers=("NHWC", spec, "NHWC"), feature_group_count=groups
        )

    inputs = 4 // groups
    params, x = {"w": jnp.transpose(normal(1, 3, 3, inputs, features), order)}, normal(2, 4, 7, 7, 4)
    monkeypatch.setattr(windows_of, "_PATCHES", 400)  # in parts
    found = row_moments(fn)(params, x)["w"]
    assert found.apart == (spec.index("O"),)
    assert found.summed == tuple(spec.index(c) for c in "HWI")
    assert found.second.shape == (features, 9 * inputs, 9 * inputs)
    for feature in range(features):
        first = feature // (features // groups) * inputs
        wanted = windows(np.asarray(x, np.float64)[..., first : first + inputs], 3, 2)
        np.testing.assert_allclose(found.second[feature], wanted.T @ wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.first[feature], wanted.sum(0), rtol=1e-4, atol=1e-4)
        assert float(found.count[feature]) == len(wanted)


def test_moments_of_groups_that_would_be_too_large_are_left_out(monkeypatch):
    def fn(p, x):
        y = lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        return y @ p["head"]

    params = {"w": normal(1, 3, 3, 2, 4), "head": normal(2, 4, 3)}
    monkeypatch.setattr(rows, "_LARGEST", 4 * 18 * 18 - 1)
    assert set(row_moments(fn)(params, normal(3, 2, 5, 5, 4))) == {"head"}
    monkeypatch.setattr(rows, "_LARGEST", 4 * 18 * 18)
    assert set(row_moments(fn)(params, normal(3, 2, 5, 5, 4))) == {"w", "head"}


def test_heads_experts_layers_and_a_leaf_that_layers_share():
    def fn(p, x):
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w @ p["shared"]), None), x, p["stack"])[0]
        heads = jnp.einsum("nd,hde->nhe", h, p["heads"])
        return jnp.einsum("nhe,hef->nf", heads, p["out"]), lax.ragged_dot(
            h, p["experts"], jnp.array([2, 0, 4], jnp.int32)
        )

    params = {
        "stack": normal(1, 2, 3, 3),
        "shared": normal(2, 3, 3),
        "heads": normal(3, 2, 3, 4),
        "out": normal(4, 2, 4, 5),
        "experts": normal(5, 3, 3, 2),
    }
    x = normal(6, 6, 3)
    found = row_moments(fn)(params, x)
    axes = {path: (m.second.shape, m.apart, m.summed) for path, m in found.items()}
    assert axes == {
        "stack": ((2, 3, 3), (0,), (1,)),
        "shared": ((3, 3), (), (0,)),
        "heads": ((3, 3), (), (1,)),
        "out": ((8, 8), (), (0, 1)),
        "experts": ((3, 3, 3), (0,), (1,)),
    }
    assert found["experts"].count.tolist() == [2, 0, 4]
    assert float(found["shared"].count) == 12
    h, seen = np.asarray(x, np.float64), []
    for w in np.asarray(params["stack"], np.float64):
        seen.append(h @ w)
        np.testing.assert_allclose(found["stack"].second[len(seen) - 1], h.T @ h, rtol=1e-4, atol=1e-5)
        h = np.tanh(seen[-1] @ np.asarray(params["shared"], np.float64))
    np.testing.assert_allclose(found["shared"].second, sum(s.T @ s for s in seen), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["experts"].first, [h[:2].sum(0), np.zeros(3), h[2:].sum(0)], rtol=1e-4, atol=1e-5)


def test_batches_add_and_leaves_of_two_kinds_are_left_out():
    fn = lambda p, x: (x @ p["w"]) @ p["twice"] @ p["twice"].T  # noqa: E731
    params = {"w": normal(1, 3, 4), "twice": normal(2, 4, 4)}
    a, b = normal(3, 5, 3), normal(4, 2, 3)
    over = row_moments_over(fn)(params, [a, (b,)])
    assert set(over) == {"w"}
    apart = [row_moments(fn)(params, x)["w"] for x in (a, b)]
    both = jax.tree.map(jnp.add, *apart)
    assert isinstance(both, Moments)
    assert float(over["w"].count) == float(both.count) == 7
    np.testing.assert_allclose(over["w"].second, both.second, rtol=1e-6)
    with pytest.raises(ValueError, match="row_moments_over: there is no batch"):
        row_moments_over(fn)(params, [])
    with pytest.raises(ValueError, match="row_moments: 'none' matches no site that multiplies rows by a leaf"):
        row_moments(fn, "none")(params, a)
