"""What stands for each parameter while a program is written: what is small in JAX is small in the file.

Integer codes stay codes up to their product. Any other compressed leaf (a codebook, a table of levels, a mask) is
written as its packed fields and its own ``materialize``, which runtimes run once, when they load the file. Leaves of
factors are opened: the function is traced as ``factored`` runs it, and each factor is a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations import factored
from jaxcomp.activations.codes import Codes, codes_of
from jaxcomp.core.leaves import dense, is_compressed, pack
from jaxcomp.core.packed import Packed, unpacked
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.core.wrappers import Masked
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Run
from jaxcomp.export.onnx.values import Coded, Const, Value
from jaxcomp.factorization.leaves import FactorLeaf
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.program import is_array_like, shapes_of


def is_whole(x: object) -> bool:
    """Whether a subtree is one parameter: a compressed leaf that is no product of factors."""
    return is_compressed(x) and not isinstance(x, FactorLeaf)


def opened(fn: Callable[..., PyTree], params: Params) -> tuple[Callable[..., PyTree], PyTree]:
    """The function as it is written, and the shapes of its parameters: with leaves of factors it runs on these."""
    found = [x for x in jax.tree.leaves(params, is_leaf=is_compressed) if isinstance(x, FactorLeaf)]
    if not found:
        return fn, shapes_of(params)
    return factored(fn), jax.tree.map(lambda x: shapes_of([x])[0], params, is_leaf=is_whole)


def values_of(graph: Graph, params: Params, run: Run) -> list[Value]:
    """What stands for each array of the parameters, in order; ``run`` writes a leaf's own program."""
    named, _ = leaves_with_paths(params, is_leaf=is_whole)
    leaves = [leaf for _, leaf in named if is_array_like(leaf)]

    def write(i: int) -> Write:
        return lambda jaxpr, values: run(graph, jaxpr, values, ("leaf", i))

    return [_value(graph, leaf, write(i)) for i, leaf in enumerate(leaves)]


Write = Callable[[Closed, Sequence[Value]], list[Value]]


def _value(graph: Graph, leaf: Leaf, write: Write) -> Value:
    if not is_compressed(leaf):
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4 and leaf.ndim > 1
        return _held(graph, leaf) if narrow else Const.of(leaf)  # or a cast to float32 would be done now
    codes = codes_of(leaf)
    if isinstance(codes, Codes):
        return Coded(codes)
    packed = pack(leaf)
    if isinstance(packed, Masked) and not is_compressed(packed.values):
        return _written(graph, _few, _kept(packed), write)
    return _written(graph, dense, packed, write)


def _held(graph: Graph, array: Leaf) -> Value:
    """An array as a constant of the graph that nothing here computes with."""
    held = np.asarray(array)
    return graph.tensor(graph.constant(held), tuple(held.shape), held.dtype)


def _written(graph: Graph, fn: Callable[..., jax.Array], tree: PyTree, write: Write) -> Value:
    """What a function makes of arrays, written into the graph."""
    arrays, structure = jax.tree.flatten(tree)
    jaxpr = jax.make_jaxpr(lambda *given: fn(jax.tree.unflatten(structure, given)))(*arrays)
    return write(jaxpr, [_held(graph, a) for a in arrays])[0]


def _kept(leaf: Masked) -> tuple[Packed, jax.Array]:
    """The mask, spread over the values, and the values where it is True."""
    mask = np.broadcast_to(np.asarray(unpacked(leaf.mask)), leaf.shape)
    return Packed.of(jnp.asarray(mask), 1, 0), jnp.asarray(
        np.append(np.asarray(leaf.values)[mask], np.zeros(1)), leaf.dtype
    )


def _few(kept: tuple[Packed, jax.Array]) -> jax.Array:
    """The array of which only the values under a mask are stored."""
    mask = kept[0].unpack()
    place = jnp.cumsum(mask.reshape(-1).astype(jnp.int32)) - 1
    return jnp.where(mask, kept[1].at[place].get(mode="clip").reshape(mask.shape), jnp.zeros((), kept[1].dtype))
