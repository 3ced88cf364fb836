"""What an option makes of a unit's leaves."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxcomp.core.leaves import is_compressed, materialize
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Leaf, Params
from jaxcomp.core.words import shape_words
from jaxcomp.search.options import Option, Table, Unit


def leaves_of(owner: str, params: Params, table: Table) -> dict[str, Leaf]:
    """The leaves that the table's units name, by path.

    Raises:
      ValueError: one is not there, or no unit has any.
    """
    named = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
    wanted = [path for unit in table for path in unit.leaves]
    lost = [path for path in wanted if path not in named]
    if lost or not wanted:
        what = f"the parameters have no {some_paths(lost)}" if lost else "no unit of the table has a leaf"
        raise ValueError(f"{owner}: {what}; the paths are {some_paths(named)}.")
    return {path: named[path] for path in wanted}


def made_of(owner: str, leaves: Mapping[str, Leaf], unit: Unit, option: Option) -> dict[str, jax.Array]:
    """The arrays that a unit's leaves stand for under an option.

    Raises:
      ValueError: what the option's ``init`` raises, or another shape or type than before.
    """
    own = {path: leaves[path] for path in unit.leaves}
    seen = materialize(option.make.apply(option.make.init(own), own))
    for path, leaf in own.items():
        was, now = ((shape_words(x.shape), str(x.dtype)) for x in (leaf, seen[path]))
        if was != now:
            raise ValueError(
                f"{owner}: option {option.label!r} makes {' '.join(now)} of {path!r}, which is {' '.join(was)}; wanted"
                " a transform that keeps shape and type."
            )
    return dict(seen)
