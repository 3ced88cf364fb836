"""What every estimate of a curvature begins with: the weights, the batches, and programs that multiply by blocks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.batches import as_batch, checked_batches
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.gradients import masked
from jaxcomp.core.meshes import here
from jaxcomp.core.paths import Where, some_paths
from jaxcomp.core.slots import Slot, check_finite, slots
from jaxcomp.core.specs import check_key, check_positive, is_number
from jaxcomp.core.types import Key, Params, PyTree, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.search.batches import parts_of
from jaxcomp.search.linear import Linear
from jaxcomp.search.products import Curved, Opened, Weights, curved

Units = Mapping[str, Sequence[str]]
"""Paths of leaves by the name of what they are one unit of."""


@dataclass(frozen=True)
class Prepared:
    """A loss at parameters and batches.

    Args:
      owner: who asks, for messages.
      curve: what has the curvature.
      opened: the parameters.
      slots: the arrays that one differentiates by.
      batches: the loss's other arguments.
      parts: what part each batch has in the mean.
    """

    owner: str
    curve: Curved
    opened: Opened
    slots: Mapping[str, Slot]
    batches: list[tuple[PyTree, ...]]
    parts: list[float]

    def sizes(self) -> dict[str, int]:
        """Parameters of each leaf, without those that a mask hides."""
        masks = {path: slot.full_mask for path, slot in self.slots.items()}
        return {p: int(self.slots[p].array.size if m is None else jnp.count_nonzero(m)) for p, m in masks.items()}

    def at(self, arrays: list[jax.Array], batch: tuple[PyTree, ...]) -> tuple[jax.Array, Callable[[Weights], Weights]]:
        """The loss and the product there; the weights are found again in what a jitted function was given."""
        tree = self.opened.rebuilt(arrays, {})
        found = slots(tree, lambda path, leaf: path in self.slots, self.owner)
        masks = {path: slot.mask for path, slot in found.items() if slot.mask is not None}
        weights = {path: found[path].array for path in self.slots}

        def rebuilt(w: Weights) -> Params:
            new = {path: Masked(x, masks[path]) if path in masks else x for path, x in w.items()}
            return self.opened.rebuilt(arrays, new)

        def kept(v: Weights) -> dict[str, jax.Array]:  # a straight mask lets gradients pass, and none is open there
            return {path: masked(x, masks[path]) if path in masks else x for path, x in v.items()}

        value, product = self.curve.at(rebuilt, weights, batch)
        return value, lambda v: kept(product(kept(v)))

    def samples(self, probes: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """A program: ``vᵀ H v`` of each leaf for some vectors of signs, ``(probes, leaves)``, of one batch."""
        like = {path: (slot.array.shape, slot.array.dtype) for path, slot in self.slots.items()}

        def run(
            arrays: list[jax.Array], key: Key, active: jax.Array, first: jax.Array, batch: tuple[PyTree, ...]
        ) -> tuple[jax.Array, jax.Array]:
            value, product = self.at(arrays, batch)

            def one(number: jax.Array) -> jax.Array:
                signs = signs_of(key, like, number)
                v = {p: jnp.where(on, s, jnp.zeros_like(s)) for (p, s), on in zip(signs.items(), active, strict=True)}
                y = product(v)
                return jnp.stack([dot(v[path], y[path]) for path in like])

            # No lax.map: XLA runs convolutions inside a loop many times slower on CPU (jax 0.12).
            return value, jnp.stack([one(first + i) for i in range(probes)])

        return run

    def block_products(self, units: Units) -> Callable[..., tuple[jax.Array, Weights]]:
        """A program: what a batch adds to the products of some units' blocks, each with the unit's own vector.

        They share one gradient that is linearized, and each goes through the part of it that its unit reaches.
        """

        def run(
            arrays: list[jax.Array], q: Weights, total: Weights, counted: tuple[jax.Array, PyTree]
        ) -> tuple[jax.Array, Weights]:
            part, batch = counted
            value, product = self.at(arrays, batch)
            zeros = {path: jnp.zeros(s.array.shape, s.array.dtype) for path, s in self.slots.items()}
            linear, found = Linear(product, zeros), dict[str, jax.Array]()
            for leaves in units.values():
                found |= linear.at({p: q[p].astype(zeros[p].dtype) for p in leaves}, leaves)
            return value, {p: x + found[p].astype(x.dtype) * part.astype(x.dtype) for p, x in total.items()}

        return run

    def checked(self, value: jax.Array, number: int) -> float:
        """A loss that is a number.

        Raises:
          ValueError: it is none.
        """
        if not math.isfinite(value):
            raise ValueError(
                f"{self.owner}: the loss of batch {number} is {float(value)}; leave that batch out, or mend the loss."
            )
        return float(value)

    def check_curvature(self, values: np.ndarray, names: Iterable[str]) -> None:
        """Checks what came of products.

        Raises:
          ValueError: one is not finite.
        """
        bad = [name for name, x in zip(names, values, strict=True) if not np.isfinite(x)]
        if bad:
            raise ValueError(
                f"{self.owner}: the curvature along {some_paths(bad)} is not finite, though the loss is; look for a"
                " square root or a logarithm at 0, or leave these out by a rule."
            )


def prepared(
    owner: str, loss: Callable[..., jax.Array] | Curved, params: Params, batches: Iterable[PyTree], *, where: Where
) -> Prepared:
    """The weights that a rule selects, at batches that are kept.

    Raises:
      ValueError: what :func:`~jaxcomp.core.slots.slots` raises, a weight that is not finite, or no batch.
    """
    found = slots(params, where, owner)
    check_finite(found, owner)
    kept = [as_batch(batch) for batch in checked_batches(owner, batches)]
    return Prepared(owner, curved(loss), Opened(params), found, kept, parts_of(owner, kept))


def check_asked(owner: str, key: Key, *, rtol: float, most: int, atol: float = 0.0) -> None:
    """Checks arguments.

    Raises:
      ValueError: no key, or a number out of range.
    """
    check_key(owner, key)
    check_positive(owner, most, "most")
    for name, x in (("rtol", rtol), ("atol", atol)):
        if not is_number(x) or x < 0:
            raise ValueError(f"{owner}: {name} must be a number, 0 or more, got {x!r}.")


def signs_of(
    key: Key, like: Mapping[str, tuple[Shape, jax.typing.DTypeLike]], number: jax.Array
) -> dict[str, jax.Array]:
    """Random signs for each leaf, the same whatever other leaves there are; ``number`` says which.

    All leaves are drawn by one call, a bit a sign: a call for each leaf took XLA seconds to compile on CPU (jax 0.12).

    >>> signs_of(jax.random.key(0), {"w": ((3,), jnp.float32)}, jnp.int32(0))["w"].shape
    (3,)
    """
    sizes = {path: math.prod(shape) for path, (shape, _) in like.items()}
    words = [-(-size // 32) for size in sizes.values()]
    hashes = np.repeat(np.array([zlib.crc32(path.encode()) for path in like], np.uint32), words)
    places = np.concatenate([np.arange(n, dtype=np.uint32) for n in words])
    fold = jax.vmap(jax.random.fold_in)
    own = fold(jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(here(key), number), hashes), places)
    bits = jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(own)
    bits = (bits[:, None] >> np.arange(32, dtype=np.uint32)[None]) & np.uint32(1)
    parts = jnp.split(bits, np.cumsum(words)[:-1])
    return {
        path: jnp.where(part.reshape(-1)[: sizes[path]].reshape(shape) == 1, 1, -1).astype(dtype)
        for (path, (shape, dtype)), part in zip(like.items(), parts, strict=True)
    }


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product of two arrays, in float32 at least."""
    wide = compute_dtype(a.dtype)
    return jnp.sum(a.astype(wide) * b.astype(wide))
