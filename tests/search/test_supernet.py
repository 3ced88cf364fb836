"""A supernet has every width exactly, trains them by one step, and is searched within budgets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.distill import soft_targets
from jaxcomp.search import Choice, Interval, cross_entropy, evolution, narrow, recalibrated, sandwich, slimmable
from jaxcomp.structure import shrink
from train.networks.linen import MODELS, ConvNet

RNG = np.random.default_rng(0)


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def arrays(**shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


PARAMS = arrays(a=(4, 8), b=(8, 6), c=(6, 3))
X = RNG.normal(size=(16, 4)).astype(np.float32)
GROUPS = jc.channel_groups(mlp)(PARAMS, X)
NET = slimmable(GROUPS, PARAMS, levels=(0.5, 0.75, 1))


def by_hand(counts):
    """Float64 numpy: the units of the largest norms, cut out."""
    a, b, c = (PARAMS[name].astype(np.float64) for name in "abc")
    first = np.argsort(-((a**2).sum(0) + (b**2).sum(1)))[: counts[0]]
    second = np.argsort(-((b**2).sum(0) + (c**2).sum(1)))[: counts[1]]
    hidden = np.maximum(X @ a[:, first], 0) @ b[first][:, second]
    return np.maximum(hidden, 0) @ c[second]


def in_order(net):
    """The counts' order by hand: the group of a's columns first."""
    return [i for _, i in sorted((group.paths != ("a", "b"), i) for i, group in enumerate(net.groups))]


def test_one_program_has_every_width():
    order = in_order(NET)
    program = jax.jit(lambda p, counts: mlp(NET.masked(p, counts), X))
    for counts in itertools.product(*NET.table.tolist()):
        out = program(PARAMS, np.array(counts))
        np.testing.assert_allclose(out, by_hand([counts[i] for i in order]), rtol=1e-4, atol=1e-5)
    assert program._cache_size() == 1


def test_the_shrunk_network_is_the_masked_one():
    for counts in (NET.narrowest, NET.uniform(0.75), NET.widest):
        plan = NET.plan(counts)
        assert plan.counts == counts.tolist()
        assert jax.tree.map(np.shape, plan.take(PARAMS)) == dict(plan.widths)
        small = np.asarray(shrink(mlp, plan)(plan.take(PARAMS), X))
        np.testing.assert_allclose(small, mlp(NET.masked(PARAMS, counts), X), rtol=1e-5, atol=1e-6)


def test_counts_are_rounded_up_to_multiples():
    rows = slimmable(GROUPS, PARAMS, levels=(0.125, 0.5, 1), round_to=4).table.tolist()
    assert sorted(rows) == [[4, 4, 6], [4, 4, 8]]


def test_drawn_counts_are_of_the_table_and_reach_both_ends():
    drawn = np.asarray(jax.jit(jax.vmap(NET.drawn))(jax.random.split(jax.random.key(0), 300)))
    assert all(set(column) == set(row) for column, row in zip(drawn.T.tolist(), NET.table.tolist(), strict=True))
    for end in (NET.narrowest, NET.widest):
        assert (drawn == end).all(1).mean() > 1 / 9  # both ends alike: a ninth, and those that come so


def test_a_stack_of_layers_keeps_units_of_its_own_in_each():
    def stacked(p, x):
        return jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w["up"]) @ w["down"], None), x, p)[0]

    params = arrays(up=(3, 4, 6), down=(3, 6, 4))
    net = slimmable(jc.channel_groups(stacked)(params, X), params, levels=(0.5, 1))
    (group,) = net.groups
    assert group.layers == 3
    masked = net.masked(params, jnp.array([3]))
    for layer in range(3):
        norms = (params["up"][layer] ** 2).sum(0) + (params["down"][layer] ** 2).sum(1)
        gone = np.argsort(norms)[:3]
        assert set(np.flatnonzero(np.asarray(masked["up"])[layer].any(0) == 0)) == set(gone)
    plan = net.plan([3])
    np.testing.assert_allclose(shrink(stacked, plan)(plan.take(params), X), stacked(masked, X), rtol=1e-4, atol=1e-5)


def cross(logits, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_the_step_is_the_sum_of_gradients_written_out():
    labels = RNG.integers(0, 3, 16)
    key = jax.random.key(3)
    losses, grads = sandwich(NET, mlp, cross)(PARAMS, key, X, labels)

    def written(p):
        wide = mlp(p, X)
        counts = [NET.narrowest, *(NET.drawn(k) for k in jax.random.split(key, 2))]
        told = [soft_targets(mlp(NET.masked(p, c), X), wide) for c in counts]
        return sum(told, cross(wide, X, labels)), told

    (total, told), wanted = jax.jit(jax.value_and_grad(written, has_aux=True))(PARAMS)
    np.testing.assert_allclose(losses.sum(), total, rtol=1e-5)
    np.testing.assert_allclose(losses[1:], jnp.stack(told), rtol=1e-5, atol=1e-7)
    for name in PARAMS:
        np.testing.assert_allclose(grads[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_step_runs_in_jit_and_beside_integers():
    def fn(p, x):
        return mlp(p, x) * p["times"].astype(x.dtype)

    params = {**PARAMS, "times": jnp.array(1)}
    net = slimmable(jc.channel_groups(fn)(params, X), params)
    step = sandwich(net, fn, cross, random=1)
    given = params, jax.random.key(0), X, np.zeros(16, int)
    bare, jitted = step(*given), jax.jit(step)(*given)
    np.testing.assert_allclose(bare[0], jitted[0], rtol=1e-5)
    np.testing.assert_allclose(bare[1]["a"], jitted[1]["a"], rtol=1e-4, atol=1e-6)
    assert bare[1]["times"].dtype == jax.dtypes.float0


def small_convnet():
    model = ConvNet((4, 6), num_classes=3)
    x = jnp.asarray(RNG.normal(size=(3, 8, 6, 6, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x[0])
    net = slimmable(jc.channel_groups(model.apply)(variables, x[0]), variables, levels=(0.5, 1))
    update = jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])[1])
    return model, x, variables, net, update


@pytest.mark.slow
def test_statistics_are_made_anew_alike_in_the_masked_and_in_the_small_network():
    model, x, variables, net, update = small_convnet()
    plan = net.plan(net.narrowest)
    masked = recalibrated(update, net.masked(variables, net.narrowest), list(x))
    narrow_model = ConvNet(plan.widths, num_classes=3)
    small = recalibrated(
        jax.jit(lambda v, x: narrow_model.apply(v, x, True, mutable=["batch_stats"])[1]),
        plan.take(variables),
        list(x),
    )
    for a, b in zip(jax.tree.leaves(plan.take(masked)), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    kernel = np.asarray(variables["params"]["conv_0"]["kernel"], np.float64)
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (3, 3), axis=(2, 3))
    out = np.einsum("bnhwij,ijc->bnhwc", windows, kernel[:, :, 0])
    whole = recalibrated(update, variables, list(x))["batch_stats"]["norm_0"]
    np.testing.assert_allclose(whole["mean"], out.mean((0, 1, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole["var"], out.var((1, 2, 3)).mean(0), rtol=1e-3)
    logits = narrow_model.apply(small, x[0])
    np.testing.assert_allclose(logits, model.apply(masked, x[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnet", "mlp", "vit"])
def test_every_network_has_widths(name):
    fields = {"resnet18": {"width": 4}, "vit": {"dim": 16, "depth": 2, "heads": 4, "mlp_dim": 32}}.get(name, {})
    model = MODELS[name](**fields)
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    net = slimmable(jc.channel_groups(model.apply)(variables, x), variables)
    for at in range(3):
        counts = np.asarray(net.drawn(jax.random.key(at)))
        plan = net.plan(counts)
        small = jax.jit(shrink(model.apply, plan))(plan.take(variables), x)
        np.testing.assert_allclose(small, model.apply(net.masked(variables, counts), x), rtol=1e-3, atol=1e-4)


def distance(weights):
    """A judge that adds up over groups, so that the best is known: minus the weighted part that went."""

    def judge(masked):
        kept = [np.asarray(masked["a"]).any(0).sum() / 8, np.asarray(masked["c"]).any(1).sum() / 6]
        return -float(np.dot(weights, 1 - np.array(kept)))

    return judge


@pytest.mark.parametrize("method", [None, cross_entropy])
@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_it_finds_what_trying_all_finds(name, method):
    of = (lambda plan: plan.macs) if name == "macs" else (lambda plan: plan.parameters)
    limit = of(NET.plan(NET.uniform(0.75)))
    judge = distance([1.0, 0.1])
    every = [c for c in itertools.product(*NET.table.tolist()) if of(NET.plan(c)) <= limit]
    best = max(judge(NET.masked(PARAMS, c)) for c in every)
    how = {} if method is None else {"method": lambda s, r: method(s, population=8, repair=r)}
    found = narrow(NET, PARAMS, judge, {name: limit}, key=jax.random.key(0), generations=2, **how)
    assert found.score == best
    assert found.costs == {name: of(found.plan)}
    assert found.costs[name] <= limit
    assert judge(NET.masked(PARAMS, found.starts["allocated"])) == best  # the losses add up, so the allocation is exact
    again = narrow(NET, PARAMS, judge, {name: limit}, key=jax.random.key(0), generations=2, **how)
    assert again.counts == found.counts
    assert again.tried == found.tried


def test_known_scores_are_not_judged_again_and_costs_are_ones_own():
    calls = []

    def judge(masked):
        calls.append(1)
        return distance([1.0, 1.0])(masked)

    known = {}
    given = {"key": jax.random.key(0), "costs": {"units": lambda plan: sum(plan.counts)}, "generations": 1}
    found = narrow(NET, PARAMS, judge, {"units": 10}, known=known, **given)
    assert sum(found.counts) <= 10
    assert list(found.starts) == ["uniform"]
    assert len(calls) == len(known)
    assert narrow(NET, PARAMS, judge, {"units": 10}, known=known, **given).counts == found.counts
    assert len(calls) == len(known)
    shown = repr(found)
    assert "uniform" in shown
    assert "10 units" in shown


@pytest.mark.slow
def test_where_many_groups_meet_nothing_is_allocated():
    """Eight layers that are all joined to those after them: 4 to the 8th combinations of counts."""

    def joined(p, x):
        for i in range(8):
            x = jnp.concatenate([x, jax.nn.relu(x @ p[str(i)])], -1)
        return x @ p["out"]

    params = arrays(**{str(i): (4 + 4 * i, 4) for i in range(8)}, out=(36, 2))
    net = slimmable(jc.channel_groups(joined)(params, X), params, levels=(0.25, 0.5, 0.75, 1))
    half = net.plan(net.uniform(0.5)).macs
    found = narrow(net, params, lambda masked: 0.0, {"macs": half}, key=jax.random.key(0), generations=1)
    assert list(found.starts) == ["uniform"]
    assert found.costs["macs"] <= half


@pytest.mark.slow
def test_statistics_of_few_bits_are_the_batches_mean():
    x = jnp.asarray(3 + RNG.normal(size=(64, 3)), jnp.bfloat16)
    update = jax.jit(lambda p, x: {"mean": 0.99 * p["mean"] + (1 - 0.99) * x.mean(0).astype(p["mean"].dtype)})
    found = recalibrated(update, {"mean": jnp.zeros(3, jnp.bfloat16)}, [x])["mean"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), x.astype(np.float32).mean(0), rtol=0.01)


def test_evolution_goes_on_from_what_was_saved_and_keeps_the_best():
    space = {"a": Choice((1, 2, 3)), "b": Choice(tuple(range(9))), "c": Interval(-1.0, 1.0)}
    search = evolution(space, population=12, parents=4)
    state = search.init(jax.random.key(0))
    bests = []
    for _ in range(12):
        leaves, tree = jax.tree.flatten(state)
        state = jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves])
        asked = search.ask(state)
        assert asked == search.ask(state)
        assert len(asked) == 12
        state = search.tell(state, asked, [c["a"] - abs(c["b"] - 5) - abs(c["c"] - 0.25) for c in asked])
        bests.append(state.found(space)[1])
    assert bests == sorted(bests)
    best, score = state.found(space)
    assert (best["a"], best["b"]) == (3, 5)
    assert score > 2.9


BAD = {
    "level must be one of": lambda: NET.uniform(0.3),
    "counts must have shape": lambda: NET.masked(PARAMS, [3]),
    "counts must be from 1 to": lambda: NET.plan([0, 3]),
    "made for another tree": lambda: NET.masked({**PARAMS, "a": PARAMS["c"]}, NET.widest),
    "levels are different parts": lambda: slimmable(GROUPS, PARAMS, levels=(0.5, 0.75)),
    "round_to must be": lambda: slimmable(GROUPS, PARAMS, round_to=0),
    "random must be": lambda: sandwich(NET, mlp, cross, random=-1),
    "has no 2 inputs": lambda: sandwich(NET, mlp, cross, inputs=2)(PARAMS, jax.random.key(0), X),
    "no batch": lambda: recalibrated(lambda p, x: p, PARAMS, []),
    "there must be a parameter": lambda: recalibrated(lambda p, x: {"mean": x}, PARAMS, [X]),
    "no running average": lambda: recalibrated(lambda p, x: {"a": p["a"] * 2}, PARAMS, [X]),
    "exceeds the budgets": lambda: narrow(NET, PARAMS, lambda p: 0.0, {"macs": 3}, key=jax.random.key(0)),
    "nothing counts 'joules'": lambda: narrow(NET, PARAMS, lambda p: 0.0, {"joules": 3}, key=jax.random.key(0)),
    "no budget": lambda: narrow(NET, PARAMS, lambda p: 0.0, {}, key=jax.random.key(0)),
    "positive and finite, got 0": lambda: narrow(NET, PARAMS, lambda p: 0.0, {"macs": 0}, key=jax.random.key(0)),
    "positive and finite, got inf": lambda: narrow(NET, PARAMS, len, {"macs": np.inf}, key=jax.random.key(0)),
    "counts nan j": lambda: narrow(NET, PARAMS, len, {"j": 1}, costs={"j": lambda p: np.nan}, key=jax.random.key(0)),
    "must give a finite number": lambda: narrow(NET, PARAMS, lambda p: np.nan, {"macs": 9999}, key=jax.random.key(0)),
    "parents must be": lambda: evolution({"a": Choice((1, 2))}, parents=1),
    "mutation must be": lambda: evolution({"a": Choice((1, 2))}, mutation=0),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_said(said):
    with pytest.raises(ValueError, match=said):
        BAD[said]()
