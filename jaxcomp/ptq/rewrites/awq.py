"""AWQ: the diagonal of each input searched by the error that rounding leaves in what its products give."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import Where, leaves_with_paths, matches
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, PyTree
from jaxcomp.ptq.rewrites.diagonals import Diagonal, Side
from jaxcomp.ptq.rewrites.results import Rewritten
from jaxcomp.ptq.rewrites.smoothing import Arrays, given, rewritten
from jaxcomp.trace.walk import Fn

OWNER = "awq"


def awq(
    fn: Fn, quantizer: Transform, *, steps: int = 20, where: Where = r".*", insert: bool = False
) -> Callable[..., Rewritten]:
    """Scales channels up before they are rounded, the more the larger their activations are, as far as that helps.

    Row j of a weight is multiplied by ``s_j = mean(x_j^2)^(a / 2)`` and what enters divided by it, as in
    :func:`~jaxcomp.ptq.rewrites.smoothing.smooth`. The exponent ``a`` in 0..1 is searched for each diagonal by the error
    of all products that read it, ``sum ||x (Q(s W) / s - W)||^2``, which second moments give without running the
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
      :func:`~jaxcomp.trace.moments.input_moments` saw.

    Raises (the function returned):
      TypeError: a leaf is compressed already.
      ValueError: ``moments`` have no entry for a selected weight, or one that is not finite.

    Source: Lin et al. 2023, arXiv:2306.00978, equation 5. Root mean squares stand for mean magnitudes, and the error is
    exact in place of measured on a few rows.
    """

    @wraps(fn)
    def scaled(params: Params, moments: Arrays, *args: PyTree, **kwargs: PyTree) -> Rewritten:
        shapes = jax.eval_shape(lambda p: quantizer.apply(quantizer.init(p), p), params)
        touched = {path for path, leaf in leaves_with_paths(shapes, is_leaf=is_compressed)[0] if is_compressed(leaf)}

        def choice(diagonal: Diagonal, leaves: Arrays) -> jax.Array | None:
            rounded = [s for s in diagonal.inputs if s.path in touched and matches(where, s.path, leaves[s.path])]
            return _searched(rounded, diagonal.size, leaves, (quantizer, moments, steps, params)) if rounded else None

        return rewritten(OWNER, fn, choice, (params, args, kwargs), where=where, insert=insert)

    return scaled


def _alone(params: Params, path: str, leaf: jax.Array) -> Params:
    """The tree with nothing but one leaf in it, so that a transform that goes by paths meets it where it was."""
    named, tree = leaves_with_paths(params)
    return jax.tree.unflatten(tree, [leaf if name == path else None for name, _ in named])


def _rounded(quantizer: Transform, path: str, leaf: jax.Array, params: Params) -> jax.Array:
    only = _alone(params, path, leaf)
    done = quantizer.apply(quantizer.init(only), only)
    return jnp.asarray(dense(dict(leaves_with_paths(done, is_leaf=is_compressed)[0])[path]))


def _searched(
    sides: list[Side], size: int, leaves: Arrays, how: tuple[Transform, Arrays, int, Params]
) -> jax.Array:
    quantizer, moments, steps, params = how
    known = {s.path: given(OWNER, {k: getattr(m, "second", m) for k, m in moments.items()}, s.path) for s in sides}
    power = jnp.zeros((size,))
    for s in sides:
        diag = jnp.diagonal(known[s.path], axis1=-2, axis2=-1)
        power = jnp.maximum(power, s.gathered(_laid(diag, s), size))
    rms = jnp.sqrt(power)
    seen = rms > 0
    level = jnp.exp(jnp.sum(jnp.where(seen, jnp.log(jnp.where(seen, rms, 1.0)), 0.0)) / jnp.maximum(seen.sum(), 1))
    base = jnp.where(seen, jnp.maximum(rms / jnp.maximum(level, 1e-30), 1e-4), 1.0)

    def error(exponent: jax.Array) -> jax.Array:
        s = base**exponent
        total = jnp.float32(0)
        for side in sides:
            w = leaves[side.path]
            f = side.factors(s, w.ndim).astype(w.dtype)
            total += output_error(_rounded(quantizer, side.path, w * f, params) / f - w, side, known[side.path])
        return total

    exponents = jnp.linspace(0.0, 1.0, steps + 1, dtype=jnp.float32)
    errors = jax.jit(partial(jax.lax.map, error))(exponents)
    return base ** exponents[jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))]


def _laid(values: jax.Array, side: Side) -> jax.Array:
    """What is one a channel, the contracted axes as one, in the shape of the side's channels."""
    return values.reshape(side.channel.shape)


def output_error(d: jax.Array, side: Side, moments: jax.Array) -> jax.Array:
    """``sum ||x d||^2`` over the rows ``x`` that the moments are of."""
    front = moments.ndim - 2
    first = [*side.axes, *(i for i in range(d.ndim) if i not in side.axes)]
    n = moments.shape[-1]
    moved = d.transpose(first)
    flat = moved.reshape(*moved.shape[:front], n, math.prod(moved.shape[len(side.axes) :]))
    return jnp.einsum("...io,...ij,...jo->", flat, moments, flat, precision="highest")
