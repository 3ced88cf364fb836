"""Attention in floats of any sizes and orders of axes: in code of our own, and numpy's in float64."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.kernels.llvm_float_attention import How, Lay, llvm_mixed, refusal
from jaxcomp.trace.pointwise import Pointwise, Step
from jaxcomp.trace.rowwise import varies

special = pytest.importorskip("scipy.special")

SIZES = {"b": 2, "h": 3, "q": 7, "k": 19, "d": 16, "e": 16}


def softmax_after(*steps: Step) -> Pointwise:
    n = len(steps)
    top, fall, e, total = (n + i for i in (1, 2, 3, 4))
    return (
        *steps,
        Step("reduce_max", (n,)),
        Step("sub", (n, top)),
        Step("exp", (fall,)),
        Step("reduce_sum", (e,)),
        Step("div", (e, total)),
    )


SCALED = (Step("constant", (), 0.3), Step("mul", (0, 1)))
HIDDEN = (Step("operand", (), 0), Step("constant", (), -1e9), Step("select_n", (1, 2, 0)))
MOVED = (Step("operand", (), 0), Step("add", (0, 1)))
TURNED = (Step("operand", (), 0), Step("constant", (), -1e9), Step("select_n", (1, 0, 2)))
NEITHER = (Step("operand", (), 0), Step("not", (1,)), Step("constant", (), -1e9), Step("select_n", (2, 3, 0)))
BOTH = (Step("operand", (), 0), Step("constant", (), -np.inf), Step("select_n", (1, 2, 0)))
BOTH += (Step("operand", (), 1), Step("add", (3, 4)))
FUNCTIONS = {
    "scaled": (softmax_after(*SCALED), lambda s: 0.3 * s),
    "hidden": (softmax_after(*HIDDEN), lambda s, m: np.where(m, s, -1e9)),
    "hidden where true": (softmax_after(*TURNED), lambda s, m: np.where(m, -1e9, s)),
    "hidden where not": (softmax_after(*NEITHER), lambda s, m: np.where(m, -1e9, s)),
    "moved": (softmax_after(*MOVED), lambda s, x: s + x),
    "both": (softmax_after(*BOTH), lambda s, m, x: np.where(m, s, -np.inf) + x),
}


class Case(NamedTuple):
    """Axes by their letters: ``k`` of keys, ``q`` of queries, ``d`` and ``e`` of what keys and values are made of.

    Attributes:
      memory: for some arrays how these lie, where that is not as their axes stand.
      beside: the axes of what meets the scores, truth values first.
    """

    sizes: dict[str, int] = {}  # noqa: RUF012
    scores: str = "bhqk"
    q: str = "bqhd"
    k: str = "bkhd"
    v: str = "bkhe"
    result: str = "bqhe"
    memory: dict[str, str] = {}  # noqa: RUF012
    beside: tuple[str, ...] = ()
    function: str = "scaled"
    queries: str = "q"

    def shape(self, axes: str) -> tuple[int, ...]:
        sizes = SIZES | self.sizes
        return tuple(sizes[c] for c in axes)

    def lay(self, name: str) -> Lay:
        axes, width = getattr(self, name), "d" if name in "qk" else "e"
        order = self.memory.get(name, axes.replace(width, "") + width)
        found = [axes.find(c) if n != 1 else -1 for c, n in zip(self.scores, self.shape(self.scores), strict=True)]
        return Lay(tuple(i if i >= 0 else None for i in found), axes.index(width), tuple(map(axes.index, order)))

    def how(self) -> How:
        function, keys = FUNCTIONS[self.function][0], self.scores.index("k")
        beside = tuple(tuple(axes.index(c) if c in axes else None for c in self.scores) for axes in self.beside)
        return How(
            sizes=self.shape(self.scores),
            keys=keys,
            queries=self.scores.index(self.queries),
            q=self.lay("q"),
            k=self.lay("k"),
            v=self.lay("v"),
            result=self.lay("result"),
            function=function,
            varying=tuple(varies(function, [type("One", (), {"axes": axes})() for axes in beside], keys)),
            beside=beside,
        )

    def drawn(self, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        found = [rng.normal(size=self.shape(axes)).astype(np.float32) for axes in (self.q, self.k, self.v)]
        truths = {"hidden": 1, "both": 1}.get(self.function, 0)
        for i, axes in enumerate(self.beside):
            x = rng.normal(size=self.shape(axes))
            found.append(x > -0.5 if i < truths else x.astype(np.float32))
            if i < truths and "k" in axes:
                found[-1][(*(slice(None) for _ in axes[: axes.index("k")]), 0)] = True
        return found

    def exact(self, q, k, v, *beside) -> np.ndarray:
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        scores = np.einsum(f"{self.q},{self.k}->{self.scores}", q, k)
        met = []
        for x, axes in zip(beside, self.beside, strict=True):
            kept = "".join(c for c in self.scores if c in axes)
            whole = np.einsum(f"{axes}->{kept}", x)
            met.append(whole[tuple(slice(None) if c in axes else None for c in self.scores)])
        weights = special.softmax(FUNCTIONS[self.function][1](scores, *met), self.scores.index("k"))
        return np.einsum(f"{self.scores},{self.v}->{self.result}", weights, v)

    def run(self, *given) -> np.ndarray:
        how = self.how()
        widths = self.shape("de")
        assert refusal(how, (widths[0], widths[1])) is None
        return np.asarray(jax.jit(partial(llvm_mixed, how))(*map(jnp.asarray, given)), np.float64)

    def check(self, seed: int = 0) -> None:
        given = self.drawn(seed)
        got, exact = self.run(*given), self.exact(*given)
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)
