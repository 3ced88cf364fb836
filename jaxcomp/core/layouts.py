"""What shares one number (a scale) or one table: the vocabulary of ``per=``, the same for every method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcomp.core.roles import INDEXED, OUTPUT, AxisRoles
from jaxcomp.core.specs import Spec, is_integer
from jaxcomp.core.types import Shape

RolesOf = Callable[[], AxisRoles]
"""The roles of an array's axes, asked for only where a layout needs them; raises ValueError where they are unknown."""


class Blocks(NamedTuple):
    """How an array is cut: each number or table serves one block.

    Fields:
      shape: how many blocks there are along each axis of the array, each a divisor of the axis; 1 is shared along it.
      row: where it is not 0, the array is flattened into rows of so many elements, the last one padded, and ``shape``
        is that of the rows' blocks, ``(rows, 1)``.
    """

    shape: Shape
    row: int = 0


class Layout(Spec, ABC):
    """What shares one number or table; a frozen value."""

    @abstractmethod
    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:
        """The blocks of an array.

        Args:
          shape: of the array.
          roles: what its axes do; called only where the layout does not name its axes.

        Raises:
          ValueError: the array has not these axes, or they do not divide; the message goes after owner and path.
        """


@dataclass(frozen=True)
class Tensor(Layout):
    """One for the whole array.

    >>> Tensor().layout((3, 4), lambda: None)
    Blocks(shape=(1, 1), row=0)
    """

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        return Blocks((1,) * len(shape))


@dataclass(frozen=True)
class Channels(Layout):
    """Each index of the axes over which no product sums has its own: output features, heads, stacked layers.

    Args:
      axes: an axis or several, where they are to be others; ``-1`` is the output features of a Flax kernel, ``0`` those
        of an Equinox or torch weight, ``(0, -1)`` those of Flax kernels that a scan has stacked.

    Raises:
      ValueError: an axis that is no integer.

    >>> Channels().layout((3, 4), lambda: AxisRoles(("contracted", "output"))).shape
    (1, 4)
    >>> Channels(0).layout((3, 4), lambda: None).shape
    (3, 1)
    """

    axes: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        named = self.axes if isinstance(self.axes, tuple | list) else (self.axes,)
        if self.axes is not None and not all(map(is_integer, named)):
            raise ValueError(f"Channels: axes must be an integer, or several, got {self.axes!r}.")

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        own = roles().channels if self.axes is None else _places(self.axes, shape)
        return Blocks(tuple(n if i in own else 1 for i, n in enumerate(shape)))


@dataclass(frozen=True)
class Groups(Layout):
    """Each ``size`` neighbours along one axis, at each index of all others, have their own.

    Args:
      size: of a group; it divides the axis.
      axis: the default is the last axis that products sum over, a convolution's window apart; of a table that is only
        looked up, the last axis of its rows.

    Raises:
      ValueError: a size below 1, or an axis that is no integer.

    >>> Groups(32).layout((64, 10), lambda: AxisRoles(("contracted", "output"))).shape
    (2, 10)
    >>> Groups(32).layout((10, 64), lambda: AxisRoles(("indexed", "output"))).shape
    (10, 2)
    """

    size: int
    axis: int | None = None

    def __post_init__(self) -> None:
        if not is_integer(self.size) or self.size < 1:
            raise ValueError(f"Groups: size must be a positive integer, got {self.size!r}.")
        if self.axis is not None and not is_integer(self.axis):
            raise ValueError(f"Groups: axis must be an integer, got {self.axis!r}.")

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        axis = _last_input(shape, roles()) if self.axis is None else _places(self.axis, shape)[0]
        if shape[axis] % self.size:
            raise ValueError(
                f"has {shape[axis]} elements along axis {axis} of shape {shape}, which groups of {self.size} do not"
                f" divide; take a divisor of {shape[axis]}, another axis, or leave this leaf out by a rule"
            )
        return Blocks(tuple(n // self.size if i == axis else n for i, n in enumerate(shape)))


@dataclass(frozen=True)
class Tiles(Layout):
    """Blocks of ``shape`` along the last axes; each index of the axes before them has its own blocks.

    Raises:
      ValueError: sides that are not positive integers.

    >>> Tiles((128, 128)).layout((3, 256, 512), lambda: None).shape
    (3, 2, 4)
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list) or not self.shape or not all(map(is_integer, self.shape)):
            raise ValueError(f"Tiles: shape must be a tuple of positive integers, got {self.shape!r}.")
        object.__setattr__(self, "shape", tuple(self.shape))
        if min(self.shape) < 1:
            raise ValueError(f"Tiles: shape must be a tuple of positive integers, got {self.shape!r}.")

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        if len(self.shape) > len(shape):
            raise ValueError(f"has shape {shape}, which has fewer axes than tiles of {self.shape}")
        before, last = shape[: len(shape) - len(self.shape)], shape[len(shape) - len(self.shape) :]
        if any(n % t for n, t in zip(last, self.shape, strict=True)):
            raise ValueError(
                f"has shape {shape}, which tiles of {self.shape} do not divide; take divisors of {last}, or leave this"
                " leaf out by a rule"
            )
        return Blocks((*before, *(n // t for n, t in zip(last, self.shape, strict=True))))


@dataclass(frozen=True)
class Buckets(Layout):
    """An array's elements in C order are cut into buckets of ``size``, the last one shorter, each with its own.

    Raises:
      ValueError: a size below 1.

    >>> Buckets(5).layout((3, 4), lambda: None)
    Blocks(shape=(3, 1), row=5)

    Source: Wu et al. 2018, PocketFlow, non-uniform quantization with buckets; Polino et al. 2018, arXiv:1802.05668.
    """

    size: int

    def __post_init__(self) -> None:
        if not is_integer(self.size) or self.size < 1:
            raise ValueError(f"Buckets: size must be a positive integer, got {self.size!r}.")

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        count = 1
        for n in shape:
            count *= n
        return Blocks((-(-count // self.size), 1), self.size)


@dataclass(frozen=True)
class Tokens(Layout):
    """Of activations: each index of the axes over which the site does not sum: a row of a dot, an image of a
    convolution.

    >>> Tokens().layout((5, 8), lambda: AxisRoles(("output", "contracted"))).shape
    (5, 1)
    """

    def layout(self, shape: Shape, roles: RolesOf) -> Blocks:  # noqa: D102
        own = roles().channels
        return Blocks(tuple(n if i in own else 1 for i, n in enumerate(shape)))


def checked_layout(owner: str, per: Any, kinds: tuple[type, ...] = (Tensor, Channels, Groups, Tiles, Buckets)) -> Any:
    """``per`` itself.

    Raises:
      TypeError: it is none of the kinds that the owner has.
    """
    if isinstance(per, kinds):
        return per
    wanted = ", ".join(_EXAMPLES.get(kind.__name__, f"{kind.__name__}()") for kind in kinds)
    raise TypeError(f"{owner}: per must be one of {wanted}, got {per!r}.")


_EXAMPLES = {
    "Channels": "Channels(axes)",
    "Groups": "Groups(size)",
    "Tiles": "Tiles(shape)",
    "Buckets": "Buckets(size)",
}


def _places(axes: int | tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """The axes, not negative and in order."""
    named = axes if isinstance(axes, tuple | list) else (axes,)
    for a in named:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"has shape {shape} and no axis {a}; name axes in {-len(shape)}..{len(shape) - 1}")
    return tuple(sorted({a % len(shape) for a in named}))


def _last_input(shape: Shape, roles: AxisRoles) -> int:
    rows = [i for i, name in enumerate(roles.names) if name == OUTPUT] if INDEXED in roles.names else []
    if not roles.inputs and rows:
        return rows[-1]
    if not roles.inputs:
        raise ValueError(
            f"has shape {shape}, and no product sums over an axis of it ({', '.join(roles.names)}); name the axis, as"
            " in Groups(size, axis)"
        )
    return roles.inputs[-1]
