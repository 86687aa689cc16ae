"""What several tests of the system share."""

import pytest


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, for pages."""
    from benchmarks import screenshot

    if screenshot.found() is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright", reason="Playwright is not installed")
    with screenshot.chromium() as started:
        yield started
