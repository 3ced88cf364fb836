"""What trees are and what became of them, to read and to look at."""

from jaxcomp.report.summary import Row, Summary, summary

__all__ = ["Row", "Summary", "summary"]
