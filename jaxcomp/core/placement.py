"""Functions of trees on meshes with Explicit axes: they run under Auto axes, and their results keep the inputs' layout.

On Explicit axes a sharding is part of an array's type, and an operation whose result could lie in several ways (a
reshape that merges a sharded axis, a sort along one, a product that sums over one) is an error unless its writer says
how. :func:`on_any_mesh` runs a function with the axes made Auto, so that the compiler places what is in between, and
gives its results an explicit layout again. Without Explicit axes it calls the function, and that is all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax

from jaxcomp.core.meshes import Axes, axes_of, concrete_mesh, explicit_mesh, here, is_explicit, lay, with_auto_axes
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import path_str
from jaxcomp.core.types import Shape

P = ParamSpec("P")
R = TypeVar("R")


class Laid(NamedTuple):
    """How an array lies: the steps of its path in a tree, its shape, and the mesh axes of each of its own."""

    path: tuple[str, ...]
    shape: Shape
    axes: Axes


def on_any_mesh(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn``, of trees of arrays, on meshes of every kind.

    Where an argument holds an array on Explicit axes, ``fn`` runs with these axes Auto, and each array of its result is
    laid out as the arguments at its path (see :func:`layout`). What ``fn`` hands through stays the same object.

    >>> on_any_mesh(lambda x: x.reshape(-1))(jax.numpy.ones((2, 3))).shape
    (6,)
    """

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = explicit_mesh(jax.tree.leaves((args, kwargs)))
        if mesh is None:
            return fn(*args, **kwargs)
        named, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        originals: dict[int, object] = {}
        with jax.sharding.use_abstract_mesh(with_auto_axes(mesh)):
            hidden = [here(x) for _, x in named]
            originals = {id(h): x for h, (_, x) in zip(hidden, named, strict=True)}
            new_args, new_kwargs = jax.tree.unflatten(treedef, hidden)
            out = fn(*new_args, **new_kwargs)
        near = Near([Laid(steps_of(path[2:]), x.shape, axes_of(x)) for path, x in named if is_explicit(x)])
        on = concrete_mesh(x for _, x in named) or mesh

        def placed(path: jax.tree_util.KeyPath, x: object) -> object:
            if isinstance(x, Packed):
                own = cast(jax.Array, originals.get(id(x.data), x.data))
                axes = in_a_row(x, near.layout(steps_of(path), x.shape), on.shape)
                return replace(x, data=lay(own, on, axes) if own is x.data else own)
            if id(x) in originals or not isinstance(x, jax.Array):
                return originals.get(id(x), x)
            return lay(x, on, near.layout(steps_of(path), x.shape))

        return cast(R, jax.tree_util.tree_map_with_path(placed, out, is_leaf=lambda x: isinstance(x, Packed)))

    return run


def layout(path: tuple[str, ...], shape: Shape, given: Sequence[Laid]) -> Axes:
    """The mesh axes of a new array, by those of the arrays that it came from.

    One at its own path and of its shape is its model. Or else each axis takes the mesh axes of the axis of its length,
    at its place from the right, of the nearest array whose path holds this path or is held by it, the longest path
    first: a mask or codes lie as their parameter does, a scale for each column as its columns, the array of a leaf as
    the leaf's fields. What finds none is not split.

    >>> layout(("w", "scale"), (1, 8), [Laid(("w",), (16, 8), (None, "d"))])
    (None, 'd')
    """
    own = next((g.axes for g in given if g.path == path and g.shape == shape), None)
    if own is not None:
        return own
    near = sorted((g for g in given if _holds(path, g.path) or _holds(g.path, path)), key=lambda g: -len(g.path))
    return tuple(_merged(shape, near))


class Near:
    """Arrays by the paths that find them, so that each of many results looks at few of many."""

    def __init__(self, given: Sequence[Laid]) -> None:
        self._whole: dict[tuple[str, ...], list[int]] = {}
        self._inside: dict[tuple[str, ...], list[int]] = {}
        self._given = given
        for i, laid in enumerate(given):
            self._whole.setdefault(laid.path, []).append(i)
            for part in _parts(laid.path):
                self._inside.setdefault(part, []).append(i)

    def layout(self, path: tuple[str, ...], shape: Shape) -> Axes:
        """What :func:`layout` gives of all the arrays."""
        found = {i for part in _parts(path) for i in self._whole.get(part, ())} | {*self._inside.get(path, ())}
        return layout(path, shape, [self._given[i] for i in sorted(found)])


def _parts(path: tuple[str, ...]) -> set[tuple[str, ...]]:
    """All steps that stand together in a path."""
    return {path[i:j] for i in range(len(path) + 1) for j in range(i, len(path) + 1)}


def in_a_row(packed: Packed, axes: Axes, sizes: Mapping[str, int]) -> Axes:
    """The mesh axes of a byte stream: all those of its array, where they divide it, so that no device holds the whole.

    Of an array split along its first axis alone each device then packs what it has.
    """
    names = [name for one in axes if one is not None for name in (one if isinstance(one, tuple) else (one,))]
    while names and packed.data.size % math.prod(sizes[name] for name in names):
        names.pop()
    return (tuple(names) or None,)


def _merged(shape: Shape, near: Sequence[Laid]) -> list[Any]:
    axes: list[Any] = [None] * len(shape)
    used: set[str] = set()
    for g in near:
        for i in range(1, min(len(shape), len(g.shape)) + 1):
            names = g.axes[-i] if isinstance(g.axes[-i], tuple) else (g.axes[-i],)
            if axes[-i] is None and shape[-i] == g.shape[-i] and names != (None,) and used.isdisjoint(names):
                axes[-i] = g.axes[-i]
                used.update(names)
    return axes


def steps_of(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """The steps of a path, those inside a key of a state too."""
    return tuple(step for step in re.split("[/:]", path_str(path)) if step)


def _holds(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    """Whether the steps of one path stand together in another."""
    return any(outer[i : i + len(inner)] == inner for i in range(len(outer) - len(inner) + 1))
