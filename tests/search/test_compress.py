"""One call compresses to a budget, says what it did, and goes on after a kill."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.search import Infeasible, Option, Plan, Quality, Recovery, Smaller, Table, Terms, Unit, compress, menu
from jaxcomp.search.channels import Widths, with_channels

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (16, 256)) / 4,
    "bias": jnp.zeros(256),
    "mid": jax.random.normal(KEYS[1], (256, 256)) / 16,
    "head": jax.random.normal(KEYS[2], (256, 8)) / 16,
}
DATA = list(np.asarray(jax.random.normal(KEYS[3], (4, 128, 16))))
OPTIONS = menu(bits=(8, 4), sparsities=(0.0,))


def fn(p, x):
    hidden = jax.nn.relu(x @ p["up"] + p["bias"][None])
    return jax.nn.relu(hidden @ p["mid"]) @ p["head"]


@pytest.fixture(scope="module")
def small():
    """The network at a sixth of its bytes."""
    return compress(fn, PARAMS, DATA, budget=6, options=OPTIONS, rounds=0, second_order=False)


def test_the_file_is_as_small_as_was_asked_for(small, tmp_path):
    size = jc.save(tmp_path / "small.safetensors", small.params)
    assert size == small.costs["bytes"] <= small.costs_before["bytes"] / 6
    assert small.met
    assert small.plan.gap == 0
    assert set(small.plan.choice.values()) <= {"as it is", "int8", "int4"}
    held = jc.load(tmp_path / "small.safetensors")
    assert jnp.array_equal(small.fn(held, DATA[0]), small.fn(small.params, DATA[0]))
    error = jnp.linalg.norm(small.fn(small.params, DATA[3]) - fn(PARAMS, DATA[3])) / jnp.linalg.norm(
        fn(PARAMS, DATA[3])
    )
    assert error**2 == pytest.approx(small.score, rel=1e-3)


def test_it_says_what_it_did(small):
    assert f"{small.ratio:.3g}x less" in repr(small)
    assert "noise on held-out data" in repr(small)
    page = small.report()
    assert {p.name for p in page.points} == {"original", "this"}
    assert page.ratio == pytest.approx(small.ratio)
    assert {layer.path for layer in page.layers} == set(PARAMS)


def test_a_plan_of_ones_own_is_applied(small):
    plan = small.plan.changed(dict.fromkeys(("up", "mid", "head"), "int8"))
    done = compress(fn, PARAMS, DATA, plan=plan, options=OPTIONS, second_order=False)
    assert all(done.params[k].grid == jc.Int(8) for k in ("up", "mid", "head"))
    assert done.score < small.score


def test_a_run_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    from jaxcomp.search import measuring

    asked = {"budget": 6, "options": OPTIONS, "rounds": 0, "folder": tmp_path, "second_order": False}
    real, calls = measuring._unit, []

    def dying(*args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measuring, "_unit", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(fn, PARAMS, DATA, **asked)
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "measured.json").read_text())["units"]) == 3
    made = []
    real_costs = jc.search.menus.Choosing.made
    monkeypatch.setattr(jc.search.menus.Choosing, "made", lambda self, *a: made.append(a) or real_costs(self, *a))
    done = compress(fn, PARAMS, DATA, **asked)
    assert made == [], "what was measured is not made again"
    assert sorted(os.listdir(tmp_path)) == ["compressed.safetensors", "measured.json", "plan.json", "report.md"]
    assert Plan.load(tmp_path / "plan.json").choice == done.plan.choice
    edited = (tmp_path / "plan.json").read_text().replace(f'"mid": "{done.plan.choice["mid"]}"', '"mid": "int8"', 1)
    (tmp_path / "plan.json").write_text(edited)
    with pytest.warns(UserWarning, match="not kept: .* bytes of"):
        again = compress(fn, PARAMS, DATA, **asked)
    assert again.params["mid"].grid == jc.Int(8)
    assert any("The plan is that of" in note for note in again.notes)
    larger = compress(fn, PARAMS, DATA, **(asked | {"budget": 3}))
    assert any("is of other budgets or units, and is written anew" in note for note in larger.notes)
    other = compress(fn, {name: -leaf for name, leaf in PARAMS.items()}, DATA, **(asked | {"budget": 3}))
    assert any("is of other parameters, data, options or terms, and is written anew" in n for n in other.notes)


@pytest.mark.slow
def test_the_column_solver_is_taken_where_it_is_nearer(small):
    done = compress(fn, PARAMS, DATA, plan=small.plan, options=OPTIONS)
    assert "Rounded by second order." in done.notes
    assert done.score < small.score
    assert done.costs["bytes"] == small.costs["bytes"]


@pytest.mark.slow
def test_the_smallest_network_that_keeps_a_quality(small):
    def fidelity(run):
        wanted = fn(PARAMS, DATA[3])
        return 1 - float(jnp.linalg.norm(run(DATA[3]) - wanted) / jnp.linalg.norm(wanted))

    good = compress(fn, PARAMS, DATA, quality=Quality(fidelity, 0.05, "fidelity"), options=OPTIONS, rounds=0)
    assert good.score >= 0.95
    smaller = [p for p in good.points if p.bytes < good.costs["bytes"]]
    assert all(p.score < 0.95 for p in smaller)
    only = {"int8": OPTIONS["int8"]}
    with pytest.raises(Infeasible, match=r"no plan keeps fidelity within 0 of 1; the nearest has 0\.9[89]"):
        compress(fn, PARAMS, DATA, quality=Quality(fidelity, 0.0, "fidelity"), options=only)
    with pytest.raises(ValueError, match="the quality 'nothing' is NaN"):
        compress(fn, PARAMS, DATA, budget=6, quality=Quality(lambda _: np.nan, 1, "nothing"), options=OPTIONS, rounds=0)


@pytest.mark.slow
def test_channels_go_under_a_budget_of_work():
    levels = (1.0, 0.5, 0.25)
    done = compress(
        fn, PARAMS, DATA, budget={"macs": Smaller(3), "bytes": Smaller(8)}, options=OPTIONS, channels=levels, rounds=0
    )
    macs = sum(site.macs for site in jc.sites(done.fn)(done.params, DATA[0]))
    assert macs <= done.costs_before["macs"] / 3
    assert done.kept is not None
    assert done.params["mid"].size < PARAMS["mid"].size
    masked = fn(jc.structure.mask(done.kept)(PARAMS), DATA[0])
    assert masked.shape == done.fn(done.params, DATA[0]).shape
    assert [f"{count / 256:g}" for count in done.kept.counts] == [done.plan.choice[f"channels {g}"] for g in (0, 1)]


def test_tied_leaves_take_what_stays_of_each():
    groups = jc.structure.channel_groups(fn)(PARAMS, DATA[0])
    widths = Widths.of(groups, PARAMS, levels=(1.0, 0.5))
    both = Unit("both", ("up", "mid"), (Option("as it is", costs={"bytes": 1.0}, loss=0.0),))
    made = with_channels(Table((both,)), widths, PARAMS, judge=lambda _: 0.0, done=lambda _: None)
    found = {o.label.split(" | ", 1)[1]: o.costs["bytes"] for o in made["both"].options}
    up, mid = PARAMS["up"].size, PARAMS["mid"].size
    less = (up + mid / 2) / (up + mid)
    wanted = {"1 | 1": 1, "1 | 0.5": less, "0.5 | 1": 0.5, "0.5 | 0.5": less / 2}
    assert found == pytest.approx(wanted)


@pytest.mark.slow
def test_fine_tuning_brings_it_nearer():
    asked = {"budget": 11, "options": menu(bits=(2,), sparsities=(0.0,)), "rounds": 0}
    done = compress(fn, PARAMS, DATA, recover=Recovery(steps=60, learning_rate=3e-3), **asked)
    (note,) = [note for note in done.notes if note.startswith("Before recovery: ")]
    assert done.score < 0.8 * float(note.removeprefix("Before recovery: ").removesuffix("."))
    assert done.met
    with pytest.raises(ValueError, match=r"Recovery: rule 'none' selects no floating leaf to train; there are "):
        compress(fn, PARAMS, DATA, recover=Recovery(steps=1, where="none"), **asked)
    held = compress(fn, PARAMS, DATA, recover=Recovery(steps=2, where="up"), plan=done.plan, **asked)
    made = done.plan.transform.apply(done.plan.transform.init(PARAMS), PARAMS)
    assert jnp.array_equal(jc.materialize(held.params["mid"]), jc.materialize(made["mid"]))
    assert not jnp.array_equal(jc.materialize(held.params["up"]), jc.materialize(made["up"]))
    with pytest.raises(ValueError, match=r"loss of recovery is (nan|inf) by step \d+; lower"):
        compress(fn, PARAMS, DATA, recover=Recovery(steps=60, loss=lambda out, x: out.sum() * np.nan), **asked)


@pytest.mark.slow
def test_fine_tuning_of_another_network_is_not_gone_on_with(tmp_path):
    asked = {"budget": 6, "options": OPTIONS, "rounds": 0, "recover": Recovery(steps=3)}
    first = compress(fn, PARAMS, DATA, folder=tmp_path, **asked)
    again = compress(fn, PARAMS, DATA, folder=tmp_path, **asked)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first.params, again.params))
    turned = {name: -leaf for name, leaf in PARAMS.items()}
    other = compress(fn, turned, DATA, folder=tmp_path, **asked)
    wanted = compress(fn, turned, DATA, plan=other.plan, options=OPTIONS, recover=Recovery(steps=3))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, other.params, wanted.params))


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="give a budget, such as budget=8"):
        compress(fn, PARAMS, DATA)
    with pytest.raises(TypeError, match=r"compress: wants batches, got one array of shape \(128, 16\)"):
        compress(fn, PARAMS, DATA[0], budget=4)
    with pytest.raises(TypeError, match=r"quality= wants Quality\(measure, drop=0.01\) around a score"):
        compress(fn, PARAMS, DATA, quality=lambda run: 1.0)
    with pytest.raises(TypeError, match=r"wants fn\(params, \*args\) first, got dict"):
        compress(PARAMS, fn, DATA, budget=4)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        compress(fn, PARAMS, DATA, budget=4, options=OPTIONS, folder=__file__)
    with pytest.raises(ValueError, match="wants two batches or more, the last of them to judge by, got 1"):
        compress(fn, PARAMS, DATA[:1], budget=4)
    with pytest.raises(ValueError, match="rule 'hidden' matches no floating array that a product multiplies"):
        compress(fn, PARAMS, DATA, budget=4, where="hidden")
    with pytest.raises(ValueError, match=r"there is no cost 'seconds'; budgets are of .* with terms=Terms"):
        compress(fn, PARAMS, DATA, budget={"seconds": 1.0}, options=OPTIONS)
    broken = PARAMS | {"bias": PARAMS["bias"].at[0].set(jnp.nan)}
    with pytest.raises(ValueError, match="outputs of the network as it was are not finite in batch 0"):
        compress(fn, broken, DATA, budget=4, options=OPTIONS)
    with pytest.raises(Infeasible, match=r"no choice takes at most [\d.]+ bytes; the nearest takes"):
        compress(fn, PARAMS, DATA, budget=1000, options=OPTIONS)


def test_time_on_a_device_is_a_cost():
    from jaxcomp.trace.cost import H100

    menus = jc.search.choosing(fn, PARAMS, DATA[0], options=OPTIONS, terms=Terms(device=H100, activations=8))
    costs = {label: menus.costs(menus.made("mid", label)) for label in OPTIONS}
    assert costs["int4"]["seconds"] < costs["int8"]["seconds"] < costs["as it is"]["seconds"]
    assert costs["int8"]["bops"] == 128 * 256 * 256 * 64
    whole = jc.cost(fn, bits=(8, 8))(PARAMS, DATA[0])
    (site,) = [s for s in whole.sites if s.site.path == "mid"]
    assert costs["int8"]["seconds"] == site.seconds(H100)
