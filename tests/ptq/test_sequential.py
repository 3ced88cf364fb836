"""Leaf after leaf in the program's order, each by what the compressed leaves before it give it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.ptq import Exact, Scopes, sequentially
from jaxcomp.ptq.parts import Alike
from jaxcomp.trace import row_moments, row_moments_over
from tests.marks import quick

RNG = np.random.default_rng(2)


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "in": normal(4, 6),
    "layers": {"key": normal(3, 6, 6), "query": normal(3, 6, 6), "up": normal(3, 6, 6)},
    "out": normal(6, 2),
}
BATCHES = [normal(5, 4), (normal(3, 4),)]


def net(p, x):
    def layer(h, w):
        return jnp.tanh((h @ w["key"]) * (h @ w["query"])) @ w["up"], None

    return lax.scan(layer, x @ p["in"], p["layers"])[0] @ p["out"]


def test_each_leaf_sees_the_rows_that_the_ones_before_it_now_give():
    calls = []

    def halved(leaves, moments):
        calls.append({path: (np.asarray(m.second), float(m.count)) for path, m in moments.items()})
        return {path: leaf / 2 for path, leaf in leaves.items()}

    made = sequentially(net, halved)(PARAMS, BATCHES)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b / 2).all()), made, PARAMS))
    together, up = ["layers/key", "layers/query"], ["layers/up"]
    assert [sorted(c) for c in calls] == [["in"], *[together, up] * 3, ["out"]]

    x = np.concatenate([np.asarray(BATCHES[0]), np.asarray(BATCHES[1][0])]).astype(np.float64)
    half = jax.tree.map(lambda w: np.asarray(w, np.float64) / 2, PARAMS)
    wanted = [x]
    h = x @ half["in"]
    for i in range(3):
        key, query, last = (half["layers"][name][i] for name in ("key", "query", "up"))
        wanted += [h, inner := np.tanh((h @ key) * (h @ query))]
        h = inner @ last
    for call, rows in zip(calls, [*wanted, h], strict=True):
        for second, count in call.values():
            np.testing.assert_allclose(second, rows.T @ rows, rtol=1e-4, atol=1e-5)
            assert count == 8


def test_a_leaf_that_is_not_chosen_stays_and_no_batch_is_said():
    made = sequentially(net, lambda leaves, moments: {p: 0 * w for p, w in leaves.items()}, where="out")(
        PARAMS, BATCHES
    )
    assert made["in"] is PARAMS["in"]
    assert not made["out"].any()
    with pytest.raises(ValueError, match="sequentially: there is no batch"):
        sequentially(net, lambda leaves, moments: leaves)(PARAMS, iter(()))
    with pytest.raises(TypeError, match=r"got quantize\(Int\(4\)\); write lambda leaves, moments: gptq"):
        sequentially(net, jc.quantize(jc.Int(4)))
    with pytest.raises(TypeError, match=r"wants batches, got one array of shape .*; write \[x\] if it is one batch"):
        sequentially(net, lambda leaves, moments: leaves)(PARAMS, BATCHES[0])
    with pytest.raises(TypeError, match=r"row_moments_over: wants batches, got dict; write \[batch\]"):
        row_moments_over(net)(PARAMS, {"x": BATCHES[0]})
    assert set(row_moments(net)(PARAMS, BATCHES[0])) == {"in", "layers/key", "layers/query", "layers/up", "out"}


def rounded(leaves, moments):
    """In the metric of the moments, so that it tells which rows were seen."""
    assert {path: m.second.shape[-1] for path, m in moments.items()} == {p: w.shape[-2] for p, w in leaves.items()}
    return {path: w + 0.01 * moments[path].second @ w / moments[path].count for path, w in leaves.items()}


def residual(p, x, scale):
    """Blocks of a residual stream, one bias used by two of them."""
    for layer in p["layers"]:
        x = x + scale * (jnp.tanh(x @ layer["up"] + p["bias"][None]) @ layer["down"])
    return x @ p["head"].T


def tied(p, ids, scale):
    """The same behind a table that is the head's too."""
    return residual({**p, "head": p["table"]}, p["table"][ids], scale)


def layers(n, d=6):
    return [{"up": normal(d, 2 * d) / 3, "down": normal(2 * d, d) / 3} for _ in range(n)]


DEEP = {"layers": layers(4), "bias": normal(12), "head": normal(3, 6)}
TIED = {"layers": layers(3), "bias": normal(12), "table": normal(9, 6)}
CASES = {
    "residual": (residual, DEEP, r"layers/.*", lambda n: normal(n, 6)),
    "tied": (tied, TIED, r".*(up|down|table)", lambda n: jnp.arange(n) % 9),
}


def over_last_axis(method):
    """For a leaf whose rows run over its last axis."""

    def made(leaves, moments):
        new = method({p: w.T if p == "table" else w for p, w in leaves.items()}, moments)
        return {p: w.T if p == "table" else w for p, w in new.items()}

    return made


@pytest.mark.parametrize("targets", quick([None, Exact()], Exact()), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_blocks_give_what_runs_of_the_whole_network_give(name, targets):
    """Batches of two shapes; a leaf of several blocks goes first; a bias of several blocks stays."""
    fn, params, where, batch = CASES[name]
    batches = [(batch(5), jnp.float32(0.5)), (batch(3), jnp.float32(0.7)), (batch(5), jnp.float32(0.1))]
    method = over_last_axis(rounded)
    made = sequentially(fn, method, where, targets=targets)(params, batches)
    want = sequentially(fn, method, where, targets=targets, cuts=Scopes(""))(params, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), made, want)
    assert not np.allclose(made["layers"][0]["up"], params["layers"][0]["up"])
    np.testing.assert_array_equal(made["bias"], params["bias"])


def test_a_block_runs_for_its_own_leaves_alone(monkeypatch):
    """Twice the depth is twice the runs, and blocks that are alike are compiled once."""
    looked, compiled = [], []
    before = Alike.__init__

    def counting(self, part, block, how):
        before(self, part, block, how)
        compiled.append(block.sites)
        look = self.look

        def counted(*given):
            looked.append(block.sites)
            return look(*given)

        self.look = counted

    monkeypatch.setattr(Alike, "__init__", counting)
    runs = {}
    for depth in (2, 4):
        looked.clear()
        compiled.clear()
        params = {**DEEP, "layers": layers(depth)}
        batches = [(normal(5, 6), jnp.float32(0.5))] * 3
        sequentially(residual, rounded, r"layers/.*")(params, batches)
        runs[depth] = len(looked)
        # Of the first layer no stream passes by, so it is two blocks.
        assert [len(sites) for sites in compiled] == [1, 1, 2]
    assert runs == {2: 2 * 2 * 3, 4: 4 * 2 * 3}
    with pytest.raises(TypeError, match=r"cut: cuts must be Single\(\), Layers\(\) or Scopes\(pattern\), got 3"):
        sequentially(residual, rounded, r"layers/.*", cuts=3)(params, batches)


def stacked(p, x, scale):
    """:func:`residual` with its layers in a scan, each with a bias of its own."""

    def layer(x, w):
        return x + scale * (jnp.tanh(x @ w["up"] + w["bias"][None]) @ w["down"]), None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["head"].T


def written_out(p, x, scale):
    """The same in a list of layers."""
    for w in p["layers"]:
        x = x + scale * (jnp.tanh(x @ w["up"] + w["bias"][None]) @ w["down"])
    return x @ p["head"].T


@pytest.mark.parametrize("targets", [None, Exact()], ids=str)
def test_the_layers_of_a_scan_are_blocks_of_their_own(targets, monkeypatch):
    each = [{**w, "bias": normal(12)} for w in layers(3)]
    apart = {"layers": each, "head": normal(3, 6)}
    params = {**apart, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *each)}
    batches = [(normal(5, 6), jnp.float32(0.5)), (normal(3, 6), jnp.float32(0.7))]
    looked, before = [], Alike.__init__

    def counting(self, part, block, how):
        before(self, part, block, how)
        look = self.look
        self.look = lambda *given: looked.append(block.paths) or look(*given)

    monkeypatch.setattr(Alike, "__init__", counting)
    runs = []
    for fn, tree in ((stacked, params), (written_out, apart)):
        looked.clear()
        runs.append(sequentially(fn, rounded, r"layers/.*", targets=targets)(tree, batches))
        assert max(map(len, looked)) <= 3  # a layer at a time
        assert len(looked) == 3 * 2 * 2
    made, want = runs
    for i, layer in enumerate(want["layers"]):
        for name, leaf in layer.items():
            np.testing.assert_allclose(made["layers"][name][i], leaf, rtol=2e-4, atol=2e-5)
    assert (targets is None) == bool((made["layers"]["bias"] == params["layers"]["bias"]).all())


def test_layers_of_a_scan_that_read_one_value_go_one_after_the_other():
    """What a method is given has one layer of a leaf; the layers of this one all multiply ``x``."""
    fn = lambda p, x: jax.lax.scan(lambda h, w: (h + x @ w, None), x, p["w"])[0]  # noqa: E731
    params, given = {"w": normal(3, 4, 4)}, []

    def method(leaves, moments):
        given.append({path: w.shape for path, w in leaves.items()})
        return {path: 2 * w for path, w in leaves.items()}

    made = sequentially(fn, method)(params, [normal(5, 4)])
    assert given == [{"w": (4, 4)}] * 3
    np.testing.assert_array_equal(made["w"], 2 * params["w"])
