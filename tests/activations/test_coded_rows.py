"""Activations whose rows have ranges of their own: codes, scales and zero points of one pass are JAX's, bit by bit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxcomp.activations import Act, Dynamic, encoded
from jaxcomp.activations.fake import Entry
from jaxcomp.core.layouts import Groups, Tensor, Tokens
from jaxcomp.kernels import llvm_calls, llvm_rows
from tests.marks import quick

pytest.importorskip("llvmlite")
ROLES = ("batch", "output", "contracted")
RULE = Act(8, range=Dynamic(), per=Tokens())
ACTS = {
    f"{bits} bits{', symmetric' if symmetric else ''}": Act(bits, symmetric=symmetric, range=Dynamic(), per=Tokens())
    for bits in (8, 7, 4, 2)
    for symmetric in (False, True)
}


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def of(x, act=RULE, roles=ROLES):
    return encoded.encoded(x, act, Entry(roles))


def plain(x, act=RULE, roles=ROLES):
    return encoded._in_steps(x, act, Entry(roles), None)


def text(x, act=RULE, roles=ROLES) -> str:
    return jax.jit(partial(of, act=act, roles=roles)).lower(x).as_text()


def same(got, wanted) -> None:
    """Where a scale is no finite number codes are any."""
    np.testing.assert_array_equal(got.scale, wanted.scale)
    finite = np.isfinite(wanted.scale)
    np.testing.assert_array_equal(np.where(finite, got.codes, 0), np.where(finite, wanted.codes, 0))
    assert got.codes.dtype == wanted.codes.dtype == jnp.int8
    assert (got.zero is None) == (wanted.zero is None)
    if got.zero is not None:
        np.testing.assert_array_equal(np.where(finite, got.zero, 0), np.where(finite, wanted.zero, 0))
        assert got.zero.dtype == wanted.zero.dtype == jnp.int32


def check(x, act=RULE, roles=ROLES) -> None:
    assert "jaxcomp_rows_of_codes" in text(x, act, roles)
    same(jax.jit(partial(of, act=act, roles=roles))(x), jax.jit(partial(plain, act=act, roles=roles))(x))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("length", quick([8, 9, 16, 19, 64, 100, 512], 8, 19))
@pytest.mark.parametrize("name", quick(ACTS, "8 bits", "4 bits, symmetric"))
def test_codes_are_jaxs(monkeypatch, name, length, wide) -> None:
    if wide and "avx512f" not in llvm_calls.features():
        pytest.skip("the processor has no AVX-512")
    monkeypatch.setattr(llvm_rows, "features", lambda: frozenset({"avx512f"} if wide else ()))
    check(drawn(3, 7, length), ACTS[name])


@pytest.mark.parametrize("name", quick(ACTS, "8 bits", "8 bits, symmetric"))
def test_rows_of_any_size(name) -> None:
    x = np.array(drawn(16, 2, 40))
    x[0], x[1], x[2], x[3] = 0.0, np.abs(x[1]), -np.abs(x[2]), 0.7
    x[4], x[5], x[6], x[7] = x[4] * 1e-39, x[5] * 1e-37, x[6] * 1e19, x[7] * 1e37
    x[8], x[9], x[10] = np.sign(x[8]) * np.finfo(np.float32).max, np.finfo(np.float32).max, -0.0
    x[11, :, 3], x[12, :, 4], x[13, :, 5] = np.nan, np.inf, -np.inf
    x[14] = np.round(x[14] * 8) / 16  # halves of a step
    x[15, :, 1:] = 0.0
    check(jnp.asarray(x), ACTS[name])


@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (2, 3, 4, 24), (70, 16), (1, 1, 4096)])
def test_any_lead(shape) -> None:
    check(drawn(*shape), roles=(*["output"] * (len(shape) - 1), "contracted"))


@pytest.mark.parametrize(
    ("x", "act", "roles"),
    [
        (drawn(2, 3, 4), RULE, ROLES),
        (drawn(2, 3, 16).astype(jnp.bfloat16), RULE, ROLES),
        (drawn(2, 3, 16), RULE, ("batch", "contracted", "output")),
        (drawn(2, 3, 16), RULE, ("output", "contracted", "contracted")),
        (drawn(2, 3, 16), Act(8, range=Dynamic(), per=Groups(8)), ROLES),
        (drawn(2, 3, 16), Act(8, range=Dynamic(), per=Tensor()), ROLES),
        (drawn(0, 3, 16), RULE, ROLES),
        (drawn(16), RULE, ("contracted",)),
    ],
)
def test_others_are_rounded_as_before(x, act, roles) -> None:
    assert "jaxcomp_rows" not in text(x, act, roles)
    got, wanted = (jax.tree.leaves(jax.jit(partial(f, act=act, roles=roles))(x)) for f in (of, plain))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mapped_and_run_at_once() -> None:
    x = drawn(4, 3, 24)
    wanted = plain(x)
    same(of(x), wanted)
    same(jax.vmap(partial(of, roles=ROLES[1:]))(x), wanted)
    same(jax.jit(jax.vmap(partial(of, roles=ROLES[1:])))(x), wanted)


def test_in_loops() -> None:
    x = drawn(4, 3, 24)
    same(jax.lax.map(partial(of, roles=ROLES[1:]), x), plain(x))


def test_no_gradient_flows() -> None:
    gradient = jax.grad(lambda x: of(x).value().sum())(drawn(2, 3, 24))
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_program_that_is_kept_holds_jaxs_operations() -> None:
    x = drawn(4, 3, 24)
    kept = export.export(jax.jit(lambda x: of(x).value()))(x)
    assert "jaxcomp_rows" not in kept.mlir_module()
    np.testing.assert_array_equal(kept.call(x), jax.jit(lambda x: of(x).value())(x))


def test_without_llvmlite(monkeypatch) -> None:
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    x = drawn(4, 5, 24)
    assert "jaxcomp_rows" not in text(x)
    same(jax.jit(of)(x), jax.jit(plain)(x))
    jax.clear_caches()
