"""How many go: fractions as decimals, counts that look like percent, and what is selected but left whole."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.core.specs import share_of
from jaxcomp.pruning.masks.densities import erk
from jaxcomp.pruning.masks.thresholds import fraction_of
from jaxcomp.pruning.schedules import alternating, constant, iterative, polynomial

HALVES = [("0.1", 5, 0), ("0.3", 5, 2), ("0.95", 150, 142), ("0.29", 150, 44), ("0.7", 35, 24), ("0.5", 7, 4)]
"""A decimal, units, and what goes: the decimal's exact product rounds half to even."""


def gone(t: jc.Transform, units: int, step: int = 0) -> int:
    params = {"kernel": jnp.arange(1.0, units + 1)[None]}
    state = t.update(t.init(params), params, step=jnp.int32(step))
    return int((~state["kernel"]).sum())


NOTHING = pytest.mark.filterwarnings("ignore:prune. nothing of 'kernel' is pruned")


@NOTHING
@pytest.mark.parametrize(("text", "units", "want"), HALVES)
def test_fault_4_a_fraction_is_the_decimal_that_was_written(text, units, want) -> None:
    assert round(Fraction(text) * units) == want == share_of(float(text), units)
    assert gone(jc.prune(float(text)), units) == want
    assert gone(jc.prune(np.float32(text)), units) == want


@NOTHING
@pytest.mark.parametrize(("text", "units", "want"), HALVES)
def test_fault_4_schedules_end_at_the_number_that_was_written(text, units, want) -> None:
    final = float(text)
    for plan in (
        jc.cubic(final, end=7),
        polynomial(final, begin=0, end=7),
        constant(final),
        alternating(final, dense=1, sparse=1, end=5),
        iterative(final, rounds=1, every=1),
        optax.constant_schedule(jnp.float32(final)),
        lambda step: jnp.where(step > 3, final, 0.0),
    ):
        assert gone(jc.prune(plan), units, step=9) == want


@given(
    total=st.integers(0, 2**31 - 1), fraction=st.one_of(st.floats(0, 1), st.integers(0, 10**4).map(lambda n: n / 10**4))
)
def test_fault_4_counts_on_the_device_are_those_of_the_host(total, fraction) -> None:
    want = round(Fraction(repr(fraction)) * total)
    assert int(fraction_of(total, fraction)) == int(fraction_of(jnp.uint32(total), fraction)) == want


device = jax.jit(fraction_of)


@given(total=st.integers(0, 2**31 - 1), places=st.integers(0, 10**6), ulps=st.integers(-1, 1))
def test_fault_4_a_float32_is_the_decimal_of_six_places_next_to_it(total, places, ulps) -> None:
    f = np.float32(places / 10**6)
    f = f if not ulps or f in (0, 1) else np.nextafter(f, np.float32(f + ulps))
    assert int(device(jnp.uint32(total), f)) == round(Fraction(places, 10**6) * total)


@given(total=st.integers(0, 2**32 - 1), fixed=st.integers(0, 2**24))
def test_fault_4_any_other_float32_is_its_value(total, fixed) -> None:
    value = Fraction(fixed, 2**24)
    nearest = Fraction(round(value * 10**6), 10**6)
    if abs(value - nearest) > value / 2**22:
        assert int(device(jnp.uint32(total), np.float32(fixed / 2**24))) == round(value * total)


def test_fault_4_what_is_no_fraction() -> None:
    for f, want in ((-0.5, 0), (float("nan"), 0), (1.5, 7), (80.0, 7)):
        assert int(device(jnp.uint32(7), jnp.float32(f))) == want
    t = jc.prune(lambda step: jnp.float32(80))
    with pytest.raises(
        ValueError, match=r"prune: the schedule's sparsity must be a number in \[0, 1\), got 80.0 at step"
    ):
        t.init({"kernel": jnp.ones((2, 2))})


def test_fault_4_the_same_decimal_elsewhere() -> None:
    """What regrow masks, top-k sends, and ERK's whole zeros."""
    params = {"kernel": jnp.arange(150.0)[None]}
    masks = jc.pruning.regrow(0.95, key=jax.random.key(0)).init(params).masks
    assert int(masks["kernel"].sum()) == 150 - 142
    topk = jc.federated.topk(0.29)
    assert topk.encode((), {"w": jnp.arange(150.0)})[0]["w"].count == 44
    density = 1 - np.array(list(erk({"a": (10, 10), "b": (10, 10)}, 0.29).values()))
    assert (density * 100).sum() == pytest.approx(200 - 2 * math.floor(Fraction("0.29") * 100))


def test_fault_4_a_stack_of_prunes_rounds_what_is_left() -> None:
    t = jc.chain(jc.prune(0.5), jc.prune(0.1))
    params = {"kernel": jnp.arange(1.0, 11)[None]}
    assert int((~t.apply(t.init(params), params)["kernel"].mask).sum()) == 5


def test_fault_4_a_count_that_looks_like_percent_warns() -> None:
    params = {"a": {"kernel": jnp.ones((32, 64))}, "b": {"kernel": jnp.ones((8, 4))}}
    said = (
        r"prune: sparsity=80 is an int and so a count: 80 of the 2048 units of 'a/kernel' are pruned \(3.91%\); for 80"
    )
    with pytest.warns(UserWarning, match=said + r" percent write 0.8, and if the count is meant"):
        state = jc.prune(80, where="a/kernel").init(params)
    assert int((~state["a/kernel"]).sum()) == 80
    with pytest.warns(UserWarning, match=r"2080 units of 'a/kernel', 'b/kernel'"):
        jc.prune(80, scope=jc.Global()).init(params)
    with pytest.warns(UserWarning, match=r"sparsity=80 is an int"):
        jc.prune(scope=jc.pruning.Given({".*": 80})).init({"kernel": params["a"]["kernel"]})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        t = jc.prune(80, where="a/kernel")
        for step in range(3):
            t.update(t.init(params), params, step=step)
    assert len(seen) == 1
    for quiet in (jc.prune(20, where="b/kernel"), jc.prune(500, where="a/kernel"), jc.prune(0.8)):
        quiet.init(params)


def test_fault_4_a_pattern_that_does_not_divide_warns() -> None:
    params = {"kernel": jnp.arange(1.0, 31).reshape(10, 3)}
    with pytest.warns(
        UserWarning,
        match=r"prune: groups of 4 do not divide axis 0 of 'kernel', 10 long: of the last 2 of each row all are",
    ):
        mask = jc.prune(structure=jc.NM(2, 4)).init(params)["kernel"]
    assert mask.sum(0).tolist() == [6, 6, 6]
    with pytest.warns(
        UserWarning, match=r"of the last 3 of each row 2 are kept, and kernels for 2:4 take no such array;"
    ):
        jc.prune(structure=jc.NM(2, 4, axis=1)).init({"kernel": jnp.ones((2, 7)), "other": jnp.ones((2, 8))})
    with pytest.warns(UserWarning, match=r"so it is with 2 leaves"):
        jc.prune(structure=jc.NM(2, 4, axis=1)).init({"kernel": jnp.ones((2, 7)), "other": jnp.ones((2, 6))})
    jc.prune(structure=jc.NM(2, 4)).init({"kernel": jnp.ones((8, 3))})


def test_fault_4_what_rounds_to_nothing_warns() -> None:
    params = {"kernel": jnp.ones((4, 1)), "wide": jnp.ones((4, 8))}
    with pytest.warns(
        UserWarning, match=r"prune: nothing of 'kernel' is pruned: 0.5 of 1 units rounds to 0; leave it out"
    ):
        jc.prune(0.5, structure=jc.Filters()).init(params)
    with pytest.warns(UserWarning, match=r"nothing of 'kernel', 'wide' is pruned: 0.01 of 36 units"):
        jc.prune(0.01, scope=jc.Global()).init(params)
    with pytest.warns(
        UserWarning, match=r"regrow: the mask of 'kernel' never moves: fraction=0.3 of 1 active weights rounds"
    ):
        jc.pruning.sparse_evolution(0.8, key=jax.random.key(0), period=10).init(params)
    jc.prune(0.0).init(params)


def test_fault_4_what_is_never_due_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every: no step is due, for stop=5 is not after start=5; never says that"):
        jc.every(1, start=5, stop=5)
    with pytest.raises(ValueError, match=r"every: no step is due, for stop=6 is not after start=10"):
        constant(0.5, begin=10, end=5)
    with pytest.raises(
        ValueError, match=r"rigl: masks move first at step 100, the period, and no more from stop=100 on"
    ):
        jc.pruning.rigl(0.9, key=jax.random.key(0), period=100, stop=100)
