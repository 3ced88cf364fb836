"""Training toward the structure: penalties that drive whole units to zero."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxcomp.core.paths import Where, leaves_with_paths, matches
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Params
from jaxcomp.structure.groups import Group, Groups, Slice
from jaxcomp.structure.scores import weights


@on_any_mesh
def unit_norms(groups: Groups, params: Params, *, where: Where = weights) -> tuple[Float[Array, "*units"], ...]:
    """``||w_u||^2`` of every unit: one array a group, shape (units,) or (layers, units). Runs under jit and grad.

    Args:
      groups: from ``channel_groups``.
      params: the full-size tree.
      where: the parameters that count; a group in which it selects none counts all of its own.

    Raises:
      ValueError: a parameter is missing or of another shape.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> [norms.astype(int).tolist() for norms in unit_norms(groups, params)]
    [[10, 1, 5, 1]]
    """
    leaves = dict(leaves_with_paths(params)[0])
    for path, shape in groups.shapes.items():
        if path not in leaves or jnp.shape(leaves[path]) != shape:
            found = jnp.shape(leaves[path]) if path in leaves else "no such leaf"
            raise ValueError(f"unit_norms: {path!r} must have shape {shape} as in the groups, found {found}.")

    def of(group: Group) -> jax.Array:
        chosen: Sequence[Slice] = [s for s in group.slices if matches(where, s.path, leaves[s.path])] or group.slices
        return jnp.sum(jnp.stack([_squares(group, s, leaves[s.path]) for s in chosen]), 0)

    return tuple(of(g) for g in groups)


def _squares(group: Group, s: Slice, w: jax.Array) -> jax.Array:
    others = tuple(d for d in range(w.ndim) if d != s.axis and not (group.layers and d == 0))
    along = jnp.sum(jnp.square(w.astype(jnp.float32)), others)
    columns = jnp.asarray(s.unit_of + 1)  # column 0 takes what belongs to no unit of this group
    total = jnp.zeros((*along.shape[:-1], group.units + 1)).at[..., columns].add(along)
    return total[..., 1:]


def group_penalty(
    groups: Groups, params: Params, strengths: Sequence[ArrayLike] | float = 1.0, *, where: Where = weights
) -> Float[Array, ""]:
    """``sum_u strength_u · ||w_u||^2 / 2``: its gradient is weight decay of its own strength for every unit.

    Args:
      strengths: one number, or an array a group like ``unit_norms``, as from ``growing_strengths``.
      where: as in ``unit_norms``.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> round(float(group_penalty(groups, params)), 3)
    8.525

    Source: the sparse training of DepGraph, Fang et al. 2023, arXiv:2301.12900, section 3.3; there the squares
    take the place of group lasso's norms so that no division by small norms is needed.
    """
    norms = unit_norms(groups, params, where=where)
    given = [strengths] * len(norms) if isinstance(strengths, int | float) else list(strengths)
    terms = [jnp.sum(jnp.asarray(g) * n) for g, n in zip(given, norms, strict=True)]
    return jnp.asarray(0.5 * sum(terms), jnp.float32)


def group_lasso(
    groups: Groups,
    params: Params,
    strengths: Sequence[ArrayLike] | float = 1.0,
    *,
    where: Where = weights,
    eps: float = 1e-12,
) -> Float[Array, ""]:
    """``sum_u strength_u · ||w_u||``, which makes units exactly zero under a proximal step. Yuan and Lin 2006.

    Arguments as ``group_penalty``; ``eps`` under the root keeps the gradient finite at zero.

    Args:
      groups, params, strengths, where: as in ``group_penalty``.
      eps: under the root, so that the gradient is finite at zero.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> round(float(group_lasso(groups, params)), 3)
    7.423
    """
    norms = unit_norms(groups, params, where=where)
    given = [strengths] * len(norms) if isinstance(strengths, int | float) else list(strengths)
    terms = [jnp.sum(jnp.asarray(g) * jnp.sqrt(n + eps)) for g, n in zip(given, norms, strict=True)]
    return jnp.asarray(sum(terms), jnp.float32)


def growing_strengths(
    groups: Groups, params: Params, *, base: float = 1e-4, alpha: float = 4.0, where: Where = weights
) -> tuple[Float[Array, "*units"], ...]:
    """``base · 2^(alpha · (max I - I_u) / (max I - min I))`` with ``I_u = ||w_u||``: the weaker, the stronger pushed.

    Recompute it every epoch with a growing ``base`` (growing regularization, Wang et al. 2021, arXiv:2012.09243; the
    exponent is DepGraph's, equation 4). Gradients do not flow through it.

    Args:
      groups, params, where: as in ``unit_norms``.
      base: the strength of the largest unit.
      alpha: the smallest unit is pushed ``2**alpha`` times as hard.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> [strengths.round().astype(int).tolist() for strengths in growing_strengths(groups, params, base=1.0)]
    [[1, 16, 3, 16]]
    """

    def of(norm: jax.Array) -> jax.Array:
        size = jnp.sqrt(norm)
        high, low = size.max(-1, keepdims=True), size.min(-1, keepdims=True)
        spread = jnp.where(high > low, high - low, 1.0)
        return base * 2.0 ** (alpha * (high - size) / spread)

    return tuple(jax.lax.stop_gradient(of(n)) for n in unit_norms(groups, params, where=where))
