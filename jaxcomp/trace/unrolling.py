"""Loops over stacked layers written out, so that each layer is a part of the program that can be run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.leaves import dense, is_compressed, method_of
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree, Shape
from jaxcomp.trace import nested, walk
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import CUSTOM_RULE
from jaxcomp.trace.program import Program, shape_like, trace
from jaxcomp.trace.walk import Fn, Location

OWNER = "unrolled"


class Slices:
    """What stands in a tree for a leaf whose layers are apart: one leaf for each index of its first axis.

    Args:
      layers: arrays, their shapes, or compressed leaves, in order.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = tuple(layers)

    @property
    def shape(self) -> Shape:
        """That of the leaf."""
        return (len(self.layers), *self.layers[0].shape)

    def dense(self) -> jax.Array:
        """The leaf as an array."""
        return jnp.stack([dense(layer) for layer in self.layers])

    def __repr__(self) -> str:
        return f"Slices({len(self.layers)} of {self.shape[1:]})"


def _with_keys(s: Slices) -> tuple[list[tuple[jax.tree_util.SequenceKey, Any]], None]:
    return [(jax.tree_util.SequenceKey(i), x) for i, x in enumerate(s.layers)], None


jax.tree_util.register_pytree_with_keys(Slices, _with_keys, lambda _, layers: Slices(layers))


def stacks(fn: Fn) -> Callable[..., dict[str, int]]:
    """``stacks(params, *args)``: the leaves that scans take a slice of a step, by path, and how many slices they have.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    >>> fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["head"]
    >>> stacks(fn)({"layers": jnp.ones((3, 2, 2)), "head": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    {'layers': 3}
    """

    def found(params: Params, *args: PyTree) -> dict[str, int]:
        program = trace(fn, params, *args)
        loops = _loops(program, program.param_paths).values()
        return {path: nested.scan_parts(eqn).length for eqn, paths in loops for path in paths if path is not None}

    return found


class Unrolled:
    """A network whose stacked layers are leaves of their own.

    Attributes:
      fn: ``fn(tree, *args)``, of the unrolled tree.
      layers: the leaves that are apart, by path, and how many layers they have.
    """

    def __init__(self, fn: Fn, layers: Mapping[str, int]) -> None:
        self.fn, self.layers = written_out(fn), dict(layers)

    def unroll(self, params: Params) -> Params:
        """The tree in which :class:`Slices` stand for stacked leaves.

        Raises:
          TypeError: a compressed leaf whose layers cannot be told apart, such as a packed one.
        """

        def one(path: str, leaf: Leaf) -> Leaf:
            if path not in self.layers:
                return leaf
            layers = [layer_of(leaf, (i,)) for i in range(self.layers[path])]
            return Slices(_checked(path, layers, leaf.shape[1:], "unroll the arrays, then compress them"))

        named, tree = leaves_with_paths(params, is_leaf=is_compressed)
        return tree.unflatten([one(path, leaf) for path, leaf in named])

    def roll(self, tree: Params) -> Params:
        """The tree as it was, from an unrolled one of arrays or leaves that are compressed alike in all layers.

        Raises:
          TypeError: layers that are compressed in different ways, or so that they cannot be stacked, as packed ones.
        """

        def one(path: str, leaf: Leaf) -> Leaf:
            if not _is_slices(leaf):
                return leaf
            mend = "compress all layers alike, and pack the tree when it is rolled"
            if len({jax.tree.structure(layer) for layer in leaf.layers}) > 1:
                raise TypeError(f"{OWNER}: the layers of {path!r} are compressed in different ways; {mend}.")
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaf.layers)
            return _checked(path, [stacked], leaf.shape, mend)[0]

        named, treedef = leaves_with_paths(tree, is_leaf=_is_slices)
        return treedef.unflatten([one(path, leaf) for path, leaf in named])

    def __repr__(self) -> str:
        return f"<Unrolled {', '.join(f'{n} x {path}' for path, n in self.layers.items()) or 'nothing'}>"


def unrolled(fn: Fn) -> Callable[..., Unrolled]:
    """Scans of ``fn(params, *args)`` that step over stacked leaves, written out: each layer has leaves of its own.

    What goes by leaves, or by blocks, then goes by layers: a width or a rank for each, and
    :func:`~jaxcomp.ptq.reconstruct` layer by layer. The other way round is :func:`~jaxcomp.trace.rolled`.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    Returns:
      A function of ``(params, *args)``, arrays or their shapes, giving :class:`Unrolled`: ``fn``, of the unrolled tree,
      and ``unroll`` and ``roll`` from tree to tree.

    >>> fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    >>> params, x = {"layers": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])}, jnp.ones((1, 2))
    >>> found = unrolled(fn)(params, x)
    >>> found, [path for path, _ in leaves_with_paths(found.unroll(params))[0]]
    (<Unrolled 2 x layers>, ['layers/0', 'layers/1'])
    >>> bool((found.fn(found.unroll(params), x) == fn(params, x)).all())
    True
    """
    return lambda params, *args: Unrolled(fn, stacks(fn)(params, *args))


def layer_of(leaf: Leaf, layer: tuple[int, ...]) -> Leaf:
    """One layer of a stacked leaf, compressed or not; what its layers share stays.

    >>> layer_of(jnp.array([[1, 2], [3, 4]]), (1,)).tolist(), layer_of(jnp.array([[5, 6]]), (1,)).tolist()
    ([3, 4], [5, 6])
    """
    return jax.tree.map(lambda x: x[tuple(min(i, n - 1) for i, n in zip(layer, x.shape, strict=False))], leaf)


def _checked(path: str, leaves: list[Leaf], shape: Shape, mend: str) -> list[Leaf]:
    """The leaves, if they are of this shape."""
    for leaf in leaves:
        if tuple(leaf.shape) != tuple(shape):
            raise TypeError(f"{OWNER}: {path!r} is compressed ({method_of(leaf)}), and its layers do not part; {mend}.")
    return leaves


def written_out(fn: Fn) -> Fn:
    """``fn`` of a tree some of whose stacked leaves are :class:`Slices`: the scans over these are written out.

    Where such a leaf is read otherwise it is stacked.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    >>> fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    >>> layers = [jnp.eye(2), 2 * jnp.eye(2)]
    >>> jaxpr = jax.make_jaxpr(written_out(fn))({"layers": Slices(layers)}, jnp.ones((1, 2)))
    >>> [e.primitive.name for e in jaxpr.jaxpr.eqns]
    ['dot_general', 'tanh', 'dot_general', 'tanh']
    """

    @wraps(fn)
    def run(tree: Params, *args: PyTree) -> PyTree:
        program = trace(fn, jax.tree.map(_whole, tree, is_leaf=_is_slices), *args)
        values = program.flatten(tree, *args)
        apart = [str(i) if _is_slices(value) else None for i, value in enumerate(values)]
        claims = {at: Claim(partial(_in_turn, eqn)) for at, (eqn, _) in _loops(program, apart).items()}
        return evaluate(program, claims, values, to_array=_array).out

    return run


def _is_slices(x: object) -> bool:
    return isinstance(x, Slices)


def _whole(x: Any) -> Any:
    if not _is_slices(x):
        return x
    one = shape_like(x.layers[0])
    return jax.ShapeDtypeStruct(x.shape, one.dtype)


def _loops(
    program: Program, names: Sequence[str | None]
) -> dict[Location, tuple[core.JaxprEqn, tuple[str | None, ...]]]:
    """The scans that step over inputs as they are, and the name of each that they step over; None of all else.

    Args:
      program: where they are.
      names: of its inputs, the first ones.
    """
    found: dict[Location, tuple[core.JaxprEqn, tuple[str | None, ...]]] = {}

    def equation(eqn: core.JaxprEqn, at: Location, values: list[str | None]) -> list[str | None]:
        if eqn.primitive.name == "scan":
            parts = nested.scan_parts(eqn)
            over = tuple(values[parts.consts + parts.carry :])
            if any(name is not None for name in over):
                found[at] = eqn, over
        elif eqn.primitive.name not in CUSTOM_RULE and (body := nested.call_body(eqn)) is not None:
            return walk.run(body, values, equation, constant=_nameless, at=(*at, "call"))
        return [None] * len(eqn.outvars)

    inputs = [*names, *[None] * (len(program.jaxpr.jaxpr.invars) - len(names))]
    walk.run(program.jaxpr, inputs, equation, constant=_nameless)
    return found


def _nameless(value: jax.Array) -> None:
    return None


def _in_turn(eqn: core.JaxprEqn, *values: Any) -> list[jax.Array]:
    """The results of a scan, one step after the other."""
    parts = nested.scan_parts(eqn)
    split = parts.consts + parts.carry
    consts, carry = ([_array(x) for x in some] for some in (values[: parts.consts], values[parts.consts : split]))
    made: dict[int, Sequence[jax.Array]] = {}
    steps = range(parts.length)
    for i in reversed(steps) if parts.reverse else steps:
        slices = [x.layers[i] if _is_slices(x) else x[i] for x in values[split:]]
        results = jax.core.eval_jaxpr(parts.body.jaxpr, parts.body.consts, *consts, *carry, *slices)
        carry, made[i] = list(results[: parts.carry]), results[parts.carry :]
    return [*carry, *(jnp.stack(ys) for ys in zip(*(made[i] for i in steps), strict=True))]


def _array(x: Any) -> jax.Array:
    return x.dense() if _is_slices(x) else x
