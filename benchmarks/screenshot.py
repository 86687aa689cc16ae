"""Pictures of a folder's report: `python -m benchmarks.screenshot runs/demo docs/images` makes the README's, with Chromium."""

import argparse
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from rwalk import report
from rwalk.report.charts import Chart, Point, Series, styles
from rwalk.report.names import names
from rwalk.report.summary import MethodComparison, Spread

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
"""For a root user, and so that the browser itself asks for nothing."""
WIDTH, HEIGHT = 1220, 1260


def found() -> str | None:
    """Return the path of this machine's Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found(), args=list(FLAGS))
        yield browser
        browser.close()


def save(png: bytes, path: Path) -> None:
    """Write a picture with few colours, which takes a third of the bytes."""
    Image.open(io.BytesIO(png)).quantize(96).save(path, optimize=True)


def kept_against_learned(comparison: MethodComparison) -> Chart:
    """Return a chart with a point for each method: what it learned, and what of it was left in the end, in percent."""
    looks, named, series = styles(comparison), names(comparison), []
    for key, (line, name) in enumerate(zip(comparison.lines, named, strict=True)):
        learned, kept = line.learned, line.kept
        if learned and kept:
            point = Point(100 * learned.mean, Spread(100 * kept.mean, None))
            series.append(Series(key, name, looks[key], [point]))
    titles = "accuracy right after learning a task, %", "of it left after the last task, %"
    return Chart("Kept against learned", "", *titles, series, whole=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of records")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    page, place = report.write(options.runs), options.out
    place.mkdir(parents=True, exist_ok=True)
    (comparison,) = report.summarise(report.read(options.runs)[0])
    for scheme in ("light", "dark"):
        chart = kept_against_learned(comparison)
        report.Drawing(chart, dark=scheme == "dark").save(place / f"kept-{scheme}.svg")
    with chromium() as browser:
        for scheme in ("light", "dark"):
            sheet = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            sheet.goto(page.resolve().as_uri())
            save(sheet.screenshot(), place / f"report-{scheme}.png")
            save(sheet.locator(".heatmaps").first.screenshot(), place / f"maps-{scheme}.png")


if __name__ == "__main__":
    main()
