"""Reports: records in, tables and a page out. Nothing here uses torch."""

from rwalk.report.between import Ranking, Rival, between
from rwalk.report.compare import Contrast, compare
from rwalk.report.drawing import Drawing, plot
from rwalk.report.export import as_csv, frame, latex
from rwalk.report.journal import Journal
from rwalk.report.page import write
from rwalk.report.summary import Line, MethodComparison, read, summarise
from rwalk.report.terminal import show

__all__ = [
    "Contrast",
    "Drawing",
    "Journal",
    "Line",
    "MethodComparison",
    "Ranking",
    "Rival",
    "as_csv",
    "between",
    "compare",
    "frame",
    "latex",
    "plot",
    "read",
    "show",
    "summarise",
    "write",
]


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return __all__
