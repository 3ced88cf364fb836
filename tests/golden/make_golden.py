"""Makes the golden files: what commit c9fb12a saved, sent and left behind, for tests/test_golden.py.

A golden file is never made anew: what it is for is that later code reads what that commit wrote. This script says how
it was made, and runs with the code of that commit only:

    git worktree add ../then c9fb12a && cd ../then && PYTHONPATH=. python make_golden.py FOLDER

It writes FOLDER/data (files of ``jaxcomp.save``, messages of ``jaxcomp.federated``, states of transforms in a
checkpoint, and expected.npz, what each of them stands for) and FOLDER/run (a run of ``python -m train`` that was
interrupted, and expected_report.json, the report of the same run uninterrupted), the latter as run.zip too.

Factors are multiples of 1/64, so that their products are exact in whatever order they are summed.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxcomp.factors import Depthwise, FactorLeaf, Separable, Tucker
from jaxcomp.grids import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, Blocked, Levels
from jaxcomp.leaves import is_compressed
from jaxcomp.low_rank import CP, SVD, RankOne, Tucker2
from jaxcomp.numerics.kmeans_inits import linear
from jaxcomp.prune import masked_by
from jaxcomp.scaling import MSE, Fixed, Percentile, Stochastic
from jaxcomp.share_vectors import share_vectors
from jaxcomp.specs import Buckets, Channels
from jaxcomp.structures import NM, Block, Filters, Global
from train.checkpoints import Checkpoints

import jaxcomp as jc
import jaxcomp.federated as fed
from jaxcomp.activations import ranges_of
from train.__main__ import main as train_main

RNG = np.random.default_rng(2024)
ROOT = jc.Compander("root", lambda w: jnp.sign(w) * jnp.sqrt(jnp.abs(w)), lambda v: jnp.sign(v) * v * v)


def normal(*shape: int, dtype: Any = np.float32) -> jax.Array:
    """Weights like a layer's."""
    return jnp.asarray(RNG.standard_normal(shape).astype(np.float32) * 0.25).astype(dtype)


def sixtyfourths(*shape: int) -> jax.Array:
    """Multiples of 1/64 between -1 and 1."""
    return jnp.asarray(RNG.integers(-64, 65, shape).astype(np.float32) / 64)


def under(t: jc.Transform, w: Any) -> Any:
    """One array's leaf under a transform, after an update."""
    params = {"kernel": w}
    state = t.update(t.init(params), params, step=jnp.int32(1), grads=jax.tree.map(jnp.cos, params))
    return t.apply(state, params)["kernel"]


# Quantized


def integers() -> dict[str, Any]:
    """Int on every width and option, and what shares a scale."""
    q = jc.quantize
    w = normal(16, 6)
    stack = normal(2, 8, 6)
    return {
        "int1": under(q(jc.Int(1)), w),
        "int2_narrow": under(q(jc.Int(2, narrow=True)), w),
        "int3": under(q(jc.Int(3)), w),
        "int4": under(q(jc.Int(4)), w),
        "int4_group": under(q(jc.Int(4, group=8)), w),
        "int4_group_asymmetric": under(q(jc.Int(4, group=4, symmetric=False)), w + 0.1),
        "int5_narrow_mse": under(q(jc.Int(5, narrow=True), scale=MSE()), w),
        "int6_percentile": under(q(jc.Int(6), scale=Percentile(95.0)), w),
        "int7_fixed": under(q(jc.Int(7), scale=Fixed(0.5)), w),
        "int8": under(q(jc.Int(8)), w),
        "int8_asymmetric": under(q(jc.Int(8, symmetric=False)), w - 0.2),
        "int1_asymmetric": under(q(jc.Int(1, symmetric=False)), w),
        "int8_tensor": under(q(jc.Int(8), channel_axes=()), w),
        "int8_rows": under(q(jc.Int(8), channel_axes=(0,)), w),
        "int8_stacked": under(q(jc.Int(8), channel_axes=(0, -1)), stack),
        "group_axis_last": under(q(jc.Int(4, group=3), group_axis=-1, channel_axes=(0,)), w),
        "group_axis_first": under(q(jc.Int(4, group=2), group_axis=0), stack),
        "tile": under(q(jc.Int(4), tile=(4, 3)), w),
        "tile_of_one_axis": under(q(jc.Int(4, symmetric=False), tile=(3,)), stack),
        "bucket": under(q(jc.Int(4), bucket=10), w),
        "bucket_asymmetric": under(q(jc.Int(3, symmetric=False), bucket=32), w),
        "stochastic": under(q(jc.Int(4), rounding=Stochastic(jax.random.key(3))), w),
        "bfloat16": under(q(jc.Int(4, group=8)), w.astype(jnp.bfloat16)),
        "float16": under(q(jc.Int(8)), w.astype(jnp.float16)),
    }


def tables() -> dict[str, Any]:
    """Grids that are tables or companded, with and without groups."""
    q = jc.quantize
    w = normal(64, 3)
    return {
        "log8": under(q(jc.Log(8)), w),
        "log3": under(q(jc.Log(3)), w),
        "companded5": under(q(jc.Companded(5)), w),
        "companded4_root": under(q(jc.Companded(4, ROOT)), w),
        "e4m3_group": under(q(jc.Float(4, 3, reserved=1, group=16)), w),
        "e4m3": under(q(E4M3), w),
        "e5m2": under(q(E5M2), w),
        "e2m1_group": under(q(jc.Float(2, 1, group=8)), w),
        "float_bias": under(q(jc.Float(3, 1, bias=2)), w),
        "nf4": under(q(jc.NF4()), w),
        "nf4_group": under(q(jc.NF4(group=32)), w),
        "nf4_channels": under(q(jc.NF4(group=None)), w),
        "pot4": under(q(jc.PoT(4)), w),
        "pot3_group": under(q(jc.PoT(3, group=16)), w),
        "apot4": under(q(jc.APoT()), w),
        "apot5_group": under(q(jc.APoT(5, group=32)), w),
        "levels": under(q(Levels((-1.0, -0.25, 0.0, 0.25, 1.0))), w),
        "levels_group": under(q(Levels((-1.0, -0.5, 0.5, 1.0), group=32)), w),
        "bucket_of_nf4": under(q(jc.NF4(group=None), bucket=50), w),
    }


def blocks() -> dict[str, Any]:
    """Block scales on a grid of their own."""
    q = jc.quantize
    w = normal(64, 3)
    return {
        "mx": under(q(jc.MX()), w),
        "mx_e4m3": under(q(jc.MX(E4M3)), w),
        "mx_e5m2": under(q(jc.MX(E5M2, block=16)), w),
        "mx_e3m2": under(q(jc.MX(E3M2)), w),
        "mx_e2m3": under(q(jc.MX(E2M3)), w),
        "mx_int8": under(q(jc.MX(jc.Int(8, narrow=True))), w),
        "mx_int4": under(q(jc.MX(jc.Int(4), block=8)), w),
        "mx_last_axis": under(q(jc.MX(block=16), group_axis=-1), normal(3, 32)),
        "nvfp4": under(q(jc.NVFP4), w),
        "nvfp4_masked": under(jc.chain(jc.prune(0.7), q(jc.NVFP4)), w),
        "mx_int8_masked": under(jc.chain(jc.prune(0.7), q(jc.MX(jc.Int(8, narrow=True)))), w),
        "double_nf4": under(q(Blocked(jc.NF4(group=None), 32, jc.Float(4, 3, reserved=1))), w),
        "blocked_apot": under(q(Blocked(jc.APoT(4), 16, E8M0())), w),
        "blocked_levels": under(q(Blocked(Levels((-1.0, 0.0, 0.5, 1.0)), 16, E4M3)), w),
    }


# Masked


def masks() -> dict[str, Any]:
    """Masks of every structure, over arrays and leaves."""
    p, q, chain = jc.prune, jc.quantize, jc.chain
    w = normal(32, 8)
    filters, kernel = p(0.75, structure=Filters()), normal(3, 3, 4, 8)
    odd = jnp.asarray(np.arange(256).reshape(32, 8) != 3)
    return {
        "elements": under(p(0.8), w),
        "elements_bfloat16": under(p(0.8), w.astype(jnp.bfloat16)),
        "does_not_pay": under(chain(p(0.05), q(jc.Int(2))), w),
        "values_not_zero": jc.Masked(jnp.ones((32, 8)), odd),
        "nm": under(p(structure=NM(1, 4)), w),
        "block": under(p(0.75, structure=Block((4, 4))), w),
        "filters": under(filters, kernel),
        "filters_int4": under(chain(filters, q(jc.Int(4))), kernel),
        "filters_of_inputs": under(p(0.5, structure=Filters(-2)), w),
        "by_given": under(masked_by({"kernel": jnp.asarray(np.arange(32) % 5 == 0)[:, None]}), w),
        "global": under(p(0.8, scope=Global()), w),
        "int1": under(chain(p(0.6), q(jc.Int(1))), w),
        "int4": under(chain(p(0.8), q(jc.Int(4))), w),
        "int4_group": under(chain(p(0.8), q(jc.Int(4, group=8))), w),
        "int8": under(chain(p(0.8), q(jc.Int(8))), w),
        "int8_asymmetric": under(chain(p(0.8), q(jc.Int(8, symmetric=False))), w + 0.2),
        "int3_tile": under(chain(p(0.8), q(jc.Int(3), tile=(8, 4))), w),
        "bucket": under(chain(p(0.8), q(jc.Int(4), bucket=48)), w),
        "log8": under(chain(p(0.8), q(jc.Log(8))), w),
        "e2m1": under(chain(p(0.8), q(E2M1)), w),
        "levels_without_zero": under(chain(p(0.8), q(Levels((-1.0, -0.5, 0.5, 1.0)))), w),
        "codebook": under(chain(p(0.8), jc.share(8)), w),
        "codebook_with_zero": under(chain(p(0.8), jc.share(8, preserve_zeros=True)), w),
        "codebook_of_channels": under(chain(p(0.6), jc.share(4, per=Channels())), w),
        "vectors": under(chain(p(0.5), share_vectors(8, size=2, key=jax.random.key(1))), w),
        "twice": under(chain(p(0.5), p(0.5), q(jc.Int(4))), w),
    }


# Codebooks


def codebooks() -> dict[str, Any]:
    """Tables per leaf, per channel, per bucket; of vectors; on a grid; with more than 256 entries."""
    s, chain = jc.share, jc.chain
    w = normal(32, 6)
    zeros = w * jnp.asarray(RNG.random((32, 6)) > 0.4)
    return {
        "local": under(s(16), w),
        "two": under(s(2), w),
        "five": under(s(5, init=linear), w),
        "channels": under(s(4, per=Channels()), w),
        "channels_of_two_axes": under(s(2, per=Channels((0, -1))), normal(2, 8, 3)),
        "channels_of_rows": under(s(3, per=Channels(0)), w),
        "buckets": under(s(4, per=Buckets(50)), w),
        "preserve_zeros": under(s(8, preserve_zeros=True), zeros),
        "sum": under(s(8, gradient="sum"), w),
        "mean_kept": under(s(8, gradient="mean", recluster=False), w),
        "table_int8": under(chain(s(16), jc.quantize(jc.Int(8))), w),
        "table_int4_narrow": under(chain(s(8, preserve_zeros=True), jc.quantize(jc.Int(4, narrow=True))), zeros),
        "table_of_channels_e4m3": under(chain(s(4, per=Channels()), jc.quantize(E4M3)), w),
        "bfloat16": under(s(4), w.astype(jnp.bfloat16)),
        "vectors": under(share_vectors(8, size=2, key=jax.random.key(0)), w),
        "vectors_last_axis": under(share_vectors(8, size=3, axis=-1, key=jax.random.key(0)), w),
        "vectors_int8": under(chain(share_vectors(8, size=4, key=jax.random.key(0)), jc.quantize(jc.Int(8))), w),
        "deep_compression": under(jc.deep_compression(0.7, 8), w),
    }


def large_codebook() -> dict[str, Any]:
    """Codes of 16 bits."""
    w = normal(40, 15)
    return {
        "local": under(jc.share(300, iterations=3), w),
        "vectors": under(share_vectors(260, size=2, key=jax.random.key(0), iterations=1), w),
    }


def global_codebook() -> dict[str, Any]:
    """One table for several leaves, which the file holds once; the same on a grid; and equal arrays."""
    w = {"a": {"kernel": normal(16, 6)}, "b": {"kernel": normal(12, 8)}}
    plain = jc.share(8, per=Global())
    on_grid = jc.chain(plain, jc.quantize(jc.Int(8)))
    tied = normal(10, 4)
    return {
        "plain": plain.apply(plain.init(w), w),
        "on_grid": on_grid.apply(on_grid.init(w), w),
        "tied": {"embedding": tied, "head": tied, "again": jnp.array(tied), "other": tied.T},
        "tied_int8": {"embedding": under(jc.quantize(jc.Int(8)), tied), "head": under(jc.quantize(jc.Int(8)), tied)},
    }


# Factors


def factors() -> dict[str, Any]:
    """Leaves of factors of every method, plain, on grids, and pruned; made by low_rank, then rounded to 1/64."""
    w, kernel = normal(12, 10), normal(3, 3, 6, 8)
    low = jc.low_rank
    on_grid = jc.quantize(jc.Int(4, narrow=True), scale=Fixed(7 / 16))
    half = jc.prune(0.6)
    both = jc.chain(half, on_grid)

    def then(t: jc.Transform, leaf: Any) -> Any:
        return t.apply(t.init({"w": leaf}), {"w": leaf})["w"]

    made = {
        "svd": exact(under(low(3), w)),
        "svd_bfloat16": exact(under(low(2), w.astype(jnp.bfloat16))),
        "svd_kernel": exact(under(low(3), kernel)),
        "svd_two_columns": exact(under(low(3, method=SVD(cols=2)), normal(6, 3, 4))),
        "svd_stacked": exact(under(low(2, method=SVD(stacked=1)), normal(2, 8, 6))),
        "rank_one": exact(under(low(2, method=RankOne(steps=50)), w)),
        "tucker2": exact(under(low((3, 4), method=Tucker2()), kernel)),
        "cp": exact(under(low(3, method=CP()), kernel)),
        "cp_separable": exact(under(low(3, method=CP(separable=True)), kernel)),
        "low_rank_by_hand": jc.LowRank(sixtyfourths(3, 3, 6, 2), sixtyfourths(2, 8), 3),
        "low_rank_default_rows": jc.LowRank(sixtyfourths(9, 2), sixtyfourths(2, 5)),
        "tucker_stacked": Tucker(sixtyfourths(2, 4, 2), sixtyfourths(2, 3, 2, 3), sixtyfourths(2, 3, 5)),
        "depthwise_by_hand": Depthwise(sixtyfourths(4, 2), sixtyfourths(3, 2), sixtyfourths(2, 5)),
        "separable_by_hand": Separable(sixtyfourths(4, 2), sixtyfourths(3, 2), sixtyfourths(2, 2), sixtyfourths(2, 5)),
    }
    return made | {
        "svd_int4": then(on_grid, made["svd"]),
        "svd_pruned": then(half, made["svd"]),
        "svd_pruned_int4": then(both, made["svd"]),
        "tucker2_int4": then(on_grid, made["tucker2"]),
        "cp_pruned": then(half, made["cp"]),
        "svd_shared": then(_shared_by_hand(), made["svd"]),
        "factorized": jax.tree.map(
            lambda x: exact(x) if is_compressed(x) else x, jc.factorize({"w": w}, 2), is_leaf=is_compressed
        )["w"],
    }


def _shared_by_hand() -> jc.Transform:
    """Tables of multiples of 1/64, kept as they are at init."""

    def apply(state: Any, params: Any) -> Any:
        def shared(x: jax.Array) -> jc.Codebook:
            table = jnp.asarray([[-0.5], [-0.125], [0.25], [0.75]], x.dtype)
            codes = jnp.abs(x[..., None] - table[:, 0]).argmin(-1).astype(jnp.uint8)
            return jc.Codebook(table, codes, None)

        return {k: v.mapped(shared) for k, v in params.items()}

    return jc.Transform(lambda params: (), lambda state, params, *, step, **stats: state, apply)


def exact(leaf: Any) -> Any:
    """The leaf with every factor rounded to multiples of 1/64 (of 1/8 in bfloat16)."""
    assert isinstance(leaf, FactorLeaf), leaf
    step = 8 if leaf.dtype == jnp.bfloat16 else 64
    return leaf.mapped(lambda x: (jnp.round(x.astype(jnp.float32) * step) / step).astype(x.dtype))


# Learned, gated, containers


def learned() -> dict[str, Any]:
    """Leaves whose scales were trained, which a file holds as Quantized; masked before and after."""
    w = normal(16, 6)
    first = {"kernel": w}
    after = jc.prune(0.7)
    pruned = under(after, w)

    def moved(leaf: Any) -> Any:
        return jax.tree.map(lambda x: x * jnp.float32(1.07) if jnp.issubdtype(x.dtype, jnp.floating) else x, leaf)

    def one(x: Any, *args: Any, **kwargs: Any) -> Any:
        return moved(jc.learned({"kernel": x}, *args, **kwargs)["kernel"])

    packed = jc.pack(jc.learned(first, jc.Int(4, group=4)))["kernel"]
    return {
        "lsq": one(w, jc.Int(4)),
        "lsq_group": one(w, jc.Int(3, group=8)),
        "lsq_tile": one(w, jc.Int(3), tile=(4, 2)),
        "lsq_sign": one(w, jc.Int(1)),
        "lsq_plus": one(w + 0.1, jc.Int(4, symmetric=False), offset=True),
        "lsq_apot": one(w, jc.APoT(4)),
        "lsq_nf4": one(w, jc.NF4(group=None)),
        "negative_scale": jc.Learned(w, jnp.full((1, 6), -0.0625), None, jc.Int(4)),
        "packed": packed,
        "pruned_before": one(pruned, jc.Int(4)),
        "pruned_after": after.apply(after.init(jc.learned(first)), jc.learned(first))["kernel"],
    }


def gated() -> dict[str, Any]:
    """A gate before and after its time: the file holds what was active."""
    w = normal(16, 6)
    t = jc.gate(jc.quantize(jc.Int(4)), jc.every(1, start=5))
    state = t.init({"kernel": w})
    off = t.apply(state, {"kernel": w})["kernel"]
    on = t.apply(t.update(state, {"kernel": w}, step=jnp.int32(6)), {"kernel": w})["kernel"]
    pruned = jc.chain(jc.prune(0.75), t)
    before = pruned.apply(pruned.init({"kernel": w}), {"kernel": w})["kernel"]
    return {"off": off, "on": on, "off_over_a_mask": before}


def containers() -> dict[str, Any]:
    """Lists, tuples, dicts with integer keys, None, numbers and strings; types of arrays; arrays of zeros."""
    many = np.zeros((40, 40), np.float32)
    many[0, 0], many[5, 5] = 3.0, -0.0
    types: list[Any] = [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.uint32, np.float16, np.float32]
    types += [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]
    nested = jc.quantize(jc.Int(4)).apply((), {"kernel": normal(8, 4)})
    return {
        "layers": [nested, (normal(3), [under(jc.prune(0.75), normal(16, 4))])],
        "by_number": {0: normal(2), 7: {"b": jnp.zeros(1)}},
        "plain": (None, 3, -2.5, "x", True, []),
        "empty": {},
        "no_rows": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2),
        "many_zeros": jnp.asarray(many),
        "types": {np.dtype(t).name: jnp.asarray(np.array([[0, 1, 1], [1, 0, 1]]).astype(t)) for t in types},
    }


def network_with_ranges() -> dict[str, Any]:
    """What the main job saves of 8-bit weights and activations."""
    params = {f"dense_{i}": {"kernel": normal(8, 8), "bias": normal(8)} for i in range(2)}

    def network(variables: Any, x: jax.Array) -> jax.Array:
        p = variables["params"]
        x = jax.nn.relu(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"])
        return x @ p["dense_1"]["kernel"] + p["dense_1"]["bias"]

    ranges = ranges_of(jc.calibrate(network)({"params": params}, normal(5, 8)))
    return {
        "params": jc.pack(jc.quantize(jc.Int(8)).apply((), params)),
        "batch_stats": {},
        "ranges": {name: {"low": np.asarray(r.low), "high": np.asarray(r.high)} for name, r in ranges.items()},
    }


def nnx_state() -> Any:
    """A state of nnx, which a file holds as nested dicts."""
    _, state = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    t = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
    return t.apply(t.init(state), state)


# Messages


def update(seed: int) -> dict[str, Any]:
    """An update of multiples of 1/64, whose sums are exact."""
    rng = np.random.default_rng(seed)

    def one(*shape: int, dtype: Any = np.float32) -> jax.Array:
        return jnp.asarray(rng.integers(-128, 129, shape).astype(np.float32) / 64).astype(dtype)

    return {"dense": {"kernel": one(12, 16), "bias": one(16)}, "half": one(8, 6, dtype=jnp.bfloat16)}


def compressors() -> dict[str, fed.Compressor]:
    """The same table as in tests/test_golden.py."""
    key = jax.random.key(5)
    rules = {r".*/kernel": fed.topk(0.25), r".*/bias": fed.sign()}
    more = {r".*/kernel": fed.powersgd(1, key=key), r".*": fed.rotate(fed.uniform(4))}
    return {
        "dense": fed.dense(),
        "topk": fed.topk(0.1),
        "topk_bitmap": fed.topk(0.5),
        "topk_count": fed.topk(count=3),
        "randomk": fed.randomk(0.25),
        "randomk_contracting": fed.randomk(0.25, unbiased=False),
        "sign": fed.sign(),
        "sign_unbiased": fed.sign(unbiased=True),
        "sign_vote": fed.sign(vote=True),
        "uniform1": fed.uniform(1),
        "uniform3": fed.uniform(3),
        "uniform8": fed.uniform(8),
        "uniform4_limit": fed.uniform(4, limit=2.0),
        "rotate_uniform2": fed.rotate(fed.uniform(2), block=16),
        "rotate_sign": fed.rotate(fed.sign(unbiased=True)),
        "rotate_topk": fed.rotate(fed.topk(0.25), block=64),
        "powersgd": fed.powersgd(1, key=key),
        "powersgd_where": fed.powersgd(2, key=key, where=r".*/kernel"),
        "by_path": fed.by_path(rules),
        "by_path_more": fed.by_path(more),
        "feedback_topk": fed.error_feedback(fed.topk(0.1)),
        "feedback_sign": fed.error_feedback(fed.sign()),
        "feedback_powersgd": fed.error_feedback(fed.powersgd(2, key=key)),
        "feedback_by_path": fed.error_feedback(fed.by_path(rules)),
        "feedback_rotate": fed.error_feedback(fed.rotate(fed.uniform(4))),
    }


COMBINED = ("topk", "randomk", "sign", "sign_vote", "uniform3", "uniform4_limit", "rotate_uniform2", "powersgd")
"""Those of which the file also holds the mean of three messages, as a server sends it."""


def sent(t: fed.Compressor, sender: int) -> list[Any]:
    """The messages of two rounds."""
    state, out = t.init(update(sender)), []
    for number in range(2):
        shared = jax.random.key(100 + number)
        own = jax.random.fold_in(shared, sender)
        message, state = t.encode(state, update(sender + 10 * number), key=own, shared=shared)
        out.append(plain(message))
    return out


def plain(message: Any) -> Any:
    """The message with what is summed in decoding, factors and rotated arrays, rounded to 1/64: the sums are exact."""

    def one(x: Any) -> Any:
        if not isinstance(x, fed.Factors | fed.Rotated):
            return x
        floats = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(
            lambda a: (jnp.round(a.astype(jnp.float32) * 64) / 64).astype(a.dtype) if floats(a) else a, x
        )

    return jax.tree.map(one, message, is_leaf=is_compressed)


def messages() -> dict[str, tuple[bytes, Any]]:
    """By name: bytes, and what they decode to."""
    out = {}
    for name, t in compressors().items():
        for number, message in enumerate(sent(t, 0)):
            out[f"{name}/{number}"] = fed.to_bytes(message), t.decode(message)
        if name in COMBINED:
            mean = plain(t.combine([sent(t, sender)[0] for sender in range(3)]))
            out[f"{name}/combined"] = fed.to_bytes(mean), t.decode(mean)
    return out


def saved_messages() -> dict[str, Any]:
    """Messages in a file of ``save``: a leaf of every class."""
    table = compressors()
    names = ("topk", "randomk", "sign", "uniform3", "rotate_uniform2", "powersgd")
    tree = {name: sent(table[name], 0)[0] for name in names}
    vote = table["sign_vote"]
    return tree | {"votes": vote.combine([sent(vote, sender)[0] for sender in range(2)])}


# States of transforms, in a checkpoint


def transforms() -> dict[str, jc.Transform]:
    """The same table as in tests/test_golden.py."""
    return {
        "prune": jc.prune(0.8),
        "prune_global": jc.prune(0.8, scope=Global()),
        "share": jc.share(4),
        "share_global": jc.share(4, per=Global()),
        "share_kept": jc.share(4, recluster=False),
        "low_rank": jc.low_rank(2),
        "regrow": jc.regrow(0.8, key=jax.random.key(2), due=jc.every(1)),
        "gate": jc.gate(jc.prune(0.5), jc.every(2)),
        "once": jc.once(jc.prune(0.5, score=jc.sensitivity)),
        "chain": jc.chain(jc.prune(0.5), jc.share(4)),
        "by_path": jc.by_path({r"a/.*": jc.prune(0.5), r".*": jc.share(4)}),
    }


def states(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """One checkpoint of all of them after two updates; parameters and what they make of them are expected."""
    params = {"a": {"kernel": sixtyfourths(8, 6), "bias": sixtyfourths(6)}, "b": {"kernel": sixtyfourths(6, 4)}}
    expected |= {f"params:{k}": v for k, v in arrays_of(params).items()}
    after = {}
    for name, t in transforms().items():
        state = t.init(params)
        for step in range(2):
            state = t.update(state, params, step=jnp.int32(step), grads=jax.tree.map(jnp.abs, params))
        after[name] = state
        made = t.apply(state, params)
        if name == "low_rank":  # the product of its factors depends on the order of sums
            made = {k: {n: x if n == "bias" else {"v": x.v} for n, x in v.items()} for k, v in made.items()}
        expected |= {f"states/{name}:{k}": v for k, v in arrays_of(made).items()}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(after, epoch=2, seconds=1.5)


# What is written


FILES = {
    "integers": integers,
    "tables": tables,
    "blocks": blocks,
    "masks": masks,
    "codebooks": codebooks,
    "large_codebook": large_codebook,
    "global_codebook": global_codebook,
    "factors": factors,
    "learned": learned,
    "gated": gated,
    "containers": containers,
    "network_with_ranges": network_with_ranges,
    "nnx_state": nnx_state,
    "messages": saved_messages,
}


def arrays_of(tree: Any) -> dict[str, np.ndarray]:
    """The arrays that a tree stands for, by path and type; what npz cannot hold is widened to float32, exactly."""
    out = {}
    for keys, x in jax.tree_util.tree_flatten_with_path(jc.materialize(tree))[0]:
        if not hasattr(x, "dtype"):
            continue
        path = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
        array = np.asarray(x)
        name = f"{path}:{array.dtype.name}"
        out[name] = array if array.dtype.kind in "biuf" and array.dtype.isbuiltin == 1 else array.astype(np.float32)
    return out


def arithmetic() -> np.ndarray:
    """A few sums and functions, whose last bits depend on the machine and on the version of XLA."""
    x = jnp.asarray(np.arange(2 * 16 * 16 * 8).reshape(2, 16, 16, 8) % 97 / np.float32(64), jnp.float32)
    w = jnp.asarray(np.arange(3 * 3 * 8 * 16).reshape(3, 3, 8, 16) % 89 / np.float32(640) - 1, jnp.float32)

    @jax.jit
    def probe(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = (y - y.mean((0, 1, 2))) * jax.lax.rsqrt(y.var((0, 1, 2)) + 1e-5)
        return jnp.expm1(y.reshape(32, -1) @ y.reshape(-1, 32) / 1e4)

    return np.asarray(jnp.concatenate([probe(x, w).reshape(-1), jnp.expm1(x.reshape(-1))]))


def write_expected(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All arrays in one stream, each [first byte, type, shape]: several hundred members of a zip would take more."""
    index, parts, start = {}, [], 0
    for name, x in arrays.items():
        index[name] = [start, x.dtype.str, x.shape]
        parts.append(x.tobytes())
        start += x.nbytes
    data = np.frombuffer(b"".join(parts), np.uint8)
    np.savez_compressed(path, index=np.array(json.dumps(index)), data=data)


def make_data(folder: Path) -> None:
    """The files, the messages, and expected.npz."""
    expected: dict[str, np.ndarray] = {}
    for name, make in FILES.items():
        tree = make()
        size = jc.save(folder / f"{name}.safetensors", tree, metadata={"note": name})
        # An nnx.State is read as nested dicts of the arrays.
        dense = jc.materialize(jc.load(folder / f"{name}.safetensors", companders=[ROOT]))
        expected |= {f"{name}:{k}": v for k, v in arrays_of(dense).items()}
        if name != "nnx_state":
            ours = arrays_of(tree)
            assert {f"{name}:{k}" for k in ours} == {k for k in expected if k.startswith(f"{name}:")}, name
            for k, v in ours.items():
                assert v.tobytes() == expected[f"{name}:{k}"].tobytes(), (name, k)
        print(f"{name}: {size} bytes")
    index, stream = {}, b""
    for name, (data, decoded) in messages().items():
        index[name] = [len(stream), len(data)]
        stream += data
        expected |= {f"wire/{name}:{k}": v for k, v in arrays_of(decoded).items()}
    (folder / "messages.bin").write_bytes(stream)
    (folder / "messages.json").write_text(json.dumps(index, indent=0) + "\n")
    states(folder / "states", expected)
    expected["arithmetic"] = arithmetic()
    write_expected(folder / "expected.npz", expected)
    print(f"{len(index)} messages, {len(stream)} bytes; {len(expected)} arrays expected")


# The run

SETTINGS = [
    "digits",
    *("--model.name", "resnet18", "--model.width", "1"),
    *("--baseline.epochs", "30", "--baseline.learning-rate", "2e-2"),
    *("--finetune.epochs", "2", "--finetune.learning-rate", "2e-3"),
    *("--checkpoint-seconds", "0"),
]
FINISHED, INTERRUPTED = ("int8", "w8a8"), ("joint", "w4a4")


class Stopped(KeyboardInterrupt):
    """Ctrl-C after the first epoch's checkpoint."""


def train(folder: Path, *methods: str) -> int:
    """``python -m train digits … --methods … --out FOLDER``."""
    return train_main([*SETTINGS, "--methods", *methods, "--out", str(folder)])


def make_run(folder: Path, scratch: Path) -> None:
    """A run with finished methods and methods that were stopped after one of two epochs; the report of a whole one."""
    assert train(scratch, *FINISHED, *INTERRUPTED) == 0
    assert train(folder, *FINISHED) == 0
    for name in ("report.json", "accuracy_against_bytes.png"):
        (folder / name).unlink()
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, state: Any, *, epoch: int, seconds: float) -> None:
        save(self, state, epoch=epoch, seconds=seconds)
        raise Stopped

    Checkpoints.save = save_and_stop  # type: ignore[method-assign]
    try:
        for name in INTERRUPTED:
            assert train(folder, name) == 130
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    for name in ("baseline", *FINISHED):  # what a resumed run must not make anew
        assert (folder / f"{name}.safetensors").read_bytes() == (scratch / f"{name}.safetensors").read_bytes()
    shutil.copy(scratch / "report.json", folder / "expected_report.json")


def without_paths(folder: Path) -> None:
    """Takes the folder's name out of the notes that orbax leaves, whose content nobody reads."""
    for note in folder.rglob("commit_success.txt"):
        note.write_text("Checkpoint commit was successful\n")


def zipped(folder: Path) -> None:
    """The folder as FOLDER.zip, a quarter of its size: orbax describes every array in words."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            z.writestr(zipfile.ZipInfo(file.relative_to(folder).as_posix()), file.read_bytes(), zipfile.ZIP_DEFLATED)


def main(out: Path) -> None:
    """Both, into an empty folder."""
    for name in ("data", "run"):
        (out / name).mkdir(parents=True)
    make_data(out / "data")
    scratch = out / "whole"
    make_run(out / "run", scratch)
    shutil.rmtree(scratch)
    without_paths(out)
    zipped(out / "run")


if __name__ == "__main__":
    if sys.argv[2:] == ["data"]:
        (Path(sys.argv[1]) / "data").mkdir(parents=True)
        make_data(Path(sys.argv[1]) / "data")
        without_paths(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
