"""What a program does with each axis of a parameter: said by :func:`jaxcomp.roles`, or settled by its path and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxcomp.core.paths import Where, is_float_array, matrices, some_paths
from jaxcomp.core.records import MAKERS, remember
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import Leaf

CONTRACTED, OUTPUT, BATCH, SPATIAL, INDEXED = "contracted", "output", "batch", "spatial", "indexed"
STACKED, MIXED, SINGLE = "stacked", "mixed", "single"

_SUMMED = (CONTRACTED, SPATIAL)
_APART = (OUTPUT, BATCH, INDEXED, STACKED)


@dataclass(frozen=True)
class AxisRoles(Spec):
    """The role of each axis of one array.

    Fields:
      names: "contracted" (a product sums over it), "spatial" (of a convolution's window, summed too), "output" (it
        reappears in the result), "batch" (shared by both operands), "indexed" (rows of a lookup), "stacked" (a layer of
        a scan an index), "single" (of one element, in no product), or "mixed" (several of these).

    >>> roles = AxisRoles(("stacked", "contracted", "output"))
    >>> roles.channels, roles.inputs, roles.stacked
    ((0, 2), (1,), 1)
    """

    names: tuple[str, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """The axes over which nothing is summed: each index may have a scale, a table or a mask of its own.

        Of a table that is looked up alone, nothing is summed at all: each row is a channel.

        >>> AxisRoles(("indexed", "output")).channels
        (0,)
        """
        apart = _APART if self.summed or INDEXED not in self.names else (INDEXED, BATCH, STACKED)
        return tuple(i for i, name in enumerate(self.names) if name in apart)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes that products sum over, a convolution's window apart."""
        return tuple(i for i, name in enumerate(self.names) if name == CONTRACTED)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that products sum over, a convolution's window among them."""
        return tuple(i for i, name in enumerate(self.names) if name in _SUMMED)

    @property
    def stacked(self) -> int:
        """How many axes in front hold layers, one a step of a scan."""
        return next((i for i, name in enumerate(self.names) if name != STACKED), len(self.names))


class Roles(Mapping[str, AxisRoles]):
    """Axis roles by path, as :func:`jaxcomp.roles` reads them off a program; every ``roles=`` takes it.

    >>> Roles({"Dense_0/kernel": AxisRoles(("contracted", "output"))})["Dense_0/kernel"].inputs
    (0,)
    """

    def __init__(self, by_path: Mapping[str, AxisRoles]) -> None:
        self._by_path = dict(by_path)
        remember(self, "Roles", {"by_path": self._by_path})

    def __getitem__(self, path: str) -> AxisRoles:
        return self._by_path[path]

    def __iter__(self) -> Any:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def __repr__(self) -> str:
        lines = [f"  {path}: {', '.join(roles.names)}" for path, roles in self._by_path.items()]
        return "\n".join(["Roles(", *lines, ")"])


MAKERS["Roles"] = Roles


def settled(path: str, rank: int) -> AxisRoles | None:
    """The roles that an array's path and rank settle, or None.

    A matrix named "weight" has its outputs first, as torch's and Equinox's have; one named "embedding" or "embeddings"
    is a table of rows; any other has them last, as ``x @ w`` wants. An array of three to five axes is a convolution's
    kernel where a name on its path holds "conv": outputs and inputs last, or first where it is named "weight". Nothing
    else is settled: three axes may be stacked layers, heads, or a window.

    >>> settled("layers/0/weight", 2).channels, settled("Conv_0/kernel", 4).channels, settled("query/kernel", 3)
    ((0,), (3,), None)
    """
    *parents, name = path.lower().split("/")
    window = (SPATIAL,) * (rank - 2)
    if rank == 2 and name in ("embedding", "embeddings"):
        return AxisRoles((INDEXED, OUTPUT))
    if rank != 2 and not (3 <= rank <= 5 and any("conv" in part for part in (*parents, name))):
        return None
    if name == "weight":
        return AxisRoles((OUTPUT, CONTRACTED, *window))
    return AxisRoles((*window, CONTRACTED, OUTPUT))


def roles_of(path: str, rank: int, roles: Roles | None, known: AxisRoles | None = None) -> AxisRoles:
    """The roles of one array's axes: what the program said, what the leaf that holds it knows, or what is settled.

    Args:
      path: of the array.
      rank: its number of axes.
      roles: of the program, or None where none was given.
      known: of an array inside a compressed leaf (a factor, a table), by the leaf's own definition.

    Raises:
      ValueError: none of these says it; the message goes after the owner and the path.
    """
    if known is not None:
        return known
    if roles is not None and path in roles:
        found = roles[path]
        if len(found.names) != rank:
            raise ValueError(
                f"has {rank} axes, and the roles given are of {len(found.names)}: {', '.join(found.names)}; make them"
                " again for these parameters"
            )
        if MIXED in found.names:
            raise ValueError(
                f"has an axis that products sum over and keep, both ({', '.join(found.names)}); name the axes yourself,"
                " or leave it out by a rule"
            )
        return found
    if roles is not None:
        raise ValueError(
            f"is in no product of the program that the roles were read from, which has {some_paths(roles)}; name the"
            " axes yourself, or leave it out by a rule"
        )
    guess = settled(path, rank)
    if guess is None:
        raise ValueError(
            f"has {rank} axes, and neither its path nor its rank settles which of them a product sums over; pass"
            " roles=jaxcomp.roles(fn)(params, *args), or name the axes yourself, as in per=Channels((0, -1))"
        )
    return guess


def checked_roles(owner: str, roles: Any) -> Roles | None:
    """``roles`` itself.

    Raises:
      TypeError: it is neither None nor :class:`Roles`.
    """
    if roles is not None and not isinstance(roles, Roles):
        raise TypeError(f"{owner}: roles must be what jaxcomp.roles(fn)(params, *args) gives, got {roles!r}.")
    return roles


def selecting(where: Where | None, roles: Roles | None) -> Where:
    """The rule ``where`` itself; None means the matrices among the leaves that roles name, or without them all.

    A program knows a matrix by its products, so no name keeps it out.

    >>> import jax.numpy as jnp
    >>> rule = selecting(None, Roles({"b": AxisRoles(("contracted", "output"))}))
    >>> rule("b", jnp.ones((2, 3))), rule("kernel", jnp.ones((2, 3))), selecting(None, None).__name__
    (True, False, 'matrices')
    """
    if where is not None:
        return where
    if roles is None:
        return matrices
    named = roles

    def in_products(path: str, leaf: Leaf) -> bool:
        return path in named and is_float_array(leaf) and len(leaf.shape) >= 2

    return in_products
