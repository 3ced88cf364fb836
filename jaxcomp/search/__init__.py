"""What is worth compressing how much: it measures, allocates under budgets, and decides."""

from jaxcomp.search.options import Option, Table, Unit

__all__ = ["Option", "Table", "Unit"]
