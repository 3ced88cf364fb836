"""Prompts of a language model with causal attention on integers on a CPU over float32, prepared for their length.

``python -m tests.benchmarks integer_prompt``, under ``taskset -c 0`` for one core: what is done before the first new
token. Norms by the root mean square, rotary positions, a quarter as many heads of keys as of queries, gated
feed-forward. Rows are those of ``integer_encoder``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.gpu_cases import Setting
from tests.benchmarks.integer_encoder import Network, on_integers
from tests.benchmarks.timing import Report
from tests.kernels.language_model import LanguageModel

MODEL = LanguageModel(vocabulary=512, dim=512, layers=4, heads=8, shared=2)
SMALL = LanguageModel(vocabulary=64, dim=64, layers=1, heads=4, shared=2)
LENGTHS = (256, 1024)


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class Prompt:
    """Keys and values of the prompt alone."""

    keys: jax.Array | None = None
    values: jax.Array | None = None

    def append(self, k: jax.Array, v: jax.Array, start: jax.Array) -> Prompt:
        """Its tokens, all at once."""
        del start
        return Prompt(k, v)

    def attend(self, q: jax.Array, start: jax.Array) -> jax.Array:
        """Attention of each token to those up to it."""
        del start
        return jax.nn.dot_product_attention(q, self.keys, self.values, is_causal=True)


def run(*, toy: bool = False) -> Iterator[Report]:
    """A report for each length."""
    setting = Setting.lasting(3600, toy=toy)
    model = setting.pick(MODEL, SMALL)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        prompts = tuple(Prompt() for _ in range(model.layers))
        return model.apply(params, tokens, prompts, jnp.int32(0))[0]

    for length in setting.pick(LENGTHS, (40,)):
        tokens = jax.random.randint(jax.random.key(1), (1, length), 0, model.vocabulary)
        prompts = tuple(Prompt() for _ in range(model.layers))
        params = jax.jit(model.init)(jax.random.key(0), tokens, prompts, jnp.int32(0))
        network = Network(logits, params, (tokens,), ".*kernel")
        yield on_integers(setting, network, f"a prompt on integers, {length} tokens, speed")
