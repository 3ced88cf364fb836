"""Which programs are functions of rows, as users write them, and what these give; axes that others have of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from jaxcomp.trace.levels import levels_of
from jaxcomp.trace.pointwise import Step
from jaxcomp.trace.program import trace
from jaxcomp.trace.rowwise import RowReading, varies
from tests.trace.rowwise import by_numpy, drawn, hiding, read

special = pytest.importorskip("scipy.special")
SHAPE = (2, 3, 4, 5)
LOWEST = float(np.finfo(np.float32).min)


class Case(NamedTuple):
    """A program, the same in numpy, the other arrays, and the axis of its rows."""

    fn: Any
    exact: Any
    others: tuple[jax.Array, ...] = ()
    along: int = 3


def by_hand(s: jax.Array) -> jax.Array:
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unshifted(s: jax.Array) -> jax.Array:
    e = jnp.exp(s)
    return e / jnp.sum(e, axis=-1)[..., None]


def normed(s: jax.Array) -> jax.Array:
    centered = s - s.mean(-1, keepdims=True)
    return centered / jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-3)


def of_normed(s: np.ndarray) -> np.ndarray:
    return (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-3)


def as_dot_product_attention(s: jax.Array, mask: jax.Array) -> jax.Array:
    """Transposed where a product gave its axes in another order."""
    s = jnp.where(mask, jnp.transpose(s, (2, 0, 1, 3)), LOWEST)
    return nn.softmax(s, axis=-1)


def softmax(s: np.ndarray, axis: int = -1) -> np.ndarray:
    return special.softmax(s, axis)


def seen(s: np.ndarray, mask: np.ndarray, other: float = -np.inf) -> np.ndarray:
    return np.where(mask, s, other)


CASES = {
    "softmax": Case(nn.softmax, softmax),
    "of another axis": Case(lambda s: nn.softmax(s, axis=1), lambda s: softmax(s, 1), along=1),
    "by hand": Case(by_hand, softmax),
    "unshifted": Case(unshifted, softmax),
    "scaled": Case(lambda s: nn.softmax(s * 0.3 / 2.0), lambda s: softmax(s * 0.15)),
    "a mask of keys": Case(
        lambda s, m: nn.softmax(jnp.where(m, s, -1e9)), lambda s, m: softmax(seen(s, m, -1e9)), (hiding(2, 1, 1, 5),)
    ),
    "a mask of queries and keys": Case(
        lambda s, m: nn.softmax(jnp.where(m, s, -jnp.inf)), lambda s, m: softmax(seen(s, m)), (hiding(1, 1, 4, 5),)
    ),
    "a mask of two axes": Case(
        lambda s, m: nn.softmax(jnp.where(m, s, LOWEST)), lambda s, m: softmax(seen(s, m)), (hiding(4, 5),)
    ),
    "softmax where": Case(lambda s, m: nn.softmax(s, where=m), lambda s, m: softmax(seen(s, m)), (hiding(*SHAPE),)),
    "two masks": Case(
        lambda s, a, b: nn.softmax(jnp.where(a & b, s, -jnp.inf)),
        lambda s, a, b: softmax(seen(s, a & b)),
        (hiding(2, 1, 1, 5), hiding(1, 1, 4, 5)),
    ),
    "a temperature": Case(lambda s, t: nn.softmax(s / t), lambda s, t: softmax(s / t), (jnp.float32(1.7),)),
    "one of each head": Case(lambda s, t: nn.softmax(s * t), lambda s, t: softmax(s * t), (drawn(3, 1, 1),)),
    "a bias": Case(lambda s, b: nn.softmax(s + b), lambda s, b: softmax(s + b), (drawn(1, 3, 4, 5),)),
    "soft caps": Case(lambda s: nn.softmax(jnp.tanh(s / 2.0) * 2.0), lambda s: softmax(np.tanh(s / 2) * 2)),
    "sinks": Case(
        lambda s, b: jnp.exp(s) / (b + jnp.exp(s).sum(-1, keepdims=True)),
        lambda s, b: np.exp(s) / (b + np.exp(s).sum(-1, keepdims=True)),
        (jnp.abs(drawn(3, 1, 1)),),
    ),
    "transposed scores": Case(
        as_dot_product_attention,
        lambda s, m: softmax(seen(s.transpose(2, 0, 1, 3), m)),
        (hiding(4, 1, 1, 5),),
    ),
    "none where all is hidden": Case(
        lambda s, m: jnp.where(m.any(-1, keepdims=True), nn.softmax(jnp.where(m, s, -1e9)), 0.0),
        lambda s, m: np.where(m.any(-1, keepdims=True), softmax(seen(s, m, -1e9)), 0),
        (jnp.zeros((2, 1, 1, 5), bool).at[1, 0, 0, 2].set(True),),
    ),
    "standardization": Case(normed, of_normed),
    "a row's shape": Case(
        lambda s: nn.relu(s) / (1.0 + jnp.abs(s).max(-1, keepdims=True)),
        lambda s: np.maximum(s, 0) / (1 + np.abs(s).max(-1, keepdims=True)),
    ),
    "between its ends": Case(
        lambda s: (s - s.min(-1, keepdims=True)) / (s.max(-1, keepdims=True) - s.min(-1, keepdims=True)),
        lambda s: (s - s.min(-1, keepdims=True)) / np.ptp(s, axis=-1, keepdims=True),
    ),
    "in calls": Case(lambda s: jax.jit(jax.checkpoint(lambda s: jax.jit(nn.softmax)(s)))(s), softmax),
    "axes of size 1 come and go": Case(lambda s: nn.softmax(s[:, None])[:, 0], softmax),
}


@pytest.mark.parametrize("name", CASES)
def test_a_function_is_read(name) -> None:
    case, s = CASES[name], drawn(*SHAPE)
    found = read(case.fn, s, *case.others)
    assert found is not None
    assert found.along == case.along
    others = [np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64) for x in case.others]
    exact = case.exact(np.asarray(s, np.float64), *others)
    np.testing.assert_allclose(by_numpy(found, np.asarray(s)), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: nn.softmax(s, axis=(2, 3)),
        lambda s: nn.softmax(s, -1) + nn.softmax(s, 1),
        lambda s: s - s.max(-1, keepdims=True) + s.max(1, keepdims=True),
        lambda s: s * (jnp.argmax(s, -1, keepdims=True) == 0),
        lambda s: jnp.cumsum(nn.softmax(s), -1),
        lambda s: jnp.sort(s, -1),
        lambda s: nn.softmax(s.reshape(6, 4, 5)),
        lambda s: nn.softmax(s.reshape(2, 3, 20)),
        lambda s: nn.softmax(s[..., :3]),
        lambda s: nn.softmax(s[..., ::-1]),
        lambda s: jnp.where(jnp.arange(5) < (s > 0).sum(-1, keepdims=True), nn.softmax(s), 0.0),
        lambda s: jax.jit(lambda s: nn.softmax(s + lax.iota(jnp.float32, 5)))(s),
        lambda s: nn.softmax(s.astype(jnp.bfloat16)).astype(jnp.float32),
        lambda s: s / s.prod(-1, keepdims=True),
        lambda s: s.max(-1, keepdims=True) + s[:, :, ::2].sum(-1, keepdims=True).repeat(2, 2),
        lambda s: jax.lax.fori_loop(0, 2, lambda _, s: nn.softmax(s), s),
        nn.log_softmax,
    ],
)
def test_what_is_another_is_not(fn) -> None:
    assert read(fn, drawn(*SHAPE)) is None


def test_rows_of_squares_do_not_meet_turned() -> None:
    """Axes of the same size are not taken for each other."""
    s = drawn(4, 4)
    assert read(lambda s: s - s.max(-1)[None], s) is None
    assert read(lambda s: nn.softmax(s) + s.T, s) is None
    assert read(lambda s: jnp.broadcast_to((s - s.max(-1, keepdims=True))[None], (4, 4, 4)).sum(0), s) is None
    assert read(lambda s: (s - s.max(-1)[None]).sum(-1, keepdims=True) * s, s) is None
    found = read(lambda s: (s.T - s.max(-1)).T, s)
    exact = np.asarray(s, np.float64) - np.asarray(s).max(-1, keepdims=True)
    assert found is not None
    np.testing.assert_allclose(by_numpy(found, np.asarray(s)), exact, rtol=1e-6)


def test_integers_do_not_meet_rows() -> None:
    s = drawn(*SHAPE)
    assert read(lambda s, n: nn.softmax(s + n.astype(jnp.float32)), s, jnp.arange(5)) is not None
    assert read(lambda s, n: jax.jit(lambda s, n: nn.softmax(s + n))(s, n), s, jnp.arange(5)) is None
    assert read(lambda s, n: nn.softmax(lax.select_n(n, s, -s)), s, jnp.ones(SHAPE, jnp.int32)) is None


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), (None, None, None, None)),
        ((5,), (None, None, None, 3)),
        ((1, 1, 1, 5), (None, None, None, 3)),
        ((2, 1, 4, 1), (0, None, 2, None)),
        (SHAPE, (0, 1, 2, 3)),
    ],
)
def test_axes_of_what_meets_rows(shape, axes) -> None:
    """It is met as far as its program broadcasts it in the same equation."""
    s, x = drawn(*SHAPE), drawn(*shape)
    program = jax.make_jaxpr(jax.jit(lambda s, x: s + x))(s, x)
    reading = RowReading(program.jaxpr.invars[0])
    assert reading.read(program.jaxpr.eqns[0])
    (one,) = reading.beside
    assert [axis is not None for axis in one.axes] == [axis is not None for axis in axes]
    assert one.value is program.jaxpr.invars[1]
    lacking = 4 - len(shape)
    assert one.axes == tuple(None if axis is None else axis - lacking for axis in axes)


def test_what_meets_rows_twice_is_one() -> None:
    found = read(lambda s, b: nn.softmax(s + b) * b, drawn(*SHAPE), drawn(*SHAPE))
    assert found is not None
    assert len(found.beside) == 1


def test_what_of_a_transposed_value_meets_rows() -> None:
    s, x = drawn(*SHAPE), drawn(5, 4, 3)
    program = jax.make_jaxpr(jax.jit(lambda s, x: s + x.T[None]))(s, x)
    reading = RowReading(program.jaxpr.invars[0])
    assert reading.read(program.jaxpr.eqns[0])
    assert reading.beside[0].axes == (None, 2, 1, 0)


def test_what_varies_along_a_row() -> None:
    mask, t = hiding(2, 1, 1, 5), drawn(3, 1, 1)
    found = read(lambda s, m, t: nn.softmax(jnp.where(m, s * t, -1e9)), drawn(*SHAPE), mask, t)
    assert found is not None
    varying = dict(zip(found.function, found.varying[1:], strict=True))
    by_name = {step.name: varies for step, varies in varying.items() if step.name != "operand"}
    expected = {"mul": True, "select_n": True, "reduce_max": False, "exp": True, "reduce_sum": False, "div": True}
    assert by_name.items() >= (expected | {"constant": False}).items()
    assert found.varying[0]


def test_what_is_the_same_along_a_row() -> None:
    steps = (Step("reduce_max", (0,)), Step("exp", (1,)), Step("add", (2, 0)), Step("mul", (2, 1)))
    assert varies(steps, (), 0) == [True, False, False, True, False]


def test_axes_that_a_value_varies_along_through_transposes() -> None:
    def fn(p, x, t):
        wide = jnp.broadcast_to(x[:, None, :, None], (2, 3, 5, 4))
        return jnp.transpose(wide, (2, 3, 0, 1)) * p, jnp.transpose(t, (1, 0)) * 2.0

    program = trace(fn, jnp.ones((5, 4, 2, 3)), drawn(2, 5), drawn(1, 7))
    level = levels_of(program)[()]
    moved, of_one = (op for op in program.flow.ops if op.name == "transpose")
    assert level.varying(moved.eqn.invars[0]) == {0, 2}
    assert level.varying(moved.eqn.outvars[0]) == {0, 2}
    assert moved.eqn.outvars[0].aval.shape == (5, 4, 2, 3)
    assert level.varying(of_one.eqn.outvars[0]) == {0}
    (product,) = (op for op in program.flow.ops if op.name == "mul" and op.eqn.outvars[0].aval.shape == (7, 1))
    assert level.varying(product.eqn.outvars[0]) == {0}
