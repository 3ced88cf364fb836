"""Where a program is cut, said in frozen values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxcomp.core.specs import Spec


@dataclass(frozen=True)
class Single(Spec):
    """Cuts where one value passes: a residual block, or a layer of a chain without branches, is a block.

    Args:
      apart: what one could put at the end of a block as well as at the beginning of the next, a norm between them say,
        is a block of its own, without a site.
    """

    apart: bool = False


@dataclass(frozen=True)
class Layers(Spec):
    """A cut behind every product: each layer with the arithmetic behind it is a block."""


@dataclass(frozen=True)
class Scopes(Spec):
    """The blocks of :class:`Single`, joined as long as the same text of their first site's path matches.

    Args:
      pattern: a regular expression, searched in paths: ``r"layer_[0-9]+"``, ``r"stage[0-9]"``.

    Raises:
      ValueError: no regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"Scopes: {self.pattern!r} is no regular expression: {e}.") from e

    def of(self, path: str) -> str | None:
        """The text that matches, if any."""
        found = re.search(self.pattern, path)
        return found.group() if found else None


Cuts = Single | Layers | Scopes
"""Where to cut."""
