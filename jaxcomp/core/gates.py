"""When: transforms that are updated at due steps only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.packed import unpacked
from jaxcomp.core.paths import is_float_array
from jaxcomp.core.records import named, recorded
from jaxcomp.core.specs import is_integer
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Leaf, Params, PyTree, State, Step
from jaxcomp.core.wrappers import Masked, Switch

Due = Callable[[jax.Array], jax.Array | np.bool_]
"""Says whether a step is due: a scalar integer step to a scalar boolean, jit-safe."""


@recorded
def every(period: int, *, start: int = 0, stop: int | None = None) -> Due:
    """Due at ``start``, ``start + period``, … up to, not including, ``stop``.

    Raises:
      ValueError: a period that is no integer of at least 1, or a stop that is not after the start.

    >>> due = every(100, start=200)
    >>> bool(due(jnp.int32(100))), bool(due(jnp.int32(300))), bool(due(jnp.int32(301)))
    (False, True, False)
    """
    if not is_integer(period) or period < 1:
        raise ValueError(f"every: the period must be an integer of at least 1, got {period!r}.")
    if stop is not None and stop <= start:
        raise ValueError(f"every: no step is due, for stop={stop} is not after start={start}; never says that.")

    def due(step: jax.Array) -> jax.Array:
        on = (step >= start) & ((step - start) % period == 0)
        return on if stop is None else on & (step < stop)

    return due


@partial(named, "never")
def never(step: Step) -> np.bool_:
    """Never due: what ``init`` found is kept, as ``when(regrow(0.9, key=key), never)`` keeps its random masks.

    >>> bool(never(0))
    False

    Args:
      step: of the training, a number or a scalar array.
    """
    return np.False_  # no array of jax's, which jit would trace: so inside jit, too, no update is compiled


@recorded
def when(transform: Transform, due: Due) -> Transform:
    """Says when: the transform is applied always, and updated at due steps only.

    Between due steps nothing of ``update`` is computed, and no statistics are asked for. The state is the transform's.

    Args:
      transform: what.
      due: when, such as :func:`every`, or :func:`never`.

    Raises:
      TypeError: no transform, or a ``due`` that is no function of the step.
      ValueError: at ``init``, where ``due`` does not give a scalar boolean.

    >>> from jaxcomp import prune
    >>> t = when(prune(0.5), every(10))
    >>> state = t.init({"kernel": jnp.array([[1.0, 2.0]])})
    >>> [t.update(state, {"kernel": jnp.array([[2.0, 1.0]])}, step=i)["kernel"].tolist() for i in (9, 10)]
    [[[False, True]], [[True, False]]]
    """
    checked_transform("when", transform)
    if not callable(due):
        raise TypeError(_no_due("when", due))

    def init(params: Params) -> State:
        _check_due("when", due)
        return transform.init(params)

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
        return cond(due(jnp.asarray(step)), lambda: transform.update(state, params, step=step, **stats), lambda: state)

    return Transform(init, update, transform.apply)


class GateState(NamedTuple):
    """Whether the gate has ever opened, and the state behind it."""

    opened: jax.Array
    inner: State


@recorded
def gate(transform: Transform, due: Due) -> Transform:
    """Says when: the transform sleeps until the first due step, and is updated at due steps only.

    While it sleeps, ``apply`` gives the parameters as they are; that is what it is more than :func:`when`.

    >>> from jaxcomp import every, prune
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> t = gate(prune(0.5), every(10))
    >>> state = t.init(params)
    >>> later = t.update(state, params, step=10)
    >>> [bool((t.apply(s, params)["kernel"].materialize() == 0).any()) for s in (state, later)]
    [False, True]

    Args:
      transform: what.
      due: when, such as :func:`every`.

    Raises:
      TypeError: no transform, or a ``due`` that is no function of the step.
      ValueError: at ``init``, where ``due`` does not give a scalar boolean.
    """
    checked_transform("gate", transform)
    if not callable(due):
        raise TypeError(_no_due("gate", due))

    def init(params: Params) -> GateState:
        _check_due("gate", due)
        return GateState(jnp.zeros((), bool), transform.init(params))

    def update(state: GateState, params: Params, *, step: Step, **stats: PyTree) -> GateState:
        now, inner = due(jnp.asarray(step)), state.inner
        updated = cond(now, lambda: transform.update(inner, params, step=step, **stats), lambda: inner)
        return GateState(state.opened | now, updated)

    def apply(state: GateState, params: Params) -> Params:
        return _switch(state.opened, transform.apply(state.inner, params), params)

    return Transform(init, update, apply)


@recorded
def once(transform: Transform) -> Transform:
    """Updates at the first ``update`` whose statistics are finite: what it finds in those is kept.

    Args:
      transform: what.

    >>> import jax.numpy as jnp
    >>> from jaxcomp import materialize, prune
    >>> t = once(prune(0.5, where=".*"))
    >>> first, later = {"w": jnp.array([[1.0, 9.0]])}, {"w": jnp.array([[9.0, 1.0]])}
    >>> state = t.update(t.init(first), first, step=0)
    >>> materialize(t.apply(t.update(state, later, step=1), later))
    {'w': Array([[0., 1.]], dtype=float32)}

    A step that loss scaling or ``optax.apply_if_finite`` skips has gradients that are not finite, and says nothing.
    """
    checked_transform("once", transform)

    def init(params: Params) -> GateState:
        return GateState(jnp.zeros((), bool), transform.init(params))

    def update(state: GateState, params: Params, *, step: Step, **stats: PyTree) -> GateState:
        first, inner = ~state.opened, state.inner
        updated = cond(first, lambda: transform.update(inner, params, step=step, **stats), lambda: inner)
        return GateState(state.opened | all_finite(stats), updated)

    return Transform(init, update, lambda state, params: transform.apply(state.inner, params))


def cond(chosen: jax.Array | np.bool_, then: Callable[[], State], otherwise: Callable[[], State]) -> State:
    """``lax.cond`` over states; where the choice is known, as outside jit, only that branch is run."""
    if isinstance(chosen, jax.core.Tracer):
        return jax.lax.cond(chosen, then, otherwise)
    return then() if chosen else otherwise()


def all_finite(stats: PyTree) -> jax.Array | np.bool_:
    """Whether no floating array of the tree holds NaN or infinity; known without computing where there is none.

    >>> bool(all_finite({"grads": jnp.array([1.0, jnp.inf])})), bool(all_finite({}))
    (False, True)
    """
    arrays = [x for x in jax.tree.leaves(stats) if is_float_array(x)]
    return reduce(jnp.logical_and, (jnp.all(jnp.isfinite(x)) for x in arrays)) if arrays else np.True_


def _no_due(owner: str, due: object) -> str:
    mend = f"every({due})" if is_integer(due) else "every(100)"
    return f"{owner}: due must be a function of the step, got {due!r}; write {owner}(transform, {mend})."


def _check_due(owner: str, due: Due) -> None:
    out = jax.eval_shape(due, jax.ShapeDtypeStruct((), jnp.int32))
    if getattr(out, "shape", None) != () or getattr(out, "dtype", None) != jnp.bool_:
        raise ValueError(f"{owner}: due(step) must be a scalar boolean, got {out}; see every().")


def _switch(active: jax.Array, on: Params, off: Params) -> Params:
    """``on`` where active, else ``off``; a mask stays open to later transforms, any other change is closed."""

    def leaf(new: Leaf, old: Leaf) -> Leaf:
        if new is old:
            return new
        if isinstance(new, Masked) and not is_compressed(new.values):
            old_mask = unpacked(old.mask) if isinstance(old, Masked) else jnp.ones((), bool)
            values = jnp.where(active, new.values, old.values if isinstance(old, Masked) else old)
            return replace(new, values=values, mask=jnp.where(active, unpacked(new.mask), old_mask))
        return Switch(active, new, old)

    return jax.tree.map(leaf, on, off, is_leaf=is_compressed)
