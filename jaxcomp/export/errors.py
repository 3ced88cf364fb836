"""The one error of exports."""

from __future__ import annotations


class ExportError(ValueError):
    """A program or a leaf that the format, or the runtime behind it, does not take; names it, and says what to do."""
