"""Images on their way into a network, in jit: augmented as uint8, then normalized by the train split's statistics."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What :func:`augment` draws for each image: a shift of up to ``shift`` pixels, and a flip left to right or none.

    ``fill`` says what moves in at the border: a mirror image of the picture, or zeros (black, before normalization).
    """

    shift: int
    flip: bool
    fill: Literal["reflect", "zero"]

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"Augmentation: shift must be at least 0 pixels, got {self.shift}")
        if self.fill not in ("reflect", "zero"):
            raise ValueError(f"Augmentation: fill must be 'reflect' or 'zero', got {self.fill!r}")


def augment(key: PRNGKeyArray, images: Shaped[Array, "n h w c"], how: Augmentation) -> Shaped[Array, "n h w c"]:
    """Each image shifted and flipped at random, by its own draw; any dtype, and fastest on uint8. Use it in jit.

    It equals padding by ``how.shift`` pixels, cropping at a random place and flipping half of the crops, but
    is one gather: a padded copy is never made.

    Raises:
      ValueError: a mirror image of the border is wanted and the shift is not smaller than the image.
    """
    n, h, w, _ = images.shape
    if how.fill == "reflect" and how.shift >= min(h, w):
        raise ValueError(f"augment: shift {how.shift} needs images larger than that to reflect, got {h} x {w}")
    shift_key, flip_key = jax.random.split(key)
    dy, dx = jax.random.randint(shift_key, (2, n, 1), -how.shift, how.shift + 1)
    rows = jnp.arange(h)[None, :] + dy
    cols = jnp.arange(w)[None, :] + dx
    if how.flip:
        cols = jnp.where(jax.random.bernoulli(flip_key, 0.5, (n, 1)), cols[:, ::-1], cols)
    source_rows, source_cols = _inside(rows, h), _inside(cols, w)
    out = images[jnp.arange(n)[:, None, None], source_rows[:, :, None], source_cols[:, None, :]]
    if how.fill == "reflect":
        return out
    seen = (rows == source_rows)[:, :, None] & (cols == source_cols)[:, None, :]
    return jnp.where(seen[..., None], out, jnp.zeros((), images.dtype))


def _inside(i: Array, size: int) -> Array:
    """Indices folded into 0..size-1 by reflection at the first and the last pixel."""
    return jnp.clip((size - 1) - jnp.abs(size - 1 - jnp.abs(i)), 0, size - 1)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [n, h, w, c], in units where 255 is 1.

    The sums are of integers, so they are exact and do not depend on the order.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 4096):  # in parts: bincount widens to int64
        for c in range(images.shape[-1]):
            counts[c] += np.bincount(images[start : start + 4096, ..., c].ravel(), minlength=256)
    values, n = np.arange(256), counts[0].sum()
    mean = counts @ values / n
    std = np.sqrt(counts @ values**2 / n - mean**2)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def normalize(
    images: UInt8[Array, "*n h w c"], mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*n h w c"]:
    """``(images / 255 - mean) / std`` by channel, computed in float32 and returned as ``dtype``.

    Raises:
      ValueError: ``mean`` or ``std`` is not one number a channel, or a ``std`` is not positive.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"normalize: wanted {channels} means and positive stds, got mean={mean}, std={std}")
    shape = (1,) * (images.ndim - 1) + (channels,)
    center = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return ((images.astype(jnp.float32) / 255 - center) / scale).astype(dtype)
