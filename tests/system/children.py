"""Runs commands of rwalk in forked children that are killed or given a full disk: a child costs no start of Python.

Reads one JSON object a line: `arguments` and the folder `out`, without which the command is only warmed up; `seconds` until
SIGKILL; `line`, SIGKILL at that line of those that the modules that write execute; `unfinished`, SIGKILL in the first write;
`limit`, bytes that a file may have. Answers with `status` (negative: the signal), `stderr` and `lines`; with `twins`, two
children do the same at once, and the answer is that of both.
"""

import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stdout

import torch

from rwalk.bench import data
from rwalk.cli import main as cli
from rwalk.report import svg

WRITERS = ("files.py", "record.py", "checkpoint.py", "pool.py")


def main():
    torch.set_num_threads(1)  # no threads before a fork
    svg.draw = lambda _: ""  # charts are drawn on threads, which a forked child does not have
    digits = data._digits()
    data._digits = lambda: digits
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def warm(arguments):
    """Run a command here, so that children find everything loaded."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        cli.main([*arguments, "--out", folder])


def answer(arguments, out=None, twins=False, **options):
    """Do one command in a child, or in two; without a folder, here."""
    if out is None:
        return warm(arguments)
    started = [started_child(arguments, out, **options) for _ in range(2 if twins else 1)]
    answers = [outcome(*child) for child in started]
    return answers if twins else answers[0]


def started_child(arguments, out, seconds=None, line=None, unfinished=False, limit=None):
    """Return a child's number, its pipes and when to kill it."""
    pipes = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _child([*arguments, "--out", out], line, unfinished, limit, pipes[0][1], pipes[1][1])
    for _, outlet in pipes:
        os.close(outlet)
    return child, pipes, seconds


def outcome(child, pipes, seconds):
    """Wait for a child, perhaps kill it, and return how it ended."""
    if seconds is not None and not select.select([pipes[1][0]], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    stderr, lines = (os.fdopen(inlet).read() for inlet, _ in pipes)
    return {"status": os.waitstatus_to_exitcode(status), "stderr": stderr, "lines": lines}


def _child(arguments, line, unfinished, limit, errors, outlet):
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    count = 0

    def local(frame, event, _):
        nonlocal count
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return local

    status = 70
    try:
        if unfinished:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if line is not None:
            sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.endswith(WRITERS) else None)
        status = cli.main(arguments)
        sys.settrace(None)
        os.write(outlet, str(count).encode())
    except BaseException:  # what is no answer of the command line is shown
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
