"""Measured losses equal those of networks compressed by hand, one unit at a time, and one program measures them all."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jaxcomp as jc
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.search import Curvature, Estimate, Option, Table, Unit, choosing, sensitivity, units_of
from jaxcomp.search.measures import change_of, decibels, kl, noise
from jaxcomp.search.omega import omega

OPTIONS = {
    "int2": jc.quantize(jc.Int(2)),
    "int4": jc.quantize(jc.Int(4)),
    "50%": jc.prune(0.5),
}


def fn(p, x, y):
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = {"a": {"kernel": draw(5, 6), "bias": draw(6)}, "b": {"kernel": draw(6, 3)}}
    batches = [(draw(8, 5), jnp.asarray(rng.integers(0, 3, 8))), (draw(4, 5), jnp.asarray(rng.integers(0, 3, 4)))]
    return params, batches


def cross_entropy(out, x, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1))


def by_hand(params, batches, path, transform):
    """KL, noise over signal and growth of the cross entropy, by numpy in float64 over all examples at once."""
    outer, inner = path.split("/")
    part = {path: params[outer][inner]}
    new = jc.materialize(transform.apply(transform.init(part), part))[path]
    changed = {**params, outer: {**params[outer], inner: new}}
    was, now = (np.concatenate([np.asarray(fn(p, *b), np.float64) for b in batches]) for p in (params, changed))
    labels = np.concatenate([np.asarray(b[1]) for b in batches])
    p, q = log_softmax(was, 1), log_softmax(now, 1)
    rows = np.arange(len(labels))
    divergence = (np.exp(p) * (p - q)).sum(1).mean()
    return divergence, ((now - was) ** 2).sum() / (was**2).sum(), (p - q)[rows, labels].mean()


@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_measured_as_by_hand(case, at_once) -> None:
    params, batches = case
    table = units_of(params, OPTIONS)
    measures = (kl, noise, change_of(cross_entropy))
    found = sensitivity(fn, params, table, batches, measures=measures, at_once=at_once)
    for path in ("a/kernel", "b/kernel"):
        for label, transform in OPTIONS.items():
            got = [found.values[m.name][path, label] for m in measures]
            np.testing.assert_allclose(got, by_hand(params, batches, path, transform), rtol=2e-4, atol=1e-6)
    assert found.table("noise")["a/kernel"].options[0].loss == found.values["noise"]["a/kernel", "int2"]
    assert found.table().what == "kl"


def test_one_program_measures_everything(case) -> None:
    params, (batch, _) = case
    traced = chex.assert_max_traces(fn, n=2)  # the network as it was, and changed
    sensitivity(traced, params, units_of(params, OPTIONS), [batch, batch])


def test_tied_leaves_change_together(case) -> None:
    params, batches = case
    table = units_of(params, {"int2": OPTIONS["int2"]}, tied={"both": ".*kernel"})
    (unit,) = table
    assert (unit.name, unit.leaves) == ("both", ("a/kernel", "b/kernel"))
    found = sensitivity(lambda p, x, y: fn(p, x, y), params, table, batches, measures=(noise,))
    new = jc.materialize(OPTIONS["int2"].apply((), params))
    outs = [np.concatenate([np.asarray(fn(p, *b), np.float64) for b in batches]) for p in (params, new)]
    wanted = ((outs[1] - outs[0]) ** 2).sum() / (outs[0] ** 2).sum()
    assert found.values["noise"]["both", "int2"] == pytest.approx(wanted, rel=1e-4)


def test_units_need_not_have_the_same_options(case) -> None:
    params, batches = case
    int2, int4 = (Option(label, OPTIONS[label]) for label in ("int2", "int4"))
    table = Table(
        (Unit("a/kernel", ("a/kernel",), (int2,)), Unit("b/kernel", ("b/kernel",), (int4,)), Unit("n", (), (int2,)))
    )
    found = sensitivity(fn, params, table, batches)
    assert set(found.values["kl"]) == {("a/kernel", "int2"), ("b/kernel", "int4")}
    assert not found.table()["n"].options[0].measured
    assert found.cells()[1] == ("a/kernel", f"{found.values['kl']['a/kernel', 'int2']:.3g}", "")


def test_compressed_leaves_change_too(case) -> None:
    params, batches = case
    masked = jc.prune(0.5).apply(jc.prune(0.5).init(params), params)
    plain = jc.materialize(masked)

    def run(p, x, y):
        return fn(jc.materialize(p), x, y)

    options = {"int4": jc.quantize(jc.Int(4))}
    found = sensitivity(run, masked, units_of(masked, options), batches)
    assert found.values == sensitivity(run, plain, units_of(plain, options), batches).values


def test_no_number_is_worst(case) -> None:
    params, batches = case
    broken = jc.core.stateless(lambda p: jax.tree.map(lambda w: w * jnp.inf, p))
    found = sensitivity(fn, params, units_of(params, {"broken": broken}), batches)
    assert set(found.values["kl"].values()) == {np.inf}


def test_omega_is_trace_times_distance(case) -> None:
    params, _ = case
    table = units_of(params, {"int4": OPTIONS["int4"], "as it is": jc.core.identity()}, tied={"both": ".*kernel"})
    rows = (
        Estimate("a/kernel", ("a/kernel",), 30, 60.0, 1.0, 16, met=True),
        Estimate("b/kernel", ("b/kernel",), 18, 9.0, 1.0, 16, met=True),
    )
    found = omega(params, table, Curvature("trace", rows, 0.0))
    new = jc.materialize(OPTIONS["int4"].apply((), params))
    moved = [float(np.sum(np.square(np.asarray(new[k]["kernel"] - params[k]["kernel"], np.float64)))) for k in "ab"]
    assert found["both"].options[0].loss == pytest.approx(2.0 * moved[0] + 0.5 * moved[1], rel=1e-5)
    assert found["both"].options[1].loss == 0
    largest = omega(params, table, Curvature("eigenvalue", rows, 0.0))
    assert largest["both"].options[0].loss == pytest.approx(60.0 * moved[0] + 9.0 * moved[1], rel=1e-5)
    with pytest.raises(ValueError, match="omega: of 'b/kernel' no trace is known, only of 'a/kernel'"):
        omega(params, table, Curvature("trace", rows[:1], 0.0))
    with pytest.raises(TypeError, match="omega: wants parameters, a table of options and a curvature in this order"):
        omega(params, Curvature("trace", rows, 0.0), table)


def test_decibels() -> None:
    assert decibels(0.0) == np.inf
    assert decibels(1e-3) == pytest.approx(30)


@pytest.mark.slow
def test_a_picture(case) -> None:
    pytest.importorskip("matplotlib")
    params, batches = case
    figure = sensitivity(fn, params, units_of(params, {"int2": OPTIONS["int2"]}), batches).plot()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"table": Table((Unit("z", ("z",), (Option("o"),)),))},
            "sensitivity: the parameters have no 'z'; the paths are 'a/bias'",
        ),
        ({"table": Table((Unit("z", (), (Option("o"),)),))}, "no unit of the table has a leaf"),
        ({"batches": []}, "sensitivity: there is no batch"),
        ({"measures": (kl, kl)}, "each of its own name"),
        ({"at_once": 0}, "at_once must be a positive integer"),
        (
            {"fn": lambda p, x, y: fn(p, x, y) * jnp.nan},
            "in batch 0 the outputs of the network as it was are not finite",
        ),
        ({"fn": lambda p, x, y: {"logits": fn(p, x, y)}}, "kl: the outputs are no one array of logits"),
    ],
    ids=["unknown leaf", "no leaf", "no batch", "same names", "none at once", "not finite", "no logits"],
)
def test_what_cannot_be_measured_is_said(case, change, message) -> None:
    params, batches = case
    how = {"fn": fn, "table": units_of(params, {"int2": OPTIONS["int2"]}), "batches": batches} | change
    with pytest.raises(ValueError, match=message):
        sensitivity(how.pop("fn"), params, how.pop("table"), how.pop("batches"), **how)


def test_an_option_must_keep_the_shape(case) -> None:
    params, batches = case
    half = jc.core.stateless(lambda p: jax.tree.map(lambda w: w.astype(jnp.float16), p))
    with pytest.raises(ValueError, match="option 'half' makes 5x6 float16 of 'a/kernel', which is 5x6 float32"):
        sensitivity(fn, params, units_of(params, {"half": half}), batches)


def test_priced_options_are_what_is_allocated(case) -> None:
    params, batches = case
    terms = choosing(fn, params, *batches[0])
    table = terms.priced(units_of(params, OPTIONS))
    assert [unit.name for unit in table][-1] == "everything else"
    for unit in list(table)[:-1]:
        for option in unit.options:
            own = {path: leaf for path, leaf in leaves_with_paths(params)[0] if path in unit.leaves}
            assert option.costs == terms.costs(option.make.apply(option.make.init(own), own))
    with pytest.raises(ValueError, match="priced: the parameters have no 'b', they have 'a'; make the table of these"):
        choosing(lambda p, x: x @ p["a"], {"a": np.ones((2, 2))}, np.ones((1, 2))).priced(
            units_of({"b": np.ones((2, 2))}, OPTIONS, where="b")
        )


def test_tables_need_options_and_leaves(case) -> None:
    params, _ = case
    with pytest.raises(ValueError, match="units_of: there is no option"):
        units_of(params, {})
    with pytest.raises(ValueError, match=r"rule 'kernel' matches nothing; .* write '.\*kernel'"):
        units_of(params, OPTIONS, where="kernel")
