"""Every primitive with a rule, over odd shapes and at the corners of its types, run by onnxruntime and by JAX.

One file of ONNX holds all cases of a group: a case is a function of the group's arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.export import ExportError, to_onnx
from jaxcomp.export.onnx.registry import RULES
from tests.export.running import exported

Case = Callable[..., Any]
FLOATS = np.array([[0.0, -0.0, 0.3, -0.7, 1.0], [-1.0, 2.5, -3.5, 1e-6, 40.0]], np.float32)
ODD = np.concatenate([FLOATS.ravel(), [np.nan, np.inf, -np.inf, 0.5, -1.5]]).astype(np.float32)
INTS = np.array([7, -7, 0, 5, -128, 127, -1], np.int32)
LOWEST = np.iinfo(np.int32).min


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def each(names: str, module: Any = lax) -> dict[str, Case]:
    return {name: getattr(module, name) for name in names.split()}


def at_ends(x, dtype, low, high):
    """Numbers about the end of a type, of the signs of ``x``, through the type."""
    ends = jnp.linspace(low, high, x.size, dtype=x.dtype).reshape(x.shape)
    return lax.convert_element_type(lax.select(x > 0, ends, -ends).astype(dtype), jnp.float32)


UNARY = {
    **each("""abs asinh atan cbrt ceil cos cosh erf erfc exp expm1 floor is_finite log1p logistic neg
           round rsqrt sign sin sinh sqrt square tan tanh exp2"""),
    "log": lambda x: lax.log(lax.abs(x)),
    "round away": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "round even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "acos": lambda x: lax.acos(lax.tanh(x)),
    "asin": lambda x: lax.asin(lax.tanh(x)),
    "acosh": lambda x: lax.acosh(lax.abs(x) + 1.5),
    "atanh": lambda x: lax.atanh(lax.tanh(x) * 0.5),
    "small expm1": lambda x: lax.expm1(x * 1e-4),
    "small log1p": lambda x: lax.log1p(x * 1e-4),
    **{f"power {n}": lambda x, n=n: lax.integer_pow(x, n) for n in (0, 1, 2, 3, 7, -1, -3)},
    "clamp": lambda x: lax.clamp(jnp.float32(-1), x, jnp.float32(2)),
    "clamp by arrays": lambda x: lax.clamp(jnp.full_like(x, -1), x, lax.abs(x) * 0.5),
    "relu": lambda x: lax.max(x, jnp.float32(0)),
    **{f"as {d}": lambda x, d=d: lax.convert_element_type(x, jnp.dtype(d))
       for d in ("int8", "uint8", "int16", "int32", "uint32", "bool", "float16")},
    "through bfloat16": lambda x: (x.astype(jnp.bfloat16) * 2 + 1).astype(jnp.float32),
    "through float8": lambda x: lax.convert_element_type(lax.convert_element_type(x, jnp.float8_e4m3fn), jnp.float32),
    **{f"ends of {d}": lambda x, d=d, ends=ends: at_ends(x, d, *ends)
       for d, ends in (("float8_e4m3fn", (440, 520)), ("float8_e5m2", (57e3, 7e4)), ("float8_e5m2fnuz", (57e3, 7e4)))},
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "not": lambda x: lax.bitwise_not(lax.gt(x, jnp.float32(0))),
    "nan is not itself": lambda x: lax.ne(x, x),
}  # fmt: skip
BINARY = {
    **each("add sub mul div max min eq ne lt le gt ge atan2 rem"),
    "pow": lambda x, y: lax.pow(lax.abs(x), y),
    "scalar": lambda x, y: x * 2 + y,
    "select": lambda x, y: lax.select(x > y, x, y),
    "select of truth": lambda x, y: lax.select(x > y, x > 0, y > 0),
    "and": lambda x, y: lax.bitwise_and(x > 0, y > 0),
    "max of truth": lambda x, y: lax.max(x > 0, y > 0),
    "less of truth": lambda x, y: (x > 0) < (y > 0),
    "row against column": lambda x, y: (x[:1] + y[:, :1]).reshape(-1),
    "of what is repeated": lambda x, y: (lax.sub(x[:, :1], jnp.broadcast_to(y[:, :1], x.shape)) + x[:, :1]).reshape(-1),
    "bfloat16": lambda x, y: (x.astype(jnp.bfloat16) * y.astype(jnp.bfloat16)).astype(jnp.float32),
    "float16": lambda x, y: x.astype(jnp.float16) + y.astype(jnp.float16),
    "pick": lambda x, y: lax.select_n(jnp.clip(y, 0, 2).astype(jnp.int32), x, y, x * y),
}
INTEGERS = {
    **each("add sub mul div rem max min eq lt bitwise_and bitwise_or bitwise_xor"),
    "not": lambda x, y: lax.bitwise_not(x),
    "neg": lambda x, y: lax.neg(x),
    "abs and sign": lambda x, y: jnp.abs(x) * lax.sign(y),
    "floor_divide": lambda x, y: jnp.where(y == 0, 0, x // jnp.where(y == 0, 1, y)),
    "by a number": lambda x, y: lax.div(x, jnp.full_like(x, 3)) + lax.rem(x, jnp.full_like(x, 4)),
    "square": lambda x, y: lax.square(x),
    "sum": lambda x, y: jnp.sum(x),
    "product": lambda x, y: jnp.prod(y),
    "largest": lambda x, y: jnp.max(x),
    "left": lambda x, y: lax.shift_left(x, jnp.abs(y)) if x.dtype == jnp.int32 else lax.shift_left(x, y),
    "right": lambda x, y: lax.shift_right_logical(x, jnp.full_like(x, 3)),
    "right by much": lambda x, y: lax.shift_right_logical(x, jnp.full_like(x, 77)),
    "arithmetic": lambda x, y: lax.shift_right_arithmetic(x, jnp.full_like(x, 2)),
    "arithmetic by much": lambda x, y: lax.shift_right_arithmetic(x, jnp.full_like(x, 77)),
    "as int8": lambda x, y: x.astype(jnp.int8),
    "as uint8": lambda x, y: x.astype(jnp.uint8),
    "as float": lambda x, y: x.astype(jnp.float32),
    "select": lambda x, y: lax.select(x > y, x, y),
    "cumsum": lambda x, y: lax.cumsum(x),
    "bits of another sign": lambda x, y: lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")),
    "bits of several": lambda x, y: lax.bitcast_convert_type(x.astype(jnp.uint8).reshape(-1, 4), jnp.uint32),
    "float of bits": lambda x, y: lax.bitcast_convert_type(
        x.astype(jnp.int32) * 16777259 + y.astype(jnp.int32), jnp.float32
    ),
    "bits in several": lambda x, y: lax.bitcast_convert_type(x.astype(jnp.uint32), jnp.uint8),
}
NANS = np.array([[1, np.nan, 9, np.nan], [3, 3, -2, 0], [0, 0, -5, -5]], np.float32)
OVER_AXES = {
    "sum": lambda x: jnp.sum(x, (0, 2)),
    "mean": lambda x: jnp.mean(x, 1, keepdims=True),
    "max": lambda x: jnp.max(x, 2),
    "min": lambda x: jnp.min(x),
    "prod": lambda x: jnp.prod(x, 1),
    "any": lambda x: jnp.any(x > 1, 1),
    "all": lambda x: jnp.all(x < 1, (1, 2)),
    "of what is repeated": lambda x: jnp.sum(jnp.broadcast_to(x[:1], x.shape), 0),
    "of what lies otherwise": lambda x: jnp.sum(jnp.transpose(x, (2, 0, 1)), 1),
    "bfloat16": lambda x: jnp.max(x.astype(jnp.bfloat16), 1).astype(jnp.float32),
    "argmax": lambda x: jnp.argmax(x, 1),
    "argmin": lambda x: jnp.argmin(x, 2),
    "argmax of all": lambda x: jnp.argmax(x),
    "cumsum": lambda x: lax.cumsum(x, 1),
    "cumsum back": lambda x: lax.cumsum(x, 2, reverse=True),
    "cumprod": lambda x: lax.cumprod(x, 1),
    "cummax back": lambda x: lax.cummax(x, 2, reverse=True),
    "cummin": lambda x: lax.cummin(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 1),
    "sort": lambda x: jnp.sort(x, 1),
    "argsort": lambda x: jnp.argsort(x, 2),
    "two keys": lambda x: lax.sort((jnp.round(x), x), dimension=1, num_keys=2),
    "top_k": lambda x: lax.top_k(x, 2),
    "softmax": lambda x: jax.nn.softmax(x, 1),
    "log_softmax": lambda x: jax.nn.log_softmax(x),
    "logsumexp": lambda x: jax.nn.logsumexp(x, 0),
    "var": lambda x: jnp.var(x, 1),
}  # fmt: skip
LOST = {
    "argmax": lambda x: jnp.argmax(x, 1),
    "argmin": lambda x: jnp.argmin(x, 1),
    "sort": lambda x: jnp.sort(x, 1),
    "argsort": lambda x: jnp.argsort(x, 1),
    "top_k": lambda x: lax.top_k(x, 3),
    "max of two": lambda x: jnp.maximum(x, x[::-1]),
    "clip": lambda x: jnp.clip(x, 0, 1),
    "relu": jax.nn.relu,
}
MOVED = {
    "slice": lambda x: lax.slice(x, (1, 0, 2), (3, 5, 7), (1, 2, 3)),
    "rev": lambda x: lax.rev(x, (0, 2)),
    "split": lambda x: jnp.split(x, (2, 3), 1),
    "array_split": lambda x: jnp.array_split(x, 3, 2),
    "concatenate": lambda x: jnp.concatenate([x, x[:, 1:], -x], 1),
    "stack": lambda x: jnp.stack([x, -x], 1),
    "unstack": lambda x: jnp.unstack(x, axis=1),
    "tile": lambda x: jnp.tile(x, (2, 1, 3)),
    "repeat": lambda x: jnp.repeat(x, 2, 1),
    "pad": lambda x: jnp.pad(x, ((1, 0), (0, 2), (0, 0)), constant_values=3),
    "pad and cut": lambda x: lax.pad(x, jnp.float32(1), ((-1, 2, 0), (1, -2, 1), (0, 0, 2))),
    "pad of truth": lambda x: jnp.pad(x > 0, ((1, 1), (0, 0), (0, 0))),
    "reflect": lambda x: jnp.pad(x, ((1, 1), (2, 0), (0, 0)), mode="reflect"),
    "roll": lambda x: jnp.roll(x, 2, 1),
    "flip of a transpose": lambda x: jnp.flip(jnp.transpose(x, (2, 0, 1)), 0),
    "slice of what is repeated": lambda x: jnp.broadcast_to(x[:, :1], x.shape)[:, 1:3],
    "squeeze and expand": lambda x: jnp.expand_dims(x[:, 2], (0, 3)),
    "reshape": lambda x: x.transpose(1, 0, 2).reshape(5, -1)[:, ::2],
    "iota": lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 1),
    "triangle": jnp.tril,
    "diagonal": lambda x: jnp.diagonal(x, axis1=0, axis2=1),
    "one_hot": lambda x: jax.nn.one_hot(jnp.clip(x[0, 0], 0, 3).astype(jnp.int32), 4),
}
PLACES = np.array([[2, 0, -1], [4, 9, -7]], np.int32)
LOOKED_UP = {
    "take": lambda x, i: jnp.take(x, i, 1),
    "take and clip": lambda x, i: jnp.take(x, i, 0, mode="clip"),
    "take and wrap": lambda x, i: jnp.take(x, i, 2, mode="wrap"),
    "take of integers": lambda x, i: jnp.take((x * 9).astype(jnp.int32), i, 1),
    "take of a transpose": lambda x, i: jnp.take(jnp.transpose(x, (1, 2, 0)), i, 1),
    "take, filled": lambda x, i: jnp.take(x, i, 1, mode="fill", fill_value=-3.0),
    "take of truth": lambda x, i: jnp.take(x > 0, i, 1),
    "one": lambda x, i: x[i[0, 0]],
    "pairs": lambda x, i: x[i, :, i],
    "pairs in front": lambda x, i: x[i, jnp.abs(i) % 5],
    "columns": lambda x, i: x[:, :, i],
    "along an axis": lambda x, i: jnp.take_along_axis(x, jnp.abs(i[:1, None]) % 5, 2),
    "dynamic_slice": lambda x, i: lax.dynamic_slice(x, (i[0, 0], i[1, 0], i[1, 2]), (1, 4, 3)),
    "dynamic_slice whole": lambda x, i: lax.dynamic_slice(x, (i[0, 0], i[0, 1], i[0, 2]), (4, 5, 2)),
    "dynamic_index": lambda x, i: lax.dynamic_index_in_dim(x, i[0, 0], 1, keepdims=False),
    "windows": lambda x, i: jax.vmap(lambda k: lax.dynamic_slice(x, (0, k, 1), (3, 2, 4)))(i.reshape(-1)),
    "rows at a place of a whole axis": lambda x, i: jax.vmap(
        lambda k: lax.dynamic_slice(x[0], (k, i[0, 0]), (1, 8))
    )(i.reshape(-1)),
    "windows of each": lambda x, i: jax.vmap(lambda r, k: lax.dynamic_slice(r, (k, 1), (2, 4)))(x[:3], i[0]),
    "table": lambda x, i: jnp.asarray(draws(7, 4, seed=5))[i],
    "numbers": lambda x, i: x[jnp.array([2, 0])][:, :, jnp.array([1, -1])],
}  # fmt: skip
UPDATED = {
    "set": lambda x, i: x.at[i[0]].set(1.0),
    "set, outside dropped": lambda x, i: x.at[:, i].set(2.0),
    "add": lambda x, i: x.at[jnp.array([1, 1, 3]), 2].add(0.5),
    "add here": lambda x, i: x.at[:, i[0]].add(x[:, :3]),
    "largest": lambda x, i: x.at[i[0], 1].max(0.1),
    "times": lambda x, i: x.at[..., i[0]].mul(2.0),
    "clip": lambda x, i: x.at[i].set(3.0, mode="clip"),
    "integers": lambda x, i: (x * 9).astype(jnp.int32).at[i[0]].add(1),
    "one element": lambda x, i: x.at[1, i[0, 1], 3].set(7.0),
    "dynamic_update_slice": lambda x, i: lax.dynamic_update_slice(x, x[:1, :2] * 2, (i[0, 0], i[1, 0], i[0, 0])),
    "row in a cache": lambda x, i: lax.dynamic_update_index_in_dim(x, x[:, 0] * 0, i[0, 0], 1),
    "whole": lambda x, i: lax.dynamic_update_slice(x, x * 2, (i[0, 0], i[0, 0], i[0, 0])),
    "slice": lambda x, i: x.at[1:3, ::2].set(0.0),
}
PRODUCTS = {
    "matrices": lambda x, y: jnp.einsum("abc,cd->abd", x, y),
    "batches": lambda x, y: jnp.einsum("abc,aec->abe", x, x),
    "heads": lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x.reshape(4, 5, 2, 4), x.reshape(4, 5, 2, 4)),
    "back": lambda x, y: jnp.einsum("bhqk,bkhd->bqhd", jnp.ones((4, 2, 3, 5)), x.reshape(4, 5, 2, 4)),
    "vectors": lambda x, y: jnp.vdot(x, x),
    "outer": lambda x, y: jnp.einsum("ab,cd->abcd", x[0], y),
    "two axes": lambda x, y: jnp.tensordot(x, draws(3, 8, 5), ((1, 2), (2, 1))),
    "row": lambda x, y: x[0, 0] @ y,
    "column": lambda x, y: x @ y[:, 0],
    "a matrix in front": lambda x, y: jnp.einsum("dc,abc->dab", jnp.asarray(draws(7, 8)), x),
    "a matrix in front of rows": lambda x, y: jax.vmap(lambda v: jnp.asarray(draws(7, 8)) @ v)(x[0]),
    "matrices in front": lambda x, y: jnp.einsum("abc,aec->abe", jnp.asarray(draws(4, 3, 8)), x),
    "all of a matrix": lambda x, y: jnp.einsum("bc,abc->a", jnp.asarray(draws(5, 8)), x),
    "integers": lambda x, y: lax.dot_general(
        (x * 9).astype(jnp.int8), (y * 9).astype(jnp.int8), (((2,), (0,)), ((), ())), preferred_element_type=jnp.int32
    ),
    "batches of integers": lambda x, y: lax.dot_general(
        (x * 9).astype(jnp.int8), (x * 7).astype(jnp.int8), (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.int32,
    ),
    "wide integers": lambda x, y: (x * 9).astype(jnp.int32) @ (y * 9).astype(jnp.int32),
    "bfloat16": lambda x, y: (x.astype(jnp.bfloat16) @ y.astype(jnp.bfloat16)).astype(jnp.float32),
    "float16 into single": lambda x, y: lax.dot_general(
        x.astype(jnp.float16), y.astype(jnp.float16), (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ),
    "attention": lambda x, y: jax.nn.dot_product_attention(*[x.reshape(4, 5, 2, 4)] * 3, is_causal=True),
}  # fmt: skip


def loop(x, n):
    return lax.fori_loop(0, n, lambda i, c: c * 0.5 + x[0] * i, x[1])


CONTROLLED = {
    "short scan": lambda x, n: lax.scan(lambda c, row: (c + row, c * row), x[0], x),
    "long scan": lambda x, n: lax.scan(lambda c, row: (c + row, c * row), x[0, :5], jnp.tile(x[:, :5], (4, 1))),
    "scan back": lambda x, n: lax.scan(lambda c, i: (c * 0.5 + i, c), x[0], jnp.arange(11.0), reverse=True),
    "scan of nothing": lambda x, n: lax.scan(lambda c, _: (jnp.sin(c) + x[0], None), x[1], None, length=12)[0],
    "fori": lambda x, n: lax.fori_loop(0, 13, lambda i, c: c * 0.9 + x[0] * i, x[1]),
    "fori to what is given": lambda x, n: loop(x, n),
    "while": lambda x, n: lax.while_loop(lambda c: jnp.sum(c[0]) < 50, lambda c: (c[0] * 1.7 + 1, c[1] + 1), (x, n)),
    "while of no round": lambda x, n: lax.while_loop(lambda c: c[1] < 0, lambda c: (c[0] + 1, c[1] + 1), (x, n)),
    "cond": lambda x, n: lax.cond(n > 2, lambda: x * 2, lambda: x - 1),
    "cond, not taken": lambda x, n: lax.cond(n > 9, jnp.sin, jnp.cos, x),
    "switch": lambda x, n: lax.switch(n, [lambda: x, lambda: -x, lambda: x * 3, lambda: x @ x.T @ x]),
    "switch beyond": lambda x, n: lax.switch(n + 7, [lambda: x, lambda: -x, lambda: x * 5]),
    "loop in a branch": lambda x, n: lax.cond(n > 2, lambda: loop(x, n), lambda: x[0]),
    "branch in a loop": lambda x, n: lax.fori_loop(
        0, 12, lambda i, c: lax.cond(i % 2 == 0, lambda: c + x[0], lambda: c * 0.5), x[1]
    ),
    "searchsorted": lambda x, n: jnp.searchsorted(jnp.sort(x[0]), x[1]),
    "remat": lambda x, n: jax.checkpoint(lambda v: jnp.sin(v) * 2)(x),
    "custom rule": lambda x, n: jax.nn.silu(x) + jax.nn.gelu(x) + jax.nn.elu(x) + jax.nn.softplus(x),
}
INT_PAIRS = [(a, b) for a in (*INTS, LOWEST) for b in (*INTS, LOWEST)]
LEFT, RIGHT = (np.array(side, np.int32) for side in zip(*INT_PAIRS, strict=True))
GROUPS: dict[str, tuple[dict[str, Case], tuple[np.ndarray, ...], float]] = {
    "unary": (UNARY, (ODD,), 2e-6),
    "unary, of two axes": (UNARY, (FLOATS.T,), 2e-6),
    "binary": (BINARY, (draws(3, 5), draws(3, 5, seed=1)), 2e-6),
    "int32": (INTEGERS, (LEFT, RIGHT), 0),
    "uint8": (INTEGERS, (LEFT.astype(np.uint8), RIGHT.astype(np.uint8)), 0),
    "int8": (INTEGERS, (LEFT.astype(np.int8), RIGHT.astype(np.int8)), 0),
    "uint16": (INTEGERS, (LEFT.astype(np.uint16), RIGHT.astype(np.uint16)), 0),
    "uint32": (INTEGERS, (LEFT.astype(np.uint32), RIGHT.astype(np.uint32)), 0),
    "over axes": (OVER_AXES, (draws(4, 5, 3),), 2e-6),
    "NaN": (LOST, (NANS,), 0),
    "moved": (MOVED, (draws(4, 5, 8),), 0),
    "looked up": (LOOKED_UP, (draws(4, 5, 8), PLACES), 0),
    "updated": (UPDATED, (draws(4, 5, 8), PLACES), 1e-6),
    "products": (PRODUCTS, (draws(4, 5, 8), draws(8, 6, seed=1)), 2e-6),
    "control": (CONTROLLED, (draws(4, 6), np.int32(3)), 1e-5),
}
SLOW = {"unary, of two axes", "int8", "uint16", "uint32"}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PARAMS = {"unused": np.ones(1, np.float32)}


@pytest.fixture(autouse=True)
def jax_defaults():
    """Functions as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def grouped(cases: dict[str, Case]) -> Case:
    return lambda p, *args: {name: case(*args) for name, case in cases.items()}


@pytest.mark.parametrize("group", [pytest.param(g, marks=pytest.mark.slow if g in SLOW else ()) for g in GROUPS])
def test_rules(tmp_path: Path, group: str) -> None:
    cases, args, relative = GROUPS[group]
    fn = grouped(cases)
    want = jax.tree_util.tree_flatten_with_path(jax.jit(fn, compiler_options=FAST)(PARAMS, *args))[0]
    got = exported(tmp_path, fn, PARAMS, *args)
    for (path, expected), found in zip(want, got, strict=True):
        name, expected = jax.tree_util.keystr(path), np.asarray(expected)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        if relative:
            found, expected = found.astype(np.float64), expected.astype(np.float64)
            scale = np.max(np.abs(expected), initial=1, where=np.isfinite(expected))
            tolerance = 8e-3 if "float16" in name else relative
            limits = {"rtol": 4 * tolerance, "atol": tolerance * min(scale, 1e3)}
            np.testing.assert_allclose(found, expected, **limits, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


UNKNOWN = {
    "erf_inv": lambda x: lax.erf_inv(x),
    "lgamma": lambda x: lax.lgamma(x),
    "population_count": lambda x: lax.population_count(x.astype(jnp.int32)),
    "triangular_solve": lambda x: jax.scipy.linalg.solve_triangular(x[:2, :2], x[:2]),
}


def test_bits_of_floats(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'bitcast_convert_type' at .*reads the bits of float32 as int32; compute"):
        to_onnx(tmp_path / "f.onnx", lambda p, x: lax.bitcast_convert_type(x, jnp.int32), PARAMS, FLOATS)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=rf"'{name}' at .*test_rules.py.*; write this part"):
        to_onnx(tmp_path / "f.onnx", lambda p, x: UNKNOWN[name](x), PARAMS, FLOATS)
    assert name not in RULES
    assert not list(tmp_path.iterdir())
