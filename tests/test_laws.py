"""Every law over every public transform and spec."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.core.gates import never, when
from jaxcomp.core.layouts import Buckets, Channels
from jaxcomp.factorization.specs import CP, RankOne, Tucker2
from jaxcomp.pruning.scores import lamp
from jaxcomp.pruning.specs import StraightThrough
from jaxcomp.pruning.statistics import accumulate, movement
from jaxcomp.quantization.adaround import adaround
from jaxcomp.quantization.level_grids import E2M1, E4M3
from jaxcomp.quantization.microscaling import Blocked
from jaxcomp.quantization.scales import MSE, Stochastic
from jaxcomp.sharing.kmeans.inits import linear, quantile
from jaxcomp.sharing.vectors import share_vectors
from tests import laws
from tests.marks import quick

TRANSFORMS: dict[str, jc.Transform] = {
    "identity": jc.core.identity(),
    "prune": jc.prune(0.5),
    "prune_schedule": jc.prune(jc.cubic(0.8, end=4)),
    "prune_constant_schedule": jc.prune(optax.constant_schedule(0.0)),
    "prune_global": jc.prune(0.6, scope=jc.Global()),
    "prune_sensitivity": jc.prune(0.4, score=jc.pruning.sensitivity),
    "prune_taylor_global": jc.prune(0.4, score=jc.pruning.taylor, scope=jc.Global()),
    "prune_filters": jc.prune(0.4, structure=jc.Filters()),
    "prune_filters_l2_global": jc.prune(0.4, structure=jc.Filters(order=2), scope=jc.Global()),
    "prune_twice": jc.chain(jc.prune(0.5), jc.prune(0.5)),
    "prune_elements_of_filters": jc.chain(jc.prune(0.3, structure=jc.Filters()), jc.prune(0.5)),
    **{f"int{b}": jc.quantize(jc.Int(b)) for b in (2, 3, 4, 8)},
    **{f"int{b}_asymmetric": jc.quantize(jc.Int(b, symmetric=False)) for b in (5, 8)},
    "int2_narrow": jc.quantize(jc.Int(2, narrow=True)),
    "int4_group": jc.quantize(jc.Int(4), per=jc.Groups(2)),
    "int4_group_asymmetric": jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(4)),
    "int8_tensor": jc.quantize(jc.Int(8), per=jc.Tensor()),
    "log8": jc.quantize(jc.Log(8)),
    "log3_tensor": jc.quantize(jc.Log(3), per=jc.Tensor()),
    "companded": jc.quantize(jc.quantization.Companded(5, laws.CUBE)),
    "joint": jc.chain(jc.prune(jc.cubic(0.8, end=4)), jc.quantize(jc.Int(4))),
    "joint_asymmetric": jc.chain(jc.prune(0.7), jc.quantize(jc.Int(3, symmetric=False))),
    "joint_filters_log": jc.chain(jc.prune(0.3, structure=jc.Filters()), jc.quantize(jc.Log(4))),
    "by_path": jc.by_path({r"dense/.*": jc.prune(0.5, scope=jc.Global()), r".*": jc.quantize(jc.Int(4))}),
    "gate_closed": jc.gate(jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))), jc.every(1, start=100)),
    "gate_open": jc.gate(jc.quantize(jc.Int(4)), jc.every(2, start=1)),
    "gate_then_quantize": jc.chain(jc.gate(jc.prune(0.5), jc.every(2, start=1)), jc.quantize(jc.Int(4))),
    "gate_stacked": jc.chain(jc.prune(0.2), jc.gate(jc.prune(0.5), jc.every(1, start=1))),
    "once": jc.once(jc.prune(0.5, score=jc.pruning.sensitivity)),
    # Dynamic sparse training: grown at random, and by gradient with a falling share; static, then quantized.
    "regrow_random": jc.pruning.regrow(0.6, key=jax.random.key(0)),
    "rigl": jc.pruning.rigl(0.6, key=jax.random.key(0), period=1, stop=9),
    "static_int4": jc.chain(when(jc.pruning.regrow(0.8, key=jax.random.key(0)), never), jc.quantize(jc.Int(4))),
    "prune_when": when(jc.prune(jc.cubic(0.8, end=4)), jc.every(2)),
    "low_rank": jc.low_rank(2),
    "low_rank_pruned_quantized": jc.chain(jc.low_rank(3), jc.prune(0.5), jc.quantize(jc.Int(8))),
    "rank_one": jc.core.when(jc.low_rank(2, method=RankOne()), jc.every(2)),
    "tucker": jc.low_rank((2, 3), method=Tucker2(), where="conv/.*"),
    "cp": jc.low_rank(3, method=CP(separable=True), where="conv/.*"),
    "share": jc.share(4),
    "share_channels_kept": jc.share(3, per=Channels(), init=linear, recluster=False, gradient="mean"),
    "share_global_pruned": jc.chain(jc.prune(0.5), jc.share(5, per=jc.Global(), preserve_zeros=True)),
    "share_buckets_quantized": jc.chain(jc.share(4, per=Buckets(10), init=quantile), jc.quantize(jc.Int(4))),
    "prune_n_m": jc.prune(structure=jc.NM(2, 4)),
    "prune_blocks_erk": jc.prune(0.5, structure=jc.pruning.Block((2, 3), pool="max"), scope=jc.pruning.ERK()),
    "prune_straight_random": jc.prune(
        0.5, score=jc.pruning.random_score(jax.random.key(0)), gradient=StraightThrough()
    ),
    "prune_movement": accumulate(
        jc.prune(jc.pruning.polynomial(0.6, begin=0, end=4), score=jc.pruning.movement, regrow=False), movement
    ),
    "prune_lamp_global_int4": jc.chain(jc.prune(0.5, score=lamp(), scope=jc.Global()), jc.quantize(jc.Int(4))),
    # Grids of levels, scales on a grid, rounding at random, buckets.
    "pruned_signs": jc.chain(jc.prune(0.4), jc.quantize(jc.Int(1))),
    "nf4_mse": jc.recipes.nf4(4, scale=MSE(steps=9)),
    "apot4_buckets": jc.chain(jc.prune(0.7), jc.quantize(jc.quantization.APoT(4), per=Buckets(50))),
    "mx": jc.recipes.mx(E4M3, 4),
    "nvfp4": jc.quantize(Blocked(E2M1, E4M3), per=jc.Groups(2)),
    "stochastic": jc.quantize(jc.Int(4), rounding=Stochastic(jax.random.key(0))),
}
# Laws of these take long to compile, and others like them are among the quick ones.
SLOW = {
    "share_global_pruned",
    "gate_stacked",
    "int2",
    "int3",
    "int5_asymmetric",
    "int8_tensor",
    "joint_filters_log",
    "log3_tensor",
    "prune_filters_l2_global",
    "prune_taylor_global",
    "prune_elements_of_filters",
    "prune_constant_schedule",
    "regrow_random",
    "static_int4",
    "low_rank_pruned_quantized",
    "rank_one",
    "cp",
    "tucker",
    "share",
    "share_channels_kept",
    "share_buckets_quantized",
    "prune_straight_random",
    "prune_lamp_global_int4",
    "apot4_buckets",
    "nf4_mse",
    "prune_sensitivity",
    "prune_twice",
    "prune_movement",
    "int2_narrow",
    "int4_group",
    "joint_asymmetric",
    "gate_then_quantize",
    "companded",
    "pruned_signs",
    "nvfp4",
    "prune_blocks_erk",
    "prune_n_m",
    "int4_group_asymmetric",
    "gate_closed",
}
# Logarithms and roots are not the same bits in and out of jit: XLA compiles vectors and remainders differently.
TRANSCENDENTAL = {"log8", "log3_tensor", "companded", "joint_filters_log"}


@cache
def make_params(dtype: jnp.dtype = jnp.float32) -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "dense": {"kernel": normal(8, 7), "bias": normal(7)},
        "conv": [normal(3, 3, 4, 5)],
    }


@pytest.mark.parametrize("check", laws.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", quick(TRANSFORMS, *(n for n in TRANSFORMS if n not in SLOW)))
def test_law(name: str, check) -> None:
    t, params = TRANSFORMS[name], make_params()
    if check is laws.check_jit_equals_eager and name in TRANSCENDENTAL:
        check(t, params, rtol=1e-6)
    else:
        check(t, params)


# Leaves of trained parameters, and a transform that sees inside them.
IN_PARAMS = {
    "learned_int4_pruned": (lambda p: jc.quantization.learned(p, jc.Int(4)), jc.prune(0.5)),
    "learned_offset_gated": (
        lambda p: jc.quantization.learned(p, jc.Int(3, symmetric=False), offset=True),
        jc.gate(jc.prune(0.5), jc.every(2, start=1)),
    ),
    "learned_apot_filters": (
        lambda p: jc.quantization.learned(p, jc.quantization.APoT(4)),
        jc.prune(0.3, structure=jc.Filters()),
    ),
    "learned_signs": (lambda p: jc.quantization.learned(p, jc.Int(1)), jc.prune(0.4)),
}


@pytest.mark.parametrize("check", laws.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", quick(IN_PARAMS, next(iter(IN_PARAMS))))
def test_law_of_leaves_in_params(name: str, check) -> None:
    make, t = IN_PARAMS[name]
    params = make(make_params())
    if check is laws.check_ships_what_it_trains:
        check(jc.core.identity(), params)
    check(t, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "name", quick(["prune", "int4", "int5_asymmetric", "joint", "log8"], "int5_asymmetric", "joint")
)
def test_laws_hold_in_half_precision(name: str, dtype: jnp.dtype) -> None:
    for check in (laws.check_ships_what_it_trains, laws.check_keeps_structure, laws.check_learns):
        check(TRANSFORMS[name], make_params(dtype))


RESCALED = {
    "prune": jc.prune(0.5),
    "regrow": jc.pruning.regrow(0.5, key=jax.random.key(0)),
    "low_rank": jc.low_rank(2),
    "factorize": lambda p: jc.factorize(p, 2),
    "learned": lambda p: jc.quantization.learned(p, jc.Int(4)),
    "share_vectors": share_vectors(3, size=2, key=jax.random.key(0)),
}


@pytest.mark.parametrize("dtype", quick(["float64", "float16", "bfloat16"], "float64"))
@pytest.mark.parametrize("name", RESCALED)
def test_a_rescaled_leaf_is_compressed_alike_in_all_bits_of_its_type(name: str, dtype: str) -> None:
    """In float64 by a factor that float32 takes for 1."""
    t, factor = RESCALED[name], 1 + 2.0**-30 if dtype == "float64" else 2.0
    with jax.enable_x64(dtype == "float64"):

        def seen(w: np.ndarray) -> np.ndarray:
            params = {"kernel": jnp.asarray(w, dtype)}
            if isinstance(t, jc.Transform):
                state = t.update(t.init(params), params, step=jnp.int32(1))
                params = t.apply(state, params)
            dense = jc.materialize(params if isinstance(t, jc.Transform) else t(params))["kernel"]
            assert dense.dtype == dtype
            return np.asarray(dense, np.float64)

        w = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), dtype), np.float64)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(seen(factor * w), factor * seen(w), rtol=8 * eps, atol=8 * eps)


EMPTY = {
    "quantize": jc.quantize(jc.Int(4)).init,
    "regrow": jc.pruning.regrow(0.5, key=jax.random.key(0)).init,
    "learned": jc.quantization.learned,
    "adaround": adaround,
    "share": jc.share(4).init,
    "share_vectors": share_vectors(3, size=2, key=jax.random.key(0)).init,
    "low_rank": jc.low_rank(2).init,
}


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_leaf_is_refused_by_its_path(name: str, shape: tuple[int, int]) -> None:
    params = {"full": {"kernel": jnp.ones((8, 6))}, "none": {"kernel": jnp.zeros(shape)}}
    message = re.escape(f"{name}: 'none/kernel' is empty (shape {shape}); leave it out by a rule.")
    with pytest.raises(ValueError, match=message):
        EMPTY[name](params)


finite = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
    [0.0, -0.0, 2.0**-126, -(2.0**-126), 2.0**-140, 2.0**127, 1.0]
)
shapes = st.sampled_from([(1, 1), (5, 3), (2, 3, 2, 2)])  # each new shape is a new compilation


VALUES = ("prune", "int2", "int3", "int8", "int5_asymmetric", "log8", "joint", "prune_global", "prune_filters")


@pytest.mark.parametrize("name", quick(VALUES, "log8", "int3"))
@given(data=st.data())
def test_laws_hold_for_any_values(name: str, data) -> None:
    w = data.draw(hnp.arrays(np.float32, shapes, elements=finite))
    params = {"conv": jnp.asarray(w)}
    laws.check_ships_what_it_trains(TRANSFORMS[name], params)
    laws.check_keeps_structure(TRANSFORMS[name], params)
    laws.check_valid_at_step_zero(TRANSFORMS[name], params)
    if name not in TRANSCENDENTAL:
        laws.check_jit_equals_eager(TRANSFORMS[name], params)


EIGHT_DEVICES = """
import jax, numpy as np, jaxcomp as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.test_laws import TRANSFORMS
from tests.laws import started, assert_same_bits
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
w = jax.random.normal(jax.random.key(0), (64, 32))
for name in ("prune", "prune_global", "prune_filters", "int4", "int4_group", "int5_asymmetric", "joint", "gate_open"):
    t = TRANSFORMS[name]
    f = jax.jit(lambda p: jc.materialize(t.apply(started(t, p), p)))
    one = f({"kernel": w, "b": {"kernel": w.T}})
    for spec in (P("d"), P(None, "d")):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
        many = f({"kernel": put(w), "b": {"kernel": put(w.T)}})
        assert_same_bits(jax.tree.map(np.asarray, many), jax.tree.map(np.asarray, one))
"""


@pytest.mark.slow  # a part of it is quick in test_meshes
def test_eight_devices_give_what_one_gives() -> None:
    import os

    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
