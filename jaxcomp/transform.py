"""Transforms of parameters: the abstraction, and how transforms compose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxcomp.leaves import Masked, Switch, is_compressed, materialize, unpacked
from jaxcomp.paths import Where, describe, leaves_with_paths, matches, some_paths
from jaxcomp.resets import reset_regrown
from jaxcomp.structures import is_integer

Params = Any
State = Any
Due = Callable[[jax.Array], jax.Array]
"""Says whether a step is due: a scalar integer step to a scalar boolean, jit-safe."""


class UpdateFn(Protocol):
    """``update(state, params, *, step, **stats)``: the next state."""

    def __call__(self, state: State, params: Params, *, step: Any, **stats: Any) -> State:  # noqa: D102
        ...


class Transform(NamedTuple):
    """A compression of parameters, as three pure functions.

    Fields:
      init: ``init(params) -> state``. The state is already valid: ``apply`` works at step 0.
      update: ``update(state, params, *, step, **stats) -> state``. Safe inside jit; the step is an argument, never a
        hidden counter; statistics (such as ``grads=``) are trees like the parameters.
      apply: ``apply(state, params) -> params``. What the forward pass sees: differentiable, used inside the loss. It
        may put compressed leaves where arrays were; ``materialize`` turns them back.

    >>> from jaxcomp import Int, chain, materialize, prune, quantize
    >>> params = {"kernel": jnp.array([[0.1, -0.9], [0.5, 0.2]]), "bias": jnp.zeros(2)}
    >>> compress = chain(prune(0.5), quantize(Int(4)))
    >>> state = compress.init(params)
    >>> materialize(compress.apply(state, params))["kernel"].round(2)
    Array([[ 0.  , -0.84],
           [ 0.47,  0.  ]], dtype=float32)
    """

    init: Callable[[Params], State]
    update: UpdateFn
    apply: Callable[[State, Params], Params]


def stateless(apply: Callable[[Params], Params]) -> Transform:
    """A transform without a state; ``init`` runs ``apply`` on shapes alone, so that a misfit is found at once."""

    def init(params: Params) -> State:
        jax.eval_shape(lambda: apply(params))
        return ()

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        return state

    return Transform(init, update, lambda state, params: apply(params))


def identity() -> Transform:
    """Leaves everything as it is."""
    return stateless(lambda params: params)


def chain(*transforms: Transform) -> Transform:
    """Applies transforms from left to right; each sees what the ones before it made.

    Its state is a tuple of theirs.
    """

    def init(params: Params) -> State:
        states = []
        for t in transforms:
            states.append(t.init(params))
            params = t.apply(states[-1], params)
        return tuple(states)

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        states = []
        for t, s in zip(transforms, state, strict=True):
            states.append(t.update(s, params, step=step, **stats))
            params = t.apply(states[-1], params)
        return tuple(states)

    def apply(state: State, params: Params) -> Params:
        for t, s in zip(transforms, state, strict=True):
            params = t.apply(s, params)
        return params

    return Transform(init, update, apply)


def by_path(table: Mapping[Where, Transform]) -> Transform:
    """Gives each leaf to the first rule of an ordered table that matches it; leaves that none matches stay as they are.

    A rule's transform sees its leaves alone, as a flat dict by path: so a global scope is global over the rule. Its own
    ``where`` holds too.

    Args:
      table: rule (regular expression over the whole path, or predicate) to transform, in order.

    Raises:
      ValueError: at ``init``, a rule that no leaf is left for.
    """
    rules = list(table.items())

    def split(params: Params) -> tuple[list[dict[str, Any]], list[tuple[str, Any]], Any]:
        named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
        parts: list[dict[str, Any]] = [{} for _ in rules]
        for path, leaf in named:
            first = next((i for i, (where, _) in enumerate(rules) if matches(where, path, leaf)), None)
            if first is not None:
                parts[first][path] = leaf
        for (where, _), part in zip(rules, parts, strict=True):
            if not part:
                raise ValueError(
                    f"by_path: rule {describe(where)} matches nothing that an earlier rule did not take; the paths are"
                    f" {some_paths(p for p, _ in named)}."
                )
        return parts, named, treedef

    def init(params: Params) -> State:
        parts, _, _ = split(params)
        return tuple(t.init(part) for (_, t), part in zip(rules, parts, strict=True))

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        parts, _, _ = split(params)
        every = zip(rules, state, parts, strict=True)
        return tuple(t.update(s, part, step=step, **stats) for (_, t), s, part in every)

    def apply(state: State, params: Params) -> Params:
        parts, named, treedef = split(params)
        new: dict[str, Any] = {}
        for (_, t), s, part in zip(rules, state, parts, strict=True):
            new |= t.apply(s, part)
        return treedef.unflatten([new.get(path, leaf) for path, leaf in named])

    return Transform(init, update, apply)


def every(period: int, *, start: int = 0, stop: int | None = None) -> Due:
    """Due at ``start``, ``start + period``, … up to, not including, ``stop``.

    >>> due = every(100, start=200)
    >>> bool(due(jnp.int32(100))), bool(due(jnp.int32(300))), bool(due(jnp.int32(301)))
    (False, True, False)
    """
    if not is_integer(period) or period < 1:
        raise ValueError(f"every: the period must be an integer of at least 1, got {period!r}.")

    def due(step: jax.Array) -> jax.Array:
        on = (step >= start) & ((step - start) % period == 0)
        return on if stop is None else on & (step < stop)

    return due


class GateState(NamedTuple):
    """Whether the gate has ever opened, and the state behind it."""

    opened: jax.Array
    inner: State


def gate(transform: Transform, due: Due) -> Transform:
    """Says when: the transform sleeps until the first due step, and is updated at due steps only.

    While it sleeps, ``apply`` gives the parameters as they are. Between due steps nothing of ``update`` is computed.

    Args:
      transform: what.
      due: when, such as :func:`every`.

    Raises:
      ValueError: at ``init``, where ``due`` does not give a scalar boolean.
    """

    def init(params: Params) -> State:
        out = jax.eval_shape(due, jax.ShapeDtypeStruct((), jnp.int32))
        if getattr(out, "shape", None) != () or getattr(out, "dtype", None) != jnp.bool_:
            raise ValueError(f"gate: due(step) must be a scalar boolean, got {out}; see every().")
        return GateState(jnp.zeros((), bool), transform.init(params))

    def update(state: GateState, params: Params, *, step: Any, **stats: Any) -> State:
        def now() -> GateState:
            return GateState(jnp.ones((), bool), transform.update(state.inner, params, step=step, **stats))

        return cond(due(jnp.asarray(step)), now, lambda: state)

    def apply(state: GateState, params: Params) -> Params:
        return _switch(state.opened, transform.apply(state.inner, params), params)

    return Transform(init, update, apply)


def once(transform: Transform) -> Transform:
    """Updates at the first ``update`` only: what it finds in the statistics of that step is kept."""

    def init(params: Params) -> State:
        return GateState(jnp.zeros((), bool), transform.init(params))

    def update(state: GateState, params: Params, *, step: Any, **stats: Any) -> State:
        def now() -> GateState:
            return GateState(jnp.ones((), bool), transform.update(state.inner, params, step=step, **stats))

        return cond(state.opened, lambda: state, now)

    return Transform(init, update, lambda state, params: transform.apply(state.inner, params))


def cond(chosen: jax.Array, then: Callable[[], State], otherwise: Callable[[], State]) -> State:
    """``lax.cond`` over states; outside jit the choice is known, and only that branch is run."""
    if isinstance(chosen, jax.core.Tracer):
        return jax.lax.cond(chosen, then, otherwise)
    return then() if chosen else otherwise()


def _switch(active: jax.Array, on: Params, off: Params) -> Params:
    """``on`` where active, else ``off``; a mask stays open to later transforms, any other change is closed."""

    def leaf(new: Any, old: Any) -> Any:
        if new is old:
            return new
        if isinstance(new, Masked) and not is_compressed(new.values):
            old_mask = unpacked(old.mask) if isinstance(old, Masked) else jnp.ones((), bool)
            values = jnp.where(active, new.values, old.values if isinstance(old, Masked) else old)
            return replace(new, values=values, mask=jnp.where(active, unpacked(new.mask), old_mask))
        return Switch(active, new, old)

    return jax.tree.map(leaf, on, off, is_leaf=is_compressed)


class WrapState(NamedTuple):
    """What :func:`wrap_optax` keeps: the step, the uncompressed parameters, both inner states."""

    step: jax.Array
    latent: Params
    transform: State
    optimizer: Any


def wrap_optax(optimizer: optax.GradientTransformation, transform: Transform) -> optax.GradientTransformation:
    """Compression-aware training for a loop that must not change: after each update the params are compressed.

    The uncompressed (latent) parameters live in the optimizer's state. Each update takes the gradient at the compressed
    point straight through ``apply`` (so masks and clipped ranges cut it), steps the latent parameters, and moves the
    loop's parameters to the compressed latent ones. The statistics it offers to ``update`` are ``grads``, those of the
    compressed point, masked weights included. What ``regrow`` grows starts at zero, without moments. For saving,
    ``transform.apply(state.transform, state.latent)`` holds the compressed leaves.

    Args:
      optimizer: any optax transformation.
      transform: any transform.

    Raises:
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

    def init(params: Params) -> WrapState:
        latent = jax.tree.map(jnp.array, params)  # copies: a step may donate the parameters and this state
        return WrapState(jnp.zeros((), jnp.int32), latent, transform.init(params), optimizer.init(params))

    def update(grads: Any, state: WrapState, params: Params | None = None) -> tuple[Any, WrapState]:
        if params is None:
            raise ValueError("wrap_optax: update wants the parameters: tx.update(grads, state, params).")
        compressed = state.transform
        _, pull_back = jax.vjp(lambda p: materialize(transform.apply(compressed, p)), state.latent)
        (latent_grads,) = pull_back(grads)
        updates, inner = optimizer.update(latent_grads, state.optimizer, state.latent)
        latent = optax.apply_updates(state.latent, updates)
        before, compressed = compressed, transform.update(compressed, latent, step=state.step, grads=grads)
        latent, inner = reset_regrown(before, compressed, latent, inner)
        target = materialize(transform.apply(compressed, latent))
        moves = jax.tree.map(lambda new, old: new - old, target, params)
        return moves, WrapState(state.step + 1, latent, compressed, inner)

    return optax.GradientTransformation(init, update)
