"""What a transform does, said in frozen values: grids of numbers."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

MAX_BITS = 8


class Spec:
    """What every frozen spec is: a value that says what to do; files name it by its class and its fields.

    Class attributes:
      goes_into: the transform that takes it, for messages.
    """

    goes_into: ClassVar[str] = ""


def known(base: type, name: str) -> type[Any]:
    """The class of this name among the subclasses of ``base``; jaxcomp's own before others.

    Raises:
      ValueError: there is none, or there are several.
    """
    found: dict[str, type] = {}  # of one definition that ran twice, as in a notebook, the last
    left: list[type] = base.__subclasses__()
    while left:
        cls = left.pop(0)
        if cls.__name__ == name:
            found[f"{cls.__module__}.{cls.__qualname__}"] = cls
        left += cls.__subclasses__()
    own = [cls for cls in found.values() if cls.__module__.partition(".")[0] == "jaxcomp"]
    if len(own or found) == 1:
        return own[0] if own else next(iter(found.values()))
    if found:
        raise ValueError(f"is made of {name!r}, and there are several: {', '.join(found)}; rename all but one")
    raise ValueError(f"is made of {name!r}, which is not known here; import the module that defines it")


def check_bits(owner: str, bits: object, least: int = 2) -> None:
    """Raises ValueError where ``bits`` is not an integer in ``least..8``."""
    if not is_integer(bits) or not least <= bits <= MAX_BITS:
        raise ValueError(f"{owner}: bits must be an integer in {least}..{MAX_BITS}, got {bits!r}.")


def check_positive(owner: str, value: object, name: str) -> None:
    """Raises ValueError where ``value`` is neither None nor a positive integer."""
    if value is not None and (not is_integer(value) or value < 1):
        raise ValueError(f"{owner}: {name} must be a positive integer or None, got {value!r}.")


def check_key(owner: str, key: object) -> None:
    """Raises ValueError where ``key`` is not one random key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = isinstance(key, jax.Array) and dtype == jnp.uint32 and len(key.shape) == 1
    if not typed and not raw:
        raise ValueError(f"{owner}: key must be one key such as jax.random.key(0), got {key!r}.")


def checked_fraction(owner: str, fraction: object, wanted: str = "a number in [0, 1)") -> float:
    """A constant sparsity as a float; one of NumPy's narrower types as the decimal that it prints.

    Raises:
      ValueError: it is not a number in [0, 1).
    """
    if is_number(fraction) and 0 <= fraction < 1:
        return float(str(fraction)) if isinstance(fraction, np.floating) else float(fraction)
    raise ValueError(f"{owner}: sparsity must be {wanted}, got {fraction!r}{as_percent(fraction)}.")


def as_percent(amount: object) -> str:
    """The end of a message on an amount that may be meant as percent.

    >>> as_percent(80), as_percent(-1)
    ('; for 80 percent write 0.8', '')
    """
    return f"; for {amount:g} percent write {amount / 100:g}" if is_number(amount) and 1 <= amount < 100 else ""


def written(fraction: float) -> Fraction:
    """The decimal that a float prints, which is what one wrote: ``0.1`` is a tenth, not the nearest binary number.

    >>> written(0.1)
    Fraction(1, 10)
    """
    return Fraction(repr(float(fraction)))


def share_of(fraction: float, total: int) -> int:
    """``fraction * total`` as a count, half to even; the fraction is the decimal that it prints, the product exact.

    Python's ``round(fraction * total)`` is the same but where floats miss a half: 0.29 of 150 is 43.5, and so 44, which
    floats make 43.49999999999999.

    >>> [share_of(0.1, 5), share_of(0.3, 5), share_of(0.95, 150), share_of(0.29, 150)]
    [0, 2, 142, 44]
    """
    return round(written(fraction) * total)


@dataclass(frozen=True)
class Local(Spec):
    """Each leaf meets the sparsity by itself."""


@dataclass(frozen=True)
class Global(Spec):
    """All selected leaves together meet the sparsity: one threshold for the whole tree."""


def is_integer(x: object) -> TypeGuard[int]:
    """Whether it is an integer, and no boolean."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_number(x: object) -> TypeGuard[float]:
    """Whether it is a real number, perhaps infinite, and neither a boolean nor NaN.

    >>> is_number(0.5), is_number(1), is_number(True), is_number(float("nan")), is_number("1")
    (True, True, False, False, False)
    """
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and not math.isnan(x)
