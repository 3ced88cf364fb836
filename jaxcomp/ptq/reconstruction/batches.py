"""What a walk over blocks is given: batches of one shape, and two trees that are alike."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxcomp.core.batches import Batch, all_batches
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.cuts import arrays_in


def read(batches: Iterable[PyTree], owner: str) -> list[Batch]:
    """The batches as tuples of arguments, all of the first one's shapes.

    Raises:
      ValueError: there is none, or one has other shapes.
    """
    cases = all_batches(owner, batches)
    shapes = [[tuple(x.shape) for x in arrays_in(case)] for case in cases]
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"{owner}: batch {i} has shapes {found}, the first has {shapes[0]}; drop or fill up the last batch."
            )
    return cases


def check_trees(params: Params, other: Params, owner: str, name: str) -> None:
    """Raises ValueError unless both trees have the same paths and shapes; ``name`` is what the other is called."""
    a, b = (
        {path: np.shape(leaf) for path, leaf in leaves_with_paths(tree, is_leaf=is_compressed)[0]}
        for tree in (params, other)
    )
    differing = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    if differing:
        one = differing[0]
        raise ValueError(
            f"{owner}: params and {name} differ at {some_paths(differing)}: {a.get(one, 'nothing')} and "
            f"{b.get(one, 'nothing')}; make {name} of params."
        )
