"""A 2:4 mask over 10 million weights inside jit, along the contraction axis of a Flax kernel and along the last one.

Command: ``python -m tests.benchmarks nm_mask``
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxcomp.pruning.masks.nm import is_n_m, n_m_mask
from jaxcomp.pruning.specs import NM
from tests.benchmarks.timing import Report, Row, measure

ROWS, COLUMNS = 4000, 2500
SIZE = ROWS * COLUMNS
PEER = "jaxpruner's method"
LIMIT = "the least: read weights, write a mask"


def by_ranks(scores: jax.Array, axis: int) -> jax.Array:
    """A mask by jaxpruner's published method: the two of highest rank, by two sorts of each group of four.

    The axis is brought to the end and back. Source: Lee et al. 2023, arXiv:2304.14082.
    """
    last = jnp.swapaxes(scores, axis, -1)
    ranks = jnp.argsort(jnp.argsort(last.reshape(-1, 4)))
    return jnp.swapaxes((ranks >= 2).reshape(last.shape), axis, -1)


def by_top_k(scores: jax.Array, axis: int) -> jax.Array:
    """A mask of the two that ``lax.top_k`` finds in each group."""
    last = jnp.swapaxes(scores, axis, -1)
    _, index = jax.lax.top_k(last.reshape(-1, 4), 2)
    mask = (jnp.arange(4)[None, None] == index[:, :, None]).any(1)
    return jnp.swapaxes(mask.reshape(last.shape), axis, -1)


def _report(weights: jax.Array, axis: int, name: str) -> Report:
    structure = NM(2, 4, axis)
    ours = jax.jit(lambda w: n_m_mask(jnp.abs(w), structure))
    peer = jax.jit(lambda w: by_ranks(jnp.abs(w), axis))
    top_k = jax.jit(lambda w: by_top_k(jnp.abs(w), axis))
    signs = jax.jit(lambda w: w > 0)
    cases = {
        PEER: lambda: peer(weights),
        LIMIT: lambda: signs(weights),
        "lax.top_k": lambda: top_k(weights),
        "ours, in jit": lambda: ours(weights),
        "ours, in jit, again (control)": lambda: ours(weights),
    }
    times = measure(cases, rounds=7, warm=True)
    mask = ours(weights)
    assert is_n_m(mask, structure)
    kept = int(mask.sum()) / (SIZE // 2)
    memory = ours.lower(weights).compile().memory_analysis()
    copies = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / (4 * SIZE)
    same = float((mask == peer(weights)).mean())
    rows = [times.row(case, PEER, target="<= 0.02" if case == "ours, in jit" else "") for case in cases if case != PEER]
    rows += [
        replace(times.row("ours, in jit", LIMIT), name="ours over the least"),
        Row("kept, counted, over half", kept, kept, kept, f"equal to the peer's in {same:.4%}"),
        Row("memory over the weights'", copies, copies, copies, "temporary and the mask", "<= 3"),
    ]
    title = f"2:4 mask, 10M weights ({ROWS} x {COLUMNS}), along {name}"
    return Report(title, f"{PEER} ({times.median(PEER):.2f} s)", rows, times.notes())


def run() -> Iterator[Report]:
    """The reports."""
    weights = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    yield _report(weights, -2, "the input features of a Flax kernel (axis -2)")
    yield _report(weights, -1, "the last axis")
