"""Layers that are alike rolled into one loop, so that a deep network is traced and compiled as one of its layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import dense, is_compressed, method_of
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.trace.cut_specs import Cuts, Single
from jaxcomp.trace.cuts import Block, Blocks, Values, arrays_in, cut
from jaxcomp.trace.program import is_array_like, kind_of, shape_like
from jaxcomp.trace.walk import Fn

OWNER = "rolled"


class Run(NamedTuple):
    """Neighbouring blocks that repeat.

    Fields:
      start: the number of the first block.
      period: blocks of one layer.
      layers: how many there are; 1 for a block that stands alone.
      names: of the leaves, for each block of a layer: where its leaf stands in the rolled tree, and whether it is
        stacked there.
    """

    start: int
    period: int
    layers: int
    names: tuple[tuple[tuple[str, bool], ...], ...]


class Rolled:
    """A network whose alike layers are a loop over stacked leaves.

    Attributes:
      fn: ``fn(tree, *args)``, of the rolled tree.
      places: for each leaf that was given, by path: its path in the rolled tree, and its number in the stack or None.
    """

    def __init__(self, fn: Fn, params: Params, args: tuple[PyTree, ...], cuts: Cuts) -> None:
        self._fn, self._cuts = fn, cuts
        named, self._treedef = leaves_with_paths(params)
        self._like = _shapes(params)
        self._paths = [path for path, _ in named]
        self._known: dict[Hashable, tuple[Blocks, list[Run]]] = {}
        blocks, self._runs = self._blocks(args)
        self.places: dict[str, tuple[str, int | None]] = {}
        for run in self._runs:
            for layer in range(run.layers):
                for n, names in enumerate(run.names):
                    own = blocks[run.start + layer * run.period + n].paths
                    self.places |= {
                        path: (name, layer if stacked else None)
                        for path, (name, stacked) in zip(own, names, strict=True)
                    }
        self.places |= {path: (path, None) for path in self._paths if path not in self.places}

    def roll(self, params: Params) -> Params:
        """The tree of stacked leaves: nested dicts, named by path; where layers are stacked, by the first and the last.

        Raises:
          TypeError: a compressed leaf.
        """
        layers: dict[str, dict[int | None, Leaf]] = {}
        for path, leaf in _arrays(params, "roll the arrays, then compress them").items():
            name, n = self.places[path]
            layers.setdefault(name, {})[n] = leaf
        whole = {name: some[None] if None in some else _stacked(some) for name, some in layers.items()}
        return _nested(whole)

    def unroll(self, tree: Params) -> Params:
        """The tree as it was, from a rolled one of arrays.

        Raises:
          TypeError: a compressed leaf.
        """
        named = _arrays(tree, "materialize the tree, or keep it rolled")
        places = (self.places[path] for path in self._paths)
        return self._treedef.unflatten([named[name] if n is None else named[name][n] for name, n in places])

    def fn(self, tree: Params, *args: PyTree) -> PyTree:
        """What the network gives, of the rolled tree."""
        blocks, runs = self._blocks(args)
        named = {path: dense(leaf) for path, leaf in leaves_with_paths(tree, is_leaf=is_compressed)[0]}
        arrays = arrays_in(args)
        values: Values = ()
        for run in runs:
            values = _through(blocks[run.start : run.start + run.period], run, named, values=values, arrays=arrays)
        return blocks.result(values)

    def _blocks(self, args: tuple[PyTree, ...]) -> tuple[Blocks, list[Run]]:
        """The blocks at these shapes, and which of them repeat."""
        kind = kind_of(args)
        if kind not in self._known:
            blocks = cut(self._fn, self._cuts)(self._like, *_shapes(args))
            found = _runs(blocks)
            if self._known and [r.names for r in found] != [r.names for r in self._runs]:
                raise ValueError(
                    f"{OWNER}: with arguments of these shapes other layers are alike than with those that the network"
                    " was rolled with; roll it with these."
                )
            self._known[kind] = blocks, found
        return self._known[kind]

    def __repr__(self) -> str:
        names = [list(dict.fromkeys(name for block in run.names for name, _ in block)) for run in self._runs]
        lines = [f"{r.layers} x {some_paths(own, 4) or 'no leaf'}" for r, own in zip(self._runs, names, strict=True)]
        return "<Rolled\n  " + "\n  ".join(lines) + ">"


def rolled(fn: Fn, *, cuts: Cuts = Single(apart=True)) -> Callable[..., Rolled]:  # noqa: B008 - frozen
    """Layers of ``fn(params, *args)`` that are alike as one loop over stacked leaves.

    The program is :func:`~jaxcomp.ptq.cut` into blocks; neighbours whose programs are the same text, one or several a
    layer, become a ``lax.scan``. What is built on the rolled network (quantized activations, gradients, a training
    step) is traced and compiled once for all of them, and compressed leaves keep scales, masks and tables of their own
    for each layer.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      cuts: where a block begins.

    Returns:
      A function of ``(params, *args)``, arrays or their shapes, giving :class:`Rolled`: ``fn``, of the rolled tree, and
      ``roll`` and ``unroll`` from tree to tree. Where no layers are alike, nothing is stacked.

    Raises:
      ValueError: the function has no site.

    >>> layers = [{"w": jnp.full((2, 2), 0.1 * i)} for i in range(4)]
    >>> def net(p, x):
    ...     for layer in p:
    ...         x = x + jnp.tanh(x @ layer["w"])
    ...     return x
    >>> x = jnp.ones((1, 2))
    >>> found = rolled(net)(layers, x)
    >>> {path: leaf.shape for path, leaf in leaves_with_paths(found.roll(layers))[0]}
    {'0/w': (2, 2), '1-3/w': (3, 2, 2)}
    >>> bool(jnp.allclose(found.fn(found.roll(layers), x), net(layers, x)))
    True
    """
    return lambda params, *args: Rolled(fn, params, args, cuts)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: shape_like(x) if is_array_like(x) else x, tree)


def _arrays(tree: Params, mend: str) -> dict[str, Leaf]:
    """The leaves by path, none of them compressed."""
    named = dict(leaves_with_paths(tree, is_leaf=is_compressed)[0])
    for path, leaf in named.items():
        if is_compressed(leaf):
            raise TypeError(f"{OWNER}: {path!r} is compressed ({method_of(leaf)}); {mend}.")
    return named


def _through(
    layer: Sequence[Block], run: Run, named: Mapping[str, Leaf], *, values: Values, arrays: Sequence[jax.Array]
) -> Values:
    """What leaves the layers of a run."""
    rests = [block.rest(arrays) for block in layer]

    def one(values: Values, own: Mapping[str, jax.Array]) -> tuple[Values, None]:
        for block, names, rest in zip(layer, run.names, rests, strict=True):
            weights = tuple(own[name] if stacked else named[name] for name, stacked in names)
            values = block.between(weights, values, rest)
        return values, None

    stacks = {name: named[name] for names in run.names for name, stacked in names if stacked}
    if run.layers == 1:
        return one(values, {})[0]
    return jax.lax.scan(one, values, stacks)[0]


def _runs(blocks: Blocks) -> list[Run]:
    """Blocks in order: at each place those that repeat farthest, in the shortest period; else one alone."""
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(_same(block), len(numbers)) for block in blocks]
    uses: dict[str, set[int]] = {}
    for n, block in enumerate(blocks):
        for path in block.paths:
            uses.setdefault(path, set()).add(n)
    found, start = [], 0
    while start < len(blocks):
        best = Run(start, 1, 1, (tuple((path, False) for path in blocks[start].paths),))
        for period in range(1, (len(blocks) - start) // 2 + 1):
            for layers in range(_repeats(kinds, start, period), 1, -1):
                if layers * period <= best.layers * best.period:
                    break
                names = _names(blocks[start : start + layers * period], period, uses, start=start)
                if names is not None:
                    best = Run(start, period, layers, names)
        found.append(best)
        start += best.layers * best.period
    return found


def _same(block: Block) -> Hashable:
    """Equal for blocks that compute the same of other leaves."""
    return block.shape, block.reads, tuple(np.asarray(c).tobytes() for c in block.constants)


def _repeats(kinds: Sequence[int], start: int, period: int) -> int:
    """How many times the kinds of a period come, one after the other."""
    one, layers = kinds[start : start + period], 1
    while kinds[start + layers * period : start + (layers + 1) * period] == one:
        layers += 1
    return layers


def _names(
    blocks: Sequence[Block], period: int, uses: Mapping[str, set[int]], *, start: int
) -> tuple[tuple[tuple[str, bool], ...], ...] | None:
    """Where the leaves of a run stand: one a layer, read nowhere else, or one that all share; None where neither."""
    names = []
    for n in range(period):
        own = []
        for paths in zip(*(block.paths for block in blocks[n::period]), strict=True):
            shared = len(set(paths)) == 1
            of_layers = (range(start + i * period, start + (i + 1) * period) for i in range(len(paths)))
            if not shared and any(not uses[path] <= {*layer} for path, layer in zip(paths, of_layers, strict=True)):
                return None
            own.append((paths[0], False) if shared else (_between(paths[0], paths[-1]), True))
        names.append(tuple(own))
    return tuple(names)


def _between(first: str, last: str) -> str:
    """The path of a stack, by those of its first leaf and its last.

    >>> _between("layer_1/q/kernel", "layer_11/q/kernel"), _between("a/w", "b/w")
    ('layer_1-11/q/kernel', 'a-b/w')
    """
    steps = first.split("/"), last.split("/")
    if len(steps[0]) != len(steps[1]):
        return f"{first}-{last.replace('/', '.')}"
    return "/".join(a if a == b else f"{a}-{b.removeprefix(_stem(a, b))}" for a, b in zip(*steps, strict=True))


def _stem(a: str, b: str) -> str:
    """What both begin with, without digits."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(x for x, _ in same).rstrip("0123456789")


def _stacked(layers: Mapping[int | None, Leaf]) -> jax.Array:
    return jnp.stack([layers[n] for n in range(len(layers))])


def _nested(flat: Mapping[str, Leaf]) -> Params:
    tree: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        here = tree
        for name in above:
            here = here.setdefault(name, {})
        here[last] = leaf
    return tree
