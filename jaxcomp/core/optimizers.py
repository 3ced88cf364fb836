"""Beside an optimizer: which of its arrays are a parameter's, what regrown weights start from, an unchanged loop."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import is_compressed, materialize
from jaxcomp.core.paths import is_float_array, leaves_with_paths, path_str, some_paths
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Leaf, Params, PyTree, State

KeyPath = jax.tree_util.KeyPath
T = TypeVar("T")


class MaskState(NamedTuple):
    """State of a transform whose newly active weights start afresh.

    Fields:
      masks: booleans by the path of the parameter, of its shape; True is active.
    """

    masks: dict[str, jax.Array]


def reset_regrown(old_state: State, new_state: State, params: Params, opt_state: State) -> tuple[Params, State]:
    """Zeroes the weights that ``update`` has just made active, and all that an optimizer remembers of them.

    Call it after every ``update`` of a transform that holds :func:`~jaxcomp.pruning.sparse_training.regrow`; where no
    weight is grown it changes nothing. In the functional design a masked weight keeps the value it had, so this is what
    makes a regrown one start at zero.

    The arrays of the optimizer's state that belong to a parameter are found by their place (see :func:`map_owned`) and
    have its shape. So momentum and both moments are found in sgd, adam, lion,
    muon and all others, inside ``chain``, ``masked``, ``partition`` and ``inject_hyperparams`` too. What is not of the
    parameter's shape is left: counters, hyperparameters, the row and column statistics of a factored adafactor (they
    mix a weight with its neighbours). Step counters are one for all weights, so adam's bias correction does not start
    again.

    Args:
      old_state, new_state: the transform's states before and after ``update``; chains, gates and rules of any depth.
      params: the latent parameters, after the optimizer's step.
      opt_state: any optax state over them.

    Returns:
      ``(params, opt_state)``; what no regrown weight belongs to is the same object.

    Raises:
      ValueError: the states are of different transforms, or a mask belongs to no leaf of the parameters.

    >>> import optax
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    >>> old = MaskState({"w": jnp.array([True, False])})
    >>> new = MaskState({"w": jnp.array([False, True])})
    >>> reset_regrown(old, new, params, opt_state)[0]
    {'w': Array([1., 0.], dtype=float32)}
    """
    grown = _grown(_masks(old_state), _masks(new_state))
    if not grown:
        return params, opt_state
    places = {key_path: path_str(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)}
    lost = sorted(set(grown) - set(places.values()))
    if lost:
        raise ValueError(
            f"reset_regrown: {lost[0]!r} is masked but is no leaf of the parameters, which are"
            f" {some_paths(places.values())}; an earlier transform made it. Put regrow first in the chain."
        )
    owners = {key_path: grown.get(path) for key_path, path in places.items()}
    return map_owned(_zeroed, params, owners), map_owned(_zeroed, opt_state, owners)


def map_owned(f: Callable[[str, Leaf, T], Leaf], tree: PyTree, owners: Mapping[KeyPath, T]) -> PyTree:
    """The tree with ``f(path, leaf, owner)`` at each leaf that belongs to a parameter; all others stay.

    A leaf of an optimizer's state belongs to the parameter whose key path its own ends with; of two that fit, to the
    one with the longer path.

    Args:
      f: makes the new leaf.
      tree: any state over parameters, or the parameters themselves.
      owners: what ``f`` is given of each parameter, by its key path.

    >>> params = {"w": 1.0}
    >>> owners = {key_path: "mine" for key_path, _ in jax.tree_util.tree_leaves_with_path(params)}
    >>> map_owned(lambda path, x, owner: (path, owner), {"mu": {"w": 0.0}, "count": 0}, owners)
    {'count': 0, 'mu': {'w': ('mu/w', 'mine')}}
    """

    def leaf(key_path: KeyPath, x: Leaf) -> Leaf:
        ends = (key_path[i:] for i in range(len(key_path) + 1))  # from the whole path on, so the longest comes first
        mine = next((end for end in ends if end in owners), None)
        return x if mine is None else f(path_str(key_path), x, owners[mine])

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _masks(state: State) -> dict[str, jax.Array]:
    """The masks of every :class:`MaskState` inside a state, by path."""
    inside = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MaskState))
    return {path: m for s in inside if isinstance(s, MaskState) for path, m in s.masks.items()}


def _grown(old: Mapping[str, jax.Array], new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise ValueError(
            f"reset_regrown: only one of the two states masks {odd[0]!r}; pass the states of one transform, before and"
            " after its update."
        )
    return {path: new[path] & ~old[path] for path in new}


def _zeroed(path: str, x: Leaf, grown: jax.Array | None) -> Leaf:
    """Zeros at the regrown entries of what has the parameter's shape."""
    if grown is None or getattr(x, "shape", None) != grown.shape:
        return x
    return jnp.where(grown, jnp.zeros((), x.dtype), x)


def dense_value_and_grad(
    transform: Transform, loss: Callable[..., PyTree], *, has_aux: bool = False
) -> Callable[..., tuple[PyTree, Params, Params]]:
    """A function ``(state, params, *args) -> (value, grads, dense)`` of one backward pass.

    With ``w(p) = materialize(transform.apply(state, p))``: ``value = loss(w(params), *args)``; ``dense = ∂loss/∂w``,
    the gradient of every weight that the loss sees, masked ones included; ``grads = (∂w/∂params)ᵀ dense``, what the
    optimizer wants, zero where masked, straight through where rounded.

    Args:
      transform: any transform.
      loss: of materialized parameters and further arguments.
      has_aux: whether ``loss`` gives ``(value, auxiliary)``; then so is ``value``.

    Raises:
      TypeError: when called, a leaf that is no array.

    >>> from jaxcomp.pruning import prune
    >>> t = prune(0.5)
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> value, grads, dense = dense_value_and_grad(t, lambda w: 3 * w["kernel"].sum())(t.init(params), params)
    >>> grads["kernel"].tolist(), dense["kernel"].tolist()
    ([[0.0, 3.0]], [[3.0, 3.0]])
    """

    def value_and_grads(state: State, params: Params, *args: PyTree) -> tuple[PyTree, Params, Params]:
        _check_arrays("dense_value_and_grad", params)
        seen, pull_back = jax.vjp(lambda p: materialize(transform.apply(state, p)), params)
        value, dense = jax.value_and_grad(loss, has_aux=has_aux)(seen, *args)
        (grads,) = pull_back(dense)
        return value, grads, dense

    return value_and_grads


def _check_arrays(owner: str, params: Params) -> None:
    """Raises TypeError where a leaf has no gradient, as an activation function in an Equinox module."""
    for path, leaf in leaves_with_paths(params)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise TypeError(
                f"{owner}: {path!r} is {leaf!r}, not an array; give the arrays alone, as optax and jax.grad want them:"
                " equinox.filter(module, equinox.is_inexact_array)."
            )


def _check_dense(params: Params) -> None:
    """Raises TypeError where a leaf is compressed already: the loop holds arrays, which the transform compresses."""
    for path, leaf in leaves_with_paths(params, is_leaf=is_compressed)[0]:
        if is_compressed(leaf):
            raise TypeError(
                f"wrap_optax: {path!r} is a compressed leaf, {type(leaf).__name__}; materialize the tree first:"
                " tx.init(jaxcomp.materialize(tree))."
            )


class WrapState(NamedTuple):
    """What :func:`wrap_optax` keeps: the step, the uncompressed parameters, both inner states."""

    step: jax.Array
    latent: Params
    transform: State
    optimizer: State


def wrap_optax(optimizer: optax.GradientTransformation, transform: Transform) -> optax.GradientTransformationExtraArgs:
    """Compression-aware training for a loop that must not change: after each update the params are compressed.

    The uncompressed (latent) parameters live in the optimizer's state. Each update takes the gradient at the compressed
    point straight through ``apply`` (so masks and clipped ranges cut it), steps the latent parameters, and moves the
    loop's parameters to the compressed latent ones. The statistics it offers to ``update`` are ``grads``, those of the
    compressed point, masked weights included. What ``regrow`` grows starts at zero, without moments.

    For saving, ``transform.apply(state.transform, state.latent)`` holds the compressed leaves. The loop holds the same
    bits after ``optax.apply_updates``: updates of float16 and bfloat16 parameters are float32, so that the sum rounds
    once. Of float32 parameters an entry that falls below half of what it was, or changes its sign, may be an ulp of the
    larger off for a step, for no float32 update leads to it; one step at the same place mends it.

    What optax passes on to an optimizer passes through: ``value``, ``loss``, or what else a step is called with, as it
    is; ``grad`` as the latent parameters' gradient; ``value_fn`` and ``obj_fn``, the losses that a line search and
    Sophia call, as functions of the latent parameters.

    With ``optax.MultiSteps`` outside, ``MultiSteps(wrap_optax(...), k)``, a step of ``transform`` is a step of the
    optimizer and its ``grads`` are the mean; inside, it is a call, one of k. ``optax.apply_if_finite`` may stand on
    either side; outside, float16 and bfloat16 parameters want float32 gradients.

    Args:
      optimizer: any optax transformation.
      transform: any transform.

    Raises:
      TypeError: optimizer and transform are swapped, or are none; at ``init``, a leaf that is no array.
      ValueError: ``update`` without params.

    >>> import jax, optax
    >>> from jaxcomp import prune
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> tx = wrap_optax(optax.sgd(0.1), prune(0.5))
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
    >>> optax.apply_updates(params, updates)["kernel"]
    Array([[0. , 0. ],
           [2.9, 3.9]], dtype=float32)
    """
    if isinstance(optimizer, Transform):
        raise TypeError("wrap_optax: the optimizer comes first; write wrap_optax(optimizer, transform).")
    checked_transform("wrap_optax", transform)
    inside = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> WrapState:
        _check_arrays("wrap_optax", params)
        _check_dense(params)
        latent = jax.tree.map(jnp.array, params)  # copies: a step may donate the parameters and this state
        return WrapState(jnp.zeros((), jnp.int32), latent, transform.init(params), optimizer.init(params))

    def update(
        grads: Params, state: WrapState, params: Params | None = None, **extra: PyTree
    ) -> tuple[Params, WrapState]:
        if params is None:
            raise ValueError("wrap_optax: update wants the parameters: tx.update(grads, state, params).")
        before = state.transform
        point = _Point.of(transform, before, state.latent)
        steps, inner = inside.update(point.pulled(grads), state.optimizer, state.latent, **point.passed(extra))
        # Barriers: fused, XLA reads products and sums before they are rounded to their type, and the loop does not.
        steps = jax.lax.optimization_barrier(steps)
        latent = jax.lax.optimization_barrier(optax.apply_updates(state.latent, steps))
        after = transform.update(before, latent, step=state.step, grads=grads)
        latent, inner = reset_regrown(before, after, latent, inner)
        target = jax.lax.optimization_barrier(materialize(transform.apply(after, latent)))
        moves = jax.tree.map(_move, target, params, steps)
        return moves, WrapState(optax.safe_increment(state.step), latent, after, inner)

    return optax.GradientTransformationExtraArgs(init, update)


class _Point(NamedTuple):
    """Where the loop took its gradient: what it sees of the latent parameters, there and how its gradients reach them.

    Fields:
      seen: latent parameters to those that the loop sees.
      value: what it sees now.
      pull_back: the transposed derivative of ``seen`` there.
    """

    seen: Callable[[Params], Params]
    value: Params
    pull_back: Callable[[Params], tuple[Params]]

    @staticmethod
    def of(transform: Transform, state: State, latent: Params) -> _Point:
        def seen(p: Params) -> Params:
            return materialize(transform.apply(state, p))

        return _Point(seen, *jax.vjp(seen, latent))

    def pulled(self, grads: Params) -> Params:
        """The latent parameters' gradient; a loop may hand gradients of a wider type than the parameters."""
        typed = jax.tree.map(lambda x, g: g if g.dtype == jax.dtypes.float0 else g.astype(x.dtype), self.value, grads)
        return self.pull_back(typed)[0]

    def passed(self, extra: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """What optax's optimizers are called with, by the names that optax gives it, for the latent parameters."""
        own = dict(extra)
        if own.get("grad") is not None:
            own["grad"] = self.pulled(own["grad"])
        for name in {"value_fn", "obj_fn"} & own.keys():
            own[name] = self._of_latent(own[name])
        return own

    def _of_latent(self, f: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return lambda latent, *args, **kwargs: f(self.seen(latent), *args, **kwargs)


def _move(new: jax.Array, old: jax.Array, step: jax.Array) -> jax.Array:
    """The update with which ``optax.apply_updates`` makes ``new`` of ``old``, of those tried the first that does.

    Tried are the optimizer's own, right where nothing is compressed; the difference, rounded once; and it with what the
    rounding of the sum lost.
    """
    if not is_float_array(old):
        return new - old
    wide = compute_dtype(old.dtype)
    there, here = new.astype(wide), old.astype(wide)
    plain = there - here
    better = plain + (there - (here + plain))
    own = step.astype(wide)

    def leads(move: jax.Array) -> jax.Array:
        return (here + move).astype(old.dtype) == new

    return jnp.where(leads(own), own, jnp.where(leads(plain), plain, better))
