"""Equations traced on meshes with Explicit axes: each runs again on the layout that it was traced for.

What takes an equation's place (a product on codes, a smaller reshape) was written for no layout: it runs under Auto
axes, and its results are laid out as the equation's own were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, use_abstract_mesh

from jaxcomp.core import meshes
from jaxcomp.core.placement import Laid, layout
from jaxcomp.core.types import PyTree

Values = Sequence[Any]
Seen = tuple[list[Any], dict[str, PyTree]]
Run = Callable[[core.JaxprEqn, Values], list[Any]]


def mesh_of(eqn: core.JaxprEqn) -> AbstractMesh | None:
    """The mesh whose Explicit axes an equation was traced on; None where it was traced on none."""
    shardings = (getattr(v.aval, "sharding", None) for v in (*eqn.invars, *eqn.outvars))
    return next((s.mesh for s in shardings if s is not None and AxisType.Explicit in s.mesh.axis_types), None)


def placed(eqn: core.JaxprEqn, run: Callable[..., Seen], *values: PyTree) -> Seen:
    """``run(*values)`` in the place of an equation: its results, laid out as the equation's, and what else was seen.

    A result of another shape is laid out where its axes are as long as the equation's; what else was seen is on every
    device.
    """
    mesh = mesh_of(eqn)
    if mesh is None or meshes.under_auto(mesh):
        return run(*values)
    on = meshes.concrete_mesh(jax.tree.leaves(values)) or mesh
    with use_abstract_mesh(meshes.with_auto_axes(mesh)):
        results, aux = run(*jax.tree.map(meshes.here, values))
    return _laid(eqn, results, on), jax.tree.map(lambda x: meshes.lay(x, on, (None,) * jnp.ndim(x)), aux)


def bound(eqn: core.JaxprEqn, values: Values, params: Mapping[str, object], run: Run) -> list[Any]:
    """``run(eqn, values)`` on the mesh that the equation was traced on.

    Where the values or parameters are others than were traced, a layout among the parameters does not hold any more.
    """
    mesh = mesh_of(eqn)
    if mesh is None:
        return run(eqn.replace(params={**eqn.params, **params}) if params else eqn, values)
    outside = meshes.under_auto(mesh)
    on = meshes.concrete_mesh(values) or mesh
    if not params and all(map(_as_traced, eqn.invars, values)):
        with use_abstract_mesh(mesh) if outside else nullcontext():
            results = run(eqn, [_shown(x, on) for x in as_traced(eqn.invars, values, on)])
        return [meshes.here(x) for x in results] if outside else results
    with nullcontext() if outside else use_abstract_mesh(meshes.with_auto_axes(mesh)):
        results = _without_layout(eqn, [meshes.here(v) for v in values], params, run)
    return results if outside else _laid(eqn, results, on)


def as_traced(variables: Sequence[Any], values: Values, on: AbstractMesh | Mesh | None = None) -> list[Any]:
    """The values, each array laid out as its variable was traced where it has its shape."""
    return [_like(v, x, on) for v, x in zip(variables, values, strict=True)]


def _like(v: Any, x: Any, on: AbstractMesh | Mesh | None) -> Any:
    sharding = getattr(v.aval, "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types or not _as_traced(v, x):
        return x
    if isinstance(x, jax.Array) and jax.typeof(x).sharding == sharding:
        return x
    return meshes.lay(x, on or meshes.concrete_mesh([x]) or sharding.mesh, tuple(sharding.spec))


def _shown(x: Any, on: AbstractMesh | Mesh) -> Any:
    """What still lies on Auto axes, for its variable was traced without a layout, as an array on every device."""
    hidden = isinstance(x, jax.Array) and AxisType.Auto in jax.typeof(x).sharding.mesh.axis_types
    return meshes.lay(x, on, (None,) * x.ndim) if hidden and not meshes.is_explicit(x) else x


def _as_traced(v: Any, x: Any) -> bool:
    """Whether a value has the shape and type of its variable."""
    if not hasattr(v.aval, "shape"):
        return True
    return jnp.shape(x) == tuple(v.aval.shape) and getattr(x, "dtype", v.aval.dtype) == v.aval.dtype


def _without_layout(eqn: core.JaxprEqn, values: Values, params: Mapping[str, object], run: Run) -> list[Any]:
    """An equation under Auto axes."""
    if eqn.primitive.name in ("reshard", "sharding_constraint"):
        return list(values)
    free = {name: None if _is_explicit(value) else value for name, value in {**eqn.params, **params}.items()}
    here = jax.make_jaxpr(jnp.negative)(0.0).eqns[0].ctx  # of the mesh in use
    return run(eqn.replace(params=free, ctx=here), values)


def _is_explicit(param: object) -> bool:
    return isinstance(param, NamedSharding) and AxisType.Explicit in param.mesh.axis_types


def _laid(eqn: core.JaxprEqn, results: Sequence[Any], on: AbstractMesh | Mesh) -> list[Any]:
    """Results in the layout of an equation's own."""
    laid = []
    for v, result in zip(cast(Sequence[Any], eqn.outvars), results, strict=True):
        sharding = getattr(v.aval, "sharding", None)
        given = [] if sharding is None else [Laid((), tuple(v.aval.shape), tuple(sharding.spec))]
        laid.append(jax.tree.map(lambda x: meshes.lay(x, on, layout((), x.shape, given)), result))  # noqa: B023
    return laid
