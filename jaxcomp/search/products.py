"""Products of a loss's curvature with vectors: of its Hessian, or of its Gauss-Newton matrix; no matrix is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcomp.core.slots import replace_slots
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import Leaf, Params, PyTree

Weights = Mapping[str, jax.Array]
"""The arrays that one differentiates by, by path."""
Product = Callable[[Weights], Weights]
"""A symmetric linear map."""


class Curved(ABC):
    """What has a value and a curvature at parameters and a batch."""

    @abstractmethod
    def at(self, rebuilt: Callable[[Weights], Params], weights: Weights, batch: tuple[PyTree, ...]) -> _Curve:
        """The value there and the product with the curvature, after what all products share has been computed once.

        Args:
          rebuilt: from the weights to the whole tree.
          weights: where.
          batch: the other arguments.
        """


_Curve = tuple[jax.Array, Product]


@dataclass(frozen=True)
class Exact(Curved):
    """The Hessian of a loss, by forward over reverse: the gradient is linearized once, and each vector goes through.

    Args:
      loss: ``loss(params, *batch)``, a scalar.
    """

    loss: Callable[..., jax.Array]

    def at(self, rebuilt: Callable[[Weights], Params], weights: Weights, batch: tuple[PyTree, ...]) -> _Curve:  # noqa: D102
        fn = jax.value_and_grad(lambda w: _scalar(self.loss(rebuilt(w), *batch)))
        (value, _), pushed = jax.linearize(fn, dict(weights))
        return value, lambda v: pushed(dict(v))[1]


@dataclass(frozen=True)
class GaussNewton(Curved, Spec):
    """The Gauss-Newton matrix ``Jᵀ H J``: of the loss as the outputs' function the Hessian H, of the network only J.

    It has no negative eigenvalue where the loss is convex in the outputs, and is the Hessian without the network's own
    curvature. Of a cross entropy of logits it is the Fisher information of the network's own predictions, in which
    labels do not occur (Martens 2014, arXiv:1412.1193, section 9).

    Args:
      model: ``model(params, *batch)`` to outputs.
      loss: ``loss(outputs, *batch)``, a scalar.

    >>> from jaxcomp.search import traces
    >>> squared = GaussNewton(lambda p, x: jnp.tanh(x @ p["w"]), lambda out, x: jnp.sum(out**2) / 2)
    >>> found = traces(squared, {"w": jnp.zeros((2, 1))}, [(jnp.array([[3.0, 4.0]]),)], key=jax.random.key(0))
    >>> abs(found["w"].value - 25) < 5 * found["w"].error
    True
    """

    model: Callable[..., PyTree]
    loss: Callable[..., jax.Array]

    def at(self, rebuilt: Callable[[Weights], Params], weights: Weights, batch: tuple[PyTree, ...]) -> _Curve:  # noqa: D102
        weights = dict(weights)
        outputs, pushed = jax.linearize(lambda w: self.model(rebuilt(w), *batch), weights)
        pulled = jax.linear_transpose(pushed, weights)
        outer = jax.value_and_grad(lambda out: _scalar(self.loss(out, *batch)))
        (value, _), bent = jax.linearize(outer, outputs)
        return value, lambda v: pulled(bent(pushed(dict(v)))[1])[0]


def curved(loss: Callable[..., jax.Array] | Curved) -> Curved:
    """A loss as what has a curvature; of a function its Hessian."""
    return loss if isinstance(loss, Curved) else Exact(loss)


def _scalar(value: jax.Array) -> jax.Array:
    if jnp.shape(value) != ():
        raise ValueError(
            f"the loss has shape {jnp.shape(value)}, wanted a scalar; take the mean over the examples of a batch."
        )
    return value


class Opened:
    """A tree taken apart: arrays, which a jitted function takes, and the rest, which may be functions.

    Args:
      params: any tree of parameters, some of them perhaps compressed.
    """

    def __init__(self, params: Params) -> None:
        leaves, self._treedef = jax.tree.flatten(params)
        self._is_array = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]
        self._rest = [None if known else x for known, x in zip(self._is_array, leaves, strict=True)]
        self.arrays = [x for known, x in zip(self._is_array, leaves, strict=True) if known]

    def rebuilt(self, arrays: list[jax.Array], new: Mapping[str, Leaf]) -> Params:
        """The tree of such arrays, with others at some slot paths."""
        left = iter(arrays)
        leaves = [next(left) if known else x for known, x in zip(self._is_array, self._rest, strict=True)]
        return replace_slots(jax.tree.unflatten(self._treedef, leaves), new)
