"""Masks, codes and tables made on a GPU: exact where they are exact on a CPU, and the same bits each time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from tests.laws import assert_same_bits
from tests.pruning.masks.test_nm import (
    test_exactly_n_are_kept_whatever_ties_and_nans,
    test_masks_are_those_of_brute_force,
)
from tests.pruning.masks.test_thresholds import (
    test_exactly_k_with_ties_by_index,
    test_keys_order_like_numbers,
    test_large_arrays_take_the_other_way,
    test_nan_of_either_sign_is_last,
)
from tests.quantization.numerics.test_levels import (
    test_a_minifloat_rounds_as_ml_dtypes_does,
    test_codes_of_a_minifloat_are_its_bit_patterns,
)
from tests.quantization.test_stable_codes import test_fault_2_codes_are_the_quotients_and_halves_go_towards_zero
from tests.quantization.test_transform import test_packed_codes_take_their_bits_and_no_more
from tests.sharing.kmeans.test_fit import (
    test_a_table_is_sorted_and_its_entries_are_means_of_their_members,
    test_few_values_are_kept_exactly_and_nothing_is_ever_not_finite,
    test_near_optimal_is_near_the_optimum,
    test_nearest_is_nearest,
)

pytestmark = pytest.mark.gpu

__all__ = [
    "test_a_minifloat_rounds_as_ml_dtypes_does",
    "test_a_table_is_sorted_and_its_entries_are_means_of_their_members",
    "test_codes_of_a_minifloat_are_its_bit_patterns",
    "test_exactly_k_with_ties_by_index",
    "test_exactly_n_are_kept_whatever_ties_and_nans",
    "test_fault_2_codes_are_the_quotients_and_halves_go_towards_zero",
    "test_few_values_are_kept_exactly_and_nothing_is_ever_not_finite",
    "test_keys_order_like_numbers",
    "test_large_arrays_take_the_other_way",
    "test_masks_are_those_of_brute_force",
    "test_nan_of_either_sign_is_last",
    "test_near_optimal_is_near_the_optimum",
    "test_nearest_is_nearest",
    "test_packed_codes_take_their_bits_and_no_more",
]

SHAPES = {"wide": {"kernel": (320, 512)}, "tall": {"kernel": (1024, 96)}}
TRANSFORMS = {
    "element": jc.prune(0.5),
    "global": jc.prune(0.7, scope=jc.Global()),
    "2:4": jc.prune(structure=jc.NM(2, 4)),
    "filters": jc.prune(0.3, structure=jc.Filters()),
    "int8": jc.quantize(jc.Int(8)),
    "int4 groups": jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32)),
    "nf4": jc.recipes.nf4(),
    "nvfp4": jc.recipes.nvfp4(),
    "share": jc.share(16),
    "share channels": jc.share(8, per=jc.Channels(-1)),
    "pruned codes": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))),
    "random": jc.prune(0.5, score=jc.pruning.random_score(jax.random.key(0))),
}
MASKS = ("element", "global", "2:4", "random")
CODES = ("int8", "int4 groups", "nf4", "nvfp4", "pruned codes")


def params(*, ties: bool) -> dict:
    """Weights made on the host, so that every device gets the same bits."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tree = jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda w: np.round(w * 4) if ties else w, tree)


def made(name: str, tree: dict, device: jax.Device) -> dict:
    """The packed leaves of a transform after an update, made on this device."""
    transform = TRANSFORMS[name]

    @jax.jit
    def run(p: dict) -> dict:
        state = transform.update(transform.init(p), p, step=jnp.int32(1))
        return jc.pack(transform.apply(state, p))

    return run(jax.device_put(tree, device))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_the_host_bit_for_bit(name, ties) -> None:
    tree = params(ties=ties)
    here, there = (made(name, tree, d) for d in (jax.devices()[0], jax.devices("cpu")[0]))
    assert_same_bits(jax.device_get(here), jax.device_get(there))


@pytest.mark.parametrize("name", CODES)
def test_codes_are_within_a_rounding_of_the_scale_of_those_of_the_host(name) -> None:
    """A quotient of scales may round otherwise, and a code on a boundary may then lie one step away."""
    tree = params(ties=False)
    here, there = (jc.materialize(made(name, tree, d)) for d in (jax.devices()[0], jax.devices("cpu")[0]))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(t)) for t in (here, there)), strict=True):
        step = np.abs(b).max() * 0.4
        assert np.abs(a - b).max() <= step
        assert (np.abs(a - b) > 1e-6 * np.abs(b).max()).mean() < 1e-4


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_weights_give_the_same_bits_each_time(name) -> None:
    """Sums that a GPU scatters arrive in any order: a result must not depend on it."""
    tree, device = params(ties=False), jax.devices()[0]
    first = jax.device_get(made(name, tree, device))
    for _ in range(3):
        assert_same_bits(jax.device_get(made(name, tree, device)), first)


@pytest.mark.parametrize("kept", [1, 4_999_999, 10_000_000])
def test_a_global_mask_of_many_weights_is_exact(kept) -> None:
    total = 10_000_000
    w = np.random.default_rng(1).normal(size=(2, total // 2000, 1000)).astype(np.float32)
    transform = jc.prune(1 - kept / total, scope=jc.Global())
    tree = {"a": {"kernel": w[0]}, "b": {"kernel": w[1]}}
    masks = jax.jit(lambda p: transform.apply(transform.init(p), p))(tree)
    mask = np.stack([np.asarray(masks[name]["kernel"].mask) for name in "ab"])
    assert mask.sum() == kept
    assert kept == total or np.abs(w[mask]).min() >= np.abs(w[~mask]).max()


def test_what_calibration_counts_is_what_the_host_counts() -> None:
    x, p = np.random.default_rng(2).normal(size=(512, 64)).astype(np.float32), {"w": np.eye(64, dtype=np.float32)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    here, there = (
        jax.device_get(jax.jit(jc.calibrate(fn))(jax.device_put(p, d), jax.device_put(x, d)))
        for d in (jax.devices()[0], jax.devices("cpu")[0])
    )
    ranges = [jc.activations.ranges_of(s, jc.trace.percentile(99.9))["w"] for s in (here, there)]
    assert ranges[0] == ranges[1]
