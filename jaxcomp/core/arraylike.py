"""Leaves in a place where an array is wanted: they act as the array that they stand for, or name the mend."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxcomp.core.types import DType, Leaf

Binary = Callable[["ArrayLike", Leaf], jax.Array]


def _both(op: Callable[[Leaf, Leaf], Leaf]) -> tuple[Binary, Binary]:
    """An operator's method, and that of its right side."""

    def left(self: ArrayLike, other: Leaf) -> jax.Array:
        return op(self.__jax_array__(), _array_of(other))

    def right(self: ArrayLike, other: Leaf) -> jax.Array:
        return op(_array_of(other), self.__jax_array__())

    return left, right


def _array_of(x: Leaf) -> Leaf:
    return x.__jax_array__() if isinstance(x, ArrayLike) else x


class ArrayLike(ABC):
    """An object that stands for an array, where one forgot to materialize: products, sums, indexing, jnp and numpy.

    Each use makes the array anew, so a tree that is used many times is materialized once. What else an array has, as
    ``reshape``, is an AttributeError that says so. ``==`` is of objects, as ever of leaves.

    >>> import jax.numpy as jnp
    >>> from jaxcomp.core.wrappers import Masked
    >>> leaf = Masked(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True], [False]]))
    >>> (jnp.ones((1, 2)) @ leaf).tolist(), (2 * leaf)[0].tolist(), np.asarray(leaf).sum().tolist()
    ([[1.0, 2.0]], [2.0, 4.0], 3.0)
    """

    __array_priority__ = 100  # as jax.Array's: numpy leaves operators to it

    @abstractmethod
    def __jax_array__(self) -> jax.Array:
        """The array."""

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.__jax_array__(), dtype)

    def __getitem__(self, index: Leaf) -> jax.Array:
        return self.__jax_array__()[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.__jax_array__())

    def __neg__(self) -> jax.Array:
        return -self.__jax_array__()

    def __abs__(self) -> jax.Array:
        return abs(self.__jax_array__())

    def __getattr__(self, name: str) -> object:
        kind = type(self).__name__
        if not name.startswith("_") and hasattr(jax.Array, name):
            raise AttributeError(
                f"{kind} has no attribute {name!r}: it is a compressed leaf that stands for an array; materialize"
                " first: jaxcomp.materialize(tree)."
            )
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    __add__, __radd__ = _both(operator.add)
    __sub__, __rsub__ = _both(operator.sub)
    __mul__, __rmul__ = _both(operator.mul)
    __matmul__, __rmatmul__ = _both(operator.matmul)
    __truediv__, __rtruediv__ = _both(operator.truediv)
    __pow__, __rpow__ = _both(operator.pow)
    __lt__, __gt__ = _both(operator.lt)
    __le__, __ge__ = _both(operator.le)
