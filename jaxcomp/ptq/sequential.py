"""Leaves compressed one after the other in the program's order, each by what reaches it behind those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from jaxcomp.core.batches import all_batches
from jaxcomp.core.leaves import dense
from jaxcomp.core.paths import Where, some_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.roles import STACKED
from jaxcomp.core.types import Leaf, Params, PyTree, Shape
from jaxcomp.ptq.growing import GAP, Growing, Toward
from jaxcomp.ptq.targets import Exact
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


def sequentially(
    fn: Fn, method: Method, where: Where = r".*", *, targets: Exact | None = None
) -> Callable[[Params, Iterable[PyTree]], Params]:
    """Compresses leaf after leaf of ``fn(params, *args)``, each by the rows that the leaves before it now give it.

    So what earlier leaves have got wrong is in the statistics of the later ones. The result takes
    ``(params, batches)``; a batch is what ``fn`` takes behind the parameters: a tuple of arguments, or the only one.
    Leaves that multiply the same value (query, key and value of an attention) go together, and in a scan over stacked
    layers one layer goes after the other. The program is compiled once for each shape of a batch, and run once for each
    leaf and layer. It shows how far it is.

    With ``targets`` the float network runs beside: before ``method`` gets a leaf ``W``, it is fitted to

        ``W + (Σ x' x'ᵀ + λI)⁻¹ Σ x' (y - y')ᵀ``

    where ``x'`` are its rows now, ``y'`` what the network with ``W`` gives and ``y`` what the float network gave; so a
    leaf makes up for what reaches it wrong, and its bias for what the mean is off by. What has been compressed before
    goes to ``method`` as it is. It costs two runs of a leaf and layer, and a batch's results of all products in both.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      method: makes of leaves and their moments, both by path, what takes the leaves' place.
      where: which leaves, by path or as a predicate of ``(path, site)``.
      targets: what leaves should give; None is what they give with the rows that reach them now.

    Raises:
      TypeError: ``method`` is no function, ``targets`` of another kind, or the batches are one array.
      ValueError: ``where`` matches no site, there is no batch, what ``method`` raises, or a leaf
        that it gives nothing for.

    >>> from jaxcomp import Int
    >>> from jaxcomp.ptq.second_order import gptq
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> w = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
    >>> params, batches = {"up": w(0, 4, 8), "down": w(1, 8, 2)}, [w(2, 32, 4), w(3, 32, 4)]
    >>> compress = sequentially(fn, lambda leaves, moments: gptq(leaves, moments, Int(4)), targets=Exact())
    >>> [type(leaf).__name__ for leaf in compress(params, batches).values()]
    ['Quantized', 'Quantized']

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4, which goes block by block and takes a block's inputs from
    the compressed blocks before it; here each leaf's own are. Targets: GPTAQ, Li et al. 2025, arXiv:2504.02692, which
    asks for ``min |x W - x' W'|²``. Deviations: the whole correction is made before the solver, where GPTAQ spreads it
    over the columns; what a residual stream carries on counts; about the means where there is a bias.
    """
    if not callable(method):
        raise TypeError(
            f"sequentially: method makes new leaves of leaves and their moments, got {method!r}; write"
            " lambda leaves, moments: gptq(leaves, moments, grid)."
        )
    if targets is not None and not isinstance(targets, Exact):
        raise TypeError(f"sequentially: targets must be Exact() or None, got {targets!r}.")
    gather = chosen_moments(fn, where)
    observed = jax.jit(gather)

    def compressed(params: Params, batches: Iterable[PyTree]) -> Params:
        many = all_batches("sequentially", batches)
        tree = Growing(params)
        known = jax.eval_shape(gather, None, tree.dense(), *many[0])
        program = trace(fn, tree.dense(), *many[0])
        stages = _stages(program, set(known))
        toward = None if targets is None else Toward(targets, fn, program, tree=tree, known=known)
        look = observed if toward is None else toward.beside(gather)
        with progress("sequentially: leaves", len(stages)) as advance:
            for paths, layer in stages:
                flags, now = {path: path in paths for path in known}, tree.dense()
                seen = total((_only(paths, look(flags, now, *batch)) for batch in many), "sequentially")
                moments = {p: _at(seen[p], layer) for p in paths}
                corrections = {} if toward is None else toward.corrections(seen, layer, moments)
                leaves = {p: tree.given(p, layer) for p in paths}
                new = method(leaves | {p: c.leaf for p, c in corrections.items()}, moments)
                if lost := [path for path in paths if path not in new]:
                    raise ValueError(f"sequentially: method gave nothing for {some_paths(lost)}; give a leaf for each.")
                for path in paths:
                    shift = corrections[path].shift(dense(new[path])) if path in corrections else None
                    tree.take(path, layer, new[path])
                    if shift is not None:
                        tree.move(*shift, layer)
                advance(1)
        return tree.whole()

    return compressed


def _only(paths: Sequence[str], seen: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {name: found for name, found in seen.items() if name.removeprefix(GAP) in paths}


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


def _at(seen: Moments, layer: tuple[int, ...]) -> Moments:
    """The moments of one layer, whose axes are those that are left."""
    less = len(layer)
    axes = (tuple(a - less for a in axes) for axes in (seen.apart[less:], seen.summed, seen.window))
    return Moments(seen.second[layer], seen.first[layer], seen.count[layer], *axes) if less else seen
