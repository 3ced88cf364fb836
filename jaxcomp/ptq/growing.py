"""A tree whose leaves are compressed one after the other, and what is made up for as each is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.ptq.targets import Exact, Gap, fitted, gaps, shifted, targets_of
from jaxcomp.trace.program import Program
from jaxcomp.trace.rows import Moments
from jaxcomp.trace.walk import Fn

Layer = tuple[int, ...]
GAP = "gap of "
"""In front of a path: the leaf's :class:`~jaxcomp.ptq.targets.Gap` beside its moments."""


class Growing:
    """A parameter tree of which more and more is compressed: leaves as they were given, and what they are now.

    Args:
      params: arrays and compressed leaves.
    """

    def __init__(self, params: Params) -> None:
        named, self._treedef = leaves_with_paths(params, is_leaf=is_compressed)
        self._given = dict(named)
        self._now = {path: dense(leaf) for path, leaf in named}
        self._made: dict[str, dict[Layer, Leaf]] = {}

    def dense(self) -> Params:
        """The tree of arrays, as it is now."""
        return self._treedef.unflatten(list(self._now.values()))

    def given(self, path: str, layer: Layer) -> Leaf:
        """One layer of a leaf as it was given; what its layers share stays."""
        return jax.tree.map(
            lambda x: x[tuple(min(i, n - 1) for i, n in zip(layer, x.shape, strict=False))], self._given[path]
        )

    def now(self, path: str, layer: Layer) -> jax.Array:
        """One layer of a leaf as it is now, dense."""
        return self._now[path][layer]

    def is_array(self, path: str) -> bool:
        """Whether a leaf was given as an array."""
        return not is_compressed(self._given[path])

    def take(self, path: str, layer: Layer, new: Leaf) -> None:
        """Puts a leaf, or one layer of it, in the place of the one there."""
        self._now[path] = self._now[path].at[layer].set(dense(new)) if layer else dense(new)
        self._made.setdefault(path, {})[layer] = new

    def move(self, path: str, by: NDArray[np.float64], layer: Layer) -> None:
        """Adds to an array, or to one layer of it."""
        now = self._now[path]
        part = now[layer]
        new = (part + jnp.asarray(by.reshape(part.shape), part.dtype)).astype(now.dtype)
        self._now[path] = self._given[path] = now.at[layer].set(new) if layer else new

    def whole(self) -> Params:
        """The tree, its new leaves in their places."""
        made = {path: _whole(layers) for path, layers in self._made.items()}
        return self._treedef.unflatten([made.get(path, leaf) for path, leaf in self._given.items()])


def _whole(made: Mapping[Layer, Leaf]) -> Leaf:
    """The layers of a leaf as one."""
    if () in made:
        return made[()]
    sizes = tuple(max(i) + 1 for i in zip(*made, strict=True))
    return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*sizes, *xs[0].shape), *made.values())


class Correction(NamedTuple):
    """A leaf that gives its targets, and what its bias takes once it is compressed.

    Fields:
      leaf: fitted, dense.
      shift: from the compressed leaf, dense, to the bias's path and what is added to it; None where there is none.
    """

    leaf: jax.Array
    shift: Callable[[jax.Array], tuple[str, NDArray[np.float64]] | None]


class Toward:
    """What leaves gave in the float network, as their targets.

    Args:
      how: what is made up for.
      fn: a pure function whose first argument is the parameter tree.
      program: of it.
      tree: of the parameters; what it is now is the float network.
      known: paths of the leaves that have moments.
    """

    def __init__(self, how: Exact, fn: Fn, program: Program, *, tree: Growing, known: Iterable[str]) -> None:
        self._how, self._tree, self._exact = how, tree, tree.dense()
        given = tree.whole()
        self._targets = targets_of(program, given, [p for p in sorted(known) if tree.is_array(p)], how)
        self._gaps = gaps(fn, given, list(self._targets), how=how)

    def beside(self, gather: Callable[..., dict[str, Moments]]) -> Callable[..., dict[str, PyTree]]:
        """What gives moments, and gaps beside them under names of their own: one run of the network serves both.

        Args:
          gather: ``gather(chosen, params, *args)``.
        """

        def both(exact: Params, chosen: Mapping[str, jax.Array], now: Params, *args: PyTree) -> dict[str, PyTree]:
            found = self._gaps({path: chosen[path] for path in self._targets}, exact, now, *args)
            return {**gather(chosen, now, *args), **{GAP + path: gap for path, gap in found.items()}}

        compiled = jax.jit(both)
        return lambda chosen, now, *args: compiled(self._exact, chosen, now, *args)

    def corrections(
        self, seen: Mapping[str, PyTree], layer: Layer, moments: Mapping[str, Moments]
    ) -> dict[str, Correction]:
        """Of those leaves that can be corrected, by path.

        Args:
          seen: sums of what :meth:`beside` gives.
          layer: of a scan.
          moments: of that layer, by path.

        Raises:
          ValueError: results that are not finite.
        """
        gap = {p: jax.tree.map(lambda x: x[layer], seen[GAP + p]) for p in moments if p in self._targets}
        return {path: self._correction(path, layer, moments[path], gap[path]) for path in gap}

    def _correction(self, path: str, layer: Layer, moments: Moments, gap: Gap) -> Correction:
        if not np.isfinite(gap.cross).all():
            raise ValueError(
                f"sequentially: of some batch {path!r} takes or gives what is not finite, in the float network or in"
                " the compressed one; mend that batch, or leave the leaf that makes it so out by where=."
            )
        before, bias = self._tree.now(path, layer), self._targets[path][0].bias

        def shift(after: jax.Array) -> tuple[str, NDArray[np.float64]] | None:
            return None if bias is None or gap.first is None else (bias, shifted(moments, gap, before, after))

        return Correction(fitted(before, moments, gap, self._how), shift)
