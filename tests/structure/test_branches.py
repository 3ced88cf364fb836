from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.paths import path_str
from jaxcomp.structure import channel_groups, check_shrink, drop_branches, plan, residual_branches, without_branches
from tests.marks import quick
from tests.structure.models import IMAGE, ResNet, ViT, filled, normal


def zeroed(params, branches):
    gone = {path for b in branches for path in b.shapes}
    return jax.tree_util.tree_map_with_path(lambda p, w: jnp.zeros_like(w) if path_str(p) in gone else w, params)


def built(module):
    x = normal(*IMAGE)
    return filled(jax.eval_shape(module.init, jax.random.key(0), x)), x


@pytest.mark.parametrize("module", quick([ResNet(), ViT()], ResNet()))
def test_dropped_equals_branch_of_zeros(module):
    params, x = built(module)
    branches = residual_branches(module.apply)(params, x)
    assert len(branches) == 2
    chosen = branches[1:]
    small = without_branches(chosen)(params)
    assert len(jax.tree.leaves(small)) == len(jax.tree.leaves(params)) - len(chosen[0].shapes)
    got = jax.jit(drop_branches(module.apply, chosen))(small, x)
    np.testing.assert_allclose(got, jax.jit(module.apply)(zeroed(params, chosen), x), atol=1e-5)


def test_branch_owns_its_parameters_and_no_other():
    params, x = built(ResNet())
    branch = residual_branches(ResNet().apply)(params, x)[0]
    assert set(branch.shapes) == {
        *(f"params/Conv_{i}/kernel" for i in (1, 2)),
        *(f"params/BatchNorm_{i}/{s}" for i in (1, 2) for s in ("scale", "bias")),
        *(f"batch_stats/BatchNorm_{i}/{s}" for i in (1, 2) for s in ("mean", "var")),
    }
    assert "models.py" in branch.source


@pytest.mark.slow
def test_train_mode_gives_no_statistics_of_a_dropped_branch_and_has_gradients():
    params, x = built(ResNet())
    fn = partial(ResNet(train=True).apply, mutable=["batch_stats"])
    branches = residual_branches(fn)(params, x)[:1]
    small, dropped = without_branches(branches)(params), drop_branches(fn, branches)
    y, state = jax.jit(dropped)(small, x)
    assert state["batch_stats"]["BatchNorm_1"]["mean"] is None
    assert state["batch_stats"]["BatchNorm_0"]["mean"].shape == (8,)
    np.testing.assert_allclose(y, jax.jit(fn)(zeroed(params, branches), x)[0], atol=1e-4)
    grads = jax.jit(jax.grad(lambda p: dropped(p, x)[0].sum()))(small)
    assert float(jnp.abs(grads["params"]["Conv_0"]["kernel"]).max()) > 0


def test_dropped_function_shrinks_further():
    params, x = built(ResNet())
    branches = residual_branches(ResNet().apply)(params, x)[1:]
    dropped, small = drop_branches(ResNet().apply, branches), without_branches(branches)(params)
    half = plan(channel_groups(dropped)(small, x), small, sparsity=0.5)
    assert check_shrink(dropped, half, small, x) < 1e-4


def test_branch_inside_remat():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            @nn.remat
            class Inner(nn.Module):
                @nn.compact
                def __call__(self, x):
                    return x + nn.Dense(4)(jnp.tanh(x))

            for i in range(2):
                x = Inner(name=f"block_{i}")(x)
            return nn.Dense(2)(x)

    x = normal(3, 4)
    params = filled(jax.eval_shape(Deep().init, jax.random.key(0), x))
    branches = residual_branches(Deep().apply)(params, x)
    assert [sorted(b.shapes)[0] for b in branches] == [f"params/block_{i}/Dense_0/bias" for i in range(2)]
    got = drop_branches(Deep().apply, branches)(without_branches(branches)(params), x)
    np.testing.assert_allclose(got, Deep().apply(zeroed(params, branches), x), atol=1e-6)


def test_bad_input():
    params, x = built(ResNet())
    branches = residual_branches(ResNet().apply)(params, x)
    with pytest.raises(
        ValueError, match=r"without_branches: 'batch_stats/BatchNorm_1/mean' must have shape .* no such leaf"
    ):
        without_branches(branches)({"params": {}})
    with pytest.raises(ValueError, match="has no sum where"):
        drop_branches(lambda p, x: x, branches)(without_branches(branches)(params), x)
