"""ERK against the published loop, restated; PocketFlow's heuristic against its formula; traced against constant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.pruning.masks.densities import erk, heuristic
from jaxcomp.pruning.specs import ERK, Heuristic

RESNET = {
    "stem": (3, 3, 3, 64),
    "a": (3, 3, 64, 64),
    "down": (1, 1, 64, 128),
    "b": (3, 3, 64, 128),
    "c": (3, 3, 512, 512),
    "head": (512, 10),
}


def published(shapes: dict, sparsity: float, power: float) -> dict:
    """Round by round: the densest leaves that pass 1 are fixed at 1, and the scale is found again for the others."""
    fixed: set[str] = set()
    while True:
        free = [k for k in shapes if k not in fixed]
        raw = {k: (sum(shapes[k]) / np.prod(shapes[k])) ** power for k in free}
        zeros = {k: int(np.floor(sparsity * np.prod(shapes[k]))) for k in shapes}
        ones = sum(np.prod(shapes[k]) - zeros[k] for k in free) - sum(zeros[k] for k in fixed)
        scale = ones / sum(raw[k] * np.prod(shapes[k]) for k in free)
        top = max(raw.values())
        if top * scale <= 1:
            return {k: 0.0 if k in fixed else 1 - scale * raw[k] for k in shapes}
        fixed |= {k for k in free if raw[k] == top}


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_numbers_are_the_published_ones(sparsity, power) -> None:
    got, want = erk(RESNET, sparsity, ERK(power)), published(RESNET, sparsity, power)
    assert got == pytest.approx(want, abs=1e-9)
    traced = jax.jit(lambda s: erk(RESNET, s, ERK(power)))(jnp.float32(sparsity))
    assert {k: float(v) for k, v in traced.items()} == pytest.approx(want, abs=2e-5)


@given(
    shapes=st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6),
    sparsity=st.floats(0.01, 0.99),
)
def test_erk_meets_the_total(shapes, sparsity) -> None:
    named = {str(i): s for i, s in enumerate(shapes)}
    got = erk(named, sparsity)
    assert all(0 <= s <= 1 for s in got.values())
    zeros = sum(got[k] * np.prod(named[k]) for k in named)
    assert zeros == pytest.approx(sum(np.floor(sparsity * np.prod(s)) for s in shapes), rel=1e-6, abs=1e-6)


def test_the_heuristic_is_pocketflows_below_the_limit() -> None:
    sizes = {k: np.prod(s) for k, s in RESNET.items()}
    alpha = 0.5 * sum(sizes.values()) / sum(n * np.log(n) for n in sizes.values())
    assert heuristic(RESNET, 0.5) == pytest.approx({k: alpha * np.log(n) for k, n in sizes.items()}, rel=1e-9)
    traced = jax.jit(lambda s: heuristic(RESNET, s))(jnp.float32(0.5))
    assert {k: float(v) for k, v in traced.items()} == pytest.approx(heuristic(RESNET, 0.5), abs=1e-5)


def test_the_heuristic_stops_at_its_limit_and_meets_the_total() -> None:
    shapes = {"small": (10, 100), "large": (1000, 1000)}
    got = heuristic(shapes, 0.9, Heuristic(most=0.9))
    assert got == pytest.approx({"small": 0.9, "large": 0.9})
    got = heuristic(shapes, 0.8997, Heuristic(most=0.9))
    assert got["large"] == pytest.approx(0.9)
    assert 0.59 < got["small"] < 0.61  # the logarithms alone would say 0.45
    assert sum(got[k] * np.prod(s) for k, s in shapes.items()) == pytest.approx(0.8997 * 1_001_000)
    with pytest.raises(ValueError, match=r"Heuristic: no leaf may be sparser than most=0.9, got sparsity 0.95"):
        heuristic(shapes, 0.95, Heuristic(most=0.9))
