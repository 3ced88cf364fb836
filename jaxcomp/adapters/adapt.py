"""``adapt``: parameters as a frozen base with factors beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxcomp.adapters.leaves import Adapted
from jaxcomp.adapters.specs import Principal, Residual, Start, Zeros
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.errors import naming
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import (
    Where,
    describe,
    is_float_array,
    key_of_leaf,
    leaves_with_paths,
    matches,
    meant,
    some_paths,
)
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import INDEXED, Roles, checked_roles, roles_of, selecting
from jaxcomp.core.slots import Slot, check_finite, replace_slots
from jaxcomp.core.specs import check_key, is_number
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import DType, Key, Leaf, Params
from jaxcomp.factorization.axes import Placed, placed
from jaxcomp.factorization.bases import Rank, checked_rank
from jaxcomp.factorization.leaves import LowRank
from jaxcomp.factorization.specs import SVD
from jaxcomp.factorization.transform import factorize

OWNER = "adapt"
Leaves = dict[str, Leaf]


@on_any_mesh
def adapt(
    params: Params,
    rank: Rank,
    *,
    key: Key | None = None,
    start: Start = Zeros(),  # noqa: B008 - frozen
    base: Transform | None = None,
    alpha: float | None = None,
    moments: Mapping[str, jax.Array] | None = None,
    roles: Roles | None = None,
    where: Where | None = None,
) -> Params:
    """Parameters whose selected leaves are :class:`~jaxcomp.adapters.leaves.Adapted`: frozen, with factors beside.

    LoRA is ``adapt(params, 8, key=key)``; QLoRA the same on parameters that are compressed already, or with
    ``base=quantize(NF4(), per=Groups(64))``; LoftQ has ``start=Residual(5)`` beside such a base, PiSSA
    ``start=Principal()``. :func:`~jaxcomp.adapters.parts.partition` takes what trains apart,
    :func:`~jaxcomp.adapters.parts.merge` makes arrays of it again, and
    ``jaxcomp.activations.factored(fn)`` runs it as it is.

    Args:
      params: arrays, and perhaps compressed leaves.
      rank: of every adapter: a count, or a fraction of each leaf's largest rank.
      key: of the random factors; for ``Zeros()`` alone.
      start: where the adapters start.
      base: what the frozen part is compressed by; None keeps it as it is.
      alpha: the adapter's product is multiplied by ``alpha / rank``; None is ``rank``, a factor of 1.
      moments: by path, ``Σ xᵀ x`` of the inputs (``input_moments`` collects them): ``Residual`` and ``Principal`` then
        meet the leaf's products best, not the leaf.
      roles: from :func:`jaxcomp.roles`: what the axes of each leaf do.
      where: which leaves; by default the matrices that roles name, or all matrices.

    Returns:
      The tree, its selected leaves replaced; all others are the same objects, and train only if :func:`partition` is
      told so.

    Raises:
      TypeError: a start, a transform or roles of another kind.
      ValueError: nothing is selected, a leaf that has an adapter already, a start other than ``Zeros`` or a ``base``
        on a leaf that is compressed already, no key, a rank beyond the shape, and what ``base`` and
        :func:`~jaxcomp.factorization.factorize` raise. The message names the path.

    >>> params = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    >>> adapted = adapt(params, 2, key=jax.random.key(0))
    >>> bool((adapted["kernel"].materialize() == params["kernel"]).all()), adapted["bias"] is params["bias"]
    (True, True)

    Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314. Deviation: the random factor has
    the deviation 1 / √inputs, so that what it gives is as large as what it is given.
    """
    _check(start, base, key=key, alpha=alpha)
    axes = checked_roles(OWNER, roles)
    found = _selected(params, selecting(where, axes))
    counts = {path: _placed(path, leaf, rank, axes) for path, leaf in found.items()}
    scaling = {path: 1.0 if alpha is None else float(alpha) / count for path, (_, count) in counts.items()}
    if isinstance(start, Zeros):
        assert key is not None
        frozen = found if base is None else _by(base, _uncompressed(found))
        deltas = {path: _zero(path, found[path], *at, roles=axes, key=key) for path, at in counts.items()}
    else:
        ranks = {path: count for path, (_, count) in counts.items()}
        frozen, found_deltas = _in_turns(
            found, start, base, lambda rest: factorize(rest, ranks, moments=moments, roles=axes)
        )
        deltas = {path: _divided(d, scaling[path], found[path].dtype) for path, d in found_deltas.items()}
    return replace_slots(params, {path: Adapted(frozen[path], deltas[path], scaling[path]) for path in found})


def _check(start: object, base: object, *, key: Key | None, alpha: object) -> None:
    if not isinstance(start, Start):
        raise TypeError(f"{OWNER}: start must be Zeros(), Residual(…) or Principal(), got {start!r}.")
    if base is not None:
        checked_transform(OWNER, base)
    if isinstance(start, Residual) and base is None:
        raise ValueError(f"{OWNER}: {start!r} starts at what a transform lost; give base=, such as quantize(Int(4)).")
    if isinstance(start, Zeros):
        if key is None:
            raise ValueError(f"{OWNER}: Zeros() has a random factor; give key=jax.random.key(0), or another one.")
        check_key(OWNER, key)
    if alpha is not None and not (is_number(alpha) and 0 < alpha < math.inf):
        raise ValueError(f"{OWNER}: alpha must be a positive number or None, got {alpha!r}.")


def _selected(params: Params, rule: Where) -> Leaves:
    named, _ = leaves_with_paths(params, is_leaf=is_compressed)
    found = {path: leaf for path, leaf in named if matches(rule, path, leaf)}
    if not found:
        paths = [path for path, _ in named]
        raise ValueError(
            f"{OWNER}: rule {describe(rule)} matches nothing; the paths are {some_paths(paths)}{meant(rule, paths)}."
        )
    for path, leaf in found.items():
        if isinstance(leaf, Adapted):
            raise ValueError(f"{OWNER}: {path!r} has an adapter already; merge it first, or leave it out by a rule.")
        if not is_float_array(leaf):
            raise ValueError(f"{OWNER}: {path!r} is no floating array; leave it out by a rule.")
    arrays = {path: Slot(path, path, leaf, None) for path, leaf in found.items() if not is_compressed(leaf)}
    check_finite(arrays, OWNER)
    return found


def _placed(path: str, leaf: Leaf, rank: Rank, roles: Roles | None) -> tuple[Placed, int]:
    """Where rows and columns of a leaf lie, and the rank of its adapter."""
    with naming(OWNER, path):
        at = placed(SVD(), Slot(path, path, leaf, None), roles)
        count = checked_rank(at, tuple(leaf.shape), rank)
        assert isinstance(count, int)
        return at, count


def _zero(path: str, leaf: Leaf, at: Placed, rank: int, *, roles: Roles | None, key: Key) -> LowRank:
    """Factors whose product is 0; the one that inputs meet is random."""
    shape, k, cols = tuple(leaf.shape), at.stacked, at.cols
    front, rows, columns = shape[:k], shape[k : len(shape) - cols], shape[len(shape) - cols :]
    u, v = (*front, *rows, rank), (*front, rank, *columns)
    names = roles_of(path, len(shape), roles).names if roles is not None else ()
    looked_up = INDEXED in names[k : len(shape) - cols] or (not names and path.rpartition("/")[2] == "embedding")
    inputs = rank if looked_up else math.prod(columns if at.outputs_first else rows)
    second = at.outputs_first or looked_up  # a lookup meets its rows alone, which start at 0 there
    noise = jax.random.normal(key_of_leaf(key, path), v if second else u, jnp.float32) * inputs**-0.5
    noise, zeros = noise.astype(leaf.dtype), jnp.zeros(u if second else v, leaf.dtype)
    first, last = (zeros, noise) if second else (noise, zeros)
    return LowRank(first, last, len(rows), at.outputs_first)


def _uncompressed(found: Leaves) -> Leaves:
    for path, leaf in found.items():
        if is_compressed(leaf):
            raise ValueError(
                f"{OWNER}: {path!r} is compressed already ({leaf.method}), and what it was is lost; start at Zeros()"
                " without base=, or give the float parameters."
            )
    return found


def _by(transform: Transform, found: Leaves) -> Leaves:
    """The leaves as a transform makes them, each under its path."""
    result: Leaves = transform.apply(transform.init(found), found)
    return result


def _in_turns(
    found: Leaves, start: Start, base: Transform | None, factors: Callable[[Leaves], Leaves]
) -> tuple[Leaves, Leaves]:
    """The frozen part and the adapters, each of what the other leaves of the weights."""
    wide = {path: leaf.astype(compute_dtype(leaf.dtype)) for path, leaf in _uncompressed(found).items()}

    def frozen_of(rest: Leaves) -> Leaves:
        typed = {path: x.astype(found[path].dtype) for path, x in rest.items()}
        return typed if base is None else _by(base, typed)

    if isinstance(start, Principal):
        deltas = factors(wide)
        return frozen_of(_less(wide, deltas)), deltas
    assert isinstance(start, Residual)
    frozen, deltas, rest = {}, {}, wide
    for _ in range(start.rounds):
        frozen = frozen_of(rest)
        deltas = factors(_less(wide, frozen))
        rest = _less(wide, deltas)
    return frozen, deltas


def _less(wide: Leaves, part: Leaves) -> Leaves:
    return {path: x - dense(part[path]).astype(x.dtype) for path, x in wide.items()}


def _divided(delta: LowRank, scaling: float, dtype: DType) -> LowRank:
    """Factors of the product over ``scaling``, in the leaf's type."""
    root = math.sqrt(scaling)
    return delta.with_fields({"u": (delta.u / root).astype(dtype), "v": (delta.v / root).astype(dtype)})
