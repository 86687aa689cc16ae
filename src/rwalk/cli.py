"""The command line: hands what was typed to what does it, and turns mistakes into messages and an exit status."""

import os
import re
import sys
from collections.abc import Sequence

try:
    import tyro  # noqa: F401
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"rwalk: the command line needs the extra `bench` ({error}). Run: pip install 'rwalk[bench]'") from None

from rwalk import __version__, reading
from rwalk._errors import explain
from rwalk.report.plain import complain, tolerant


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a mistake of ours, 2 for a user's, 130 after Ctrl-C."""
    _forget_sizes()
    console = Console(markup=False, emoji=False, highlight=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    with tolerant() as output:
        try:
            return _do(words, console) or _unprinted(output.failure)
        except (ValueError, OSError, ImportError) as error:
            complain(error)
            return 2
        except KeyboardInterrupt:
            if not console.quiet:  # of several ranks the first one speaks
                again = " The same command continues after the last finished task." if words[:1] in (["run"], ["tune"]) else ""
                complain(f"interrupted.{again}")
            return 130


def _unprinted(failure: OSError | None) -> int:
    """Say that what was done could not be printed, unless nobody wants to know, and return the exit status."""
    if failure is None or isinstance(failure, BrokenPipeError):
        return int(failure is not None)
    came = f"standard output that cannot be written ({failure.strerror or failure})"
    complain(explain(came, "one that takes what is printed", "Print elsewhere; all else is done."))
    return 2


def _forget_sizes() -> None:
    """Take sizes of a terminal in the environment that are none, such as 0, for unset, as other programs do."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("0*[1-9][0-9]{0,5}", os.environ.get(name, "")):
            os.environ.pop(name, None)


def _do(words: list[str], console: Console) -> int:
    """Do a command; those that read records start at once, as they load neither torch nor the rules."""
    if words == ["--version"]:
        console.print(f"rwalk {__version__}")
        return 0
    if words and words[0] in reading.NAMES:
        return reading.do(reading.parsed(words), console)
    from rwalk import actions

    return actions.do(words, console)
