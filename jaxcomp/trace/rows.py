"""The rows that each leaf multiplies: how many there were, their sum, and their second moments, windows whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.batches import no_batch, results_of
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.paths import Where, matches
from jaxcomp.core.roles import BATCH, CONTRACTED, OUTPUT, SPATIAL, STACKED, AxisRoles
from jaxcomp.core.types import Params, PyTree
from jaxcomp.core.words import shape_words
from jaxcomp.trace.collect import ADDED, Nothing, Observer, collect
from jaxcomp.trace.exact import Sum, summed
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import zeros
from jaxcomp.trace.moments import BY_GROUP, paired
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.products import by_rows
from jaxcomp.trace.sites import Site
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import Fn
from jaxcomp.trace.windows import over_windows


@compressed_leaf(meta=("apart", "summed", "window"))
class Moments:
    """What a leaf multiplies: ``second == Σ x xᵀ``, ``first == Σ x`` and ``count == Σ 1`` over the rows ``x``.

    Moments of several batches add: ``jax.tree.map(jnp.add, a, b)``.

    Fields:
      second: of shape ``(*apart, n, n)``.
      first: of shape ``(*apart, n)``.
      count: of shape ``apart``.
      apart: the leaf's axes of which each index has its own rows: stacked layers, batches, experts, output features
        of a convolution with feature groups. Static.
      summed: the leaf's axes that a row runs over, the slowest first; those of a window before the others.
        Static.
      window: those of them that are a convolution's window. Static.
    """

    second: jax.Array
    first: jax.Array
    count: jax.Array
    apart: tuple[int, ...]
    summed: tuple[int, ...]
    window: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = f" in {shape_words(self.count.shape)} parts" if self.count.shape else ""
        return f"Moments(rows of {self.first.shape[-1]}{parts}, axes {self.summed} of the leaf)"

    def roles(self, rank: int) -> AxisRoles:
        """What the program does with each axis of the leaf.

        Args:
          rank: of the leaf.
        """
        known = {**dict.fromkeys(self.apart, BATCH), **dict.fromkeys(self.summed, CONTRACTED)}
        known |= dict.fromkeys(self.window, SPATIAL)
        return AxisRoles(tuple(known.get(i, OUTPUT) for i in range(rank)))


_LARGEST = 1 << 26
"""Numbers in the moments of a convolution with feature groups, which has some for each output feature."""


class _Sums(NamedTuple):
    second: Sum
    first: Sum
    number: Sum

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(a.plus(b) for a, b in zip(self, other, strict=True)))


class _Rows(NamedTuple):
    """How a leaf's rows lie in the activation.

    Fields:
      apart, summed, window: the leaf's axes, as :class:`Moments` has them.
      shared: how many layer scans are around a leaf that is not stacked: they are added up.
      take: from the operands' values to the sums.
    """

    apart: tuple[int, ...]
    summed: tuple[int, ...]
    window: tuple[int, ...]
    shared: int
    take: Observer


def row_moments(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, Moments]]:
    """:class:`Moments` of the rows that each leaf multiplies in ``fn(params, *args)``, by the leaf's path.

    Of a dot, a row runs over the leaf's axes that are summed over, wherever they stand; of a convolution over its whole
    window and its input features; with feature groups, depthwise ones too, each output feature has its group's moments.
    In a scan over stacked layers there are moments for each layer, and where axes of the leaf are batch axes or experts
    (``ragged_dot``), for each of these, over its own rows. A leaf with several sites has all their rows together. Sites
    whose weight is computed, feature groups whose moments would be more than 2^26 numbers, and leaves that are summed
    over in more ways than one are left out.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which leaves, by path or as a predicate of ``(path, site)``.

    Raises:
      ValueError: no site is left.

    >>> m = row_moments(lambda p, x: x @ p["w"].T)({"w": jnp.ones((3, 2))}, jnp.array([[1.0, 2.0], [0.0, 1.0]]))["w"]
    >>> m.second.tolist(), m.first.tolist(), float(m.count), m.summed
    ([[1.0, 2.0], [2.0, 5.0]], [1.0, 3.0], 2.0, (1,))
    """
    found = chosen_moments(fn, where)

    @wraps(fn)
    def moments(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, Moments]:
        return found(None, params, *args, **kwargs)

    return moments


def chosen_moments(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, Moments]]:
    """:func:`row_moments` that compute only some: ``moments(chosen, params, *args)``, zeros for the others.

    So one compiled program gathers now these, now those.

    Args:
      fn, where: as for :func:`row_moments`.

    The result takes ``chosen``, by path whether it is wanted: booleans, or scalars of them inside jit; None is all.
    """
    nothing = Nothing("row_moments", where, "site that multiplies rows by a leaf")

    def moments(
        chosen: Mapping[str, jax.Array] | None, params: Params, *args: PyTree, **kwargs: PyTree
    ) -> dict[str, Moments]:
        known: dict[str, _Rows | None] = {}

        def observer(site: Site, op: Op) -> Observer | None:
            path = site.leaf or ""
            rows = _rows(site, op) if matches(where, path, site) else None
            if rows is None:
                return None
            before = known.setdefault(path, rows)
            if before is None or before[:-1] != rows[:-1]:
                known[path] = None
                return None
            return rows.take if chosen is None else _when(chosen.get(path, False), rows.take)

        seen = collect(fn, observer, merged=ADDED, nothing=nothing)(params, *args, **kwargs).seen
        return {path: _finished(seen[path], rows) for path, rows in known.items() if rows is not None}

    return moments


def _when(wanted: jax.Array | bool, take: Observer) -> Observer:
    def look(values: Sequence[jax.Array]) -> Mapping[str, PyTree]:
        values = list(values)
        shapes = jax.eval_shape(take, values)
        return lax.cond(wanted, take, lambda _: zeros(shapes), values)

    return look


def row_moments_over(fn: Fn, where: Where = r".*") -> Callable[[Params, Iterable[PyTree]], dict[str, Moments]]:
    """:func:`row_moments` of many batches, compiled once for each shape and added as they come.

    The result takes ``(params, batches)``; a batch is what ``fn`` takes behind the parameters: a tuple of arguments, or
    the only one. It shows how far it is.

    Args:
      fn, where: as for :func:`row_moments`.

    Raises:
      ValueError: ``where`` matches no site, or there is no batch.

    >>> m = row_moments_over(lambda p, x: x @ p["w"])({"w": jnp.ones((2, 3))}, [jnp.ones((4, 2)), jnp.ones((1, 2))])
    >>> float(m["w"].count), m["w"].second.tolist()
    (5.0, [[5.0, 5.0], [5.0, 5.0]])
    """
    observed = jax.jit(row_moments(fn, where))

    def over(params: Params, batches: Iterable[PyTree]) -> dict[str, Moments]:
        owner = "row_moments_over"
        return total(results_of(observed, params, batches, owner=owner, words="row_moments: batches"), owner)

    return over


def total(seen: Iterable[PyTree], owner: str) -> PyTree:
    """The moments, or other sums, of several batches together, added up as they come without rounding errors that grow.

    Args:
      seen: of each batch.
      owner: for the message.

    Raises:
      ValueError: there is none.
    """
    found: PyTree = None
    for one in seen:
        new = jax.tree.map(summed, one)
        # Waiting keeps no more than one batch on the device, and a bar honest.
        found = jax.block_until_ready(new if found is None else _added(found, new))
    if found is None:
        raise no_batch(owner)
    return jax.tree.map(lambda both: both.rounded(), found, is_leaf=_is_sum)


@jax.jit
def _added(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.plus(y), a, b, is_leaf=_is_sum)


def _is_sum(x: object) -> bool:
    return isinstance(x, Sum)


def _finished(sums: _Sums, rows: _Rows) -> Moments:
    over = tuple(range(rows.shared))
    second, first, count = (jnp.sum(s.rounded(), axis=over) if over else s.rounded() for s in sums)
    return Moments(second, first, count, rows.apart, rows.summed, rows.window)


def _rows(site: Site, op: Op) -> _Rows | None:
    """Where a site's leaf has its rows; None where it has none to speak of."""
    if site.weight is None or len(site.activations) != 1 or not BARRED.isdisjoint(site.inside):
        return None
    weight, origin = site.operands[site.weight], op.tags[site.weight].origin
    if not weight.exact or origin is None or site.kind == "embed":
        return None
    stacked = tuple(i for i in origin.stacked if weight.leaf_roles[i] == STACKED)
    layers = tuple(origin.shape[i] for i in stacked)
    if layers not in ((), site.layer_steps):
        return None
    shared = len(site.layer_steps) if not stacked else 0
    if site.kind == "conv":
        return _windows(site, op, origin, stacked=stacked, shared=shared)
    if site.kind == "ragged" and (site.weight != 1 or by_rows(op.eqn) is None):
        return None
    batch, over = paired(site, op)
    apart, of_rows = (tuple(a for axes, _ in pairs for a in axes) for pairs in (batch, over))
    if len({*stacked, *apart, *of_rows}) != len(stacked) + len(apart) + len(of_rows):
        return None  # halves of an axis that a reshape split
    x, in_front, last = site.activations[0], *([j for _, j in pairs if j is not None] for pairs in (batch, over))
    sizes = tuple(origin.shape[i] for i in apart) if site.kind != "ragged" else ()
    if math.prod(site.operands[x].shape[j] for j in last) != math.prod(origin.shape[i] for i in of_rows):
        return None  # part of an axis alone

    def take(values: Sequence[jax.Array]) -> dict[str, _Sums]:
        rows = jnp.moveaxis(values[x], (*in_front, *last), (*range(len(in_front)), *range(-len(last), 0)))
        width = math.prod(rows.shape[rows.ndim - len(last) :])
        rows = rows.reshape(*sizes, rows.size // max(math.prod(sizes) * width, 1), width)
        return {site.leaf or "": _by_group(rows, values[2]) if site.kind == "ragged" else _sums(rows)}

    return _Rows((*stacked, *apart), of_rows, (), shared, take)


def _sums(rows: jax.Array) -> _Sums:
    """Of ``(*apart, rows, n)``."""
    x = rows.astype(compute_dtype(rows.dtype))
    second = jnp.einsum("...ni,...nj->...ij", x, x, precision="highest")
    count = jnp.full(x.shape[:-2], x.shape[-2], x.dtype)
    return _Sums(summed(second), summed(jnp.sum(x, axis=-2)), summed(count))


def _by_group(rows: jax.Array, sizes: jax.Array) -> _Sums:
    """Of the rows of each group."""
    x = rows.astype(compute_dtype(rows.dtype))
    one = jnp.ones((len(x), 1), x.dtype)
    second, first = (lax.ragged_dot_general(a, x, sizes, BY_GROUP, precision="highest") for a in (x, one))
    return _Sums(summed(second), summed(first[..., 0, :]), summed(sizes.astype(x.dtype)))


def _windows(site: Site, op: Op, origin: Origin, *, stacked: tuple[int, ...], shared: int) -> _Rows | None:
    """The rows of a convolution: a window each, in the order of the leaf's axes."""
    eqn, x = op.eqn, site.activations[0]
    numbers = eqn.params["dimension_numbers"]
    places = [origin.axes[i] for i in numbers.rhs_spec[1:]]  # input features, then the window
    if x != 0 or eqn.params["batch_group_count"] != 1 or any(len(p) > 1 for p in places):
        return None
    sizes = [site.operands[1].shape[i] for i in numbers.rhs_spec[1:]]
    of = {p[0]: i for i, p in enumerate(places) if p}  # a window of one has no axis where a reshape made it
    window = tuple(sorted(a for a, i in of.items() if i))
    leaf_axes = (*window, *(a for a, i in of.items() if not i))
    if len(of) != sum(map(len, places)) or math.prod(sizes) != math.prod(origin.shape[a] for a in leaf_axes):
        return None
    order = [*(of[a] for a in leaf_axes), *(i for i in range(len(sizes)) if i not in of.values())]
    features, apart = site.operands[1].shape[numbers.rhs_spec[0]], stacked
    if site.groups != 1:
        out = origin.axes[numbers.rhs_spec[0]]
        if len(out) != 1 or origin.shape[out[0]] != features or features * math.prod(sizes) ** 2 > _LARGEST:
            return None
        apart = (*stacked, *out)

    def take(values: Sequence[jax.Array]) -> dict[str, _Sums]:
        sums = over_windows(values[0], eqn, _sums, sizes=sizes, order=order)
        if site.groups != 1:
            sums = jax.tree.map(lambda x: jnp.repeat(x, features // site.groups, axis=0), sums)
        return {site.leaf or "": sums}

    return _Rows(apart, leaf_axes, window, shared, take)
