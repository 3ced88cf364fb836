"""Transforms of parameters: the abstraction, and how transforms compose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import NamedTuple, Protocol

import jax

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where, describe, first_matches, leaves_with_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.plain import Plain, from_plain, to_plain
from jaxcomp.core.records import MAKERS, again, made_of, portable, recorded, text_of
from jaxcomp.core.specs import Spec
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

    def __new__(  # noqa: D102
        cls, init: Callable[[Params], State], update: UpdateFn, apply: Callable[[State, Params], Params]
    ) -> Transform:
        return super().__new__(cls, on_any_mesh(init), _explained("update", update), _explained("apply", apply))

    def __repr__(self) -> str:
        if made_of(self) is not None:
            return text_of(self)
        return f"Transform({', '.join(f'{name}={text_of(fn)}' for name, fn in self._asdict().items())})"

    def __reduce__(self) -> tuple[object, ...]:
        if made_of(self) is not None:
            return again, (portable(self),)
        return Transform, tuple(inspect.unwrap(fn) for fn in self)

    def to_plain(self) -> Plain:
        """The transform as nested lists and dicts that JSON holds, for the config of a run.

        Raises:
          TypeError: it holds a function of one's own; the message says where and the mend.

        >>> from jaxcomp import prune
        >>> prune(0.5).to_plain()
        {'prune': {'sparsity': 0.5}}
        """
        if made_of(self) is None:
            raise TypeError(
                f"to_plain: {self!r} was made of functions; make it in a function that jaxcomp.core.recorded decorates."
            )
        return to_plain(self)

    @staticmethod
    def from_plain(data: Plain) -> Transform:
        """The inverse of :meth:`to_plain`.

        Raises:
          ValueError: a name that is not known here, or data that :meth:`to_plain` did not write.
          TypeError: arguments that a constructor does not take, or no transform.

        >>> Transform.from_plain({"chain": {"transforms": [{"prune": {"sparsity": 0.5}}, {"identity": {}}]}})
        chain(prune(0.5), identity())
        """
        return checked_transform("from_plain", from_plain(data))


def _explained(name: str, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``update`` or ``apply`` on any mesh, whose errors say it where the step is missing, or state and params swapped.

    A state is whatever pytree a transform makes, so only the transform itself tells one from parameters: where a call
    failed and the other order runs, on shapes, that is what was meant.
    """
    run = on_any_mesh(fn)

    @wraps(fn)
    def explained(state: State, params: Params, *more: Step, **stats: PyTree) -> PyTree:
        if more or (name == "update" and "step" not in stats):
            wanted = "(state, params, step=i)" if name == "update" else "(state, params)"
            found = f"{len(more)} more by place" if more else "no step"
            raise TypeError(f"{name}: wants {name}{wanted}, got {found}; the step is named, and counted by you.")
        try:
            return run(state, params, **stats)
        except Exception as e:
            if jax.tree.leaves(state) and _runs(lambda: run(params, state, **stats)):
                raise TypeError(f"{name}: state and parameters are swapped; write {name}(state, params).") from e
            raise

    return explained


def _runs(f: Callable[[], PyTree]) -> bool:
    def run() -> None:  # its result may hold functions
        f()

    try:
        jax.eval_shape(run)
    except Exception:
        return False
    return True


def checked_transform(owner: str, value: object) -> Transform:
    """``value`` itself.

    Raises:
      TypeError: it is no transform; the message says how to make one of it.
    """
    if isinstance(value, Transform):
        return value
    found = f"{owner}: {text_of(value)} is no transform"
    if isinstance(value, list | tuple) and any(isinstance(t, Transform) for t in value):
        raise TypeError(f"{owner}: wants transforms, got a {type(value).__name__} of them; write chain(a, b).")
    if callable(value) and getattr(value, "__name__", "") in MAKERS:
        raise TypeError(f"{found} but makes one; call it, as in {text_of(value)}({_HINTS.get(text_of(value), '...')}).")
    if isinstance(value, Spec) and value.goes_into:
        raise TypeError(f"{found} but goes into one; write {value.goes_into}({text_of(value)}).")
    if hasattr(value, "init") and hasattr(value, "update"):
        raise TypeError(f"{found} but an optimizer; write wrap_optax(optimizer, transform).")
    raise TypeError(f"{found}; give one such as prune(0.5).")


_HINTS = {"prune": "0.5", "quantize": "Int(8)", "share": "16", "low_rank": "8"}


@recorded
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
        _check_none(state)
        return state

    def applied(state: State, params: Params) -> Params:
        _check_none(state)
        return apply(params)

    return Transform(init, update, applied)


def _check_none(state: State) -> None:
    if jax.tree.leaves(state):
        raise ValueError(f"the transform has no state, which is (), got one of {len(jax.tree.leaves(state))} arrays.")


@recorded
def identity() -> Transform:
    """Leaves everything as it is.

    >>> params = {"kernel": jax.numpy.ones(2)}
    >>> identity().apply((), params) is params
    True
    """
    return stateless(lambda params: params)


@recorded
def chain(*transforms: Transform) -> Transform:
    """Applies transforms from left to right; each sees what the ones before it made.

    Its state is a tuple of theirs.

    Raises:
      TypeError: one that is no transform.

    >>> from jaxcomp import Int, prune, quantize
    >>> chain(prune(0.5), quantize(Int(4)))
    chain(prune(0.5), quantize(Int(4)))
    """
    for t in transforms:
        checked_transform("chain", t)

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


@recorded
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
      TypeError: no table, or one of something else than transforms.
      ValueError: at ``init``, a rule that no leaf is left for.
    """
    if not isinstance(table, Mapping):
        raise TypeError(
            f"by_path: wants a table of rule to transform, as in {{'.*': prune(0.5)}}, got {text_of(table)}."
        )
    for rule, t in table.items():
        checked_transform(f"by_path: rule {describe(rule)}", t)
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
