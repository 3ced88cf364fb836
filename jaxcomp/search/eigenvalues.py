"""Largest eigenvalues of a loss's curvature, a leaf or a group of leaves each: how it minds the worst direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import Where, key_of_leaf, matrices, some_paths
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.progress import progress
from jaxcomp.core.specs import check_positive
from jaxcomp.core.types import Key, Params, PyTree
from jaxcomp.search.estimates import Curvature, Estimate
from jaxcomp.search.prepared import Prepared, Units, check_asked, dot, prepared
from jaxcomp.search.products import Curved, Weights

OWNER = "eigenvalues"


def eigenvalues(
    loss: Callable[..., jax.Array] | Curved,
    params: Params,
    batches: Iterable[PyTree],
    *,
    key: Key,
    where: Where = matrices,
    units: Units | None = None,
    rtol: float = 0.01,
    most: int = 64,
    at_once: int = 4,
) -> Curvature:
    """The eigenvalue of largest size of each leaf's block of the Hessian of the batches' mean loss, by Lanczos.

    Each leaf's vector goes through the gradient alone, and only through the layers that its leaf reaches. The error is
    Lanczos's own bound: an eigenvalue lies within it. That it is the largest one is as sure as that a random vector is
    not orthogonal to its eigenvector.

    Args:
      loss, params, batches, key, where: as of :func:`~jaxcomp.search.hessian.traces`.
      units: paths by the name of a group of leaves that has one block, tied ones say; by default each selected leaf
        has its own.
      rtol: a unit is done where its error is at most ``rtol * |eigenvalue|``.
      most: products with the whole Hessian for a unit, after which it is done anyway; ``met`` says so.
      at_once: units of one program, whose products share a gradient. More take less time a product, longer to compile,
        and memory for a vector's way through the network each, if the compiler lets them run side by side.

    Raises:
      ValueError: what :func:`~jaxcomp.search.hessian.traces` raises, a leaf of two units, or one that ``where`` does
        not select.

    >>> loss, batches = lambda p, x: jnp.mean((x @ p["w"]) ** 2), [jnp.array([[1.0, 2.0], [3.0, 0.0]])]
    >>> found = eigenvalues(loss, {"w": jnp.ones((2, 1))}, batches, key=jax.random.key(0))
    >>> round(found["w"].value, 3)
    10.606

    Source: Dong et al. 2019, arXiv:1905.03696 (HAWQ), which takes power iterations and knows no error; the bound is
    Paige's (1976, J. Inst. Maths Applics 18). No vectors are kept but three, so an eigenvalue may be found twice, and
    the largest is right all the same.
    """
    check_asked(OWNER, key, rtol=rtol, most=most)
    check_positive(OWNER, at_once, "at_once")
    ready = prepared(OWNER, loss, params, batches, where=where)
    named = _checked_units(units, ready)
    programs, step = programs_of(ready, named, at_once), on_any_mesh(jax.jit(_lanczos(named)))
    rows, value = {name: Tridiagonal() for name in named}, 0.0
    q = on_any_mesh(jax.jit(_starts(named, ready)))(key)
    last = zeros = jax.tree.map(jnp.zeros_like, q)
    with progress(OWNER, most * len(ready.batches)) as advance:
        for _ in range(most):
            active = {name: not row.done(rtol) for name, row in rows.items()}
            if not any(active.values()):
                break
            value, total = _product(ready, [p for p in programs if any(map(active.get, p.units))], q, zeros)
            advance(len(ready.batches))
            q, last, coefficients = step(q, last, total, np.array([row.beta for row in rows.values()]))
            ready.check_curvature(np.asarray(coefficients, float).sum(1), named)
            for row, on, (alpha, beta) in zip(
                rows.values(), active.values(), np.asarray(coefficients, float), strict=True
            ):
                row.add(float(alpha), float(beta), on=bool(on))
    sizes, n = ready.sizes(), len(ready.batches)
    estimates = (
        Estimate(name, tuple(named[name]), sum(sizes[p] for p in named[name]), *row.largest(), n * row.steps,
                 met=row.done(rtol))
        for name, row in rows.items()
    )  # fmt: skip
    return Curvature("eigenvalue", tuple(estimates), value)


class Program(NamedTuple):
    """A program of some units' products."""

    units: Units
    run: Callable[..., tuple[jax.Array, Weights]]


def programs_of(ready: Prepared, units: Units, at_once: int) -> list[Program]:
    """Programs of so many units each, the last perhaps of fewer."""
    names = list(units)
    parts = [{n: units[n] for n in names[i : i + at_once]} for i in range(0, len(names), at_once)]
    return [Program(part, on_any_mesh(jax.jit(ready.block_products(part)))) for part in parts]


def _product(ready: Prepared, programs: Sequence[Program], q: Weights, zeros: Weights) -> tuple[float, Weights]:
    """The mean loss, and the products of the programs' blocks with their vectors; zeros for the others."""
    total, losses = dict(zeros), []
    for i, batch in enumerate(ready.batches):
        for program in programs:
            own = [path for leaves in program.units.values() for path in leaves]
            now = {p: q[p] for p in own}, {p: total[p] for p in own}
            value, added = program.run(ready.opened.arrays, *now, (np.float64(ready.parts[i]), batch))
            total |= added
        losses.append(ready.checked(value, i))
    return float(np.dot(losses, ready.parts)), total


class Tridiagonal:
    """The coefficients of a block's Lanczos steps so far."""

    def __init__(self) -> None:
        self._alphas: list[float] = []
        self._betas: list[float] = []

    @property
    def steps(self) -> int:
        """How many there were."""
        return len(self._alphas)

    @property
    def beta(self) -> float:
        """The last one that couples to a next step."""
        return self._betas[-1] if self._betas else 0.0

    def add(self, alpha: float, beta: float, *, on: bool) -> None:
        """A step's coefficients, where the block took part in it."""
        if on:
            self._alphas.append(alpha)
            self._betas.append(beta)

    def largest(self) -> tuple[float, float]:
        """The eigenvalue of largest size, and how far the nearest eigenvalue of the block lies at most."""
        inner = self._betas[: self.steps - 1]
        values, vectors = np.linalg.eigh(np.diag(self._alphas) + np.diag(inner, 1) + np.diag(inner, -1))
        at = int(np.argmax(np.abs(values)))
        return float(values[at]), float(abs(self.beta * vectors[-1, at]))

    def done(self, rtol: float) -> bool:
        """Whether the error is small enough."""
        if not self.steps:
            return False
        value, error = self.largest()
        return error <= rtol * abs(value)


def _checked_units(units: Units | None, ready: Prepared) -> Units:
    """The groups, by default each leaf one of its own.

    Raises:
      ValueError: there is none, a leaf is of two, or none of a group's leaves is known.
    """
    if units is None:
        return {path: (path,) for path in ready.slots}
    every = [path for leaves in units.values() for path in leaves]
    twice = sorted({path for path in every if every.count(path) > 1})
    if twice:
        raise ValueError(f"{OWNER}: {some_paths(twice)} are in two units; a leaf is in one.")
    lost = [path for path in every if path not in ready.slots]
    empty = [name for name, leaves in units.items() if not leaves]
    if lost or empty or not units:
        found = some_paths(lost) if lost else f"nothing in {some_paths(empty)}" if empty else "no unit"
        raise ValueError(f"{OWNER}: units= names {found}; the selected leaves are {some_paths(ready.slots)}.")
    return units


def _starts(units: Units, ready: Prepared) -> Callable[[Key], dict[str, jax.Array]]:
    """Random vectors of length 1, one a unit, in float32 at least."""
    shapes = {path: ready.slots[path].array for leaves in units.values() for path in leaves}

    def run(key: Key) -> dict[str, jax.Array]:
        def drawn(path: str, like: jax.Array) -> jax.Array:
            wide = compute_dtype(like.dtype)
            return jax.random.normal(key_of_leaf(key, path), like.shape, wide)

        q = {path: drawn(path, like) for path, like in shapes.items()}
        for leaves in units.values():
            q |= _scaled({p: q[p] for p in leaves})[0]
        return q

    return run


def _lanczos(units: Mapping[str, Sequence[str]]) -> Callable[..., tuple[Weights, Weights, jax.Array]]:
    """A program: from vectors, those before, and the products, to the next vectors and this step's coefficients."""

    def run(q: Weights, last: Weights, product: Weights, betas: jax.Array) -> tuple[Weights, Weights, jax.Array]:
        new: dict[str, jax.Array] = {}
        rows = []
        for leaves, beta in zip(units.values(), betas, strict=True):
            alpha = sum(dot(q[p], product[p]) for p in leaves)
            rest = {p: product[p] - alpha * q[p] - beta.astype(q[p].dtype) * last[p] for p in leaves}
            found, length = _scaled(rest)
            new |= found
            rows.append(jnp.stack([alpha, length]))
        return new, dict(q), jnp.stack(rows)

    return run


def _scaled(x: Weights) -> tuple[dict[str, jax.Array], jax.Array]:
    """The vector of length 1, zeros of zeros, and the length."""
    length = jnp.sqrt(sum(dot(v, v) for v in x.values()))
    safe = jnp.where(length > 0, length, jnp.ones_like(length))
    return {path: v / safe for path, v in x.items()}, length
