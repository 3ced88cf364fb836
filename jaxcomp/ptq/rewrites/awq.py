"""AWQ: the diagonal of each input searched by the error that rounding leaves in what its products give."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import Where, leaves_with_paths, matches
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Params, PyTree
from jaxcomp.ptq.rewrites.diagonals import Diagonal, Side, Vector
from jaxcomp.ptq.rewrites.results import Rewritten
from jaxcomp.ptq.rewrites.smoothing import Arrays, given, rewritten
from jaxcomp.trace.rows import Moments
from jaxcomp.trace.walk import Fn

OWNER = "awq"


def awq(
    fn: Fn, quantizer: Transform, *, steps: int = 20, where: Where = r".*", insert: bool = False
) -> Callable[..., Rewritten]:
    """Scales channels up before they are rounded, the more the larger their activations are, as far as that helps.

    Row j of a weight is multiplied by ``s_j = mean(x_j^2)^(a / 2)`` and what enters divided by it, as in
    :func:`~jaxcomp.ptq.rewrites.smoothing.smooth`. The exponent ``a`` in 0..1 is searched for each diagonal by the
    error of all products that read it, ``sum ||x (Q(s W) / s - W)||^2``, which second moments give without running the
    network; ``a = 0`` is among the candidates, so that no diagonal does worse than rounding alone on these data. The
    parameters that come out are not rounded yet.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      quantizer: what will round the weights, ``quantize(Int(4), per=Groups(64))`` say; leaves that it does not touch
        are not considered.
      steps: how many exponents are tried.
      where: which weights, by path or as a predicate of ``(path, array)``.
      insert: put a factor in front of the products that have no other place; see :class:`Rewritten`.

    Returns:
      A function of ``(params, moments, *args)`` giving :class:`Rewritten`; ``moments`` is what
      :func:`~jaxcomp.trace.rows.row_moments` or :func:`~jaxcomp.trace.moments.input_moments` saw.

    Raises:
      TypeError: ``quantizer`` is no transform.

    Raises (the function returned):
      TypeError: a leaf is compressed already.
      ValueError: ``moments`` have no entry for a selected weight, or one that is not finite.

    >>> from jaxcomp import Int, quantize
    >>> from jaxcomp.trace import input_moments
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> params = {"a": jnp.array([[9.0, 1.0]]), "b": jnp.array([[0.3], [1.0]])}
    >>> x = jnp.array([[1.0], [2.0]])
    >>> done = awq(fn, quantize(Int(2), where="b"), steps=4)(params, input_moments(fn)(params, x), x)
    >>> done.moved, done.difference < 1e-5
    (('a', 'b'), True)

    Source: Lin et al. 2023, arXiv:2306.00978, equation 5. Root mean squares stand for mean magnitudes, and the error is
    exact in place of measured on a few rows.
    """

    checked_transform(OWNER, quantizer)

    @wraps(fn)
    def scaled(params: Params, moments: Arrays, *args: PyTree, **kwargs: PyTree) -> Rewritten:
        shapes = jax.eval_shape(lambda p: quantizer.apply(quantizer.init(p), p), params)
        touched = {path for path, leaf in leaves_with_paths(shapes, is_leaf=is_compressed)[0] if is_compressed(leaf)}

        named = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
        second = {path: _of_channels(moments[path], named[path]) for path in moments.keys() & named.keys()}
        search = _Search(quantizer, second, steps, params)

        def choice(diagonal: Diagonal, leaves: Arrays) -> Vector | None:
            rounded = [s for s in diagonal.inputs if s.path in touched and matches(where, s.path, leaves[s.path])]
            return _searched(rounded, diagonal.size, leaves, search) if rounded else None

        return rewritten(OWNER, fn, choice, (params, args, kwargs), where=where, insert=insert)

    return scaled


def _of_channels(moments: Moments | jax.Array, leaf: jax.Array) -> jax.Array:
    """Second moments of the channels; those of a window's taps are averaged, for a channel has one factor at all."""
    if not isinstance(moments, Moments):
        return moments
    taps = math.prod(leaf.shape[i] for i in moments.window)
    *front, rows, _ = moments.second.shape
    if rows % taps:
        return moments.second
    return jnp.einsum("...tctd->...cd", moments.second.reshape(*front, taps, rows // taps, taps, rows // taps)) / taps


def _alone(params: Params, path: str, leaf: jax.Array) -> Params:
    """The tree with nothing but one leaf in it, so that a transform that goes by paths meets it where it was."""
    named, tree = leaves_with_paths(params)
    return jax.tree.unflatten(tree, [leaf if name == path else None for name, _ in named])


def _rounded(quantizer: Transform, path: str, leaf: jax.Array, params: Params) -> jax.Array:
    only = _alone(params, path, leaf)
    done = quantizer.apply(quantizer.init(only), only)
    return jnp.asarray(dense(dict(leaves_with_paths(done, is_leaf=is_compressed)[0])[path]))


class _Search(NamedTuple):
    """What a search needs to know, whatever the diagonal."""

    quantizer: Transform
    moments: Arrays
    steps: int
    params: Params


def _searched(sides: list[Side], size: int, leaves: Arrays, how: _Search) -> Vector:
    known = {s.path: given(OWNER, how.moments, s.path) for s in sides}
    diagonals = {path: np.diagonal(np.asarray(m), axis1=-2, axis2=-1) for path, m in known.items()}
    rms = np.sqrt(np.max([s.gathered(diagonals[s.path], size) for s in sides], axis=0))
    seen = rms > 0
    level = np.exp(np.log(rms[seen]).mean()) if seen.any() else 1.0
    base = np.where(seen, np.maximum(rms / level, 1e-4), 1).astype(np.float32)

    def error(exponent: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for side in sides:
            w = jnp.asarray(leaves[side.path])
            f = (jnp.asarray(side.factors(base, w.ndim)) ** exponent).astype(w.dtype)
            off = _rounded(how.quantizer, side.path, w * f, how.params) / f - w
            total += output_error(off, side, jnp.asarray(known[side.path]))
        return total

    exponents = np.linspace(0, 1, how.steps + 1, dtype=np.float32)
    errors = np.asarray(jax.jit(partial(jax.lax.map, error))(exponents))
    best = exponents[np.argmin(np.where(np.isfinite(errors), errors, np.inf))]
    return (base**best).astype(np.float32)


def output_error(d: jax.Array, side: Side, moments: jax.Array) -> jax.Array:
    """``sum ||x d||^2`` over the rows ``x`` that the moments are of."""
    front = moments.ndim - 2
    first = [*side.axes, *(i for i in range(d.ndim) if i not in side.axes)]
    n = moments.shape[-1]
    moved = d.transpose(first)
    flat = moved.reshape(*moved.shape[:front], n, math.prod(moved.shape[len(side.axes) :]))
    return jnp.einsum("...io,...ij,...jo->", flat, moments, flat, precision="highest")
