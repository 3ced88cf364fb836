"""``trace``: a function of (parameters, arguments) as a jaxpr whose inputs have names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import jax
from jax.extend import core

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.meshes import explicit_mesh, is_explicit, shape_of
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.trace.flow import Flow, flow
from jaxcomp.trace.walk import Fn, Value


@dataclass(frozen=True, eq=False)
class Program:
    """``fn(params, *args, **kwargs)`` traced at given shapes.

    Invariant: ``jaxpr`` takes the array leaves of ``(params, args, kwargs)`` in tree order, the first
    ``len(param_paths)`` of which are parameters named by ``param_paths``; leaves that are no arrays (Python
    numbers, strings, functions, as an Equinox module holds) are constants of the program. ``flow.ops`` are its
    equations in order, each in its place.
    """

    jaxpr: core.ClosedJaxpr
    param_paths: tuple[str, ...]
    flow: Flow
    in_tree: jax.tree_util.PyTreeDef
    is_array: tuple[bool, ...]
    out_tree: jax.tree_util.PyTreeDef
    out_static: tuple[Leaf, ...]

    def flatten(self, params: Params, *args: PyTree, **kwargs: PyTree) -> list[Leaf]:
        """The values of the jaxpr's inputs; a subtree at a leaf's place (a compressed leaf) stays one value.

        Raises:
          ValueError: the trees are not those that the program was traced with.
        """
        try:
            leaves = self.in_tree.flatten_up_to((params, args, kwargs))
        except ValueError as e:
            raise ValueError(
                f"this program was traced with parameters {some_paths(self.param_paths)}; it was given another tree: "
                f"{e}. Trace it again with trace(fn, params, *args)."
            ) from e
        return [leaf for leaf, keep in zip(leaves, self.is_array, strict=True) if keep]

    def unflatten(self, results: Sequence[Value]) -> PyTree:
        """The function's result from the list of the jaxpr's outputs."""
        arrays = iter(results)
        leaves = [next(arrays) if static is _ARRAY else static for static in self.out_static]
        return jax.tree.unflatten(self.out_tree, leaves)

    def results(self, out: PyTree) -> list[Value]:
        """The list of the jaxpr's outputs from the function's result: what ``unflatten`` was given."""
        leaves = self.out_tree.flatten_up_to(out)
        return [leaf for leaf, static in zip(leaves, self.out_static, strict=True) if static is _ARRAY]


class _Array:
    """Stands for an array among static leaves."""


_ARRAY = _Array()


def trace(fn: Fn, params: Params, *args: PyTree, **kwargs: PyTree) -> Program:
    """Traces ``fn(params, *args, **kwargs)`` without running it.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      params: any pytree: a linen dict, an ``nnx.State``, an Equinox module, nested containers. Leaves may be
        arrays, tracers or ``jax.ShapeDtypeStruct``; anything else (Python numbers and bools too) is held constant.
      args: further arguments, pytrees likewise, so ``train=False`` may be passed as it is.

    Raises:
      TypeError: ``params`` holds no array, so ``fn`` probably takes its arguments in another order.
      ValueError: two parameters have the same path.

    >>> program = trace(lambda p, x: x @ p["w"], {"w": jax.ShapeDtypeStruct((3, 4), "float32")}, jax.numpy.ones((2, 3)))
    >>> program.param_paths, [e.primitive.name for e in program.jaxpr.jaxpr.eqns]
    (('w',), ['dot_general'])
    """
    if not any(map(is_array_like, jax.tree.leaves(params))):
        raise TypeError(
            f"trace: the first argument of {getattr(fn, '__name__', type(fn).__name__)!r} must be the parameter tree,"
            f" got {type(params).__name__} without an array in it; wrap the function so that the parameters come first."
        )
    return program_of(fn, params, *args, **kwargs)


def program_of(fn: Fn, params: Params, *args: PyTree, **kwargs: PyTree) -> Program:
    """:func:`trace` of a function that may have no parameters."""
    named, _ = leaves_with_paths(params)
    param_paths = tuple(path for path, leaf in named if is_array_like(leaf))
    leaves, in_tree = jax.tree.flatten((params, args, kwargs))
    is_array = tuple(map(is_array_like, leaves))
    out: dict[str, PyTree] = {}

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        values = iter(arrays)
        filled = [next(values) if keep else leaf for leaf, keep in zip(leaves, is_array, strict=True)]
        inner_params, inner_args, inner_kwargs = jax.tree.unflatten(in_tree, filled)
        results, out["tree"] = jax.tree.flatten(fn(inner_params, *inner_args, **inner_kwargs))
        out["static"] = tuple(_ARRAY if is_array_like(r) else r for r in results)
        return [r for r in results if is_array_like(r)]

    jaxpr = jax.make_jaxpr(flat)(*(leaf for leaf, keep in zip(leaves, is_array, strict=True) if keep))
    return Program(jaxpr, param_paths, flow(jaxpr, param_paths), in_tree, is_array, out["tree"], out["static"])


def kind_of(args: PyTree) -> Hashable:
    """What a program is traced for: equal for arguments of equal shapes, types and constants."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((tuple(x.shape), str(x.dtype)) if is_array_like(x) else x for x in leaves)


def shape_like(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """The shape of an array in the type that JAX gives it: NumPy's int64 is int32 unless x64 is enabled.

    On Explicit axes its layout is kept.
    """
    if is_explicit(leaf):
        return shape_of(leaf)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(tuple(leaf.shape), dtype)


def is_array_like(leaf: Leaf) -> bool:
    """Whether ``leaf`` is traced: an array, a shape of one, or a tracer; Python numbers are constants."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def shapes_of(params: Params) -> Params:
    """The tree with a shape in the place of each compressed leaf."""

    def shape(x: Leaf) -> Leaf:
        if not is_compressed(x):
            return x
        explicit = explicit_mesh(jax.tree.leaves(x)) is not None
        return jax.eval_shape(dense, x) if explicit else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape, params, is_leaf=is_compressed)
