"""Low rank: leaves as products of smaller factors, in training as a projection or as parameters of their own.

Two uses. As a ``Transform``, :func:`low_rank` projects dense parameters on a basis that it found in them: the
parameters stay dense and learn, and what the forward pass sees has the rank. With :func:`factorize` the factors *are*
the parameters, fewer of them, and an optimizer trains them. ``jaxcomp.activations.factored(fn)`` runs either without
ever multiplying the factors out.

Layer by layer, each followed by fine-tuning of the whole network::

    ranks = choose_ranks(params, Budget(params=0.4))
    for path in ranks:                       # from the input to the output, or the most redundant one first
        params = factorize(params, ranks, where=re.escape(path))
        params = fine_tune(params)           # any training loop over factored(fn)
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcomp.core.errors import count_known, naming
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.meshes import after
from jaxcomp.core.paths import Where, describe, leaves_with_paths, matches, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.records import recorded
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots
from jaxcomp.core.specs import check_positive
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Leaf, Params, PyTree, State, Step
from jaxcomp.factorization.axes import Selected, placed
from jaxcomp.factorization.bases import Basis, Count, Rank, basis_of, checked_rank, leaf_of, rank_in
from jaxcomp.factorization.leaves import balanced
from jaxcomp.factorization.ranks import OWNER, Ranks, chosen_ranks
from jaxcomp.factorization.specs import SVD, Budget, Energy, Method

Wanted = Rank | Energy | Budget | Mapping[str, Rank]
"""A rank for every leaf, what ranks must meet, or ranks by path."""


@recorded
def low_rank(
    rank: Wanted,
    *,
    method: Method = SVD(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    where: Where | None = None,
    moments: Mapping[str, jax.Array] | None = None,
    reuse: Mapping[str, float] | None = None,
    max_rank: int | None = None,
) -> Transform:
    """Makes a leaf of factors of each selected array: ``LowRank``, ``Tucker``, ``Depthwise`` or ``Separable``.

    The state is a basis: of ``SVD`` the right singular vectors ``v``, so that ``apply`` gives ``u = W vᵀ``, linear in
    the parameters, which learn through it. At the step where the basis was found this is the truncated SVD. ``update``
    finds it again from the parameters it is given; :func:`~jaxcomp.core.gates.when` makes that rarer. Later transforms
    of a chain see the factors.

    Args:
      rank: a count for every selected leaf (for ``Tucker2`` a pair too); a fraction of each leaf's largest rank;
        ``Energy`` or ``Budget``, for which ``init`` must see values; or ranks by path, as :func:`choose_ranks` gives.
      method: ``SVD()``, ``RankOne()``, ``Tucker2()`` or ``CP()``.
      roles: from :func:`jaxcomp.roles`: what the axes of each leaf do, for a method that does not say how many are
        stacked and how many are columns. Without it, what path and rank settle.
      where: which leaves; by default those that ``rank`` names, the matrices that roles name, or all matrices.
      moments: by path, ``Σ xᵀ x`` of the inputs of a leaf (``input_moments`` collects them) or its diagonal: what is
        minimized is then the error of the leaf's products, not of the leaf. ``update(…, moments=…)`` replaces them.
      reuse: for ``Budget(macs=…)``, from :func:`~jaxcomp.trace.cost.reuse_of`.
      max_rank: for ``Energy`` and ``Budget``, no rank above it is tried.

    Raises:
      TypeError: a method, rank or roles of another kind.
      ValueError: at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, a leaf without enough axes or of which it
        is not known what they do, a rank beyond the shape, a budget that cannot be met, a moment of another shape, or a
        leaf that an earlier transform took. The message names the path.

    >>> t = low_rank(1)
    >>> params = {"kernel": jnp.array([[2.0, 4.0], [1.0, 2.0], [3.0, 6.0]])}
    >>> leaf = t.apply(t.init(params), params)["kernel"]
    >>> leaf.u.shape, leaf.v.shape, bool(jnp.allclose(leaf.materialize(), params["kernel"], atol=1e-5))
    ((3, 1), (1, 2), True)

    Source: Denton et al. 2014, arXiv:1404.0736; weighting by inputs as in Yuan et al. 2023, arXiv:2312.05821.
    """
    _check(method, rank, max_rank)
    axes = checked_roles(OWNER, roles)
    given = dict(moments or {})

    def select(params: Params) -> dict[str, Selected]:
        return _selected(_found(params, rank, where=where, roles=axes), method, axes)

    def init(params: Params) -> State:
        found = select(params)
        _check_values(found, given)
        if isinstance(rank, Energy | Budget):
            ranks = chosen_ranks(found, rank, moments=given, reuse=reuse, max_rank=max_rank)
        else:
            ranks = _given_ranks(found, rank)
        return _bases(found, ranks, given)

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
        weights = given if stats.get("moments") is None else stats["moments"]
        ranks = {path: rank_in(method, basis) for path, basis in state.items()}
        return _bases(select(params), ranks, weights)

    def apply(state: State, params: Params) -> Params:
        found = select(params)
        new = {path: leaf_of(found[path].at, basis, found[path].slot.array) for path, basis in state.items()}
        return replace_slots(params, new)

    return Transform(init, update, apply)


@on_any_mesh
def factorize(
    params: Params,
    rank: Wanted,
    *,
    method: Method = SVD(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    where: Where | None = None,
    moments: Mapping[str, jax.Array] | None = None,
    reuse: Mapping[str, float] | None = None,
    max_rank: int | None = None,
) -> Params:
    """The parameters with factors in place of the selected arrays, to be trained as they are.

    The leaves are those of :func:`low_rank`, which has the arguments, with each term's size shared evenly among its
    factors. Train on ``fn(materialize(params), …)`` or, with fewer operations, on ``factored(fn)(params, …)``.

    Args:
      params: arrays, in any containers.
      rank, method, roles, where, moments, reuse, max_rank: as in :func:`low_rank`.

    >>> import jax
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)}
    >>> small = factorize(params, 4)
    >>> sum(x.size for x in jax.tree.leaves(small))
    416
    """
    t = low_rank(rank, method=method, roles=roles, where=where, moments=moments, reuse=reuse, max_rank=max_rank)
    state = t.init(params)
    leaves = dict(leaves_with_paths(t.apply(state, params), is_leaf=is_compressed)[0])
    return replace_slots(params, {path: balanced(leaves[path]) for path in state})


@on_any_mesh
def choose_ranks(
    params: Params,
    target: Energy | Budget,
    *,
    method: Method = SVD(),  # noqa: B008 - frozen
    roles: Roles | None = None,
    where: Where | None = None,
    moments: Mapping[str, jax.Array] | None = None,
    reuse: Mapping[str, float] | None = None,
    max_rank: int | None = None,
) -> Ranks:
    """Ranks by path that meet a target; leaves that are better left dense are not among them.

    With a ``Budget`` the ranks of all leaves compete: the greedy climb goes where the error falls most for each
    parameter (or multiply-accumulate) that it costs. For ``RankOne`` and ``CP`` the falls are those of the terms as
    they are found.

    Args:
      params, method, roles, where, moments, reuse, max_rank: as in :func:`low_rank`.
      target: ``Energy(fraction)`` or ``Budget(…)``.

    Raises:
      TypeError: a target of another kind.
      ValueError: as for :func:`low_rank`.

    >>> import jax
    >>> thin = jax.random.normal(jax.random.key(0), (32, 2)) @ jax.random.normal(jax.random.key(1), (2, 32))
    >>> choose_ranks({"a": thin, "full": jax.random.normal(jax.random.key(2), (32, 32))}, Energy(0.999))
    {'a': 2}
    """
    if not isinstance(target, Energy | Budget):
        raise TypeError(f"choose_ranks: wants Energy(fraction) or Budget(…), got {target!r}.")
    _check(method, target, max_rank)
    axes = checked_roles(OWNER, roles)
    found = _selected(_found(params, target, where=where, roles=axes), method, axes)
    given = dict(moments or {})
    _check_values(found, given)
    return chosen_ranks(found, target, moments=given, reuse=reuse, max_rank=max_rank)


def _check(method: object, rank: object, max_rank: object) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"{OWNER}: method must be SVD(), RankOne(), Tucker2() or CP(), got {method!r}.")
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real | tuple | Energy | Budget | Mapping):
        raise TypeError(f"{OWNER}: rank must be a number, a pair, Energy, Budget, or ranks by path, got {rank!r}.")
    if isinstance(rank, Mapping) and not rank:
        raise ValueError(f"{OWNER}: the ranks by path are empty; nothing would be factored.")
    check_positive(OWNER, max_rank, "max_rank")


def _found(params: Params, rank: Wanted, *, where: Where | None, roles: Roles | None) -> dict[str, Slot]:
    """The selected slots, each a whole leaf that nobody took before."""
    rule = selecting(where, roles)
    if isinstance(rank, Mapping):

        def named(path: str, leaf: Leaf) -> bool:
            return path in rank and (where is None or matches(where, path, leaf))

        named.__name__ = "ranks by path" if where is None else describe(where)
        rule = named
    found = slots(params, rule, OWNER)
    for slot in found.values():
        if slot.path != slot.leaf_path:
            raise ValueError(
                f"{OWNER}: {slot.path!r} is a factor already, or inside another leaf; leave {slot.leaf_path!r} out by a"
                " rule."
            )
        if slot.mask is not None:
            raise ValueError(
                f"{OWNER}: {slot.path!r} was made by prune earlier in this chain; put {OWNER} before prune, which then"
                " prunes the factors."
            )
    missing = [p for p in rank if p not in found] if isinstance(rank, Mapping) and where is None else []
    if missing:
        raise ValueError(f"{OWNER}: ranks are given for {some_paths(missing)}, where there is no leaf.")
    return found


def _selected(found: Mapping[str, Slot], method: Method, roles: Roles | None) -> dict[str, Selected]:
    chosen = {}
    for path, slot in found.items():
        with naming(OWNER, path):
            chosen[path] = Selected(slot, placed(method, slot, roles))
    return chosen


def _diagonal(moment: jax.Array) -> jax.Array:
    return moment if moment.ndim < 2 else jnp.diagonal(moment, axis1=-2, axis2=-1)


def _check_values(found: Mapping[str, Selected], moments: Mapping[str, jax.Array]) -> None:
    check_finite({path: one.slot for path, one in found.items()}, OWNER)
    for path, m in moments.items():
        if count_known(lambda m: ~jnp.isfinite(m), m) or count_known(lambda m: _diagonal(m) < 0, m):
            raise ValueError(
                f"{OWNER}: the moment of {path!r} must be finite, and not negative on its diagonal; it is the sum of"
                " xᵀ x over the inputs, as jaxcomp.trace.input_moments gives it."
            )
    if moments and not set(moments) & set(found):
        raise ValueError(
            f"{OWNER}: moments are given for {some_paths(moments)}, and none of the selected leaves is among them:"
            f" {some_paths(found)}."
        )


def _given_ranks(found: Mapping[str, Selected], rank: Rank | Mapping[str, Rank]) -> Ranks:
    ranks: Ranks = {}
    for path, one in found.items():
        with naming(OWNER, path):
            asked = rank[path] if isinstance(rank, Mapping) else rank
            ranks[path] = checked_rank(one.at, tuple(one.slot.array.shape), asked)
    return ranks


def _bases(found: Mapping[str, Selected], ranks: Ranks, moments: Mapping[str, jax.Array]) -> State:
    made: State = {}
    for path in ranks:  # a decomposition wants its array whole: on a mesh one leaf after another is gathered for it
        made[path] = _basis(found[path], ranks[path], moments.get(path), before=made)
    return made


def _basis(one: Selected, rank: Count, moment: jax.Array | None, *, before: State) -> Basis:
    with naming(OWNER, one.slot.path):
        return basis_of(one.at, after(one.slot.array, before), rank, moment=moment)
