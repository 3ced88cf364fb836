"""``distilled``: a student's loss against a frozen teacher, a sum of terms over results and captured values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import materialize
from jaxcomp.core.paths import is_float_array, key_of_leaf, some_paths
from jaxcomp.core.specs import check_key
from jaxcomp.core.types import DType, Key, Params, PyTree
from jaxcomp.distill.capture import Captured, capture
from jaxcomp.trace.walk import Fn

OWNER = "distilled"
Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""Of the student's value and the teacher's: any loss of this room, or one of yours."""


@dataclass(frozen=True)
class Match:
    """Something of the student that should be as it is of the teacher.

    Args:
      loss: of the student's value and the teacher's.
      at: the student's value, by its name in :func:`~jaxcomp.distill.capture.capture`; None is what the function gives.
      of: the teacher's; None is the same name.
      weight: of this term in the sum.
      projected: the last axis of the student's value goes through a trained matrix first, to the teacher's width.
      layer, of_layer: of a value that a scan over layers stacked, which layer; None is the value as it is.
    """

    loss: Loss
    at: str | None = None
    of: str | None = None
    weight: float = 1.0
    projected: bool = False
    layer: int | None = None
    of_layer: int | None = None

    @property
    def theirs(self) -> str | None:
        """The teacher's name."""
        return self.at if self.of is None else self.of


class Taught(NamedTuple):
    """What the student gave, the weighted sum of the terms, and each term before its weight, by name."""

    out: PyTree
    loss: jax.Array
    parts: dict[str, jax.Array]


class Distilled(NamedTuple):
    """A loss with a teacher.

    Fields:
      init: ``init(key, params, known, *args)``: the matrices of the projected terms by name, to be trained with the
        parameters; empty where nothing is projected. Nothing of the networks is computed.
      loss: ``loss(params, known, *args, projections={})``, a :class:`Taught`. ``known`` are the teacher's parameters.
    """

    init: Callable[..., dict[str, jax.Array]]
    loss: Callable[..., Taught]


def distilled(
    student: Fn,
    teacher: Fn,
    terms: Mapping[str, Match],
    *,
    logits: Callable[[PyTree], jax.Array] = lambda out: out,
    dtype: DType | None = None,
) -> Distilled:
    """The loss of a student that learns from a teacher, without labels; add the labels' own to it.

    Both see the same arguments. The teacher is frozen: no gradient reaches it, and its parameters are an argument, so
    that they are no constants of a compiled step. They may be compressed leaves, an int8 or int4 teacher in a quarter
    or an eighth of the memory.

    Args:
      student, teacher: pure functions ``fn(params, *args)``; compressed leaves are materialized for them.
      terms: what should agree, by names of your choice.
      logits: what of a function's result a term without ``at`` compares; the result itself by default.
      dtype: the floats of the teacher's parameters and arguments are cast to it, ``jnp.bfloat16`` say.

    Raises:
      ValueError: no term. Of the loss: a name that the program has not, a projection that is missing or foreign, a
        layer that is not there, and what the losses raise.

    >>> from functools import partial
    >>> from jaxcomp.distill import hint, soft_targets
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.eye(2), "down": jnp.eye(2)}
    >>> known = {"up": jnp.ones((2, 5)), "down": jnp.ones((5, 2))}
    >>> taught = distilled(fn, fn, {
    ...     "soft": Match(partial(soft_targets, temperature=2.0)),
    ...     "hidden": Match(hint, at="down:in", weight=0.5, projected=True)})
    >>> x = jnp.array([[0.3, -0.2]])
    >>> projections = taught.init(jax.random.key(0), params, known, x)
    >>> found = taught.loss(params, known, x, projections=projections)
    >>> {name: m.shape for name, m in projections.items()}, sorted(found.parts)
    ({'hidden': (2, 5)}, ['hidden', 'soft'])

    Source: Hinton et al. 2015, arXiv:1503.02531; trained projections as in Romero et al. 2014, arXiv:1412.6550.
    """
    if not terms:
        raise ValueError(f"{OWNER}: there is no term; give one, such as {{'soft': Match(soft_targets)}}.")
    ours = _captured(student, [m.at for m in terms.values()])
    theirs = _captured(teacher, [m.theirs for m in terms.values()])
    pair = _Pair(dict(terms), ours, theirs, logits, dtype)
    return Distilled(pair.init, pair.loss)


class _Pair(NamedTuple):
    """A student and its teacher with what the terms name captured; see :func:`distilled`."""

    terms: Mapping[str, Match]
    ours: Callable[..., Captured]
    theirs: Callable[..., Captured]
    logits: Callable[[PyTree], jax.Array]
    dtype: DType | None

    def init(self, key: Key, params: Params, known: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        check_key(OWNER, key)
        mine = jax.eval_shape(lambda p: self.ours(p, *args, **kwargs), params)
        other = jax.eval_shape(lambda p: self.of_teacher(p, args, kwargs), known)
        made = {}
        for name, m in self.terms.items():
            if m.projected:
                inner, outer = (
                    _value(found, at, None, self.logits).shape[-1] for found, at in ((mine, m.at), (other, m.theirs))
                )
                made[name] = jax.random.normal(key_of_leaf(key, name), (inner, outer)) * inner**-0.5
        return made

    def loss(
        self,
        params: Params,
        known: Params,
        *args: PyTree,
        projections: Mapping[str, jax.Array] | None = None,
        **kwargs: PyTree,
    ) -> Taught:
        matrices = _checked(self.terms, projections or {})
        mine, other = self.ours(params, *args, **kwargs), self.of_teacher(known, args, kwargs)
        parts = {}
        for name, m in self.terms.items():
            value = _value(mine, m.at, m.layer, self.logits)
            if m.projected:
                value = _projected(value, matrices[name])
            parts[name] = m.loss(value, _value(other, m.theirs, m.of_layer, self.logits))
        total = sum((m.weight * parts[name] for name, m in self.terms.items()), jnp.float32(0))
        return Taught(mine.out, total, parts)

    def of_teacher(self, known: Params, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]) -> Captured:
        """What the frozen teacher gives, in its own type."""
        known, args, kwargs = jax.lax.stop_gradient(_in_type((materialize(known), args, kwargs), self.dtype))
        found: Captured = jax.lax.stop_gradient(self.theirs(known, *args, **kwargs))
        return found


def _captured(fn: Fn, names: list[str | None]) -> Callable[..., Captured]:
    """``fn`` with what the terms name; without a name it runs as it is."""
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    if wanted:
        return capture(fn, wanted)
    return lambda params, *args, **kwargs: Captured(fn(materialize(params), *args, **kwargs), {})


def _value(found: Captured, name: str | None, layer: int | None, logits: Callable[[PyTree], jax.Array]) -> jax.Array:
    value = logits(found.out) if name is None else found.values[name]
    if not hasattr(value, "shape"):
        raise ValueError(
            f"{OWNER}: the function gives {type(value).__name__}, which is no array; say by logits= what of it counts."
        )
    if layer is None:
        return value
    if not -value.shape[0] <= layer < value.shape[0]:
        raise ValueError(f"{OWNER}: {name!r} has {value.shape[0]} in front, and there is no layer {layer}.")
    return value[layer]


def _projected(value: jax.Array, matrix: jax.Array) -> jax.Array:
    wide = jnp.promote_types(value.dtype, matrix.dtype)
    return jnp.matmul(value.astype(wide), matrix.astype(wide))


def _checked(terms: Mapping[str, Match], given: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    wanted = {name for name, m in terms.items() if m.projected}
    if wanted != set(given):
        raise ValueError(
            f"{OWNER}: projections are wanted for {some_paths(sorted(wanted)) or 'no term'}, got"
            f" {some_paths(sorted(given)) or 'none'}; pass projections=, what init gave or training made of it."
        )
    return given


def _in_type(tree: PyTree, dtype: DType | None) -> PyTree:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: cast(jax.Array, x).astype(dtype) if is_float_array(x) else x, tree)
