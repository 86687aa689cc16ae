"""Reports: records in, tables and a page out; imports neither torch nor the code that made the records."""

from rwalk.report.contrast import Contrast, compare
from rwalk.report.page import write
from rwalk.report.summary import Comparison, Line, read, summarise
from rwalk.report.terminal import show

__all__ = ["Comparison", "Contrast", "Line", "compare", "read", "show", "summarise", "write"]
