"""Transforms of parameters: the abstraction, and how transforms compose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where, first_matches, leaves_with_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Leaf, Params, PyTree, State, Step


class UpdateFn(Protocol):
    """``update(state, params, *, step, **stats)``: the next state."""

    def __call__(self, state: State, params: Params, *, step: Step, **stats: PyTree) -> State:  # noqa: D102
        ...


class _Functions(NamedTuple):
    init: Callable[[Params], State]
    update: UpdateFn
    apply: Callable[[State, Params], Params]


class Transform(_Functions):
    """A compression of parameters, as three pure functions.

    They run on meshes of every kind: on Explicit axes, masks, codes and scales are laid out as their parameter is.

    Fields:
      init: ``init(params) -> state``. The state is already valid: ``apply`` works at step 0.
      update: ``update(state, params, *, step, **stats) -> state``. Safe inside jit; the step is an argument, never a
        hidden counter; statistics (such as ``grads=``) are trees like the parameters.
      apply: ``apply(state, params) -> params``. What the forward pass sees: differentiable, used inside the loss. It
        may put compressed leaves where arrays were; ``materialize`` turns them back.

    >>> import jax.numpy as jnp
    >>> from jaxcomp import Int, chain, materialize, prune, quantize
    >>> params = {"kernel": jnp.array([[0.1, -0.9], [0.5, 0.2]]), "bias": jnp.zeros(2)}
    >>> compress = chain(prune(0.5), quantize(Int(4)))
    >>> state = compress.init(params)
    >>> materialize(compress.apply(state, params))["kernel"].round(2)
    Array([[ 0.  , -0.84],
           [ 0.47,  0.  ]], dtype=float32)
    """

    __slots__ = ()

    def __new__(  # noqa: D102
        cls, init: Callable[[Params], State], update: UpdateFn, apply: Callable[[State, Params], Params]
    ) -> Transform:
        return super().__new__(cls, on_any_mesh(init), on_any_mesh(update), on_any_mesh(apply))


def stateless(apply: Callable[[Params], Params]) -> Transform:
    """A transform without a state; ``init`` runs ``apply`` on shapes alone, so that a misfit is found at once.

    Args:
      apply: from the parameters to what the forward pass sees.

    >>> halved = stateless(lambda params: jax.tree.map(lambda w: w / 2, params))
    >>> halved.apply(halved.init({"w": jax.numpy.ones(2)}), {"w": jax.numpy.ones(2)})
    {'w': Array([0.5, 0.5], dtype=float32)}
    """

    def init(params: Params) -> State:
        def run() -> None:  # its result may hold functions, as an Equinox module does, which no jit gives back
            apply(params)

        jax.eval_shape(run)
        return ()

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
        return state

    return Transform(init, update, lambda state, params: apply(params))


def identity() -> Transform:
    """Leaves everything as it is.

    >>> params = {"kernel": jax.numpy.ones(2)}
    >>> identity().apply((), params) is params
    True
    """
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

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
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

    >>> import jax.numpy as jnp
    >>> from jaxcomp import Int, prune, quantize
    >>> params = {"body": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    >>> t = by_path({"head/.*": identity(), ".*kernel": quantize(Int(4))})
    >>> seen = t.apply(t.init(params), params)
    >>> type(seen["body"]["kernel"]).__name__, seen["head"]["kernel"] is params["head"]["kernel"]
    ('Quantized', True)

    Args:
      table: rule (regular expression over the whole path, or predicate) to transform, in order.

    Raises:
      ValueError: at ``init``, a rule that no leaf is left for.
    """
    rules, transforms = list(table), list(table.values())

    def split(params: Params) -> tuple[list[dict[str, Leaf]], list[tuple[str, Leaf]], jax.tree_util.PyTreeDef]:
        named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
        parts: list[dict[str, Leaf]] = [{} for _ in rules]
        for (path, leaf), first in zip(named, first_matches(rules, named, owner="by_path"), strict=True):
            if first is not None:
                parts[first][path] = leaf
        return parts, named, treedef

    def init(params: Params) -> State:
        return tuple(t.init(part) for t, part in zip(transforms, split(params)[0], strict=True))

    def update(state: State, params: Params, *, step: Step, **stats: PyTree) -> State:
        parts = zip(transforms, state, split(params)[0], strict=True)
        return tuple(t.update(s, part, step=step, **stats) for t, s, part in parts)

    def apply(state: State, params: Params) -> Params:
        parts, named, treedef = split(params)
        new: dict[str, Leaf] = {}
        for t, s, part in zip(transforms, state, parts, strict=True):
            new |= t.apply(s, part)
        return treedef.unflatten([new.get(path, leaf) for path, leaf in named])

    return Transform(init, update, apply)
