"""Leaves of a plan rounded anew by second order: each row's error is made good by the rows not yet rounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxcomp.core.batches import Batch
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.packed import unpacked
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq.second_order import gptq
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.search.menus import rule_of
from jaxcomp.trace.rows import Moments, row_moments_over


def solved(fn: Callable[..., PyTree], params: Params, made: Params, batches: Sequence[Batch]) -> Params:
    """The tree ``made`` with its rounded leaves by the column solver, on the same grids and under the same masks.

    A leaf whose scales the solver would lay out otherwise, or that no product multiplies by rows, stays as it was made.

    Args:
      fn, params: the network before compression, at the widths that it has.
      made: its leaves in training form, as the plan's transform made them.
      batches: what the moments of the inputs are taken over.
    """
    dense = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    named, _ = leaves_with_paths(made, is_leaf=is_compressed)
    wanted = {path: leaf for path, leaf in named if isinstance(_inner(leaf), Quantized) and path in dense}
    if not wanted:
        return made
    rule = "|".join(map(re.escape, wanted))
    moments = row_moments_over(fn, rule)(params, batches)
    new = {path: _one(dense[path], leaf, moments[path], path) for path, leaf in wanted.items() if path in moments}
    return replace_slots(made, new)


def _one(w: jax.Array, leaf: Leaf, moments: Moments, path: str) -> Leaf:
    inner = _inner(leaf)
    if isinstance(leaf, Masked):
        given: Leaf = Masked(jnp.where(unpacked(leaf.mask), w, jnp.zeros((), w.dtype)), leaf.mask)
    else:
        given = w
    scale = rule_of(inner.grid.bits)
    found = gptq({path: given}, {path: moments}, inner.grid, scale=scale, where=path)[path]
    one, other = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (found, leaf))
    return found if one == other else leaf


def _inner(leaf: Leaf) -> Leaf:
    return leaf.values if isinstance(leaf, Masked) else leaf
