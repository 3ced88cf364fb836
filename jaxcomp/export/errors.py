"""The one error of exports."""

from __future__ import annotations

from jaxcomp.core.types import PyTree


class ExportError(ValueError):
    """A program or a leaf that the format, or the runtime behind it, does not take; names it, and says what to do."""


def want_rules(owner: str, rules: PyTree, **given: PyTree) -> None:
    """What speaks of activations wants rules that round some.

    Raises:
      ExportError: ranges or samples, and no rules: the file would leave activations in float.
    """
    for name, value in given.items():
        if rules is None and value is not None:
            raise ExportError(
                f"{owner}: {name}= is of rounded activations, and no rules= round any; give rules too, such as"
                f" {{'.*': Act(8)}}, or leave {name}= out."
            )
