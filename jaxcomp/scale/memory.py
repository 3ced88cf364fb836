"""What each device of a mesh holds of a training or of a compressed model, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxcomp.core.leaves import pack
from jaxcomp.core.meshes import Axes
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import Where, first_matches, leaves_with_paths
from jaxcomp.core.placement import Laid, layout
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Params, PyTree, Shape
from jaxcomp.core.words import bytes_of
from jaxcomp.scale.parts import stand_in

_HEAD = ("what", "bytes", "a device", "GiB a device")


class Optimizer(Protocol):
    """What has an ``init``, as all of optax do."""

    init: Callable[[Params], PyTree]


@dataclass(frozen=True)
class Held:
    """One row: what it is, the bytes of all of it, and those on a device."""

    what: str
    whole: int
    device: int


@dataclass(frozen=True)
class DeviceMemory:
    """The rows of :func:`device_memory`; ``print`` it for a table, or leave it at the end of a notebook's cell.

    Attributes:
      rows: what is held, a row each; a training holds the first ones, a server the last.
      leaves: the bytes of the weights on a device, by path.
    """

    rows: tuple[Held, ...]
    leaves: Mapping[str, int]

    def __getitem__(self, what: str) -> Held:
        return {row.what: row for row in self.rows}[what]

    def cells(self) -> list[tuple[str, ...]]:
        """The table in words."""
        return [_HEAD, *((r.what, f"{r.whole:,}", f"{r.device:,}", f"{r.device / 2**30:.3g}") for r in self.rows)]

    def __repr__(self) -> str:
        return columns(self.cells(), "lrrr")

    def _repr_html_(self) -> str:
        return html_table(self.cells(), "lrrr")


def device_memory(
    params: Params,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    lay: Mapping[Where, PartitionSpec] | None = None,
    compress: Transform | None = None,
    optimizer: Optimizer | None = None,
) -> DeviceMemory:
    """The bytes of weights, gradients, states and compressed weights, on all devices together and on each.

    Nothing is computed, and no device needs to be there: a table for 70 billion weights on 64 chips takes seconds on
    a laptop. Activations are not counted. States, masks, codes and scales lie as their parameter does, where they have
    its axes; a packed stream of codes is split over all that the parameter is split over.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``, as ``jax.eval_shape(model.init, key, x)`` gives them.
      mesh: the devices, ``jax.sharding.AbstractMesh((8, 4), ("data", "model"))`` say; None is one device.
      lay: an ordered table of rule and ``PartitionSpec``, first match wins; what none matches is whole on each device.
      compress: adds its state, and the weights that it makes, in training form and packed.
      optimizer: adds gradients and its state.

    Raises:
      ValueError: a rule that matches nothing, a spec that does not fit a leaf or the mesh, or what ``compress`` raises.
      TypeError: a layout without a mesh, or of what is no ``PartitionSpec``.

    >>> import optax
    >>> import jaxcomp as jc
    >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((4096, 16384), "bfloat16")}}
    >>> mesh = AbstractMesh((8,), ("fsdp",))
    >>> lay = {".*kernel": PartitionSpec("fsdp", None)}
    >>> int4 = jc.quantize(jc.Int(4), per=jc.Groups(128))
    >>> device_memory(params, mesh=mesh, lay=lay, compress=int4, optimizer=optax.adam(1e-3))
    what                        bytes    a device  GiB a device
    weights               134,217,728  16,777,216        0.0156
    gradients             134,217,728  16,777,216        0.0156
    optimizer state       268,435,460  33,554,436        0.0313
    transform state                 0           0             0
    compressed, training  270,532,608  35,651,584        0.0332
    compressed, packed     35,651,584   6,291,456       0.00586
    """
    sizes = {} if mesh is None else {str(name): int(n) for name, n in mesh.shape.items()}
    if lay and mesh is None:
        raise TypeError("device_memory: lay= says how arrays lie on a mesh; give mesh=, an AbstractMesh is enough.")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)), params)
    given = _laid(shapes, lay or {}, sizes)
    held: dict[str, PyTree] = {"weights": shapes}
    if optimizer is not None:
        held |= {"gradients": shapes, "optimizer state": jax.eval_shape(optimizer.init, shapes)}
    if compress is not None:
        t = stand_in(checked_transform("device_memory", compress))
        state = jax.eval_shape(t.init, shapes)
        made = jax.eval_shape(t.apply, state, shapes)
        packed = jax.eval_shape(pack, made)
        held |= {"transform state": state, "compressed, training": made, "compressed, packed": packed}
    rows = tuple(Held(what, bytes_of(tree), sum(_shares(tree, given, sizes).values())) for what, tree in held.items())
    return DeviceMemory(rows, _shares(shapes, given, sizes))


def _laid(shapes: Params, lay: Mapping[Where, PartitionSpec], sizes: Mapping[str, int]) -> list[Laid]:
    """How each parameter lies.

    Raises:
      ValueError: it cannot.
    """
    named = leaves_with_paths(shapes)[0]
    specs = list(lay.values())
    found = first_matches(list(lay), named, owner="device_memory") if lay else [None] * len(named)
    laid = []
    for (path, leaf), first in zip(named, found, strict=True):
        axes = () if first is None else _axes(specs[first])
        if len(axes) > len(leaf.shape):
            raise ValueError(f"device_memory: {path!r} of shape {leaf.shape} has fewer axes than {specs[first or 0]}.")
        axes += (None,) * (len(leaf.shape) - len(axes))
        unknown = [name for axis in axes for name in _names(axis) if name not in sizes]
        if unknown:
            raise ValueError(f"device_memory: the mesh has no axis {unknown[0]!r}, only {', '.join(sizes)}.")
        if not _fits(leaf.shape, axes, sizes):
            raise ValueError(
                f"device_memory: {path!r} of shape {leaf.shape} is not divided by {specs[first or 0]} on a mesh of"
                f" {dict(sizes)}; give it another spec by a rule before."
            )
        laid.append(Laid(tuple(path.split("/")), tuple(leaf.shape), axes))
    return laid


def _axes(spec: PartitionSpec) -> Axes:
    """Raises:
    TypeError, ValueError: it is none, or names an axis twice.
    """
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"device_memory: lay wants a jax.sharding.PartitionSpec for each rule, got {spec!r}.")
    names = [name for axis in spec for name in _names(axis)]
    if len(names) > len({*names}):
        raise ValueError(f"device_memory: {spec} names an axis of the mesh twice; each splits an array once.")
    return tuple(spec)


def _shares(tree: PyTree, given: Sequence[Laid], sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes of each array on a device, by path."""
    by_step: dict[str, list[Laid]] = {}
    for laid in given:
        by_step.setdefault(laid.path[-1], []).append(laid)
    named, _ = leaves_with_paths(tree, is_leaf=lambda x: isinstance(x, Packed))
    return {path: _share(path, x, by_step, sizes) for path, x in named}


def _share(path: str, x: PyTree, by_step: Mapping[str, list[Laid]], sizes: Mapping[str, int]) -> int:
    data = x.data if isinstance(x, Packed) else x
    if not hasattr(data, "shape"):
        return 0
    steps = tuple(step for step in path.replace(":", "/").split("/") if step) or ("",)
    near = [laid for step in dict.fromkeys(steps) for laid in by_step.get(step, ())]
    if isinstance(x, Packed):
        own = layout(steps, tuple(x.shape), near)
        axes: Axes = (tuple(name for axis in own for name in _names(axis)),)
    else:
        axes = layout(steps, tuple(data.shape), near)
    parts = math.prod(sizes[name] for axis in axes for name in _names(axis))
    return bytes_of(data) // (parts if _fits(data.shape, axes, sizes) else 1)


def _fits(shape: Shape, axes: Axes, sizes: Mapping[str, int]) -> bool:
    parts = (math.prod(sizes[name] for name in _names(axis)) for axis in axes)
    return all(length % n == 0 for length, n in zip(shape, parts, strict=True))


def _names(axis: object) -> tuple[str, ...]:
    return tuple(map(str, axis)) if isinstance(axis, tuple) else () if axis is None else (str(axis),)
