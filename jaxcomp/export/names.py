"""What a weight is called elsewhere, and in what order its axes lie there: names with dots, outputs first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import first_matches, leaves_with_paths, matrices
from jaxcomp.core.roles import BATCH, CONTRACTED, INDEXED, MIXED, SPATIAL, STACKED, AxisRoles, Roles, settled
from jaxcomp.core.types import Leaf, PyTree, Shape
from jaxcomp.export.errors import ExportError

Names = Mapping[str, str] | Callable[[str], str]
"""Paths to names: an ordered table of regular expressions and what they become, or a function of the path."""

_MATRICES = {"kernel": "weight", "embedding": "weight"}
_KNOWN = ("kernel", "w", "weight", "embedding", "embeddings")
"""What matrices are called whose axes their path and rank settle; of any other a program must say it."""
_VECTORS = {"scale": "weight", "mean": "running_mean", "var": "running_var"}


@dataclass(frozen=True)
class Place:
    """Where a weight goes.

    Fields:
      name: there; with "{}" in it each index of the first axis, a layer of a scan, goes to a name of its own, and what
        follows is of one layer.
      order: of its axes there: outputs, inputs, then a convolution's window.
      outputs, inputs: how many axes are which; each lot is written as one axis.
    """

    name: str
    order: tuple[int, ...]
    outputs: int = 0
    inputs: int = 0

    @property
    def layered(self) -> bool:
        """Whether each layer goes to a name of its own."""
        return "{}" in self.name

    def names(self, of: Shape) -> list[str]:
        """The names that an array of shape ``of`` goes to."""
        return [self.name.replace("{}", str(i)) for i in range(of[0])] if self.layered else [self.name]

    def layers(self, x: np.ndarray) -> list[np.ndarray]:
        """The array, or each of its layers; what is shared by all of them again and again."""
        return list(x) if self.layered else [x]

    def one(self, of: Shape) -> Shape:
        """The shape of a layer, or of the array where it is none."""
        return of[1:] if self.layered else of

    @property
    def is_matrix(self) -> bool:
        """Whether it is written as outputs by inputs."""
        return bool(self.outputs and self.inputs) and self.outputs + self.inputs == len(self.order)

    def shape(self, of: Shape) -> Shape:
        """The shape that an array of shape ``of`` has there."""
        sizes = [of[i] for i in self.order]
        o, i = self.outputs, self.inputs
        merged = [sizes[:o], sizes[o : o + i]] if o and i else ([sizes[:o]] if o else [])
        return (*(int(np.prod(part)) for part in merged), *sizes[o + i :])

    def there(self, x: np.ndarray) -> np.ndarray:
        """An array as it lies there."""
        return np.ascontiguousarray(x.transpose(self.order)).reshape(self.shape(x.shape))

    def back(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The inverse of :meth:`there`, into an array of this shape."""
        lying = x.reshape([shape[i] for i in self.order])
        return np.ascontiguousarray(lying.transpose(np.argsort(self.order))).reshape(shape)


def places(
    leaves: Sequence[tuple[str, Leaf]], *, names: Names | None, roles: Roles | None, owner: str
) -> dict[str, Place]:
    """Where each leaf goes, by its path.

    Without ``names`` a path's slashes become dots, and its last part what torch calls it: "kernel", "embedding" and
    a vector "scale" are "weight", vectors "mean" and "var" the running ones. What each axis does is read off ``roles``,
    or off the path and rank where they settle it.

    Raises:
      ExportError: two leaves get one name, or it is not known what the axes of a leaf do.

    >>> leaves = [("mlp/kernel", np.ones((2, 3))), ("mlp/bias", np.ones(3))]
    >>> [(p.name, p.order) for p in places(leaves, names=None, roles=None, owner="f").values()]
    [('mlp.weight', (1, 0)), ('mlp.bias', (0,))]
    """
    named = _named(leaves, names, owner)
    taken: dict[str, str] = {}
    for path, name in named.items():
        if name in taken:
            raise ExportError(f"{owner}: {taken[name]!r} and {path!r} are both called {name!r}; change names=.")
        taken[name] = path
    heads = {path.rpartition("/")[0]: (path, leaf) for path, leaf in leaves if path.rpartition("/")[2] == "kernel"}
    return {path: _placed(path, named[path], leaf, roles, owner, heads) for path, leaf in leaves}


def _named(leaves: Sequence[tuple[str, Leaf]], names: Names | None, owner: str) -> dict[str, str]:
    if callable(names):
        return {path: names(path) for path, _ in leaves}
    rules = dict(names or {})
    found = first_matches(rules, leaves, owner=owner) if rules else [None] * len(leaves)
    said = list(rules.items())
    return {
        path: usual(path, len(leaf.shape)) if at is None else _filled(*said[at], path, owner)
        for (path, leaf), at in zip(leaves, found, strict=True)
    }


def usual(path: str, rank: int) -> str:
    """What an array of ``rank`` axes is called where nothing is said.

    >>> usual("layers/0/Dense_0/kernel", 2), usual("norm/scale", 1), usual("scale", 0)
    ('layers.0.Dense_0.weight', 'norm.weight', 'scale')
    """
    *parents, last = path.split("/")
    return ".".join((*parents, (_VECTORS if rank == 1 else _MATRICES if rank > 1 else {}).get(last, last)))


def _filled(rule: str, template: str, path: str, owner: str) -> str:
    if rule == path:
        return template
    match = re.fullmatch(rule, path)
    assert match is not None  # the table's own test
    try:
        return match.expand(template)
    except (re.error, IndexError) as e:
        raise ExportError(
            f"{owner}: names maps {rule!r} to {template!r}, which asks for a group that the rule has not ({e}); write"
            r" it as in {'(.*)/kernel': r'\1.weight'}."
        ) from e


def _placed(
    path: str, name: str, leaf: Leaf, roles: Roles | None, owner: str, heads: Mapping[str, tuple[str, Leaf]]
) -> Place:
    whole = tuple(leaf.shape)
    shape = Place(name, ()).one(whole)
    ranks = range(len(shape))
    if "{}" in name and not whole:
        raise ExportError(f"{owner}: {path!r} is one number and called {name!r}, a name for each layer; change names=.")
    if len(shape) < 2:
        return Place(name, tuple(ranks))
    said = None if roles is None else roles.get(path)
    if said is None and not matrices(path, leaf):
        return _vector(path, name, shape, roles, heads)
    if said is None and roles is not None and not is_compressed(leaf):
        return Place(name, tuple(ranks))  # in no product: positions, say
    if said is not None and len(said.names) == len(whole):
        said = AxisRoles(said.names[len(whole) - len(shape) :])
    if (said is None or MIXED in said.names) and path.rpartition("/")[2] in _KNOWN:
        said = settled(path, len(shape))
    if said is None or MIXED in said.names or len(said.names) != len(shape):
        raise ExportError(
            f"{owner}: {path!r} has {len(shape)} axes, and neither its path nor its rank settles which of them a"
            " product sums over; pass roles=jaxcomp.roles(fn)(params, *args), or --fn and --shape to the command."
        )
    apart = [kind for kind in (BATCH, STACKED) if kind in said.names]
    if apart:
        raise ExportError(
            f"{owner}: {path!r} holds several matrices, for it has a {apart[0]} axis ({', '.join(said.names)}); if it"
            " is the first, write {} in its name for its index, as in"
            r" names={'layers/(.*)/kernel': r'layers.{}.\1.weight'}."
        )
    inputs = [i for i in ranks if said.names[i] == CONTRACTED]
    window = [i for i in ranks if said.names[i] == SPATIAL]
    outputs = [i for i in ranks if i not in (*inputs, *window)]
    if INDEXED in said.names:  # a table: its rows are what torch has first
        outputs, inputs = outputs[:1], outputs[1:]
    return Place(name, (*outputs, *inputs, *window), len(outputs), len(inputs))


def _vector(path: str, name: str, shape: Shape, roles: Roles | None, heads: Mapping[str, tuple[str, Leaf]]) -> Place:
    """A bias of as many axes as its kernel has outputs is written as one; any other array as it is."""
    kernel, leaf = heads.get(path.rpartition("/")[0], ("", None))
    said = None if roles is None else roles.get(kernel)
    if said is not None and len(said.names) == len(leaf.shape):
        inner = (CONTRACTED, SPATIAL, STACKED)
        outputs = tuple(n for n, kind in zip(leaf.shape, said.names, strict=True) if kind not in inner)
        if outputs == shape:
            return Place(name, tuple(range(len(shape))), len(shape))
    return Place(name, tuple(range(len(shape))))


def array_leaves(tree: PyTree, owner: str, is_leaf: Callable[[Leaf], bool]) -> list[tuple[str, Leaf]]:
    """The leaves of a tree by path.

    Raises:
      ExportError: one is no array.
    """
    leaves = leaves_with_paths(tree, is_leaf=is_leaf)[0]
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ExportError(f"{owner}: {path!r} is {leaf!r}, and the file holds arrays alone; leave it out.")
    return leaves


def nested(flat: Mapping[str, Leaf], owner: str) -> dict[str, PyTree]:
    """Names with dots as nested dicts.

    Raises:
      ValueError: one name is the beginning of another; the message goes after the file's name.

    >>> nested({"a.weight": 1, "a.bias": 2}, "f")
    {'a': {'weight': 1, 'bias': 2}}
    """
    tree: dict[str, PyTree] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        at = tree
        for part in parents:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                break
        if not isinstance(at, dict) or last in at:
            raise ValueError(f"holds {name!r} beside a tensor whose name is its beginning; give like= the tree to fill")
        at[last] = leaf
    return tree
