"""Weight sharing: each weight is replaced by the nearest entry of a small table that k-means finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.errors import naming
from jaxcomp.core.layouts import Buckets, Channels, Groups, Layout, Tensor, Tiles, checked_layout
from jaxcomp.core.paths import Where, key_of_leaf
from jaxcomp.core.progress import each
from jaxcomp.core.records import recorded
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots, state_of
from jaxcomp.core.specs import Global, check_key, is_integer
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Key, Params, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.sharing.kmeans.fit import Parts, fit, fit_parts, refit, refit_parts
from jaxcomp.sharing.kmeans.inits import Init, near_optimal
from jaxcomp.sharing.kmeans.tables import table_count
from jaxcomp.sharing.leaves import GRADIENTS, Codebook
from jaxcomp.sharing.rows import Laid, Rows, joined, means, padded

MAX_CLUSTERS = 1 << 16
_LAYOUTS = (Tensor, Channels, Groups, Tiles, Buckets, Global)


class Shared(NamedTuple):
    """What :func:`share` keeps: the tables, entries by tables, by slot path; and the codes where they are kept."""

    tables: dict[str, jax.Array]
    codes: dict[str, jax.Array]


@recorded
def share(
    clusters: int,
    *,
    init: Init = near_optimal,
    per: Layout | Global = Tensor(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    preserve_zeros: bool = False,
    recluster: bool = True,
    gradient: str = "straight",
    key: Key | None = None,
    iterations: int = 300,
    where: Where | None = None,
) -> Transform:
    """Leaves at most ``clusters`` different values in each selected array; ``apply`` makes a ``Codebook`` leaf of it.

    ``init`` finds the tables by k-means. Each ``update`` counts or sorts every selected weight once (a gate makes that
    rarer) and improves the tables. What an earlier ``prune`` masks takes no part. A later ``quantize`` quantizes the
    tables, so that no more values are left than there were clusters. :func:`~jaxcomp.sharing.leaves.trained_tables`
    goes on to train the tables themselves.

    Args:
      clusters: entries of a table, 2..65536.
      init: where k-means starts, one of :mod:`jaxcomp.sharing.kmeans.inits`.
      per: what has a table of its own: ``Tensor()``, a leaf; ``Channels()``, each index of the axes over which no
        product sums; ``Groups(size)``, ``Tiles(shape)``, ``Buckets(size)``; or ``Global()``, one table for all selected
        leaves (a file holds it once).
      roles: from :func:`jaxcomp.roles`, for a ``per`` that does not name its axes. Without it, what path and rank
        settle.
      preserve_zeros: the first of the clusters is 0, for the weights that are exactly 0 or masked, and for no other;
        these get no gradient, so what is zero stays so.
      recluster: at ``apply`` a weight takes the entry that is nearest now, and ``update`` goes on with k-means from the
        last table. If False, a weight keeps the entry that it had at ``init``, and ``update`` moves each entry to its
        members' mean.
      gradient: "straight" passes each weight its own; "sum" and "mean" pass the sum or the mean over all weights of the
        same entry, which so move together.
      key: for an ``init`` that draws; each leaf draws from a key of its own, whatever else is in the tree.
      iterations: the most of Lloyd's iterations at ``init`` and at each ``update``; they stop where nothing moves.
      where: which leaves; by default the matrices that roles name, or all matrices.

    Raises:
      TypeError: an init, a layout or roles of another kind.
      ValueError: clusters out of range, an unknown gradient, a missing key; at ``init``, what
        :func:`~jaxcomp.core.slots.slots` raises, a layout that does not fit a leaf or needs roles that are not known,
        and fewer weights a table than clusters.

    >>> t = share(2)
    >>> params = {"kernel": jnp.array([[0.0, 1.0], [5.0, 7.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[0.5, 0.5],
           [6. , 6. ]], dtype=float32)

    Source: Han et al. 2015, arXiv:1510.00149, section 3; there the tables' gradients are sums over their members.
    """
    how = _Sharing(
        clusters=clusters,
        start=init,
        per=checked_layout("share", per, _LAYOUTS),
        roles=checked_roles("share", roles),
        zero_first=bool(preserve_zeros),
        recluster=recluster,
        gradient=gradient,
        key=key,
        iterations=iterations,
        where=selecting(where, roles),
    )
    return Transform(how.init, how.update, how.apply)


@dataclass(frozen=True, eq=False)
class _Sharing:
    """The arguments of :func:`share`, checked here once, and its three functions."""

    clusters: int
    start: Init
    per: Layout | Global
    roles: Roles | None
    zero_first: bool
    recluster: bool
    gradient: str
    key: Key | None
    iterations: int
    where: Where

    def __post_init__(self) -> None:
        if not is_integer(self.clusters) or not 2 <= self.clusters <= MAX_CLUSTERS:
            raise ValueError(f"share: clusters must be an integer in 2..{MAX_CLUSTERS}, got {self.clusters!r}.")
        if not isinstance(self.start, Init):
            raise TypeError(f"share: init must be an Init such as near_optimal, got {self.start!r}.")
        if self.gradient not in GRADIENTS:
            raise ValueError(
                f"share: gradient must be one of {', '.join(map(repr, GRADIENTS))}, got {self.gradient!r}."
            )
        if self.start.random and self.key is None:
            raise ValueError(
                f"share: init {self.start.name!r} draws, and wants a key: share(..., key=jax.random.key(0))."
            )
        if self.key is not None:
            check_key("share", self.key)
        if not is_integer(self.iterations) or self.iterations < 0:
            raise ValueError(f"share: iterations must be an integer that is not negative, got {self.iterations!r}.")

    def init(self, params: Params) -> Shared:
        every = self.laid(params)
        check_finite({path: one.slot for path, one in every.items()}, "share")
        tables = each(self.fitted, self.grouped(every), "share: k-means")
        if self.recluster:
            return Shared(tables, {})
        own = {path: self.table(path, one, tables) for path, one in every.items()}
        return Shared(tables, {path: one.codes(own[path], self.zero_first) for path, one in every.items()})

    def update(self, state: Shared, params: Params, *, step: Step, **stats: Any) -> Shared:
        every = self.laid(params)
        tables = {}
        for path, values in self.grouped(every).items():
            old = state_of(state.tables, path, "share")
            if self.recluster:
                tables[path] = self.refitted(values, old)
            else:
                served = every if isinstance(self.per, Global) else {path: every[path]}
                codes = [state_of(state.codes, p, "share") for p in served]
                tables[path] = means(values, list(served.values()), codes, old)
        return Shared(tables, state.codes)

    def apply(self, state: Shared, params: Params) -> Params:
        new = {}
        for path, one in self.laid(params).items():
            slot, (shape, row) = one.slot, one.blocks
            table = self.table(path, one, state.tables)
            codes = one.codes(table, self.zero_first) if self.recluster else state.codes[path]
            leaf = Codebook(table, codes, slot.array, shape, row, self.gradient, self.zero_first)
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return replace_slots(params, new)

    def laid(self, params: Params) -> dict[str, Laid]:
        """The selected slots with their blocks, checked."""
        return {path: self.lay(slot) for path, slot in slots(params, self.where, "share").items()}

    def lay(self, slot: Slot) -> Laid:
        layout = Tensor() if isinstance(self.per, Global) else self.per
        blocks, size = slot.blocks(layout, self.roles, "share"), int(slot.array.size)
        if blocks.row > size:  # the only row, and not a full one
            blocks = blocks._replace(row=size)
        weights = blocks.row or size // table_count(blocks)
        if weights < self.clusters:
            with naming("share", slot.path):
                raise ValueError(
                    f"of shape {tuple(slot.array.shape)} has {weights} weights a table, fewer than {self.clusters}"
                    " clusters; take fewer clusters, tables that serve more weights, or leave it out by a rule"
                )
        return Laid(slot, blocks)

    def grouped(self, every: dict[str, Laid]) -> dict[str, Rows | Parts]:
        """The values of each of the state's entries: one a leaf, or one for all of them."""
        if isinstance(self.per, Global):
            return {"": joined(list(every.values()), self.zero_first)}
        return {path: one.values(self.zero_first) for path, one in every.items()}

    def fitted(self, path: str, values: Rows | Parts) -> jax.Array:
        keys = None
        if self.start.random and self.key is not None:
            tables = 1 if isinstance(values, Parts) else values.values.shape[0]
            keys = jax.random.split(key_of_leaf(self.key, path), tables)
        free = self.clusters - self.zero_first  # entries that k-means places
        how = {"clusters": free, "init": self.start, "iterations": self.iterations}
        if isinstance(values, Parts):
            return self.with_zero(fit_parts(values, key=None if keys is None else keys[0], **how)[:, None])
        one, rows = partial(fit, **how), padded(values)
        found = jax.vmap(lambda x, counted, key: one(x, counted, key=key))(rows.values, rows.counted, keys)
        return self.with_zero(found.T)

    def refitted(self, values: Rows | Parts, old: jax.Array) -> jax.Array:
        free = old[int(self.zero_first) :]
        if isinstance(values, Parts):
            return self.with_zero(refit_parts(values, free[:, 0], iterations=self.iterations)[:, None])
        return self.with_zero(jax.vmap(partial(refit, iterations=self.iterations))(*values, free.T).T)

    def with_zero(self, table: jax.Array) -> jax.Array:
        if not self.zero_first:
            return table
        return jnp.concatenate([jnp.zeros((1, table.shape[1]), table.dtype), table])

    def table(self, path: str, one: Laid, tables: dict[str, jax.Array]) -> jax.Array:
        """The table of a slot, in its type."""
        name = "" if isinstance(self.per, Global) else path
        return state_of(tables, name, "share").astype(one.slot.array.dtype)
