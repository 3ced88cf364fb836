"""What a network loses by an option, told by the curvature of its loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import dense
from jaxcomp.core.paths import some_paths
from jaxcomp.core.types import Leaf, Params
from jaxcomp.search.estimates import Curvature
from jaxcomp.search.options import Table
from jaxcomp.search.trying import leaves_of, made_of


def omega(params: Params, table: Table, curvature: Curvature) -> Table:
    """HAWQ's measure as the losses of options: ``Ω = Σ over leaves (trace / parameters) · ‖Q(W) - W‖²``.

    Half of it is what the loss grows by at a minimum, were the change as likely in all directions.

    Args:
      params: the parameters.
      table: the units and their options.
      curvature: of :func:`~jaxcomp.search.hessian.traces`, of all leaves of units; or of ``eigenvalues``, whose own
        value is taken and not its part of a parameter, as the first HAWQ orders layers.

    Raises:
      TypeError: a table or a curvature that is none.
      ValueError: a unit's leaf that the parameters do not have, or that is changed and has no estimate.

    >>> import jaxcomp as jc
    >>> from jaxcomp.search import traces, units_of
    >>> params = {"w": jnp.array([[1.0, 0.3], [0.2, 1.0]])}
    >>> found = traces(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, [jnp.eye(2)], key=jax.random.key(0))
    >>> losses = omega(params, units_of(params, {"int4": jc.quantize(jc.Int(4))}), found)
    >>> 0 < losses["w"].options[0].loss < 0.01
    True

    Source: Dong et al. 2019, arXiv:1911.03852 (HAWQ-V2), equation 7.
    """
    if not isinstance(table, Table) or not isinstance(curvature, Curvature):
        raise TypeError(
            f"omega: wants parameters, a table of options and a curvature in this order, got {type(params).__name__},"
            f" {type(table).__name__} and {type(curvature).__name__}; write omega(params, units_of(params, options),"
            " traces(loss, params, batches, key=key))."
        )
    leaves = leaves_of("omega", params, table)
    known = {e.name: e.mean if curvature.what == "trace" else e.value for e in curvature}
    losses = {}
    for unit in table:
        for option in unit.options if unit.leaves else ():
            made = made_of("omega", leaves, unit, option)
            moved = {path: _distance(made[path], leaves[path]) for path in unit.leaves}
            lost = [path for path, far in moved.items() if far and path not in known]
            if lost:
                raise ValueError(
                    f"omega: of {some_paths(lost)} no {curvature.what} is known, only of {some_paths(known)}; estimate"
                    " it with a where= that selects these leaves too."
                )
            losses[unit.name, option.label] = math.fsum(known[p] * far for p, far in moved.items() if far)
    return table.with_losses(losses, f"omega by {curvature.what}")


def _distance(made: jax.Array, leaf: Leaf) -> float:
    wide = compute_dtype(made.dtype)
    return float(jnp.sum((made.astype(wide) - dense(leaf).astype(wide)) ** 2))
