"""Searches find optima that are known, go on from what was saved, and say what they cannot do."""

import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.search import Choice, Interval, cross_entropy, policy_gradient
from tests.marks import quick

KEY = jax.random.key(0)
MIXED = {"bits": Choice((2, 4, 8)), "method": Choice(("prune", "rank")), "sparsity": Interval(0.0, 0.9)}
SEARCHES = {"cross_entropy": cross_entropy, "policy_gradient": policy_gradient}


def run(search, score, generations, state=None):
    state = search.init(KEY) if state is None else state
    for _ in range(generations):
        asked = search.ask(state)
        state = search.tell(state, asked, [score(c) for c in asked])
    return state


def mixed_score(c):
    """The best is 4 bits, rank, 0.6; a detour of 8 bits, prune, 0.1 is nearly as good."""
    good = -((c["sparsity"] - 0.6) ** 2) - (c["bits"] != 4) - (c["method"] != "rank")
    return max(good, -0.2 - (c["bits"] != 8) - (c["method"] != "prune") - (c["sparsity"] - 0.1) ** 2)


@pytest.mark.parametrize("name", quick(SEARCHES, "cross_entropy"))
def test_mixed_decisions(name) -> None:
    best, score = run(SEARCHES[name](MIXED), mixed_score, 40).found(MIXED)
    assert (best["bits"], best["method"]) == (4, "rank")
    assert best["sparsity"] == pytest.approx(0.6, abs=0.05)
    assert score > -0.003


LAYERS = {f"layer {i}": Choice((2, 3, 4, 5, 6, 8)) for i in range(6)}
_RNG = np.random.default_rng(0)
WEIGHT, SIZE = _RNG.uniform(0.5, 4, 6), _RNG.uniform(0.5, 2, 6)
COUPLING = np.triu(_RNG.uniform(0, 1.5, (6, 6)), 1)
BUDGET = 4.0 * SIZE.sum()


def coupled(bits):
    """An error that does not add up over layers, or minus infinity over the budget."""
    noise = WEIGHT**0.5 * 2.0 ** -np.asarray(bits, float)
    total = (noise**2).sum() + noise @ COUPLING @ noise
    return -np.log(total) if np.dot(bits, SIZE) <= BUDGET else -np.inf


def test_a_budget_of_layers_that_are_coupled() -> None:
    """Beside all 46,656 networks: among the best hundredth of a percent, and better than as many at random."""
    every = [coupled(bits) for bits in itertools.product((2, 3, 4, 5, 6, 8), repeat=6)]
    found = run(cross_entropy(LAYERS), lambda c: coupled(list(c.values())), 25).found(LAYERS)[1]
    assert found >= np.sort(every)[-5]
    rng = np.random.default_rng(1)
    assert found > max(rng.choice(every, 25 * 64))


@pytest.mark.slow
def test_an_agent_meets_a_budget_by_repair() -> None:
    """As in HAQ, bits are lowered in order until the budget is met; the agent learns of what came out."""

    def repair(c):
        c = dict(c)
        names = itertools.cycle(c)
        while np.dot(list(c.values()), SIZE) > BUDGET:
            name = next(names)
            c[name] = max((v for v in LAYERS[name].values if v < c[name]), default=2)
        return c

    every = [coupled(bits) for bits in itertools.product((2, 3, 4, 5, 6, 8), repeat=6)]
    features = {name: [WEIGHT[i], SIZE[i]] for i, name in enumerate(LAYERS)}
    search = policy_gradient(LAYERS, features=features, repair=repair)
    state = run(search, lambda c: coupled(list(c.values())), 80)
    assert all(np.isfinite(coupled(list(c.values()))) for c in search.ask(state))
    assert state.found(LAYERS)[1] >= np.sort(every)[-47]  # the best thousandth


@pytest.mark.parametrize("name", quick(SEARCHES, "cross_entropy"))
def test_a_search_goes_on_from_what_was_saved(name) -> None:
    search = SEARCHES[name](MIXED, population=8)
    whole = run(search, mixed_score, 4)
    half = pickle.loads(pickle.dumps(run(search, mixed_score, 2)))
    again = run(search, mixed_score, 2, half)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert search.ask(whole) == search.ask(again)


@pytest.mark.parametrize("name", quick(SEARCHES, "cross_entropy"))
def test_what_is_asked_is_json_and_within(name) -> None:
    search = SEARCHES[name](MIXED, population=16)
    for c in search.ask(search.init(KEY)):
        assert json.loads(json.dumps(c)) == c
        assert c["bits"] in (2, 4, 8)
        assert 0 <= c["sparsity"] <= 0.9


def test_scores_that_are_no_numbers_are_worst() -> None:
    search = cross_entropy(MIXED, population=8)
    state = search.init(KEY)
    asked = search.ask(state)
    state = search.tell(state, asked, [np.nan, np.inf, -3.0, *[-np.inf] * 5])
    assert state.found(MIXED) == (asked[2], -3.0)


BEGUN = cross_entropy(MIXED).init(KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy({}), "cross_entropy: there is nothing to decide"),
        (lambda: cross_entropy(MIXED, population=1), "population must be an integer, 2 or more, got 1"),
        (lambda: cross_entropy(MIXED, elite=0), r"elite must be a number in \(0, 1\], got 0"),
        (lambda: policy_gradient(MIXED, entropy=-1), "entropy must be a number, 0 or more"),
        (lambda: policy_gradient(MIXED, features={"bits": [1]}), "features= wants equally many numbers for each"),
        (lambda: Choice((2,)), "Choice: wants two or more different values"),
        (lambda: Choice((2, 2)), "Choice: wants two or more different values"),
        (lambda: Interval(1.0, 0.0), "Interval: wants finite numbers low < high"),
        (lambda: BEGUN.found(MIXED), "no candidate had a finite score yet"),
        (lambda: cross_entropy(MIXED).tell(BEGUN, [], []), "wants a score for each candidate, got 0 for 0"),
        (lambda: cross_entropy(MIXED).tell(BEGUN, [{"bits": 2}], [0.0]), "a candidate decides 'bits', wanted"),
        (
            lambda: cross_entropy(MIXED).tell(BEGUN, [{"bits": 3, "method": "rank", "sparsity": 0.5}], [0.0]),
            "'bits' is 3, wanted of Choice",
        ),
        (
            lambda: cross_entropy(MIXED).tell(BEGUN, [{"bits": 2, "method": "rank", "sparsity": 0.5}], [np.nan]),
            "none of 1 scores is a finite number",
        ),
        (lambda: cross_entropy(MIXED).init(7), "key must be one key"),
    ],
    ids=["nothing", "one", "elite", "entropy", "features", "one value", "twice", "interval", "untold", "empty", "lost",
         "outside", "no score", "no key"],
)  # fmt: skip
def test_what_cannot_be_searched_is_said(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_decision_is_a_choice_or_an_interval() -> None:
    with pytest.raises(TypeError, match="'bits' is 4, wanted a Choice or an Interval"):
        cross_entropy({"bits": 4})


def test_a_state_is_a_tree_of_arrays() -> None:
    assert all(isinstance(x, np.ndarray | np.generic | jnp.ndarray) for x in jax.tree.leaves(BEGUN))
