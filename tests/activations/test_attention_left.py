"""Attention that is left as the program has it: what is read between, in other types, by rules, of few queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax, nn

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage
from jaxcomp.activations.between import ONE_PASS
from tests.activations.attention import (
    KERNELS,
    PARAMS,
    X,
    by_einsum,
    exact,
    ids,
    is_called,
    joined,
    made,
    near,
    prepared,
    ran,
    run_of,
)
from tests.marks import quick

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.usefixtures("jax_defaults")


def given_back(p, x):
    q, k, v = made(p, x)
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0))
    return joined(p, jnp.einsum("bhqk,bkhd->bqhd", weights, v)), weights


def read_twice(p, x):
    q, k, v = made(p, x)
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0))
    return joined(p, jnp.einsum("bhqk,bkhd->bqhd", weights, v)), weights.mean()


def in_bfloat16(p, x):
    q, k, v = (y.astype(jnp.bfloat16) for y in made(p, x))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0).astype(q.dtype))
    return joined(p, jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(jnp.float32))


def of_other_rows(p, x):
    """Softmax goes along queries, and the sum along keys."""
    return by_einsum(p, x, lambda s: nn.softmax(s, axis=2))


def with_its_transpose(p, x):
    return by_einsum(p, x, lambda s: nn.softmax(s + jnp.swapaxes(s, -1, -2)))


def while_it_lasts(p, x):
    return lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, by_einsum(p, c[1])), (0, x))[1]


LEFT = [given_back, read_twice, in_bfloat16, of_other_rows, with_its_transpose, while_it_lasts]


@pytest.mark.parametrize("fn", quick(LEFT, given_back, in_bfloat16, of_other_rows), **ids)
def test_what_is_left_as_it_is(fn) -> None:
    tree, weights = prepared(fn, X)
    got, calls = ran(run_of(fn), tree, None, X)
    assert calls == 0
    assert all(row.form != ONE_PASS for row in coverage(fn, {})(tree, X).rows)
    if fn in (given_back, read_twice, while_it_lasts):
        near(jax.tree.leaves(got)[0], exact(weights, X))


def test_few_queries_are_left_as_they_are() -> None:
    tree, weights = prepared(by_einsum, X)
    run = run_of(by_einsum)
    got, calls = ran(run, tree, None, X[:, :3])
    assert calls == 0
    near(got, exact(weights, X[:, :3]))
    assert is_called(run, tree, None, X[:, :4])


def test_what_a_rule_quantizes_is_left_to_it() -> None:
    act = Act(8, range=Dynamic())
    tree, _ = prepared(by_einsum, X)
    assert not is_called(run_of(by_einsum, {".*": act}), tree, None, X)
    assert not is_called(run_of(by_einsum, {"bqhd.*": act}), tree, None, X)
    assert is_called(run_of(by_einsum, {"q": act}), tree, None, X)


def test_a_tree_that_is_not_prepared_has_its_program_as_it_is() -> None:
    tree = jc.pack(jc.quantize(jc.Int(8), where=KERNELS, roles=jc.roles(by_einsum)(PARAMS, X)).apply((), PARAMS))
    got, calls = ran(run_of(by_einsum), tree, None, X)
    assert calls == 0
    near(got, exact(jc.materialize(tree), X))


def test_a_result_in_another_type() -> None:
    def fn(p, x):
        q, k, v = made(p, x)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.bfloat16)
        return joined(p, y.astype(jnp.float32))

    tree, weights = prepared(fn, X)
    near(ran(run_of(fn), tree, None, X)[0], exact(weights, X), 0.02)
