"""One function traced and walked: its atoms, and which parameters they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.paths import Where, matches, path_str
from jaxcomp.core.types import Params, PyTree
from jaxcomp.structure.atoms import FROZEN, Atoms, Dim, Label
from jaxcomp.structure.labelling import RULES, Product, Unknown, Walk, Walked
from jaxcomp.structure.rules import control as rules_control
from jaxcomp.structure.rules import index as rules_index
from jaxcomp.structure.rules import layout as rules_layout
from jaxcomp.structure.rules import math as rules_math
from jaxcomp.structure.rules import mixing as rules_mixing
from jaxcomp.structure.splits import Reason
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.walk import Fn, aval_of

RULE_MODULES = (rules_math, rules_layout, rules_index, rules_control, rules_mixing)
"""The modules that fill the table of rules."""
assert RULES, "the rule modules register themselves when imported"


@dataclass(frozen=True)
class Options:
    """How a function is analysed; see ``channel_groups``."""

    free_outputs: Where | None = None
    through_means: bool = False
    strict: bool = False


@dataclass(frozen=True, eq=False)
class Output:
    """A result's dimensions, and the parameter whose new value it is, if it is one's."""

    dims: tuple[Dim, ...]
    param: str | None = None


@dataclass(frozen=True, eq=False)
class Analysis:
    """A walked program.

    ``dims`` holds every parameter's dimensions by path, ``outs`` what the results become; ``reasons`` say why atoms
    stay, by number, the last one why those do that are not read; ``positional`` are the sets of atoms whose place
    mattered, ``stacked`` those that a scan slices layer by layer.
    """

    program: Program
    walked: Walked
    atoms: Atoms
    dims: Mapping[str, tuple[Dim, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    outs: tuple[Output, ...]
    products: tuple[Product, ...]
    unknown: tuple[Unknown, ...]
    reasons: tuple[Reason, ...]
    positional: NDArray[np.int64]
    stacked: NDArray[np.int64]


def analyze(fn: Fn, options: Options, params: Params, *args: PyTree, **kwargs: PyTree) -> Analysis:
    """Traces ``fn(params, *args, **kwargs)`` and walks it once; makes no array."""
    program = trace(fn, params, *args, **kwargs)
    walk = Walk(options.strict, options.through_means)
    jaxpr = program.jaxpr.jaxpr
    ins, dims, shapes = [], {}, {}
    paths = iter(program.param_paths)
    for var in jaxpr.invars:
        path = next(paths, None)
        label = _input(walk, aval_of(var), path is not None)
        ins.append(label)
        if path is not None:
            dims[path], shapes[path] = label.dims, label.shape
    walked, results = walk.run(program.jaxpr, ins)
    outs = tuple(
        _output(walk, options, out, r, dims, shapes) for out, r in zip(_named_outputs(program), results, strict=True)
    )
    walk.settle()
    return Analysis(
        program,
        walked,
        walk.atoms,
        dims,
        shapes,
        outs,
        tuple(walk.products),
        tuple(walk.unknown),
        (*walk.reasons, Reason((), "this call does not read it")),
        _roots(walk, walk.positional),
        _roots(walk, walk.stacked),
    )


def _roots(walk: Walk, found: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    every = {id(a): a.reshape(-1) for a in found}.values()
    return np.unique(walk.atoms.find(np.concatenate([np.zeros(1, np.int64), *every])))


def _input(walk: Walk, aval: jax.core.ShapedArray, has_channels: bool) -> Label:
    shape = tuple(aval.shape)
    if not has_channels or not jnp.issubdtype(aval.dtype, jnp.floating):
        return Label(shape, (FROZEN,) * len(shape), (False,) * len(shape))
    return Label(shape, tuple(walk.atoms.fresh(n) if n > 1 else FROZEN for n in shape), (True,) * len(shape))


def _named_outputs(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    avals = [jax.ShapeDtypeStruct(aval_of(v).shape, aval_of(v).dtype) for v in program.jaxpr.jaxpr.outvars]
    flat, _ = jax.tree_util.tree_flatten_with_path(program.unflatten(avals))
    return [(path_str(p), tuple(leaf.shape)) for p, leaf in flat if isinstance(leaf, jax.ShapeDtypeStruct)]


def _output(
    walk: Walk,
    options: Options,
    out: tuple[str, tuple[int, ...]],
    label: Label,
    dims: Mapping[str, tuple[Dim, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Output:
    """Ties an output to the parameter whose new value it is, lets it shrink if the caller says so, or freezes it."""
    path, shape = out
    parts = path.split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if shapes.get(name) == shape and not all(p.isdigit() for p in parts[start:]):
            return Output(tuple(walk.join(a, b) for a, b in zip(dims[name], label.dims, strict=True)), name)
    if options.free_outputs is not None and matches(options.free_outputs, path, jax.ShapeDtypeStruct(shape, float)):
        walk.mark(*label.dims)
        return Output(label.dims)
    walk.freeze(*label.dims, why=f"it is in the result{f' {path!r}' * bool(path)} of the function")
    return Output((FROZEN,) * len(shape))


def layer_count(analysis: Analysis, paths: list[str], roots: NDArray[np.int64]) -> int | None:
    """How many layers may each keep channels of their own: the stack's height, or None where they must agree."""
    heights = {analysis.shapes[p][0] for p in paths}
    if len(heights) != 1 or np.isin(roots, analysis.positional).any() or not np.isin(roots, analysis.stacked).all():
        return None
    return heights.pop()
