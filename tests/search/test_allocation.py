"""Allocation is optimal, and says what cannot be had."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxcomp as jc
from jaxcomp.search import Infeasible, Option, Plan, Table, Unit, allocate, frontier
from tests.marks import quick
from tests.search.knapsacks import HAWQ_COSTS, halfway, hawq, least_by_states, least_by_trying, random_table


@pytest.mark.parametrize("cost", HAWQ_COSTS)
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_the_published_problem_of_hawq_v3_is_solved_to_optimality(network, cost):
    table = hawq(network)
    budget = halfway(table, cost)
    plan = allocate(table, {cost: budget})
    assert plan.gap == 0
    assert not plan.broken
    assert math.isclose(plan.loss, least_by_states(table, cost, budget), rel_tol=1e-9)
    ties = {name: option.ties for name, option in plan.options.items() if option.ties}
    assert len({(tie, level) for said in ties.values() for tie, level in said.items()}) == len(ties) / 2


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_several_budgets_at_once_cost_no_less_than_each(network):
    table = hawq(network)
    budgets = {cost: halfway(table, cost) for cost in HAWQ_COSTS}
    plan = allocate(table, budgets)
    assert plan.gap == 0
    assert not plan.broken
    assert plan.loss >= max(least_by_states(table, cost, b) for cost, b in budgets.items()) * (1 - 1e-9)


@pytest.mark.parametrize("seed", quick(range(12), 0, 1, 2))
def test_it_finds_what_trying_all_finds(seed):
    table = random_table(seed, units=6, options=4, tied=(1, 4) if seed % 2 else ())
    budgets = {"a": 120.0, "b": 2.5}
    wanted = least_by_trying(table, budgets)
    if wanted is None:
        with pytest.raises(Infeasible):
            allocate(table, budgets)
        return
    plan = allocate(table, budgets)
    assert math.isclose(plan.loss, wanted, rel_tol=1e-6)
    assert plan.bound <= plan.loss
    assert plan.gap <= 1e-6 * plan.loss


def test_small_losses_beside_large_ones_are_told_apart():
    """An absolute gap of 1e-6, where the solver stops, would leave the two small units to chance."""
    large = Unit("a", ("a",), (Option("x", costs={"n": 1.0}, loss=1e3), Option("y", costs={"n": 2.0}, loss=0.0)))
    small = [
        Unit(f"b{i}", (f"b{i}",), (Option("x", costs={"n": 1.0}, loss=x), Option("y", costs={"n": 2.0}, loss=0.0)))
        for i, x in enumerate((3e-9, 2e-9, 5e-9))
    ]
    assert allocate(Table((large, *small)), {"n": 6.0}).loss == 5e-9


def test_a_cost_can_be_minimized_under_a_bound_on_the_loss():
    table = hawq("resnet18")
    least = allocate(table, {"bytes": halfway(table, "bytes")})
    back = allocate(table, {"loss": least.loss}, minimize="bytes")
    assert back.costs["bytes"] <= least.costs["bytes"]
    assert back.loss <= least.loss


def test_a_budget_that_is_met_exactly_is_met():
    table = random_table(3, units=5, options=3)
    cheapest = sum(min(o.costs["a"] for o in u.options) for u in table)
    assert allocate(table, {"a": cheapest}).costs["a"] == cheapest


def test_what_cannot_be_met_names_the_nearest():
    table = hawq("resnet18")
    with pytest.raises(
        Infeasible, match=r"at most 1,000 bytes and 100,000,000 bops; the nearest takes 5,578,752 bytes"
    ) as e:
        allocate(table, {"bytes": 1000.0, "bops": 1e8})
    assert set(e.value.nearest.choice.values()) == {"int4"}
    assert any("bytes of 1,000" in words for words in e.value.nearest.broken)


def test_ties_that_no_options_share_are_an_error():
    a = Unit("a", ("a",), (Option("x", loss=0.0, ties={"t": "1"}),))
    b = Unit("b", ("b",), (Option("x", loss=0.0, ties={"t": "2"}),))
    with pytest.raises(Infeasible, match="no choice agrees on the ties 't'"):
        allocate(Table((a, b)), {})


def test_a_limit_for_each_unit_takes_options_away():
    table = random_table(5, units=4, options=4)
    plan = allocate(table, {}, each={"a": 25.0})
    assert all(o.costs["a"] <= 25 for o in plan.options.values())
    with pytest.raises(Infeasible, match=r"'u\d' takes \d+ a at least, as 'o\d', and 0.5 are allowed"):
        allocate(table, {}, each={"a": 0.5})


def test_what_was_not_measured_or_is_no_number_is_said():
    unmeasured = Table((Unit("a", ("a",), (Option("int4", costs={"n": 1.0}),)),))
    with pytest.raises(ValueError, match="nobody measured what 'a' loses as 'int4'"):
        allocate(unmeasured, {"n": 1.0})
    broken = unmeasured.with_losses({("a", "int4"): math.inf})
    with pytest.raises(ValueError, match="every option of 'a' leaves a network whose outputs are not finite"):
        allocate(broken, {"n": 1.0})
    done = unmeasured.with_losses({("a", "int4"): 0.0})
    with pytest.raises(ValueError, match="no unit has a cost 'bytes'; the table has 'loss', 'n'"):
        allocate(done, {"bytes": 1.0})
    with pytest.raises(ValueError, match="the budget of n must be a positive finite number, got 0"):
        allocate(done, {"n": 0})


def test_the_frontier_falls_and_is_never_above_a_uniform_choice():
    table = hawq("resnet50")
    plans = frontier(table, "bytes", points=6)
    sizes, losses = [p.costs["bytes"] for p in plans], [p.loss for p in plans]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    for bits in (4, 8):
        uniform = [u.option(f"int{bits}") for u in table]
        size, loss = sum(o.costs["bytes"] for o in uniform), sum(o.loss for o in uniform)
        assert min(x for s, x in zip(sizes, losses, strict=True) if s <= size) <= loss * (1 + 1e-12)


def quantized_table():
    def unit(path, loss):
        int8 = Option("int8", jc.quantize(jc.Int(8)), {"bytes": 8.0}, loss=0.0)
        return Unit(
            path,
            (path,),
            (
                Option("as it is", costs={"bytes": 32.0}, loss=0.0),
                int8,
                Option("int4 50%", jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))), {"bytes": 3.0}, loss=loss),
            ),
        )

    return Table((unit("a.b/kernel", 1.0), unit("aXb/kernel", 2.0)), "KL")


def test_a_plan_is_applied_changed_and_read_again(tmp_path):
    plan = allocate(quantized_table(), {"bytes": 12.0})
    assert plan.choice == {"a.b/kernel": "int4 50%", "aXb/kernel": "int8"}
    params = {"a.b": {"kernel": jnp.ones((4, 2))}, "aXb": {"kernel": jnp.ones((4, 2))}}
    t = plan.transform
    made = t.apply(t.init(params), params)
    assert [made[k]["kernel"].method for k in params] == ["Masked Quantized int4", "Quantized int8"]
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert repr(again) == repr(plan)
    assert repr(again.transform) == repr(plan.transform)
    assert (again.budgets, again.gap) == (plan.budgets, 0)
    (tmp_path / "plan.json").write_text(
        (tmp_path / "plan.json").read_text().replace('"aXb/kernel": "int8"', '"aXb/kernel": "as it is"')
    )
    edited = Plan.load(tmp_path / "plan.json")
    assert edited.choice["aXb/kernel"] == "as it is"
    assert edited.broken == ("35 bytes of 12",)
    (tmp_path / "plan.json").write_text('{"version": 1,')
    with pytest.raises(ValueError, match=r"plan.json is no JSON: .*; mend it, or delete it to decide anew"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"version": 1, "choice": {"a": 1}}')
    with pytest.raises(ValueError, match=r"plan.json: this is no plan of jaxcomp.search: KeyError"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(
        ValueError, match="'aXb/kernel' has no option 'int5'; its options are 'as it is', 'int8', 'int4 50%'"
    ):
        plan.changed({"aXb/kernel": "int5"})
    assert math.isnan(plan.changed({"aXb/kernel": "int8"}).gap)


def test_tables_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match="'a' has no options"):
        Unit("a", (), ())
    with pytest.raises(ValueError, match="'a' has two options of one label"):
        Unit("a", (), (Option("x"), Option("x")))
    with pytest.raises(ValueError, match=r"costs \['n'\] as 'x' and \[\] as 'y'"):
        Unit("a", (), (Option("x", costs={"n": 1.0}), Option("y")))
    with pytest.raises(ValueError, match="'x' costs nan n"):
        Option("x", costs={"n": math.nan})
    with pytest.raises(ValueError, match="'a' stand twice among the units"):
        Table((Unit("a", (), (Option("x"),)), Unit("a", (), (Option("x"),))))


def test_an_answer_of_the_solver_that_breaks_a_tie_is_not_taken(monkeypatch):
    """scipy's milp may call what breaks a constraint optimal (scipy issue 24141)."""
    table = random_table(1, units=4, options=3, tied=(0, 2))
    budgets = {"a": 1e3, "b": 1e3}
    wanted, solve, calls = allocate(table, budgets), scipy.optimize.milp, []

    def at_first_wrong(objective, **given):
        done = solve(objective, **given)
        calls.append(done)
        if len(calls) <= 6:
            first = len(table.units[0].options)
            chosen = np.argmax(done.x[:first])
            done.x[:first] = np.roll(done.x[:first], 1)  # the first unit alone takes another option
            assert np.argmax(done.x[:first]) != chosen
        return done

    monkeypatch.setattr(scipy.optimize, "milp", at_first_wrong)
    assert allocate(table, budgets).loss == wanted.loss
    assert len(calls) > 6
