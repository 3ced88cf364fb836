"""Tables of units: each leaf that a rule selects, or tied ones together, with the same options."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where, describe, first_matches, leaves_with_paths, matches, matrices, meant, some_paths
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params
from jaxcomp.search.options import Option, Table, Unit


def units_of(
    params: Params,
    options: Mapping[str, Transform],
    *,
    where: Where = matrices,
    tied: Mapping[str, Where] | None = None,
) -> Table:
    """A table of the leaves that ``where`` selects, each a unit, and all with the same options.

    Args:
      params: the parameters.
      options: transforms by label.
      where: which leaves.
      tied: groups of leaves by name, an ordered table of rules; the leaves of a group are one unit, which stands where
        the first of them stands.

    Raises:
      ValueError: no option, a rule that matches no leaf, or a name that is a path as well.

    >>> import jax.numpy as jnp, jaxcomp as jc
    >>> params = {"u": jnp.ones((2, 2)), "v": jnp.ones((2, 2)), "w": jnp.ones((2, 2))}
    >>> [(u.name, u.leaves) for u in units_of(params, {"int4": jc.quantize(jc.Int(4))}, tied={"ends": "u|w"})]
    [('ends', ('u', 'w')), ('v', ('v',))]
    """
    if not options:
        raise ValueError("units_of: there is no option; give transforms by label, such as {'int4': quantize(Int(4))}.")
    named = leaves_with_paths(params, is_leaf=is_compressed)[0]
    chosen = [(path, leaf) for path, leaf in named if matches(where, path, leaf)]
    if not chosen:
        paths = [path for path, _ in named]
        raise ValueError(
            f"units_of: rule {describe(where)} matches nothing; the paths are {some_paths(paths)}{meant(where, paths)}."
        )
    groups = list(tied or {})
    paths = [path for path, _ in named if path in groups]
    if paths:
        raise ValueError(
            f"units_of: tied= names a group {some_paths(paths)}, which is a leaf; call the group otherwise."
        )
    first = first_matches((tied or {}).values(), chosen, owner="units_of")
    leaves: dict[str, list[str]] = {}
    for (path, _), group in zip(chosen, first, strict=True):
        leaves.setdefault(path if group is None else groups[group], []).append(path)
    made = tuple(Option(label, make) for label, make in options.items())
    return Table(tuple(Unit(name, tuple(paths), made) for name, paths in leaves.items()))
