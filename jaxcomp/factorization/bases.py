"""From an array and a method to factors: what is fixed of them (a basis), and what follows the array linearly."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.specs import is_integer, share_of
from jaxcomp.core.types import Shape
from jaxcomp.factorization import decompositions as decomp
from jaxcomp.factorization.axes import Placed
from jaxcomp.factorization.leaves import Depthwise, FactorLeaf, LowRank, Separable, Tucker
from jaxcomp.factorization.rank_one import RIDGE, deflate, khatri_rao
from jaxcomp.factorization.specs import CP, SVD, Method, RankOne, Tucker2

Count = int | tuple[int, int]
"""A rank; of Tucker2 one of the inputs and one of the outputs."""
Rank = int | float | tuple[int, int]
Basis = dict[str, jax.Array]
"""The fixed part of a leaf's factors, and what projects the array on the rest; stacked layers in front."""


def _sizes(at: Placed, shape: Shape) -> Shape:
    """The axes of one slice as the method sees them: (rows, cols), (taps, I, O) or (H, W, I, O).

    Raises:
      ValueError: the array has too few axes, or one of them is empty.
    """
    method, own = at.method, shape[at.stacked :]
    if isinstance(method, SVD | RankOne):
        if len(own) <= at.cols:
            raise ValueError(
                f"has shape {shape}; {method!r} wants {at.stacked} stacked axes, rows and {at.cols} axes of"
                " columns; leave it out by a rule"
            )
        return math.prod(own[: -at.cols]), math.prod(own[-at.cols :])
    if isinstance(method, CP) and method.separable:
        if len(own) != 4:
            raise ValueError(f"has shape {shape}; separable taps want a kernel (H, W, I, O); use CP() for it")
        return own
    if len(own) < 3:
        raise ValueError(
            f"has shape {shape}; {type(method).__name__} wants a kernel (*spatial, I, O) after {at.stacked} stacked"
            " axes; use SVD() for a matrix"
        )
    return math.prod(own[:-2]), own[-2], own[-1]


def largest_rank(at: Placed, shape: Shape) -> Count:
    """The rank at which every array of this shape is met exactly.

    Raises:
      ValueError: the method does not fit the shape.
    """
    sizes = _sizes(at, shape)
    if isinstance(at.method, Tucker2):
        return sizes[1], sizes[2]
    return math.prod(sizes) // max(sizes)


def checked_rank(at: Placed, shape: Shape, rank: Rank) -> Count:
    """A rank for this shape: a count as it is, a fraction of the largest as a count (one at least).

    Raises:
      ValueError: a rank below one or beyond the shape, or a method that does not fit.
    """
    largest = largest_rank(at, shape)
    if isinstance(largest, tuple):
        pair = rank if isinstance(rank, tuple) else (rank, rank)
        if len(pair) != 2:
            raise ValueError(f"wants a rank or a pair of them for {at.method!r}, got {rank!r}")
        return _count(pair[0], largest[0], shape, largest), _count(pair[1], largest[1], shape, largest)
    return _count(rank, largest, shape, largest)


def _count(rank: object, most: int, shape: Shape, largest: Count) -> int:
    if is_integer(rank):
        if not 1 <= rank <= most:
            raise ValueError(f"has shape {shape}, of rank {largest} at most; got rank {rank}")
        return int(rank)
    if isinstance(rank, numbers.Real) and 0 < float(rank) <= 1:
        return max(1, share_of(float(rank), most))
    raise ValueError(f"wants a rank of at least 1, or a fraction of the largest in (0, 1], got {rank!r}")


def size_at(at: Placed, shape: Shape, rank: Count) -> int:
    """How many parameters the factors have, all stacked layers together."""
    sizes, layers = _sizes(at, shape), math.prod(shape[: at.stacked])
    if isinstance(at.method, Tucker2):
        a, b = rank if isinstance(rank, tuple) else (rank, rank)
        taps, inputs, outputs = sizes
        return layers * (inputs * a + taps * a * b + b * outputs)
    assert isinstance(rank, int)
    return layers * rank * sum(sizes)


def basis_of(at: Placed, w: jax.Array, rank: Count, *, moment: jax.Array | None = None) -> Basis:
    """The basis of an array, found from its values.

    Args:
      at: how.
      w: the array.
      rank: from :func:`checked_rank`.
      moment: (*stacked, n) or (*stacked, n, n), the second moment of the inputs that it multiplies: of its rows, or
        of its input features.

    Raises:
      ValueError: a moment of another shape.
    """
    wide = jax.lax.stop_gradient(w).astype(compute_dtype(w.dtype))
    fn: Callable[..., Basis] = partial(_basis, at, rank)
    full = None if moment is None else full_moment(at, w.shape, jnp.asarray(moment, wide.dtype))
    for _ in range(at.stacked):
        fn = jax.vmap(fn)
    return fn(wide) if full is None else fn(wide, full)


def full_moment(at: Placed, shape: Shape, moment: jax.Array) -> jax.Array:
    """A moment as matrices, (*stacked, n, n).

    Raises:
      ValueError: it does not fit the array's shape, or the array's rows are not its inputs.
    """
    if at.outputs_first:
        raise ValueError(
            f"has shape {shape}, whose rows are outputs, and moments weigh inputs that are rows; leave those of this"
            " leaf out"
        )
    front, sizes = shape[: at.stacked], _sizes(at, shape)
    fitting = {sizes[-2]}
    if isinstance(at.method, SVD | RankOne):
        fitting.add(shape[-1 - at.cols])
    n = moment.shape[-1] if moment.ndim else 0
    if n not in fitting or moment.shape not in ((*front, n), (*front, n, n)):
        raise ValueError(
            f"has shape {shape}; the moments of its inputs must be (*stacked, n) or (*stacked, n, n) with n in"
            f" {sorted(fitting)}, got {moment.shape}"
        )
    return moment if moment.ndim == len(front) + 2 else moment[..., None] * jnp.eye(n, dtype=moment.dtype)


def view_of(at: Placed, w: jax.Array) -> jax.Array:
    """One slice in the axes that the method sees."""
    return w.reshape(_sizes(at, (1,) * at.stacked + w.shape))


def weighted_view(at: Placed, w: jax.Array, root: jax.Array) -> jax.Array:
    """One slice's view, its input features (or rows) multiplied by ``root``."""
    view = view_of(at, w)
    n, inputs = root.shape[0], view.shape[-2]
    parts = view.reshape(*view.shape[:-2], inputs // n, n, view.shape[-1])
    return jnp.einsum("ij,...jo->...io", root, parts, precision=decomp.HIGHEST).reshape(view.shape)


def _basis(at: Placed, rank: Count, w: jax.Array, moment: jax.Array | None = None) -> Basis:
    roots = None if moment is None else decomp.moment_root(moment)
    view = view_of(at, w) if roots is None else weighted_view(at, w, roots[0])
    match at.method, rank:
        case SVD(), int(rank):
            v = decomp.right_rows(view, rank)
            return {"down": v.T, "v": v}
        case RankOne() as method, int(rank):
            (_, right), _ = deflate(view, rank=rank, steps=method.steps, refits=method.refits)
            down = jnp.linalg.qr(right)[0]
            return {"down": down, "v": down.T}
        case Tucker2() as method, (int(), int()):
            u, v = decomp.tucker2(view, rank, method.sweeps)
            found = {"u": u, "down": u.T, "v": v}
        case CP() as method, int(rank):
            factors, _ = deflate(view, rank=rank, steps=method.steps, refits=method.refits, sweeps=method.sweeps)
            taps = {"rows": factors[0], "cols": factors[1]} if method.separable else {"taps": factors[0]}
            known = khatri_rao(factors[:-1])
            gram = jnp.einsum("nr,ns->rs", known, known, precision=decomp.HIGHEST) + RIDGE * jnp.eye(
                rank, dtype=known.dtype
            )
            dual = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), known.T)
            found = {"u": factors[-2], "dual": dual, **taps}
        case _:
            raise ValueError(f"wants a rank for {at.method!r}, got {rank!r}")
    if roots is not None:
        found["u"] = decomp.matmul(roots[1], found["u"])
        key = "down" if "down" in found else "dual"
        rows = found[key].reshape(-1, roots[0].shape[0])
        found[key] = decomp.matmul(rows, roots[0]).reshape(found[key].shape)
    return found


def leaf_of(at: Placed, basis: Basis, w: jax.Array) -> FactorLeaf:
    """The leaf of an array in a basis; linear in the array, so gradients reach it."""
    wide = w.astype(compute_dtype(w.dtype))
    k = at.stacked
    front, own = w.shape[:k], w.shape[k:]
    kept = {name: x.astype(w.dtype) for name, x in basis.items()}
    if isinstance(at.method, SVD | RankOne):
        rows, cols = own[: -at.cols], own[-at.cols :]
        # No transpose here: inside jit it would become part of the product, whose bits then differ.
        u = decomp.matmul(wide.reshape(*front, -1, basis["down"].shape[-2]), basis["down"])
        rank = u.shape[-1]
        u, v = u.reshape(*front, *rows, rank).astype(w.dtype), kept["v"].reshape(*front, rank, *cols)
        return LowRank(u, v, len(rows), at.outputs_first)
    if isinstance(at.method, Tucker2):
        half = jnp.einsum("...sio,...bo->...sib", wide.reshape(*front, -1, *own[-2:]), basis["v"], precision="highest")
        core = jnp.einsum("...ai,...sib->...sab", basis["down"], half, precision="highest")
        core = core.reshape(*front, *own[:-2], *core.shape[-2:]).astype(w.dtype)
        return Tucker(kept["u"], core, kept["v"])
    v = decomp.matmul(basis["dual"], wide.reshape(*front, -1, own[-1])).astype(w.dtype)
    if "rows" in kept:
        return Separable(kept["u"], kept["rows"], kept["cols"], v)
    return Depthwise(kept["u"], kept["taps"].reshape(*front, *own[:-2], -1), v)


def rank_in(method: Method, basis: Basis) -> Count:
    """The rank of a basis."""
    if isinstance(method, Tucker2):
        return basis["down"].shape[-2], basis["v"].shape[-2]
    return basis["v" if isinstance(method, SVD | RankOne) else "dual"].shape[-2]
