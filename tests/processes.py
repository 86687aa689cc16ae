"""Processes of tests, and waiting for what they do."""

import json
import subprocess
import time
from contextlib import contextmanager


@contextmanager
def running(command, **options):
    """A process that is gone at the end, whatever the test finds."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def answering(command, **options):
    """A function that sends a process a request, which is a line of JSON, and returns its answer."""
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:

        def ask(request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
        process.wait(timeout=30)


def wait(holds, seconds=120):
    """Wait until something holds; that it never does is an error."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
