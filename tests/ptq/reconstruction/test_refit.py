"""Least-squares refit against numpy's, for dense, convolutional and stacked kernels; and with shrinking."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq import FewRows, Scopes
from jaxcomp.ptq.reconstruction import refit
from jaxcomp.structure import channel_groups, mask, plan, shrink

rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def mlp(p, x):
    h = jax.nn.relu(x @ p["up"])
    return jax.nn.relu(h @ p["down"]) @ p["head"]


PARAMS = {"up": normal(4, 8), "down": normal(8, 5), "head": normal(5, 2)}
BATCHES = [normal(40, 4) for _ in range(3)]
X = np.concatenate(BATCHES).astype(np.float64)


def least_squares(x, y, w, damping):
    delta = damping * np.mean(np.sum(np.square(x), 0))
    kept = np.any(x != 0, 0)
    new = np.zeros_like(w)
    a = x[:, kept].T @ x[:, kept] + delta * np.eye(kept.sum())
    new[kept] = np.linalg.solve(a, x[:, kept].T @ y + delta * w[kept])
    return new


def test_it_is_numpys_least_squares_and_what_shrinks() -> None:
    groups = channel_groups(mlp)(PARAMS, BATCHES[0])
    half = plan(groups, PARAMS, sparsity=0.5)
    pruned = mask(half)(PARAMS)
    found = refit(mlp, PARAMS, pruned, batches=BATCHES, damping=1e-3)
    assert [s.path for s in found.sites] == ["down", "head"]
    assert all(s.after < s.before for s in found.sites)
    assert "'down'" in repr(found)
    p, q = ({k: np.asarray(v, np.float64) for k, v in tree.items()} for tree in (PARAMS, pruned))
    h, h_ = (np.maximum(X @ t["up"], 0) for t in (p, q))
    columns = np.any(q["down"], 0)
    down = least_squares(h_, h @ p["down"], p["down"], 1e-3) * columns
    before = np.square(h_ @ q["down"] - h @ p["down"]).sum() / np.square(h @ p["down"]).sum()
    np.testing.assert_allclose(found.sites[0].before, before, rtol=1e-3)
    near = least_squares(h_, h @ p["down"], q["down"], 1e-3) * columns
    np.testing.assert_allclose(found.params["down"], near, rtol=1e-3, atol=1e-4)
    assert down.shape == near.shape
    g, g_ = np.maximum(h @ p["down"], 0), np.maximum(h_ @ np.asarray(found.params["down"], np.float64), 0)
    np.testing.assert_allclose(
        found.params["head"], least_squares(g_, g @ p["head"], q["head"], 1e-3), rtol=1e-3, atol=1e-4
    )
    small = shrink(mlp, half)(half.take(found.params), BATCHES[0])
    np.testing.assert_allclose(small, mlp(found.params, BATCHES[0]), rtol=1e-4, atol=1e-4)


def conv(p, x):
    y = jax.lax.conv_general_dilated(x, p["one"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y)
    return jax.lax.conv_general_dilated(y, p["two"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_a_convolution_is_fitted_over_its_window() -> None:
    p = {"one": normal(1, 1, 3, 4), "two": normal(2, 2, 4, 3)}
    pruned = {"one": p["one"].at[..., 1].set(0), "two": p["two"].at[:, :, 1].set(0)}
    x = normal(16, 6, 6, 3)
    found = refit(conv, p, pruned, batches=[x], damping=1e-4)
    y = np.maximum(np.asarray(x, np.float64) @ np.asarray(pruned["one"], np.float64)[0, 0], 0)
    windows = y.reshape(16, 3, 2, 3, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16)
    target = np.asarray(conv(p, x), np.float64).reshape(-1, 3)
    wanted = least_squares(windows, target, np.asarray(pruned["two"], np.float64).reshape(16, 3), 1e-4)
    np.testing.assert_allclose(found.params["two"].reshape(16, 3), wanted, rtol=2e-3, atol=2e-3)
    assert found.params["one"] is pruned["one"]


@pytest.mark.slow
def test_stacked_layers_are_fitted_each_to_its_own() -> None:
    def stacked(p, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    p = {"up": normal(2, 4, 6), "down": normal(2, 6, 4)}
    pruned = {"up": p["up"].at[0, :, 1].set(0).at[1, :, 2].set(0), "down": p["down"].at[0, 1].set(0).at[1, 2].set(0)}
    found = refit(stacked, p, pruned, batches=BATCHES, where="down", damping=1e-5)
    assert found.sites[0].after < found.sites[0].before
    h = np.tanh(X @ np.asarray(p["up"][0], np.float64))
    h_ = np.tanh(X @ np.asarray(pruned["up"][0], np.float64))
    wanted = least_squares(
        h_, h @ np.asarray(p["down"][0], np.float64), np.asarray(pruned["down"][0], np.float64), 1e-5
    )
    np.testing.assert_allclose(found.params["down"][0], wanted, rtol=1e-3, atol=1e-3)


def test_masks_stay_and_few_rows_are_told() -> None:
    keep = jnp.asarray([True, False, True, True, True, True, True, True])[:, None]
    pruned = {**PARAMS, "down": Masked(PARAMS["down"], keep)}
    with pytest.warns(FewRows, match=r"'down' has 7 inputs left and saw 3 rows; calibrate on 7 rows at least"):
        found = refit(mlp, PARAMS, pruned, batches=[BATCHES[0][:3]])
    assert isinstance(found.params["down"], Masked)
    assert not found.params["down"].materialize()[1].any()


@pytest.mark.slow
def test_a_mask_of_elements_is_fitted_column_by_column() -> None:
    keep = jnp.asarray(rng.random((8, 5)) < 0.6)
    pruned = {**PARAMS, "down": Masked(jnp.where(keep, PARAMS["down"], 0.0), keep)}
    found = refit(mlp, PARAMS, pruned, batches=BATCHES, damping=1e-6)
    h = np.maximum(X @ np.asarray(PARAMS["up"], np.float64), 0)
    target = h @ np.asarray(PARAMS["down"], np.float64)
    for j in range(5):
        rows = np.asarray(keep)[:, j]
        wanted = np.linalg.lstsq(h[:, rows], target[:, j], rcond=None)[0]
        np.testing.assert_allclose(found.params["down"].values[rows, j], wanted, rtol=1e-3, atol=1e-3)
        assert not np.asarray(found.params["down"].values)[~rows, j].any()


def test_leaves_whose_rows_are_not_read_are_told() -> None:
    def both_ways(p, x):
        return x @ p["tied"] @ p["tied"].T @ p["last"]

    params, x = {"tied": normal(4, 4), "last": normal(4, 2)}, normal(16, 4)
    pruned = {"tied": params["tied"].at[:, 0].set(0), "last": params["last"]}
    found = refit(both_ways, params, pruned, batches=[x], where="tied|last", cuts=Scopes(""))
    assert (found.left, [site.path for site in found.sites]) == (("tied",), ["last"])
    np.testing.assert_array_equal(found.params["tied"], pruned["tied"])
    assert "left as it was: 'tied'" in repr(found)
    with pytest.raises(ValueError, match="'tied' have no rows that are read"):
        refit(both_ways, params, pruned, batches=[x], where="tied", cuts=Scopes(""))


def test_a_leaf_of_several_blocks_is_fitted_to_none_of_them() -> None:
    def twice(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["tied"]) @ p["tied"]) @ p["last"]

    params, x = {"tied": normal(4, 4), "last": normal(4, 2)}, normal(16, 4)
    pruned = {"tied": params["tied"].at[0].set(0), "last": params["last"].at[0].set(0)}
    found = refit(twice, params, pruned, batches=[x])
    assert (found.left, [site.path for site in found.sites]) == (("tied",), ["last"])
    np.testing.assert_array_equal(found.params["tied"], pruned["tied"])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="there is nothing to fit: no leaf lost rows or is masked"):
        refit(mlp, PARAMS, PARAMS, batches=BATCHES[:1])
    with pytest.raises(ValueError, match="damping must be a positive number, got 0"):
        refit(mlp, PARAMS, PARAMS, batches=BATCHES, damping=0)
    closed = jc.quantize(jc.Int(4)).apply((), PARAMS)
    with pytest.raises(ValueError, match=r"'down' is compressed already .*; refit first, then that"):
        refit(mlp, PARAMS, closed, batches=BATCHES, where="down")
    lost = {**PARAMS, "down": PARAMS["down"].at[0].set(0)}
    with pytest.raises(ValueError, match="what enters or leaves 'down' is not finite"):
        refit(mlp, PARAMS, lost, batches=[BATCHES[0] * jnp.nan])
