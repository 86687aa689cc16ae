"""The command line: hands what was typed to its command, and turns mistakes into messages and an exit status."""

import os
import re
import sys
import warnings
from collections.abc import Sequence

try:
    from rich.console import Console

    from rwalk.cli.options import parse
except ImportError as error:
    raise SystemExit(f"rwalk: the command line needs the extra `bench` ({error}). Run: pip install 'rwalk[bench]'") from None

from rwalk import __version__
from rwalk.report.plain import complain, tolerant


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a mistake of ours, 2 for a user's, 130 after Ctrl-C."""
    _forget_sizes()
    console = Console(markup=False, emoji=False, highlight=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    with tolerant() as output, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: complain(f"warning: {message}")
        try:
            return _do(words, console) or _unprinted(output.failure)
        except (ValueError, OSError, ImportError) as error:
            complain(error)
            return 2
        except KeyboardInterrupt:
            again = " The same command continues after the last finished task." if words[:1] in (["run"], ["tune"]) else ""
            complain(f"interrupted.{again}")
            return 130


def _do(words: list[str], console: Console) -> int:
    if words == ["--version"]:
        console.print(f"rwalk {__version__}")
        return 0
    status: int = parse(words).do(words, console)
    return status


def _unprinted(failure: OSError | None) -> int:
    """Complain that the output could not be printed, unless its reader went away, and return the exit status."""
    if failure is None or isinstance(failure, BrokenPipeError):
        return int(failure is not None)
    complain(f"Standard output cannot be written ({failure.strerror or failure}). Everything else is done; print elsewhere.")
    return 2


def _forget_sizes() -> None:
    """Ignore sizes of a terminal in the environment that are none, such as 0, as other programs do."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("0*[1-9][0-9]{0,5}", os.environ.get(name, "")):
            os.environ.pop(name, None)
