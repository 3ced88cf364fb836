"""What was estimated of a curvature: a number with its error for each leaf or group of leaves, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from jaxcomp.core.paths import some_paths
from jaxcomp.core.plain import Plain
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Json


@dataclass(frozen=True)
class Estimate:
    """One number of a leaf, or of a group of leaves.

    Args:
      name: of the group; of one leaf its path.
      leaves: the paths.
      size: how many parameters they have, those that a mask hides left out.
      value: what was estimated.
      error: of a trace its standard error; of an eigenvalue how far the nearest true one lies at most.
      products: with how many vectors the curvature was multiplied for it, each batch counted.
      met: whether the error is as small as was asked for.
    """

    name: str
    leaves: tuple[str, ...]
    size: int
    value: float
    error: float
    products: int
    met: bool

    @property
    def mean(self) -> float:
        """The value for each parameter: of a trace the mean eigenvalue, by which HAWQ-V2 ranks layers."""
        return self.value / self.size if self.size else 0.0


@dataclass(frozen=True)
class Curvature:
    """Estimates by name; ``print`` it, or leave it at the end of a notebook's cell.

    Args:
      what: "trace" or "eigenvalue".
      estimates: in the tree's order.
      loss: the loss's mean over the batches.
    """

    what: str
    estimates: tuple[Estimate, ...]
    loss: float

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self.estimates)

    def __len__(self) -> int:
        return len(self.estimates)

    def __getitem__(self, name: str) -> Estimate:
        for one in self.estimates:
            if one.name == name:
                return one
        raise KeyError(f"no {self.what} of {name!r} was estimated; there are {some_paths(e.name for e in self)}.")

    def of(self, leaves: Iterable[str]) -> Estimate:
        """The sum over some leaves, tied ones say, with the errors added, for probes that leaves share correlate.

        Args:
          leaves: their paths.

        Raises:
          ValueError: of eigenvalues, which do not add.
          KeyError: a leaf of which there is no estimate.
        """
        if self.what != "trace":
            raise ValueError(f"Curvature: of several leaves no {self.what} is a sum; name them in units=.")
        parts = [self[path] for path in leaves]
        return Estimate(
            " + ".join(p.name for p in parts),
            tuple(p for part in parts for p in part.leaves),
            sum(p.size for p in parts),
            math.fsum(p.value for p in parts),
            math.fsum(p.error for p in parts),
            max((p.products for p in parts), default=0),
            met=all(p.met for p in parts),
        )

    def cells(self) -> list[tuple[str, ...]]:
        """The table in words: its head, a row a name."""
        head = ("leaf", "parameters", self.what, "error", "a parameter", "products", "")
        return [head, *map(_cells, self)]

    def __repr__(self) -> str:
        return columns(self.cells(), "lrrrrrl")

    def _repr_html_(self) -> str:
        return html_table(self.cells(), "lrrrrrl")

    def to_plain(self) -> dict[str, Plain]:
        """As JSON holds it."""
        rows: list[Plain] = [{**asdict(one), "leaves": list(one.leaves)} for one in self]
        return {"what": self.what, "loss": self.loss, "estimates": rows}

    @staticmethod
    def from_plain(data: Json) -> Curvature:
        """The inverse of :meth:`to_plain`.

        Raises:
          ValueError: data that it did not write.

        >>> found = Curvature("trace", (Estimate("w", ("w",), 4, 2.0, 0.1, 16, met=True),), 0.5)
        >>> Curvature.from_plain(found.to_plain()) == found
        True
        """
        try:
            found = tuple(Estimate(**{**row, "leaves": tuple(row["leaves"])}) for row in data["estimates"])
            return Curvature(str(data["what"]), found, float(data["loss"]))
        except (KeyError, TypeError) as e:
            raise ValueError(f"Curvature: this is nothing that to_plain wrote: {e!r}.") from e


def _cells(one: Estimate) -> tuple[str, ...]:
    note = "" if one.met else "not as exact as asked"
    if one.met and one.value == 0 and one.error == 0:
        note = "the loss does not curve along it"
    numbers = (f"{one.value:.4g}", f"{one.error:.1g}", f"{one.mean:.3g}")
    return (one.name, f"{one.size:,}", *numbers, f"{one.products:,}", note)
