"""What shares one number or one table: the vocabulary of ``per=``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxcomp.core.specs import Global, Local, Spec, is_integer


@dataclass(frozen=True)
class Channels(Spec):
    """Each index of ``axes`` has a table of its own.

    Args:
      axes: an axis or several; the default is the output features of a Flax kernel.

    Raises:
      ValueError: an axis that is no integer.
    """

    axes: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        named = self.axes if isinstance(self.axes, tuple | list) else (self.axes,)
        if not all(map(is_integer, named)):
            raise ValueError(f"Channels: axes must be an integer, or several, got {self.axes!r}.")


@dataclass(frozen=True)
class Buckets(Spec):
    """A leaf's elements in C order are cut into buckets of ``size``, each with a table of its own.

    Raises:
      ValueError: a size below 1.

    Source: Wu et al. 2018, PocketFlow, non-uniform quantization with buckets.
    """

    size: int

    def __post_init__(self) -> None:
        if not is_integer(self.size) or self.size < 1:
            raise ValueError(f"Buckets: size must be a positive integer, got {self.size!r}.")


Tables = Local | Global | Channels | Buckets
