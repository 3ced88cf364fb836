"""What stands for a variable while a program is written as a graph: a host array, codes of a weight, a graph's tensor.

All three are *compact*: an axis along which a value repeats one element has length 1 in what is held, whatever its
``shape`` says, for the operators of ONNX broadcast. A tensor may also lie transposed, as an image does in NCHW whose
program says NHWC; whoever needs it otherwise asks the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxcomp.activations.codes import Codes
from jaxcomp.core.types import DType

Dims = tuple[int, ...]
"""A shape; a dimension may be one that is known when the program runs alone, of ``jax.export.symbolic_shape``."""


@dataclass(frozen=True, eq=False)
class Const:
    """An array that is known now.

    Attributes:
      array: on the host; each axis has the length of ``shape``, or 1.
      shape: of the value.
    """

    array: np.ndarray
    shape: Dims

    @classmethod
    def of(cls, value: object) -> Const:
        """An array or a number of JAX or NumPy; a number of Python in JAX's type."""
        if is_key(value):
            return cls(value, tuple(value.shape))  # type: ignore[arg-type,attr-defined]
        array = np.asarray(value, getattr(value, "dtype", None))
        if not hasattr(value, "dtype"):
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        return cls(array, tuple(array.shape))

    @property
    def dtype(self) -> DType:
        """Of its elements."""
        return self.array.dtype

    def full(self) -> np.ndarray:
        """Every element."""
        if is_key(self.array):
            return self.array
        return np.broadcast_to(self.array, self.shape)


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight in codes, moved at most: ``dense == (codes - zero) * scale``; it is of its codes' shape."""

    codes: Codes

    @property
    def shape(self) -> Dims:
        """Of the weight."""
        return tuple(self.codes.codes.shape)

    @property
    def dtype(self) -> DType:
        """Of the weight."""
        return self.codes.dtype

    def dense(self) -> Const:
        """The weight."""
        return Const.of(np.asarray(self.codes.dense()))


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    Attributes:
      name: in the graph.
      shape, dtype: of the value.
      order: how it lies: axis ``k`` of what the graph holds is axis ``order[k]`` of the value.
      repeats: the value's axes that have length 1 in the graph, whatever ``shape`` says.
    """

    name: str
    shape: Dims
    dtype: DType
    order: tuple[int, ...]
    repeats: frozenset[int] = field(default=frozenset())

    @property
    def plain(self) -> bool:
        """Whether its axes lie in the value's order."""
        return self.order == tuple(range(len(self.shape)))

    @property
    def held(self) -> Dims:
        """Its shape in the graph."""
        return tuple(1 if i in self.repeats else self.shape[i] for i in self.order)


Value = Const | Coded | Tensor


def is_key(value: object) -> bool:
    """Whether an array holds random keys, which only equations that run now can take."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_static(shape: Sequence[object]) -> bool:
    """Whether every dimension is known now."""
    return all(isinstance(n, int | np.integer) for n in shape)


def one_where(array: np.ndarray, shape: Dims) -> frozenset[int]:
    """The axes along which a compact array repeats its one element."""
    return frozenset(i for i, n in enumerate(array.shape) if n == 1 and not is_one(shape[i]))


def is_one(n: object) -> bool:
    """Whether a dimension is known to be 1."""
    return isinstance(n, int | np.integer) and n == 1


def repeats_of(value: Const | Tensor) -> frozenset[int]:
    """The axes along which a value repeats one element."""
    return one_where(value.array, value.shape) if isinstance(value, Const) else value.repeats
