"""Meshes with Explicit axes, JAX's default: what an array's layout is there, and how to set it aside for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

R = TypeVar("R")
Axes = tuple[Any, ...]
"""The mesh axes that each axis of an array is split over: a name, several, or None."""


def explicit_mesh(values: Iterable[object]) -> AbstractMesh | None:
    """The mesh of the first array that lies on Explicit axes; None where none does."""
    return next((jax.typeof(x).sharding.mesh for x in values if is_explicit(x)), None)


def is_explicit(x: object) -> bool:
    """Whether ``x`` is an array whose type tells its layout."""
    return isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def spread(values: Iterable[object]) -> bool:
    """Whether an array may be split over several devices: it is of a mesh that has them, or one is in use.

    Where an Auto axis splits an array its type does not say; that there is a mesh, it does.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in values if isinstance(x, jax.Array)]
    return any(mesh.size > 1 for mesh in (*meshes, jax.sharding.get_abstract_mesh()) if not mesh.empty)


def over_all(x: jax.Array) -> jax.Array:
    """An array whose first axis is split over all devices of its mesh, inside jit on Auto axes; else as it is."""
    mesh = next((m for m in (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()) if not m.empty), None)
    if mesh is None or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return x
    spec = PartitionSpec(mesh.axis_names, *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def after(x: jax.Array, made: Mapping[str, Any]) -> jax.Array:
    """An array for what wants it whole: on a mesh it is gathered when the last of what is ``made`` is there.

    Of many arrays, each after what was made of the one before, the devices then hold one whole at a time.
    """
    if not made or not spread([x]):
        return x
    last = list(made.values())[-1]
    return cast(jax.Array, jax.lax.optimization_barrier((x, last))[0])


def with_auto_axes(mesh: AbstractMesh) -> AbstractMesh:
    """The mesh with its Explicit axes Auto."""
    explicit = (name for name, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def under_auto(mesh: AbstractMesh) -> bool:
    """Whether the mesh in use is ``mesh`` with its Explicit axes Auto."""
    return jax.sharding.get_abstract_mesh() == with_auto_axes(mesh)


def here(x: Any) -> Any:
    """An array on Explicit axes as one on their Auto namesakes where these are in use; it stays where it is.

    What a closure holds may lie on Explicit axes, and is met under Auto ones.
    """
    if not is_explicit(x) or not under_auto(jax.typeof(x).sharding.mesh):
        return x
    return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim))


def backward(rule: Callable[..., R]) -> Callable[..., R]:
    """The backward rule of a ``custom_vjp``, run under the axes that its cotangent has.

    Outside jit it would meet those in use where the gradient is taken, not those under which the function ran.
    """

    @wraps(rule)
    def run(*args: Any) -> R:
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args[-1]))
        mesh = next((m for m in meshes if not m.empty), None)
        with nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            return rule(*args)

    return run


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and type of an array or of what stands for one, and its layout where that is a part of its type."""
    aval: Any = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a shape, a type and, where that is a part of the type, a layout."""
    x = jnp.zeros(shape.shape, shape.dtype)
    on = shape.sharding
    explicit = isinstance(on, NamedSharding) and AxisType.Explicit in on.mesh.axis_types
    return jax.sharding.reshard(x, on) if explicit else x


def lay(x: jax.Array, mesh: AbstractMesh | Mesh, axes: Axes) -> jax.Array:
    """An array laid out over the Explicit axes of a mesh."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*axes)))


def axes_of(x: jax.Array) -> Axes:
    """The mesh axes that each axis of an array on Explicit axes is split over."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def concrete_mesh(values: Iterable[object]) -> Mesh | None:
    """The devices of the first array on Explicit axes that is no tracer: outside jit a layout must name them."""
    for x in values:
        if is_explicit(x) and not isinstance(x, jax.core.Tracer):
            return cast(NamedSharding, cast(jax.Array, x).sharding).mesh  # type: ignore[return-value]
    return None
