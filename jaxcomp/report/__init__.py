"""What trees are and what became of them, to read and to look at: a table of one, a page that compares two."""

from jaxcomp.report.compare import Change, Side, changes
from jaxcomp.report.frontier import Point, frontier
from jaxcomp.report.page import Report, report
from jaxcomp.report.summary import Row, Summary, summary

__all__ = [
    "Change",
    "Point",
    "Report",
    "Row",
    "Side",
    "Summary",
    "changes",
    "frontier",
    "report",
    "summary",
]
