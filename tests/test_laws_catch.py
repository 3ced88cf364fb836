"""A check that cannot fail proves nothing: each law's check, on a transform that breaks that law."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.leaves import CompressedLeaf
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.transform import stateless
from tests import laws
from tests.test_laws import make_params


@compressed_leaf()
class Lossy(CompressedLeaf):
    """Packs to fewer bits than it trains with."""

    x: jax.Array

    @property
    def shape(self):
        return self.x.shape

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32)

    def materialize(self):
        return self.x.astype(jnp.float32)

    def pack(self):
        return Lossy(self.x.astype(jnp.bfloat16))


@compressed_leaf()
class Wide(CompressedLeaf):
    """Codes of four bits that take a byte each."""

    inner: jc.quantization.Quantized

    @property
    def shape(self):
        return self.inner.shape

    @property
    def dtype(self):
        return self.inner.dtype

    def materialize(self):
        return self.inner.materialize()

    def pack(self):
        q = self.inner
        return jc.quantization.Quantized(q.codes.astype(jnp.int8), q.scale, q.zero_point, q.grid, q.dense_dtype)


def each(fn) -> jc.Transform:
    return stateless(lambda params: jax.tree.map(fn, params))


def stateful(init, update) -> jc.Transform:
    return jc.Transform(init, lambda s, p, *, step, **stats: update(s, step), lambda s, p: p)


def int4(w: jax.Array):
    return jc.quantize(jc.Int(4), per=jc.core.Channels(-1), where=jc.core.everything).apply((), {"w": w})["w"]


counter = itertools.count()

BROKEN = {
    "loses bits in pack": (laws.check_ships_what_it_trains, each(Lossy)),
    "a byte for four bits": (laws.check_codes_are_narrow, each(lambda w: Wide(int4(w)))),
    "changes the type": (laws.check_keeps_structure, each(lambda w: w.astype(jnp.bfloat16))),
    "changes the shape": (laws.check_keeps_structure, each(lambda w: w[:1])),
    "changes the structure": (laws.check_keeps_structure, stateless(lambda p: {"all": p})),
    "copies what it should leave": (laws.check_keeps_structure, each(lambda w: w + 0)),
    "looks whether it is traced": (
        laws.check_jit_equals_eager,
        each(lambda w: w + jnp.float32(isinstance(w, jax.core.Tracer))),
    ),
    "grows its state": (
        laws.check_compiles_once,
        stateful(lambda p: jnp.zeros(1), lambda s, step: jnp.concatenate([s, jnp.zeros(1)])),
    ),
    "needs values to init": (laws.check_init_has_shapes, stateful(lambda p: float(p["conv"][0].sum()), lambda s, i: s)),
    "draws hidden numbers": (laws.check_deterministic, each(lambda w: w + jnp.float32(next(counter)))),
    "rounds without a gradient": (laws.check_learns, each(lambda w: jnp.round(w) - w * 0 + jax.lax.stop_gradient(w))),
    "has a gradient of NaN": (laws.check_learns, each(lambda w: jnp.sqrt(w - w))),
    "keeps a Python number": (laws.check_state_is_a_checkpoint, stateful(lambda p: 3, lambda s, i: s)),
    "starts with NaN": (laws.check_valid_at_step_zero, each(lambda w: w / 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_catches(name: str) -> None:
    check, transform = BROKEN[name]
    with pytest.raises((AssertionError, jax.errors.ConcretizationTypeError, TypeError)):
        check(transform, make_params())


def test_every_check_is_broken_once() -> None:
    assert {check for check, _ in BROKEN.values()} == set(laws.CHECKS)


def test_bits_tell_zero_from_minus_zero() -> None:
    with pytest.raises(AssertionError, match="differs in its bits"):
        laws.assert_same_bits({"w": np.float32(0.0)}, {"w": np.float32(-0.0)})
