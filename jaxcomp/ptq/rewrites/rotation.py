"""Rotation: residual streams, and channels of heads, turned by a matrix that the function cannot see."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.slots import replace_slots
from jaxcomp.core.types import Key, Params, PyTree
from jaxcomp.ptq.rewrites.diagonals import Diagonal, Vector, arrays_of, diagonals_of
from jaxcomp.ptq.rewrites.results import Left, Rewritten, checked, difference
from jaxcomp.ptq.rewrites.smoothing import Arrays
from jaxcomp.ptq.rewrites.turning import Axis, turned, turns_of
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Fn


def rotate(fn: Fn, *, least: int = 8) -> Callable[..., Rewritten]:
    """Turns residual streams and heads by random orthogonal matrices, so that no channel is an outlier.

    What is turned is found in the program: all parameters that make a stream, or read it, turn together, through sums,
    products with numbers, and norms. A norm's scale is first folded into the weights that read it, and is 1 then; one
    whose scale is read elsewhere too (as in a post-norm transformer) keeps the stream as it is. The matrices keep the
    vector of ones, so that layer norms, which subtract the mean, are as exact as RMS norms are.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      least: channels fewer than this are not turned.

    Returns:
      A function of ``(params, key, *args)`` giving :class:`Rewritten`; ``left`` names the weights that were not turned.

    Raises (the function returned):
      TypeError: a leaf is compressed already.

    >>> fn = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> params = {"a": jnp.eye(8), "b": jnp.eye(8)}
    >>> done = rotate(fn)(params, jax.random.key(0), jnp.eye(8))
    >>> done.moved, bool(jnp.allclose(done.params["a"] @ done.params["b"], jnp.eye(8), atol=1e-5))
    (('a', 'b'), True)

    Source: Ashkboos et al. 2024, arXiv:2404.00456, and SliceGPT, arXiv:2401.15024, for norms. Random orthogonal
    matrices stand for Hadamard ones, and keep the vector of ones, so that no mean need be folded.
    """

    @wraps(fn)
    def rotated(params: Params, key: Key, *args: PyTree, **kwargs: PyTree) -> Rewritten:
        before = arrays_of(params, "rotate")
        program = trace(fn, params, *args, **kwargs)
        after, moved = _norms_folded(program, dict(before))
        ones = {path for path, leaf in after.items() if _is_one(leaf)}
        groups: dict[int, list[Axis]] = {}
        for axis in turns_of(program, ones):
            if axis.size >= least:
                groups.setdefault(abs(axis.name), []).append(axis)
        for i, axes in enumerate(group for group in groups.values() if len(group) > 1):
            q = rotation(jax.random.fold_in(key, i), axes[0].size)
            for axis in axes:
                after[axis.path] = turned(jnp.asarray(after[axis.path]), axis.axis, q)
                moved[axis.path] = None
        new = replace_slots(params, {path: after[path] for path in moved})
        weights = dict.fromkeys(site.leaf for site in sites_of(program) if site.leaf)
        left = tuple(Left(path, _WHY) for path in weights if path not in moved)
        worst = difference((fn, params), (fn, new), (args, kwargs))
        return Rewritten(new, fn, tuple(moved), left, checked("rotate", worst, tuple(moved)))

    return rotated


_WHY = (
    "what it reads and what it makes pass through what a rotation does not: an elementwise function, or a norm's scale"
)


def rotation(key: Key, n: int) -> jax.Array:
    """A random orthogonal matrix that keeps the vector of ones.

    >>> q = rotation(jax.random.key(0), 8)
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(8), atol=1e-5)), bool(jnp.allclose(q.sum(0), 1, atol=1e-5))
    (True, True)
    """
    if n == 1:
        return jnp.ones((1, 1))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1))
    basis = np.linalg.qr(np.concatenate([np.ones((n, 1)), np.eye(n)[:, 1:]], axis=1))[0][:, 1:]
    inner, triangle = np.linalg.qr(rng.normal(size=(n - 1, n - 1)))
    inner *= np.where(np.diag(triangle) < 0, -1, 1)
    return jnp.asarray(basis @ inner @ basis.T + 1 / n, jnp.float32)


def _is_one(leaf: jax.Array) -> bool:
    return leaf.ndim > 0 and bool(np.all(np.asarray(leaf) == 1))


def _norms_folded(program: Program, leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, None]]:
    """The leaves with the scales that multiply activations moved into what reads the channels, where all of it can."""
    scales = set()
    for op in program.flow.ops:
        if op.name == "mul" and op.tags[0].args != op.tags[1].args:
            origin = op.tags[1 if op.tags[0].args else 0].origin
            if origin is not None and origin.exact:
                scales.add(origin.path)
    moved: dict[str, None] = {}
    for diagonal in diagonals_of(program):
        found = _norm_scale(diagonal, scales, leaves)
        if found is not None:
            path, s = found
            leaves |= diagonal.applied(leaves, s)
            leaves[path] = jnp.ones_like(leaves[path])  # s / s may be a rounding off
            moved |= dict.fromkeys(side.path for side in diagonal.sides)
    return leaves, moved


def _norm_scale(diagonal: Diagonal, scales: set[str], leaves: Arrays) -> tuple[str, Vector] | None:
    """The path and the scale of the one norm that makes a diagonal's channels, if it is positive."""
    (*made,) = (s for s in diagonal.outputs if s.path in scales and not s.kernel)
    if len(made) != 1 or not diagonal.inputs or any(s.kernel for s in diagonal.outputs):
        return None
    (side,) = made
    leaf = np.asarray(leaves[side.path])
    channel = side.channel.reshape(-1)
    if leaf.size != diagonal.size or (channel < 0).any() or not (leaf > 0).all():
        return None
    s = np.empty(diagonal.size, np.float32)
    s[channel] = leaf.reshape(-1)
    return side.path, s
