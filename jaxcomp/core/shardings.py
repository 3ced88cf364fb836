"""Where a function's results are to lie on a mesh, known from shapes before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import path_str
from jaxcomp.core.placement import Laid, Near, in_a_row, steps_of
from jaxcomp.core.types import PyTree


def out_shardings(fn: Callable[..., PyTree], *args: Any, **kwargs: Any) -> PyTree:
    """The shardings of ``fn(*args, **kwargs)``, for ``jax.jit(fn, out_shardings=...)``; nothing is computed.

    A state lies as its parameter: a mask or codes as the array at their path, a scale or a basis along the axes that it
    keeps, a packed stream over all that its array is split over; what has no axis of a parameter is whole on each
    device. On Explicit axes jaxcomp's functions lay their results out so by themselves; on Auto axes the compiler would
    choose.

    Args:
      fn: ``transform.init``, ``apply`` or ``update``, ``pack``, an optimizer's ``init``: any function of trees of which
        the results' paths hold those of the arguments.
      args, kwargs: arrays, or ``jax.ShapeDtypeStruct`` with a sharding, of one mesh. Those without a ``NamedSharding``
        count as whole on each device.

    Raises:
      ValueError: no argument has a ``NamedSharding``, or they are of several meshes; the message names the paths.

    >>> from jax.sharding import AbstractMesh
    >>> import jaxcomp as jc
    >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 32), "float32", sharding=split)}
    >>> t = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
    >>> state = out_shardings(t.init, params)
    >>> [tuple(s.spec) for s in jax.tree.leaves(state)]
    [('fsdp', 'tensor')]
    >>> masked = out_shardings(t.apply, jax.eval_shape(t.init, params), params)["kernel"]
    >>> tuple(masked.mask.spec), tuple(masked.values.scale.spec)
    (('fsdp', 'tensor'), (None, 'tensor'))
    """
    named, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    laid = {path: x.sharding for path, x in named if isinstance(getattr(x, "sharding", None), NamedSharding)}
    mesh = _one_mesh({path_str(path[2:]): s for path, s in laid.items()}, [path_str(p[2:]) for p, _ in named])
    given = [Laid(steps_of(path[2:]), x.shape, _axes(laid[path], x.ndim)) for path, x in named if path in laid]
    near = Near(given)
    bare = [jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for _, x in named]
    new_args, new_kwargs = jax.tree.unflatten(treedef, bare)
    out = jax.eval_shape(fn, *new_args, **new_kwargs)

    def sharding(path: jax.tree_util.KeyPath, x: Any) -> Any:
        axes = near.layout(steps_of(path), x.shape)
        if isinstance(x, Packed):
            row: Any = NamedSharding(mesh, PartitionSpec(*in_a_row(x, axes, mesh.shape)))
            return replace(x, data=row)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, out, is_leaf=lambda x: isinstance(x, Packed))


def _axes(sharding: NamedSharding, rank: int) -> tuple[Any, ...]:
    spec = tuple(sharding.spec)
    return spec + (None,) * (rank - len(spec))


def _one_mesh(found: dict[str, NamedSharding], paths: list[str]) -> Any:
    """The mesh of all shardings, by path."""
    if not found:
        raise ValueError(
            f"out_shardings: no argument has a NamedSharding, of {len(paths)} from {next(iter(paths), '')!r} on; give"
            " arrays that lie on a mesh, or jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))."
        )
    first, *others = found.items()
    for path, s in others:
        if s.mesh != first[1].mesh:
            raise ValueError(
                f"out_shardings: {first[0]!r} lies on {first[1].mesh} and {path!r} on {s.mesh}; lay them out on one"
                " mesh."
            )
    return first[1].mesh
