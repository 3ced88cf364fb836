"""Equations over smaller arrays: those whose parameters name a size have it rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.core.placement import on_any_mesh
from jaxcomp.structure.atoms import FREE, Dim, Label
from jaxcomp.structure.labelling import Step
from jaxcomp.structure.rules.index import clamp_start, constant_take
from jaxcomp.trace.nested import bind


class Keep:
    """Which atoms stay, by number."""

    def __init__(self, stays: NDArray[np.bool_]) -> None:
        self.stays = stays

    def mask(self, dim: Dim) -> NDArray[np.bool_] | None:
        """True where an index of ``dim`` stays; None if all do."""
        if not isinstance(dim, np.ndarray):
            return None
        stays = self.stays[dim]
        return None if stays.all() else stays

    def size(self, dim: Dim, n: int) -> int:
        """How many of the ``n`` indices stay."""
        stays = self.mask(dim)
        return n if stays is None else int(stays.sum())

    def shape(self, label: Label) -> tuple[int, ...]:
        """The smaller shape."""
        return tuple(self.size(d, n) for d, n in zip(label.dims, label.shape, strict=True))

    def touches(self, *labels: Label) -> bool:
        """Whether any of the arrays is smaller than it was."""
        return any(self.mask(d) is not None for label in labels for d in label.dims)

    @on_any_mesh
    def fit(self, value: jax.Array, have: Sequence[Dim], want: Sequence[Dim]) -> jax.Array:
        """Slices dimensions that are still whole down to what is wanted of them."""
        for axis, (h, w) in enumerate(zip(have, want, strict=True)):
            stays = self.mask(w)
            if stays is not None and self.mask(h) is None:
                value = pick(value, axis, np.flatnonzero(stays))
        return value

    @on_any_mesh
    def grow(self, value: jax.Array, label: Label) -> jax.Array:
        """Puts zeros where indices went, so that ``value`` has its full shape again."""
        for axis, (d, n) in enumerate(zip(label.dims, label.shape, strict=True)):
            stays = self.mask(d)
            if stays is not None:
                shape = (*value.shape[:axis], n, *value.shape[axis + 1 :])
                at = (slice(None),) * axis + (np.flatnonzero(stays),)
                value = jnp.zeros(shape, value.dtype).at[at].set(value)
        return value


def pick(value: jax.Array, axis: int, positions: NDArray[np.int64]) -> jax.Array:
    """The indices ``positions`` of an axis: a slice where they are neighbours."""
    if len(positions) and (np.diff(positions) == 1).all():
        return lax.slice_in_dim(value, int(positions[0]), int(positions[-1]) + 1, axis=axis)
    return jnp.take(value, jnp.asarray(positions), axis=axis)


Values = Sequence[jax.Array]
Rewrite = Callable[[Keep, core.JaxprEqn, Step, Values], list[jax.Array]]


def run(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    """Runs one equation without jaxprs inside on smaller operands."""
    if not keep.touches(*step.uses, *step.outs):
        return bind(eqn, values)
    return _REWRITES.get(eqn.primitive.name, _unchanged)(keep, eqn, step, values)


def _unchanged(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    return bind(eqn, values)


def _broadcast(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    return bind(eqn, values, {"shape": keep.shape(step.outs[0])})


def _reshape(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    return bind(eqn, values, {"new_sizes": keep.shape(step.outs[0])})


def _split(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    axis = eqn.params["axis"]
    return bind(eqn, values, {"sizes": tuple(keep.shape(o)[axis] for o in step.outs)})


def _conv(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    groups, feature = eqn.params["feature_group_count"], eqn.params["dimension_numbers"].lhs_spec[1]
    x = step.uses[0]
    kept = groups * keep.size(x.dims[feature], x.shape[feature]) // x.shape[feature] if groups > 1 else 1
    return bind(eqn, values, {"feature_group_count": kept})


def _pad(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    config = []
    for (low, high, interior), dim in zip(eqn.params["padding_config"], step.outs[0].dims, strict=True):
        stays = keep.mask(dim)
        if stays is not None:
            low, high = int(stays[:low].sum()), int(stays[len(stays) - high :].sum())
        config.append((low, high, interior))
    return bind(eqn, values, {"padding_config": tuple(config)})


def _parts(keep: Keep, x: Label, out: Label, parts: Sequence[slice | None], value: jax.Array) -> jax.Array:
    """Slices dimensions of which some indices went: ``parts`` are the slices of the full ones."""
    for axis, part in enumerate(parts):
        stays, wanted = keep.mask(x.dims[axis]), keep.mask(out.dims[axis])
        if part is None or stays is None:
            continue
        full = np.arange(x.shape[axis])[part]
        full = full if wanted is None else full[wanted]
        value = pick(value, axis, np.searchsorted(np.flatnonzero(stays), full))
    return value


def _slice(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    p, x = eqn.params, step.uses[0]
    strides = p["strides"] or (1,) * len(x.shape)
    parts = [slice(*b) for b in zip(p["start_indices"], p["limit_indices"], strides, strict=True)]
    whole = [keep.mask(d) is not None for d in x.dims]
    rest = tuple(slice(None) if w else part for w, part in zip(whole, parts, strict=True))
    return [_parts(keep, x, step.outs[0], parts, values[0][rest])]


def _dynamic_slice(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    x, starts, sizes = step.uses[0], list(values[1:]), list(eqn.params["slice_sizes"])
    parts: list[slice | None] = [None] * len(sizes)
    for d, dim in enumerate(x.dims):
        if keep.mask(dim) is not None:
            at = clamp_start(step.uses[1 + d], x.shape[d], sizes[d])
            parts[d] = None if at is None else slice(at, at + sizes[d])
            sizes[d], starts[d] = values[0].shape[d], jnp.zeros_like(starts[d])
    return [_parts(keep, x, step.outs[0], parts, lax.dynamic_slice(values[0], starts, sizes))]


def _gather(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    x, index = step.uses
    taken = constant_take(eqn, x, index)
    if taken is not None and (stays := keep.mask(x.dims[taken[0]])) is not None:
        d, full = taken
        (e,) = [e for e in range(len(step.outs[0].dims)) if e not in eqn.params["dimension_numbers"].offset_dims]
        positions = np.searchsorted(np.flatnonzero(stays), full[stays[full]])
        return [jnp.moveaxis(jnp.take(values[0], jnp.asarray(positions), axis=d), d, e)]
    sizes = [
        values[0].shape[d] if keep.mask(dim) is not None else n
        for d, (dim, n) in enumerate(zip(x.dims, eqn.params["slice_sizes"], strict=True))
    ]
    return bind(eqn, values, {"slice_sizes": tuple(sizes)})


_REWRITES: dict[str, Rewrite] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "split": _split,
    "conv_general_dilated": _conv,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}


def full_size(keep: Keep, eqn: core.JaxprEqn, step: Step, values: Values) -> list[jax.Array]:
    """Runs an equation that cannot be rewritten at full size, with zeros where indices went; exact, not faster."""
    grown = [keep.grow(v, use) for v, use in zip(values, step.uses, strict=True)]
    return [keep.fit(v, (FREE,) * len(o.dims), o.dims) for v, o in zip(bind(eqn, grown), step.outs, strict=True)]
