"""Sparsities, schedules and masks equal to jaxpruner's, by figures recorded from it.

Source: github.com/google-research/jaxpruner at 14f976266e5ceed3b8701df3b5faa2ec7e036a90, run on jax 0.10.2 with
``jax.tree_map`` put back; the call is beside each table. It is on no registry and imports on no current jax.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.gates import every
from jaxcomp.core.optimizers import MaskState
from jaxcomp.pruning.masks.densities import erk
from jaxcomp.pruning.schedules import PruningSchedule
from jaxcomp.pruning.scores import magnitude, taylor
from jaxcomp.pruning.specs import ERK, Given, StraightThrough
from tests.figures import TIES, W, digits, mask, masks, normal
from tests.marks import quick

G = normal(8, 12, seed=2)
V = normal(6, 4, seed=1)


def resnet18() -> dict[str, tuple[int, ...]]:
    """The 21 kernels of ResNet-18 for ImageNet."""
    shapes, width = {"stem": (7, 7, 3, 64)}, 64
    for c in (64, 128, 256, 512):
        for block in (0, 1):
            shapes |= {f"{c}/{block}/a": (3, 3, width, c), f"{c}/{block}/b": (3, 3, c, c)}
            if width != c:
                shapes[f"{c}/{block}/down"] = (1, 1, width, c)
            width = c
    return shapes | {"head": (512, 1000)}


# sparsity_distributions.get_sparsities_erdos_renyi(shapes, sparsity); kernels of one shape get one sparsity.
# fmt: off
ERK_FIGURES = {
    # sparsity:         0.5          0.8          0.9          0.95         0.98
    (7, 7, 3, 64):     (0.0,         0.0,         0.0,         0.508072662, 0.804193381),
    (3, 3, 64, 64):    (0.0,         0.114136638, 0.577293127, 0.792309999, 0.917331130),
    (3, 3, 64, 128):   (0.0,         0.345518860, 0.687701638, 0.846557387, 0.938923746),
    (3, 3, 128, 128):  (0.0,         0.566984700, 0.793378357, 0.898479887, 0.959590963),
    (1, 1, 64, 128):   (0.0,         0.0,         0.0,         0.0,         0.461418484),
    (3, 3, 128, 256):  (0.0,         0.677717620, 0.846216716, 0.924441138, 0.969924572),
    (3, 3, 256, 256):  (0.321220790, 0.785971445, 0.897872127, 0.949821166, 0.980026831),
    (1, 1, 128, 256):  (0.0,         0.0,         0.0,         0.326944902, 0.732097339),
    (3, 3, 256, 512):  (0.492881169, 0.840098358, 0.923699832, 0.962511180, 0.985077961),
    (3, 3, 512, 512):  (0.662575972, 0.893605496, 0.949231800, 0.975055888, 0.990071253),
    (1, 1, 256, 512):  (0.0,         0.0,         0.316847334, 0.664344284, 0.866395693),
    (512, 1000):       (0.0,         0.280308739, 0.656585365, 0.831268923, 0.932838330),
}
# The same with sparsity 0.9 and erk_power_scale=0.5, and with custom_sparsity_map={"head": 0.5}.
SOFTER = (0.657263955, 0.777301600, 0.808582211, 0.844301171, 0.431576769, 0.865676498,
          0.890536436, 0.599101334, 0.905384958, 0.922822035, 0.716889273, 0.799272516)
WITHOUT_HEAD = (0.0, 0.521350711, 0.646371048, 0.766033370, 0.0, 0.825864531,
                0.884356189, 0.0, 0.913602017, 0.942512970, 0.226436667)
# fmt: on


@pytest.mark.parametrize(("column", "sparsity"), list(enumerate([0.5, 0.8, 0.9, 0.95, 0.98])))
def test_erk_of_resnet18(column, sparsity) -> None:
    shapes = resnet18()
    want = {name: ERK_FIGURES[shape][column] for name, shape in shapes.items()}
    assert erk(shapes, sparsity) == pytest.approx(want, abs=1e-9)


def test_softer_erk_and_erk_of_all_but_the_head() -> None:
    shapes = resnet18()
    want = dict(zip(ERK_FIGURES, SOFTER, strict=True))
    assert erk(shapes, 0.9, ERK(0.5)) == pytest.approx({k: want[s] for k, s in shapes.items()}, abs=1e-9)
    want = dict(zip(ERK_FIGURES, WITHOUT_HEAD, strict=False))
    del shapes["head"]
    assert erk(shapes, 0.9) == pytest.approx({k: want[s] for k, s in shapes.items()}, abs=1e-9)


def test_uniform_with_one_leaf_by_a_table() -> None:
    """MagnitudePruning with uniform(sparsity=0.7, custom_sparsity_map={("two",): 0.25}) of W and V."""
    got = masks(jc.prune(scope=Given({"two": 0.25, ".*": 0.7})), {"one": W, "two": V})
    assert {name: digits(m) for name, m in got.items()} == {"one": "024a040001e3d22634311950", "two": "ffdb63"}


# PolynomialSchedule(update_freq, update_start_step, update_end_step, power).get_sparsity_at_step(target, step) for the
# steps, and the steps below 40 at which is_mask_update_iter is true.
SCHEDULES = {
    (4, 6, 26, 3, 0.8): (
        {4: 0.0, 6: 0.1141, 8: 0.3087, 10: 0.4625, 14: 0.6669, 18: 0.7657, 22: 0.7973, 24: 0.7999, 25: 0.8, 30: 0.8},
        [8, 12, 16, 20, 24],
    ),
    (5, 1, 11, 2, 0.6): (
        {0: 0.0, 1: 0.114, 2: 0.216, 3: 0.306, 4: 0.384, 5: 0.45, 7: 0.546, 9: 0.594, 10: 0.6, 13: 0.6},
        [5, 10],
    ),
}


def gradual(period: int, start: int, end: int, power: float, target: float) -> PruningSchedule:
    """jaxpruner counts the step as done, so its numbers are one step ahead of the paper's; it is due at multiples."""
    shifted = jc.pruning.polynomial(target, begin=start - 1, end=end - 1, power=power)
    return PruningSchedule(shifted, every(period, start=ceil(start / period) * period, stop=end + 1))


@pytest.mark.parametrize("args", SCHEDULES)
def test_polynomial_schedules(args) -> None:
    plan, (values, due) = gradual(*args), SCHEDULES[args]
    assert {step: float(plan(step)) for step in values} == pytest.approx(values, abs=1e-6)
    assert [step for step in range(40) if plan.due(step)] == due


# MagnitudePruning(sparsity_distribution_fn=partial(uniform, sparsity=…)).instant_sparsify(W), and SaliencyPruning.
MAGNITUDE = {
    0.0: "ffffffffffffffffffffffff",
    0.3: "2bebb6ba4bf3d6ff3dfd5fdd",
    0.5: "03cb16b203f3d27635b519d5",
    0.9: "000800000001800224210050",
}
SALIENCY = "096a10ba0371d490389d0ad4"  # 0.6


@pytest.mark.parametrize("sparsity", MAGNITUDE)
def test_magnitude(sparsity) -> None:
    assert digits(mask(jc.prune(sparsity), W)) == MAGNITUDE[sparsity]


def test_saliency() -> None:
    assert digits(mask(jc.prune(0.6, score=taylor), W, grads=G)) == SALIENCY


def test_of_equal_scores_theirs_keeps_the_lower_index() -> None:
    theirs = np.unpackbits(np.frombuffer(bytes.fromhex("2febd49203f3d22634b519d1"), np.uint8)).astype(bool)  # TIES, 0.5
    size = np.abs(TIES).reshape(-1)
    ours = mask(jc.prune(0.5), TIES).reshape(-1)
    assert sorted(size[ours]) == sorted(size[theirs])
    edge = np.flatnonzero(size == size[theirs].min())
    assert theirs[edge].tolist() == ours[edge][::-1].tolist() == sorted(theirs[edge], reverse=True)


def test_theirs_rounds_what_is_kept_and_keeps_one_at_least() -> None:
    """At 0.999 of 96 theirs keeps one, ours none; at half of seven theirs keeps four, ours (as torch) prunes four."""
    assert digits(mask(jc.prune(0.999), W)) == "0" * 24
    assert digits(mask(jc.prune(95), W)) == "000800000000000000000000"
    seven = np.arange(1.0, 8.0, dtype=np.float32)[None]
    assert mask(jc.prune(0.5), seven).astype(int).tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert mask(jc.prune(3), seven).astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 1]]


# The same with sparsity_type=NByM(n, m, axis), on W and on TIES.
N_M = {
    (2, 4, -1): ("63ca969a5363c66635355955", "336a359a5363c33635353955"),
    (2, 4, -2): ("47ce969013ebc2262c3d39dd", "02ca56d817fbc2262c3d39dd"),
    (1, 4, -2): ("008e140001e3c0202c3110c0", "0008040007fbc020242101c9"),
}


@pytest.mark.parametrize("args", N_M)
def test_n_m_and_its_ties(args) -> None:
    for w, want in zip((W, TIES), N_M[args], strict=True):
        assert digits(mask(jc.prune(structure=jc.NM(*args)), w)) == want


# The same with sparsity_type=Block(shape, use_avg_pooling): (average, maximum), sparsity 0.5.
BLOCKS = {
    (8, 2, 3): ("e00e001c71c7e3fe3ffc0fc0", "e00e00007007e3fe3fff8ff8"),
    (8, 4, 4): ("0f00f00f00f0ff0ff0ff0ff0", "f00f00f00f000ff0ff0ff0ff"),
    (6, 4, 4): ("0f00f00f00f0f0ff0f", "f0ff0ff0ff0f00f00f"),  # the first six rows
}


@pytest.mark.parametrize("args", BLOCKS)
def test_blocks(args) -> None:
    rows, *shape = args
    for pool, want in zip(("mean", "max"), BLOCKS[args], strict=True):
        assert digits(mask(jc.prune(0.5, structure=jc.pruning.Block(shape, pool=pool)), W[:rows])) == want


def test_channels() -> None:
    """sparsity_type=Channel(axis), sparsity 0.5."""
    for axis, want in ((-1, "b34" * 8), (0, "000000000fff000fffffffff")):
        assert digits(mask(jc.prune(0.5, structure=jc.Filters(axis)), W)) == want


def test_global_scopes_with_and_without_their_normalization() -> None:
    """GlobalMagnitudePruning(sparsity=0.6, use_normalization=…) and GlobalSaliencyPruning of W and 3 V."""
    params = {"one": W, "two": 3 * V}
    by_norm = replace(magnitude, normalize=lambda x: x / (jnp.linalg.norm(x) + 1e-8))
    grads = {"one": G, "two": V}
    for score, stats, want in (
        (magnitude, {}, ("024a140201e3d22634b11951", "df9b23")),
        (by_norm, {}, ("024a140201e3d22634311951", "ff9b23")),
        (taylor, {"grads": grads}, ("096810ba0371d480389d08d4", "5f1b23")),
    ):
        got = masks(jc.prune(0.6, score=score, scope=jc.Global()), params, **stats)
        assert (digits(got["one"]), digits(got["two"])) == want


# SteMagnitudePruning(PolynomialSchedule(2, 3, 9), sparsity 0.8).pre_forward_update(W) != 0, at a step.
STE = {
    2: "ffffffffffffffffffffffff",
    3: "2beb96ba4bf3d67f3dfd5fd5",
    5: "024a040001e3d22634311950",
    8: "020804000163c00234310050",
    20: "020804000163c00234310050",
}


def test_straight_through_magnitude_over_a_schedule() -> None:
    t = jc.prune(jc.cubic(0.8, begin=2, end=8), gradient=StraightThrough())
    for step, want in STE.items():
        assert digits(mask(t, W, step)) == want


# wrap_optax(sgd(0.1)) of MagnitudePruning(PolynomialSchedule(2, 2, 6), sparsity 0.8): the masks after a step that is
# due, with the gradient G at every step and post_gradient_update after it.
GRADUAL = {2: "2beb96a20bf3d26635f11fd1", 4: "020a102201a3800234210050", 6: "020a102201a2800234210050"}


def test_a_gradual_loop() -> None:
    plan = gradual(2, 2, 6, 3, 0.8)
    t = plan.gate(jc.prune(plan))
    params = {"kernel": jnp.asarray(W)}
    state = t.init(params)
    for step in range(9):
        state = t.update(state, params, step=jnp.int32(step))
        params = {"kernel": params["kernel"] - 0.1 * G}
        seen = t.apply(state, params)
        params = jc.materialize(seen)
        if step in GRADUAL:
            assert digits(seen["kernel"].mask) == GRADUAL[step]


# RigL._update_masks(|V| > 1/2, |V|, |V2|, fraction); theirs rounds what is kept, so half of eleven drops five.
DROP_AND_GROW = {0.3: "da4923", 5 / 11: "da4227"}


@pytest.mark.parametrize("fraction", DROP_AND_GROW)
def test_drop_and_grow(fraction) -> None:
    params, grads = {"kernel": jnp.asarray(V)}, {"kernel": jnp.asarray(normal(6, 4, seed=3))}
    active = int((np.abs(V) > 0.5).sum())
    by_size = jc.pruning.regrow(1 - active / V.size, key=jax.random.key(0), initial=magnitude)
    state = by_size.init(params)
    assert digits(state.masks["kernel"]) == "5b1923"
    # Half way to its stop, RigL's share is half of what it began with.
    t = jc.pruning.rigl(0.5, key=jax.random.key(0), period=10, stop=100, fraction=2 * fraction)
    state = t.update(state, params, step=jnp.int32(50), grads=grads)
    assert digits(by_size.apply(state, params)["kernel"].mask) == DROP_AND_GROW[fraction]


def cosine(fraction: float, step: int, stop: int) -> float:
    """f_decay of RigL, equation 1, by which SET is run there too."""
    return fraction / 2 * (1 + np.cos(np.pi * step / stop))


@pytest.mark.parametrize("falls", quick([True, False], True))
def test_set_drops_the_published_share_of_the_active_weights(falls) -> None:
    """So many of the smallest go, and none above them; SET itself keeps the share, the RigL paper lets it fall."""
    w = jnp.asarray(normal(40, 50))
    params = dict.fromkeys("uvwx", w)  # each draws for itself, and few of what it drops come back at once
    fraction = optax.cosine_decay_schedule(0.3, 100) if falls else 0.3
    t = jc.pruning.sparse_evolution(0.9, key=jax.random.key(0), period=10, stop=100, fraction=fraction)
    update = jax.jit(lambda state, step: t.update(state, params, step=step))
    draw = np.random.default_rng(1)
    state = MaskState({name: jnp.asarray(draw.permutation(2000).reshape(40, 50) < 200) for name in params})
    for step in (10, 50, 80):
        with jax.numpy_dtype_promotion("standard"):  # optax's own code mixes types
            new = update(state, step)
        count = round((cosine(0.3, step, 100) if falls else 0.3) * 200)
        ranks = []
        for name, old in state.masks.items():
            now = np.asarray(new.masks[name])
            ascending = np.argsort(np.where(old, np.abs(w), np.inf), axis=None)[:200]
            ranks += np.flatnonzero(~now.reshape(-1)[ascending]).tolist()
            assert now.sum() == old.sum() == 200
        assert max(ranks) == count - 1
        state = new
    for step in (85, 100, 110):
        with jax.numpy_dtype_promotion("standard"):
            chex.assert_trees_all_equal(update(state, step), state)
