"""A language model with a 4-bit base and an int8 cache generates step by step what one pass over all of it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.activations import coverage, quantize_function
from jaxcomp.kernels import KVCache, prepare
from tests.kernels.language_model import LanguageModel, four_bits

MODEL = LanguageModel(vocabulary=97, dim=64, layers=2, heads=4, shared=2)
BATCH, PROMPT, NEW = 2, 6, 40
CAPACITY = PROMPT + NEW
STARTS = np.array([6, 4])
"""How long each row's prompt is."""


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def caches() -> tuple[KVCache, ...]:
    return MODEL.caches(BATCH, CAPACITY)


def requantized(cache: KVCache) -> KVCache:
    """All of it in codes anew, as caches do that quantize what they hold at every step."""
    return KVCache(*(rows.of(rows.materialize()) for rows in (cache.keys, cache.values)))


class Run:
    """The model on packed weights; its compiled steps."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.prompt = jnp.asarray(rng.integers(0, 97, (BATCH, PROMPT)))
        start = jnp.zeros(BATCH, jnp.int32)
        shapes = jax.eval_shape(MODEL.init, jax.random.key(0), self.prompt, caches(), start)
        draw = lambda s: jnp.asarray(rng.normal(size=s.shape) * 3 / max(s.shape[0], 1) ** 0.5, s.dtype)  # noqa: E731
        params = jax.tree.map(lambda s: draw(s) if len(s.shape) > 1 else jnp.ones(s.shape), shapes)
        self.tree = prepare(four_bits(params, 32), MODEL.apply, self.prompt, caches(), start)
        run = quantize_function(MODEL.apply, {})
        self.step = jax.jit(lambda tokens, caches, start: run(self.tree, None, tokens, caches, start))

    def generated(self, between: Callable[[Any], Any] = lambda caches: caches) -> tuple[np.ndarray, np.ndarray]:
        """Greedy tokens ``(batch, new)`` and their logits, one step after another."""
        rows = np.arange(BATCH)
        logits, now = self.step(self.prompt, caches(), jnp.zeros(BATCH, jnp.int32))
        found = [np.asarray(logits)[rows, STARTS - 1]]
        for i in range(NEW - 1):
            token = found[-1].argmax(-1)[:, None]
            logits, now = self.step(jnp.asarray(token), between(now), jnp.asarray(STARTS + i, jnp.int32))
            found.append(np.asarray(logits)[:, 0])
        logits = np.stack(found, 1)
        return logits.argmax(-1), logits

    def in_one_pass(self, new: np.ndarray) -> np.ndarray:
        """The logits of these tokens, all at once through an empty cache."""
        tokens = np.zeros((BATCH, CAPACITY), np.int32)
        for b, start in enumerate(STARTS):
            row = [*np.asarray(self.prompt)[b, :start], *new[b]]
            tokens[b, : len(row)] = row
        logits, _ = self.step(jnp.asarray(tokens), caches(), jnp.zeros(BATCH, jnp.int32))
        return np.stack([np.asarray(logits)[b, s - 1 : s - 1 + NEW] for b, s in enumerate(STARTS)])


def test_steps_generate_what_one_pass_does_and_a_cache_quantized_again_does_not():
    run = Run()
    tokens, logits = run.generated()
    whole = run.in_one_pass(tokens)
    margin = np.diff(np.sort(whole, -1)[..., -2:], axis=-1).min()
    assert np.abs(whole - logits).max() < 0.2 * margin  # no token is a matter of rounding
    np.testing.assert_array_equal(whole.argmax(-1), tokens)
    assert len(np.unique(tokens)) > 20

    again = jax.jit(lambda caches: jax.tree.map(requantized, caches, is_leaf=lambda x: isinstance(x, KVCache)))
    drifted, _ = run.generated(again)
    assert (drifted != tokens).any()
    assert (run.in_one_pass(drifted).argmax(-1) != drifted).any()

    start = jnp.zeros(BATCH, jnp.int32)
    rows = coverage(MODEL.apply, {})(run.tree, run.prompt[:, :1], caches(), start).rows
    assert {r.done for r in rows if r.path.startswith("params")} == {"lookup", "weight-only"}
