"""What a transform does, said in frozen values: grids of numbers."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

MAX_BITS = 8


class Spec:
    """What every frozen spec is: a value that says what to do; files name it by its class and its fields."""


def check_bits(owner: str, bits: Any, least: int = 2) -> None:
    """Raises ValueError where ``bits`` is not an integer in ``least..8``."""
    if not is_integer(bits) or not least <= bits <= MAX_BITS:
        raise ValueError(f"{owner}: bits must be an integer in {least}..{MAX_BITS}, got {bits!r}.")


def check_group(owner: str, group: Any, name: str = "group") -> None:
    """Raises ValueError where ``group`` is neither None nor a positive integer."""
    if group is not None and (not is_integer(group) or group < 1):
        raise ValueError(f"{owner}: {name} must be a positive integer or None, got {group!r}.")


def check_key(owner: str, key: object) -> None:
    """Raises ValueError where ``key`` is not one random key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = isinstance(key, jax.Array) and dtype == jnp.uint32 and len(key.shape) == 1
    if not typed and not raw:
        raise ValueError(f"{owner}: key must be one key such as jax.random.key(0), got {key!r}.")


def checked_fraction(owner: str, fraction: Any, wanted: str = "a number in [0, 1)") -> float:
    """A constant sparsity as a float.

    Raises:
      ValueError: it is not a number in [0, 1).
    """
    if isinstance(fraction, numbers.Real) and not isinstance(fraction, bool) and 0 <= float(fraction) < 1:
        return float(fraction)
    raise ValueError(f"{owner}: sparsity must be {wanted}, got {fraction!r}.")


@dataclass(frozen=True)
class Local:
    """Each leaf meets the sparsity by itself."""


@dataclass(frozen=True)
class Global:
    """All selected leaves together meet the sparsity: one threshold for the whole tree."""


def is_integer(x: object) -> TypeGuard[int]:
    """Whether it is an integer, and no boolean."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)
