"""What an update unmasks starts at zero: dense phases go on from the sparse weights."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.optimizers import MaskState
from jaxcomp.core.packed import unpacked
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.records import recorded
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Params, PyTree, State, Step
from jaxcomp.core.wrappers import Masked


class FromZero(NamedTuple):
    """What is unmasked, and the state behind it."""

    masks: MaskState
    inner: State


@recorded
def from_zero(transform: Transform) -> Transform:
    """What an update of ``transform`` unmasks starts at zero, without moments, instead of from where it was masked.

    It keeps the masks that ``transform`` puts on whole parameters; :func:`~jaxcomp.core.optimizers.reset_regrown` after
    each ``update``, or ``wrap_optax``, does the rest.

    Args:
      transform: one that masks and may unmask, such as a pruning plan or a chain with one.

    Raises:
      TypeError: no transform.
      ValueError: at ``init``, it masks no parameter.

    AC/DC, whose dense phases go on from the sparse weights:

    >>> import optax
    >>> from jaxcomp.pruning.transform import prune
    >>> from jaxcomp.pruning.schedules import alternating
    >>> from jaxcomp.core.optimizers import wrap_optax
    >>> plan = alternating(0.5, dense=1, sparse=1)
    >>> tx = wrap_optax(optax.sgd(0.1), from_zero(plan.gate(prune(plan))))
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> state, seen = tx.init(params), []
    >>> for step in range(4):
    ...     updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     seen += params["kernel"].tolist()
    >>> seen
    [[1.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]

    Source: Peste et al. 2021 (AC/DC), arXiv:2106.12379, section 3.
    """
    checked_transform("from_zero", transform)

    def seen(inner: State, params: Params) -> FromZero:
        named, _ = leaves_with_paths(transform.apply(inner, params), is_leaf=is_compressed)
        masks = {p: jnp.broadcast_to(unpacked(x.mask), x.shape) for p, x in named if isinstance(x, Masked)}
        return FromZero(MaskState(masks), inner)

    def init(params: Params) -> FromZero:
        state = seen(transform.init(params), params)
        if not state.masks.masks:
            raise ValueError("from_zero: the transform masks no parameter; give it a prune, or a chain with one.")
        return state

    def update(state: FromZero, params: Params, *, step: Step, **stats: PyTree) -> FromZero:
        return seen(transform.update(state.inner, params, step=step, **stats), params)

    return Transform(init, update, lambda state, params: transform.apply(state.inner, params))
