"""Traces and eigenvalues are the exact Hessian's within the reported errors, and a product costs little."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxcomp as jc
from jaxcomp.search import Curvature, GaussNewton, eigenvalues, traces
from jaxcomp.search.estimates import Estimate
from jaxcomp.search.hessian import statistics
from jaxcomp.search.linear import Linear
from jaxcomp.search.prepared import prepared

KEY = jax.random.key(3)
KERNELS = ("a/kernel", "b/kernel")


def logits(p, x, y):
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]


def with_last(params, x, y, kernel):
    return logits({**params, "b": {"kernel": kernel}}, x, y)


def outer(out, x, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1))


def loss(p, x, y):
    return outer(logits(p, x, y), x, y)


def case(lengths=(8, 8)):
    """Parameters and batches of unequal length, of whatever precision is on."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape))

    params = {"a": {"kernel": draw(5, 6), "bias": draw(6)}, "b": {"kernel": draw(6, 3)}}
    return params, [(draw(n, 5), jnp.asarray(rng.integers(0, 3, n))) for n in lengths]


def blocks(fn, params, batches):
    """The exact Hessian of the mean over all examples, float64: by the paths of leaves in rows and columns."""
    flat, unravel = ravel_pytree(params)
    at = unravel(jnp.arange(flat.size).astype(flat.dtype))
    where = {path: np.asarray(at[path[0]]["kernel"], int).ravel() for path in KERNELS}
    whole = [np.concatenate([np.asarray(leaf) for leaf in leaves]) for leaves in zip(*batches, strict=True)]
    matrix = np.asarray(jax.jit(jax.hessian(lambda v: fn(unravel(v), *whole)))(flat))
    return lambda *paths: matrix[np.ix_(*[np.concatenate([where[p] for p in paths])] * 2)]


def extreme(matrix):
    values = np.linalg.eigvalsh(matrix)
    return values[np.argmax(np.abs(values))]


def test_traces_are_the_exact_ones() -> None:
    with jax.enable_x64():
        params, batches = case()
        exact = blocks(loss, params, batches)
        found = traces(loss, params, batches, key=KEY, rtol=0.08, most=160)
        for path in KERNELS:
            one = found[path]
            assert abs(one.value - np.trace(exact(path))) < 4 * one.error
            assert one.met == (one.error <= 0.08 * abs(one.value))
            assert one.met or one.products >= 160
        assert found.loss == pytest.approx(sum(float(loss(params, *b)) / 2 for b in batches))


def test_eigenvalues_are_the_exact_ones() -> None:
    with jax.enable_x64():
        params, batches = case()
        exact = blocks(loss, params, batches)
        for one in eigenvalues(loss, params, batches, key=KEY, rtol=1e-3):
            assert abs(one.value - extreme(exact(one.name))) <= one.error + 1e-9


@pytest.mark.slow
def test_batches_of_unequal_length_count_by_it() -> None:
    with jax.enable_x64():
        params, batches = case((8, 4))
        exact = blocks(loss, params, batches)
        found = traces(loss, params, batches, key=KEY, rtol=0.04, most=2000)
        for path in KERNELS:
            assert abs(found[path].value - np.trace(exact(path))) < 4 * found[path].error
        both = eigenvalues(loss, params, batches, key=KEY, rtol=1e-6, units={"both": KERNELS})["both"]
        assert both.value == pytest.approx(extreme(exact(*KERNELS)), abs=both.error + 1e-6)
        assert (both.size, both.leaves) == (48, KERNELS)


def test_the_standard_error_is_the_spread_of_estimates() -> None:
    """Over many keys the deviations from the truth, in standard errors, have a mean of 0 and a spread of 1."""
    matrix = np.random.default_rng(1).normal(size=(8, 8))
    matrix = matrix + matrix.T
    rng = np.random.default_rng(2)
    scores = []
    for _ in range(400):
        v = rng.choice([-1.0, 1.0], size=(2, 3, 6, 8))  # rounds, batches, probes
        samples = np.einsum("...i,ij,...j->...", v, matrix, v)[..., None] * np.array([1.0, 2.0, 3.0])[:, None, None]
        means, errors, counts = statistics(samples, np.ones((2, 1), bool), [0.5, 0.3, 0.2])
        scores.append((means[0] - 1.7 * np.trace(matrix)) / errors[0])
    assert counts[0] == 36
    assert abs(np.mean(scores)) < 4 / 20
    assert 0.85 < np.std(scores) < 1.15


def test_a_leaf_that_is_done_takes_no_part() -> None:
    samples = np.array([[[[1.0, 5.0], [3.0, 7.0]]], [[[0.0, 6.0], [0.0, 6.0]]]])
    means, errors, counts = statistics(samples, np.array([[True, True], [False, True]]), [1.0])
    np.testing.assert_allclose(means, [2, 6])
    np.testing.assert_allclose(errors, [1, np.std([5, 7, 6, 6], ddof=1) / 2])
    np.testing.assert_array_equal(counts, [2, 4])


@pytest.mark.slow
def test_quadratic_of_a_diagonal_is_exact_at_once() -> None:
    """Signs square to 1: of a diagonal Hessian each sample is the trace, whatever the vector."""
    c = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    found = traces(lambda p: jnp.sum(c * p["w"] ** 2), {"w": jnp.ones((2, 3))}, [()], key=KEY)["w"]
    assert (found.value, found.error, found.products, found.met) == (42, 0, 16, True)
    assert found.mean == 7
    assert eigenvalues(lambda p: jnp.sum(c * p["w"] ** 2), {"w": jnp.ones((2, 3))}, [()], key=KEY)["w"].value == (
        pytest.approx(12, rel=0.02)
    )


@pytest.mark.slow
def test_gauss_newton_is_the_part_of_the_outputs() -> None:
    with jax.enable_x64():
        params, batches = case()
        matrix = 0.0
        for x, y in batches:
            jacobian = jax.jacobian(partial(with_last, params, x, y))(params["b"]["kernel"])
            bend = jax.hessian(outer)(logits(params, x, y), x, y)
            j, h = (np.asarray(m).reshape(len(y) * 3, -1) for m in (jacobian, bend))
            matrix += len(y) / 16 * j.T @ h @ j
        curved = GaussNewton(logits, outer)
        only = "b/kernel"
        found = traces(curved, params, batches, key=KEY, where=only, most=1000)[only]
        assert abs(found.value - np.trace(matrix)) < 4 * found.error
        largest = eigenvalues(curved, params, batches, key=KEY, where=only, rtol=1e-6)[only]
        assert largest.value == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-5)


def test_a_product_costs_less_than_two_and_a_half_gradients() -> None:
    """XLA's own count of operations of one program with two products, which share a gradient that is linearized."""
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64)), "c": jnp.ones((64, 64))}
    x = jnp.ones((128, 64))

    def fn(p, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"])

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    ready = prepared("t", fn, params, [x], where=".*")
    args = (ready.opened.arrays, KEY, np.ones(3, bool), np.int32(0), (x,))
    gradient = flops(jax.grad(fn), params, x)
    assert flops(ready.samples(2), *args) <= 2 * 2.5 * gradient
    blocks = ready.block_products({p: (p,) for p in params})  # only what each leaf reaches, and one gradient for all
    assert flops(blocks, ready.opened.arrays, params, params, (np.float32(1), (x,))) <= 3 * 0.8 * gradient


@pytest.mark.parametrize("units", [{p: (p,) for p in KERNELS}, {"both": KERNELS}], ids=["apart", "together"])
def test_products_of_blocks_are_the_exact_blocks(units) -> None:
    """Of a loss inside jit, so that zeros are followed into it."""
    with jax.enable_x64():
        params, (batch,) = case((8,))
        exact = blocks(loss, params, [batch])
        ready = prepared("t", jax.jit(loss), params, [batch], where=".*kernel")
        v = {p: jnp.asarray(np.random.default_rng(5).normal(size=s.array.shape)) for p, s in ready.slots.items()}
        program = jax.jit(ready.block_products(units))
        found = program(ready.opened.arrays, v, jax.tree.map(jnp.zeros_like, v), (np.float64(0.5), batch))[1]
        for paths in units.values():
            flat = [np.concatenate([np.asarray(x[p]).ravel() for p in paths]) for x in (v, found)]
            np.testing.assert_allclose(flat[1], 0.5 * exact(*paths) @ flat[0], rtol=1e-9, atol=1e-12)


def test_nothing_is_computed_of_zeros() -> None:
    """What the inputs that are given do not reach is zero, at sums they pass alone, and constants stay."""
    fixed = jnp.arange(3.0)

    def product(v):
        a, b = jnp.sin(fixed) * v["a"], 2 * v["b"]
        return {"a": a, "b": a + b, "c": jax.jit(lambda x, y: x - y)(b, v["a"])}

    like = {"a": jnp.ones(3), "b": jnp.ones(3)}
    linear, v = Linear(product, like), np.array([1.0, 2.0, 4.0], np.float32)
    found = linear.at({"b": v}, ["a", "b", "c"])
    for path, wanted in (("a", 0 * v), ("b", 2 * v), ("c", 2 * v)):
        np.testing.assert_array_equal(found[path], wanted)
    jaxpr = jax.make_jaxpr(lambda b: linear.at({"b": b}, ["b"]))(v)
    assert [e.primitive.name for e in jaxpr.eqns if e.invars and jaxpr.jaxpr.invars[0] in e.invars] == ["mul"]
    assert sum(e.primitive.name == "mul" for e in jaxpr.eqns) == 1


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])
def test_how_many_share_a_program_changes_no_eigenvalue(at_once) -> None:
    with jax.enable_x64():
        params, batches = case()
        curved = GaussNewton(logits, outer)
        found, other = (eigenvalues(curved, params, batches, key=KEY, at_once=n) for n in (at_once, 4))
        assert [e.value for e in found] == pytest.approx([e.value for e in other], rel=1e-9)


@pytest.mark.slow
def test_layers_stacked_in_a_scan_are_one_leaf() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32) / 2

    def fn(p, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] ** 2)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)
    matrix = np.asarray(jax.hessian(fn)({"w": w}, x)["w"]["w"]).reshape(48, 48)
    found = traces(fn, {"w": w}, [x], key=KEY)["w"]
    assert abs(found.value - np.trace(matrix)) < 4 * found.error
    largest = eigenvalues(fn, {"w": w}, [x], key=KEY, rtol=1e-3)["w"]
    assert largest.value == pytest.approx(extreme(matrix), rel=2e-3)


def test_masked_leaves_count_what_is_kept() -> None:
    t = jc.prune(0.5)
    params = {"w": jnp.array([[1.0, 0.1], [0.2, 2.0]])}
    masked = t.apply(t.init(params), params)
    found = traces(lambda p: jnp.sum(jc.materialize(p)["w"] ** 2), masked, [()], key=KEY)["w"]
    assert (found.value, found.size, found.mean) == (4, 2, 2)


def test_what_does_not_curve_is_told_and_does_not_stop_the_others() -> None:
    params = {"w": jnp.ones((2, 2)), "unused": jnp.ones((2, 2))}

    def fn(p):
        return jnp.sum(p["w"] ** 4)

    found = traces(fn, params, [()], key=KEY)
    assert (found["unused"].value, found["w"].value) == (0, 48)
    assert "unused" in str(found)
    assert "the loss does not curve along it" in str(found)
    assert [e.value for e in eigenvalues(fn, params, [()], key=KEY)] == pytest.approx([0, 12])


@pytest.mark.slow
def test_the_same_key_gives_the_same_bits_and_other_leaves_change_none() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)
    params = {"w": jnp.ones((4, 4)) / 4, "other": jnp.ones((2, 2))}

    def fn(p, x):
        return jnp.mean(jnp.tanh(x @ p["w"]) ** 2)

    first, again = (traces(fn, params, [x], key=KEY, where="w") for _ in range(2))
    assert first == again
    assert traces(fn, params, [x], key=KEY)["w"].value == pytest.approx(first["w"].value, rel=1e-5)
    assert Curvature.from_plain(first.to_plain()) == first


def test_sums_of_tied_leaves() -> None:
    rows = tuple(Estimate(n, (n,), 4, 2.0, 0.5, 16, met=True) for n in "ab")
    both = Curvature("trace", rows, 0.0).of("ab")
    assert (both.value, both.error, both.size, both.leaves) == (4, 1, 8, ("a", "b"))
    with pytest.raises(ValueError, match="no eigenvalue is a sum"):
        Curvature("eigenvalue", rows, 0.0).of("ab")
    with pytest.raises(KeyError, match="no trace of 'c' was estimated; there are 'a', 'b'"):
        Curvature("trace", rows, 0.0)["c"]
    with pytest.raises(ValueError, match="nothing that to_plain wrote"):
        Curvature.from_plain({})


W = {"w": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traces(lambda p: p["w"], W, [()], key=KEY), r"the loss has shape \(2, 2\), wanted a scalar"),
        (lambda: traces(lambda p: jnp.sum(p["w"]) * jnp.nan, W, [()], key=KEY), "traces: the loss of batch 0 is nan"),
        (lambda: traces(lambda p: jnp.sum(p["w"]), W, [], key=KEY), "traces: there is no batch"),
        (lambda: traces(lambda p: jnp.sum(p["w"]), W, [()], key=KEY, probes=1), "probes must be 2 or more"),
        (lambda: traces(lambda p: jnp.sum(p["w"]), W, [()], key=KEY, rtol=-1), "rtol must be a number, 0 or more"),
        (lambda: traces(lambda p: jnp.sum(p["w"]), W, [()], key=7), "key must be one key"),
        (
            lambda: traces(lambda p: jnp.sum(jnp.sqrt(p["w"] - 1)), W, [()], key=KEY),
            "the curvature along 'w' is not finite, though the loss is",
        ),
        (
            lambda: eigenvalues(lambda p: jnp.sum(p["w"]), W, [()], key=KEY, units={"a": ["w"], "b": ["w"]}),
            "'w' are in two units",
        ),
        (
            lambda: eigenvalues(lambda p: jnp.sum(p["w"]), W, [()], key=KEY, units={"a": ["z"]}),
            "units= names 'z'; the selected leaves are 'w'",
        ),
        (
            lambda: eigenvalues(lambda p: jnp.sum(p["w"]), W, [()], key=KEY, at_once=0),
            "eigenvalues: at_once must be a positive",
        ),
    ],
    ids=[
        "no scalar",
        "no number",
        "no batch",
        "one probe",
        "rtol",
        "no key",
        "no curvature",
        "twice",
        "unknown",
        "none at once",
    ],
)
def test_what_has_no_answer_is_said(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
