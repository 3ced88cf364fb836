"""Leaves compressed one after the other in the program's order, each by what reaches it behind those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.batches import all_batches
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import Where, leaves_with_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.roles import STACKED
from jaxcomp.core.types import Leaf, Params, PyTree, Shape
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.rows import Moments, chosen_moments, total
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Fn, Location

Method = Callable[[dict[str, Leaf], dict[str, Moments]], Mapping[str, Leaf]]
"""From leaves and the moments of what they multiply, both by path, to what takes the leaves' place."""


class Stage(NamedTuple):
    """What is compressed at a time.

    Fields:
      paths: leaves that multiply the same value.
      layer: the index of the layer in a scan over stacked ones; () outside.
    """

    paths: tuple[str, ...]
    layer: tuple[int, ...] = ()


def sequentially(fn: Fn, method: Method, where: Where = r".*") -> Callable[[Params, Iterable[PyTree]], Params]:
    """Compresses leaf after leaf of ``fn(params, *args)``, each by the rows that the leaves before it now give it.

    So what earlier leaves have got wrong is in the statistics of the later ones. The result takes
    ``(params, batches)``; a batch is what ``fn`` takes behind the parameters: a tuple of arguments, or the only one.
    Leaves that multiply the same value (query, key and value of an attention) go together, and in a scan over stacked
    layers one layer goes after the other. The program is compiled once for each shape of a batch, and run once for each
    leaf and layer. It shows how far it is.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      method: makes of leaves and their moments, both by path, what takes the leaves' place.
      where: which leaves, by path or as a predicate of ``(path, site)``.

    Raises:
      TypeError: ``method`` is no function, or the batches are one array.
      ValueError: ``where`` matches no site, there is no batch, or what ``method`` raises.

    >>> from jaxcomp import Int
    >>> from jaxcomp.ptq.second_order import gptq
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> w = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
    >>> params, batches = {"up": w(0, 4, 8), "down": w(1, 8, 2)}, [w(2, 32, 4), w(3, 32, 4)]
    >>> compress = sequentially(fn, lambda leaves, moments: gptq(leaves, moments, Int(4)))
    >>> [type(leaf).__name__ for leaf in compress(params, batches).values()]
    ['Quantized', 'Quantized']

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4, which goes block by block and takes a block's inputs from
    the compressed blocks before it; here each leaf's own are.
    """
    if not callable(method):
        raise TypeError(
            f"sequentially: method makes new leaves of leaves and their moments, got {method!r}; write"
            " lambda leaves, moments: gptq(leaves, moments, grid)."
        )
    gather = chosen_moments(fn, where)
    observed = jax.jit(gather)

    def compressed(params: Params, batches: Iterable[PyTree]) -> Params:
        many = all_batches("sequentially", batches)
        named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
        leaves, now = dict(named), {path: dense(leaf) for path, leaf in named}
        known = jax.eval_shape(gather, None, treedef.unflatten(list(now.values())), *many[0])
        stages = _stages(trace(fn, treedef.unflatten(list(now.values())), *many[0]), set(known))
        made: dict[str, dict[tuple[int, ...], Leaf]] = {}
        with progress("sequentially: leaves", len(stages)) as advance:
            for paths, layer in stages:
                tree, flags = treedef.unflatten(list(now.values())), {path: path in paths for path in known}
                seen = total((_only(paths, observed(flags, tree, *batch)) for batch in many), "sequentially")
                new = method({p: _layer_of(leaves[p], layer) for p in paths}, {p: _at(seen[p], layer) for p in paths})
                for path in paths:
                    now[path] = now[path].at[layer].set(dense(new[path])) if layer else dense(new[path])
                    made.setdefault(path, {})[layer] = new[path]
                advance(1)
        return treedef.unflatten([_whole(made[path]) if path in made else leaf for path, leaf in named])

    return compressed


def _only(paths: Sequence[str], seen: Mapping[str, Moments]) -> dict[str, Moments]:
    return {path: seen[path] for path in paths}


def _stages(program: Program, known: set[str]) -> list[Stage]:
    """In the program's order; the layers of a scan one after the other, each with all its leaves."""
    ops = {op.location: op for op in program.flow.ops}
    found: dict[tuple[Location, int], list[str]] = {}
    around: dict[str, tuple[tuple[Location, ...], Shape]] = {}
    for site in sites_of(program):
        if site.leaf not in known or site.leaf in around or site.weight is None:
            continue
        op, roles = ops[site.location], site.operands[site.weight].leaf_roles
        stacked = [i for i, role in enumerate(roles) if role == STACKED]
        sliced = bool(stacked) and stacked == list(range(len(site.layer_steps)))
        scans = tuple(loop.location for loop in op.loops if loop.layers)
        around[site.leaf] = (scans, site.layer_steps) if sliced else ((), ())
        value = op.eqn.invars[site.activations[0]]
        found.setdefault((site.location[:-1], id(value) if sliced or not scans else id(op)), []).append(site.leaf)
    stages: list[Stage] = []
    for (_, steps), together in groupby(found.values(), key=lambda paths: around[paths[0]]):
        each = [tuple(paths) for paths in together]
        stages += [Stage(paths, layer) for layer in np.ndindex(steps) for paths in each]
    return stages


def _layer_of(leaf: Leaf, layer: tuple[int, ...]) -> Leaf:
    """One layer of a leaf; what its layers share stays."""
    return jax.tree.map(lambda x: x[tuple(min(i, n - 1) for i, n in zip(layer, x.shape, strict=False))], leaf)


def _at(seen: Moments, layer: tuple[int, ...]) -> Moments:
    """The moments of one layer, whose axes are those that are left."""
    less = len(layer)
    axes = (tuple(a - less for a in axes) for axes in (seen.apart[less:], seen.summed, seen.window))
    return Moments(seen.second[layer], seen.first[layer], seen.count[layer], *axes) if less else seen


def _whole(made: Mapping[tuple[int, ...], Leaf]) -> Leaf:
    """The layers of a leaf as one."""
    if () in made:
        return made[()]
    sizes = tuple(max(i) + 1 for i in zip(*made, strict=True))
    return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*sizes, *xs[0].shape), *made.values())
