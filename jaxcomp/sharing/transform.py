"""Weight sharing: each weight is replaced by the nearest entry of a small table that k-means finds."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Buckets, Channels
from jaxcomp.core.leaves import Masked
from jaxcomp.core.paths import Where, matrices
from jaxcomp.core.slots import Slot, check_finite, rewrite, slots, state_of
from jaxcomp.core.specs import Global, Local, check_key
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, State
from jaxcomp.sharing.kmeans.fit import code_dtype, fit, member_means, nearest, refit
from jaxcomp.sharing.kmeans.inits import Init, near_optimal
from jaxcomp.sharing.kmeans.tables import from_rows, table_count, to_rows
from jaxcomp.sharing.leaves import GRADIENTS, Codebook

MAX_CLUSTERS = 1 << 16
Tables = Local | Global | Channels | Buckets


class Shared(NamedTuple):
    """What :func:`share` keeps: the tables, entries by tables, by slot path; and the codes where they are kept."""

    tables: dict[str, jax.Array]
    codes: dict[str, jax.Array]


class _Rows(NamedTuple):
    """The values that one state table serves, a row a table; which of them count, or None for all."""

    values: jax.Array
    counted: jax.Array | None


def share(
    clusters: int,
    *,
    init: Init = near_optimal,
    per: Tables = Local(),  # noqa: B008 - frozen
    preserve_zeros: bool = False,
    recluster: bool = True,
    gradient: str = "straight",
    key: Any = None,
    iterations: int = 300,
    where: Where = matrices,
) -> Transform:
    """Leaves at most ``clusters`` different values in each selected array; ``apply`` makes a ``Codebook`` leaf of it.

    ``init`` finds the tables by k-means. Each ``update`` counts or sorts every selected weight once (a gate makes that
    rarer) and improves the tables. What an earlier ``prune`` masks takes no part. A later ``quantize`` quantizes the
    tables, so that no more values are left than there were clusters. :func:`~jaxcomp.sharing.leaves.trained_tables`
    goes on to train the tables themselves.

    Args:
      clusters: entries of a table, 2..65536.
      init: where k-means starts, one of :mod:`jaxcomp.sharing.kmeans.inits`.
      per: ``Local()``, a table a leaf; ``Global()``, one for all selected leaves (a file holds it once);
        ``Channels(axes)``; ``Buckets(size)``.
      preserve_zeros: the first of the clusters is 0, for the weights that are exactly 0 or masked, and for no other;
        these get no gradient, so what is zero stays so.
      recluster: at ``apply`` a weight takes the entry that is nearest now, and ``update`` goes on with k-means from the
        last table. If False, a weight keeps the entry that it had at ``init``, and ``update`` moves each entry to its
        members' mean.
      gradient: "straight" passes each weight its own; "sum" and "mean" pass the sum or the mean over all weights of the
        same entry, which so move together.
      key: for an ``init`` that draws.
      iterations: the most of Lloyd's iterations at ``init`` and at each ``update``; they stop where nothing moves.
      where: which leaves.

    Raises:
      ValueError: clusters out of range, an unknown gradient, a missing key; at ``init``, what
        :func:`~jaxcomp.core.slots.slots` raises, an axis that a leaf does not have, and fewer weights a table than
        clusters.

    >>> t = share(2)
    >>> params = {"kernel": jnp.array([[0.0, 1.0], [5.0, 7.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[0.5, 0.5],
           [6. , 6. ]], dtype=float32)

    Source: Han et al. 2015, arXiv:1510.00149, section 3; there the tables' gradients are sums over their members.
    """
    _check(clusters, init, per, gradient, key, iterations)
    free = clusters - preserve_zeros  # entries that k-means places

    def found(params: Params) -> dict[str, Slot]:
        return slots(params, where, "share")

    def rows_of(path: str, slot: Slot) -> _Rows:
        axes, bucket = _layout(path, slot, per, clusters)
        counted = _counted(slot, preserve_zeros)
        if counted is None and bucket and slot.array.size % bucket:
            counted = jnp.ones(slot.array.shape, bool)
        x = slot.array.astype(compute_dtype(slot.array.dtype))
        return _Rows(to_rows(x, axes, bucket), None if counted is None else to_rows(counted, axes, bucket))

    def grouped(selected: dict[str, Slot]) -> dict[str, _Rows]:
        rows = {path: rows_of(path, slot) for path, slot in selected.items()}
        return {"": _joined(list(rows.values()))} if isinstance(per, Global) else rows

    def init_fn(params: Params) -> State:
        selected = found(params)
        check_finite(selected, "share")
        tables = {}
        for i, (path, rows) in enumerate(grouped(selected).items()):
            rows = _padded(rows)
            keys = jax.random.split(jax.random.fold_in(key, i), rows.values.shape[0]) if init.random else None
            one = lambda x, c, k: fit(x, c, clusters=free, init=init, key=k, iterations=iterations)  # noqa: E731
            tables[path] = _with_zero(jax.vmap(one)(*rows, keys).T, preserve_zeros)
        codes = {} if recluster else {path: codes_of(path, slot, tables) for path, slot in selected.items()}
        return Shared(tables, codes)

    def codes_of(path: str, slot: Slot, tables: dict[str, jax.Array]) -> jax.Array:
        rows = rows_of(path, slot)
        table = state_of(tables, _name(path, per), "share").astype(slot.array.dtype).astype(rows.values.dtype)
        codes = jax.vmap(nearest)(rows.values, table[int(preserve_zeros) :].T).astype(code_dtype(clusters))
        codes = codes + jnp.asarray(preserve_zeros, codes.dtype)
        if rows.counted is not None:
            codes = jnp.where(rows.counted, codes, jnp.zeros((), codes.dtype))
        return from_rows(codes, slot.array.shape, *_layout(path, slot, per, clusters))

    def update(state: Shared, params: Params, *, step: Any, **stats: Any) -> State:
        selected = found(params)
        members = {} if recluster else _grouped_codes(selected, state.codes, per, clusters)
        tables = {}
        for path, rows in grouped(selected).items():
            old = state.tables[path].T
            if recluster:
                one = lambda x, c, t: refit(x, c, t, iterations)  # noqa: E731
                new = jax.vmap(one)(*rows, old[:, int(preserve_zeros) :])
                tables[path] = _with_zero(new.T, preserve_zeros)
            else:
                tables[path] = jax.vmap(member_means)(*rows, members[path], old).T
        return Shared(tables, state.codes)

    def apply(state: Shared, params: Params) -> Params:
        new = {}
        for path, slot in found(params).items():
            codes = codes_of(path, slot, state.tables) if recluster else state.codes[path]
            table = state_of(state.tables, _name(path, per), "share").astype(slot.array.dtype)
            axes, bucket = _layout(path, slot, per, clusters)
            leaf = Codebook(table, codes, slot.array, axes, bucket, gradient, preserve_zeros)
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return rewrite(params, new)

    return Transform(init_fn, update, apply)


def _check(clusters: Any, init: Any, per: Any, gradient: Any, key: Any, iterations: Any) -> None:
    if (
        not isinstance(clusters, numbers.Integral)
        or isinstance(clusters, bool)
        or not 2 <= int(clusters) <= MAX_CLUSTERS
    ):
        raise ValueError(f"share: clusters must be an integer in 2..{MAX_CLUSTERS}, got {clusters!r}.")
    if not isinstance(init, Init):
        raise TypeError(f"share: init must be an Init such as near_optimal, got {init!r}.")
    if not isinstance(per, Local | Global | Channels | Buckets):
        raise TypeError(f"share: per must be Local(), Global(), Channels(axes) or Buckets(size), got {per!r}.")
    if gradient not in GRADIENTS:
        raise ValueError(f"share: gradient must be one of {', '.join(map(repr, GRADIENTS))}, got {gradient!r}.")
    if init.random and key is None:
        raise ValueError(f"share: init {init.name!r} draws, and wants a key: share(..., key=jax.random.key(0)).")
    if key is not None:
        check_key("share", key)
    if not isinstance(iterations, numbers.Integral) or int(iterations) < 0:
        raise ValueError(f"share: iterations must be an integer that is not negative, got {iterations!r}.")


def _name(path: str, per: Tables) -> str:
    """Of the state's table for a slot."""
    return "" if isinstance(per, Global) else path


def _layout(path: str, slot: Slot, per: Tables, clusters: int) -> tuple[tuple[int, ...], int]:
    """The axes with tables of their own and the bucket, checked."""
    shape = tuple(slot.array.shape)
    axes: tuple[int, ...] = ()
    if isinstance(per, Channels):
        named = (per.axes,) if isinstance(per.axes, int) else per.axes
        bad = [a for a in named if not -len(shape) <= a < len(shape)]
        if bad:
            raise ValueError(
                f"share: {path!r} has shape {shape} and no axis {bad[0]}; name axes in {-len(shape)}..{len(shape) - 1}."
            )
        axes = tuple(sorted({a % len(shape) for a in named}))
    bucket = min(per.size, slot.array.size) if isinstance(per, Buckets) else 0
    weights = bucket or slot.array.size // table_count(shape, axes, 0)
    if weights < clusters:
        raise ValueError(
            f"share: {path!r} of shape {shape} has {weights} weights a table, fewer than {clusters} clusters; take"
            " fewer clusters, tables that serve more weights, or leave it out by a rule."
        )
    return axes, bucket


def _counted(slot: Slot, preserve_zeros: bool) -> jax.Array | None:
    """The elements that k-means sees, or None for all."""
    alive = slot.full_mask
    if not preserve_zeros:
        return alive
    nonzero = slot.array != 0
    return nonzero if alive is None else alive & nonzero


def _joined(rows: list[_Rows]) -> _Rows:
    """All rows as one."""
    dtype = jnp.result_type(*(r.values.dtype for r in rows))
    values = jnp.concatenate([r.values.reshape(1, -1).astype(dtype) for r in rows], axis=1)
    if all(r.counted is None for r in rows):
        return _Rows(values, None)
    counted = [jnp.ones(r.values.shape, bool) if r.counted is None else r.counted for r in rows]
    return _Rows(values, jnp.concatenate([c.reshape(1, -1) for c in counted], axis=1))


def _padded(rows: _Rows) -> _Rows:
    """Rows of a power of two: leaves of many sizes are then few compilations."""
    tables, size = rows.values.shape
    more = (1 << (size - 1).bit_length()) - size
    counted = jnp.ones((tables, size), bool) if rows.counted is None else rows.counted
    return _Rows(jnp.pad(rows.values, ((0, 0), (0, more))), jnp.pad(counted, ((0, 0), (0, more))))


def _grouped_codes(
    selected: dict[str, Slot], codes: dict[str, jax.Array], per: Tables, clusters: int
) -> dict[str, jax.Array]:
    """Kept codes, in the rows of the values."""
    rows = {p: to_rows(codes[p], *_layout(p, slot, per, clusters)) for p, slot in selected.items()}
    if isinstance(per, Global):
        return {"": jnp.concatenate([r.reshape(1, -1) for r in rows.values()], axis=1)}
    return rows


def _with_zero(table: jax.Array, zero_first: bool) -> jax.Array:
    return jnp.concatenate([jnp.zeros((1, table.shape[1]), table.dtype), table]) if zero_first else table
