"""Reports: records in, tables and a page out. Nothing here uses torch."""

from rwalk.report.compare import Contrast, compare
from rwalk.report.journal import Journal
from rwalk.report.page import write
from rwalk.report.summary import Line, MethodComparison, read, summarise
from rwalk.report.terminal import show

__all__ = ["Contrast", "Journal", "Line", "MethodComparison", "compare", "read", "show", "summarise", "write"]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
