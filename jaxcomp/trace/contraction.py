"""How large the inputs of each weight are: a statistic that pruning reads off a traced function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.paths import Where, describe, matches, matrices, some_paths
from jaxcomp.core.roles import CONTRACTED
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Operand, Site, sites_of

_STACKED = "stacked"


def input_norms(fn: Callable[..., Any], where: Where = matrices) -> Callable[..., dict[str, jax.Array]]:
    """ℓ2 norms of what each weight multiplies, one for each index of its contraction axis: the statistic of ``wanda``.

    They have the weight's rank, and 1 along all its other axes but those of stacked layers. Several batches together
    have ``jax.tree.map(jnp.hypot, a, b)``. Covered are weights of dots and convolutions with one contracted axis
    (beside the window) and no batch axes or feature groups; a leaf with several sites has all their inputs together.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which leaves.

    Raises:
      ValueError: nothing is found.

    >>> p = {"kernel": jnp.ones((2, 3))}
    >>> input_norms(lambda p, x: x @ p["kernel"])(p, jnp.array([[3.0, 1.0], [4.0, 0.0]]))["kernel"].tolist()
    [[5.0], [1.0]]
    """

    @wraps(fn)
    def norms(params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        program = trace(fn, params, *args, **kwargs)
        ops = {op.location: op for op in program.flow.ops}
        every = sites_of(program)
        chosen = [s for s in every if _is_plain(s) and _selects(where, s)]
        if not chosen:
            raise ValueError(
                f"input_norms: {describe(where)} matches no weight with one contracted axis; the sites are"
                f" {some_paths(s.path for s in every) or 'none'}."
            )
        claims = {s.location: Claim(_observing(s, ops[s.location])) for s in chosen}
        squares = evaluate(program, claims, program.flatten(params, *args, **kwargs), collect=_SUM).aux
        total: dict[str, jax.Array] = {}
        for site in chosen:
            path, here = site.leaf or "", _at_leaf(site, squares[site.path])
            total[path] = total[path] + here if path in total else here
        return {path: jnp.sqrt(x) for path, x in total.items()}

    return norms


def _weight(site: Site) -> Operand | None:
    return None if site.weight is None else site.operands[site.weight]


def _is_plain(site: Site) -> bool:
    weight = _weight(site)
    if weight is None or weight.leaf is None or site.groups != 1 or len(site.activations) != 1:
        return False
    x = site.operands[site.activations[0]]
    alone = len(weight.leaf_axes(CONTRACTED)) == 1 and x.roles.count(CONTRACTED) == 1
    return alone and "batch" not in weight.roles and "while_cond" not in site.inside


def _selects(where: Where, site: Site) -> bool:
    weight = _weight(site)
    return (
        weight is not None
        and weight.leaf is not None
        and matches(where, weight.leaf, jax.ShapeDtypeStruct(weight.leaf_shape, weight.leaf_dtype))
    )


def _observing(site: Site, op: Op) -> Callable[..., Emitted]:
    operand = site.activations[0]
    axis = site.operands[operand].roles.index(CONTRACTED)

    def run(*values: Any) -> Emitted:
        x = values[operand].astype(jnp.float32)
        others = tuple(i for i in range(x.ndim) if i != axis)
        return Emitted(op.bind(*values), {site.path: jnp.sum(x * x, axis=others)})

    return run


def _at_leaf(site: Site, x: jax.Array) -> jax.Array:
    """Sums with the layers' axes in front, at the rank of the site's weight."""
    weight = site.operands[site.weight or 0]
    stacked, (contracted,) = weight.leaf_axes(_STACKED), weight.leaf_axes(CONTRACTED)
    x = x.reshape(*(weight.leaf_shape[i] for i in stacked), weight.leaf_shape[contracted])
    axes = (*stacked, contracted)
    x = jnp.transpose(x, sorted(range(len(axes)), key=axes.__getitem__))
    return x.reshape([size if i in axes else 1 for i, size in enumerate(weight.leaf_shape)])


def _zero(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


_SUM = Monoid(_zero, lambda a, b: a + b)
