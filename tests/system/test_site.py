"""The site that `make docs` has built, in the folder that RWALK_SITE names: complete, self-contained, readable."""

import importlib
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import rwalk

SITE = Path(os.environ.get("RWALK_SITE") or "nowhere").absolute()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
SHOWN = ["index.html", "own_rule.html", "api/rwalk.html", "notebooks/first_steps.html"]
"""A page of each sort: start, guide, reference, notebook."""

pytestmark = pytest.mark.skipif("RWALK_SITE" not in os.environ, reason="the site is tested by `make docs`")


class Reader(HTMLParser):
    """Notes where a page leads, what it loads, and the places in it."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed((SITE / page).read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places.add(found.get("id"))
        if tag == "a":
            self.links.append(found.get("href") or "")
        else:
            self.loads += [found[name] for name in ("src", "href", "data") if name in found]


@pytest.fixture(scope="module")
def pages():
    return {page: Reader(page) for page in PAGES}


def led(page, link):
    """Where a link on a page leads: a file of the site, and a place in it."""
    parts = urlsplit(link)
    path = os.path.normpath(os.path.join(os.path.dirname(page), unquote(parts.path))) if parts.path else page
    return path, unquote(parts.fragment)


def test_no_page_loads_anything_from_the_network(pages):
    assert len(pages) > 40
    for page, reader in pages.items():
        assert not [link for link in reader.loads if re.match(r"[a-z]+:|//", link) and not link.startswith("data:")], page
        assert not re.findall(r"@import|url\((?!['\"]?data:)", (SITE / page).read_text()), page


def test_every_link_within_the_site_leads_somewhere(pages):
    for page, reader in pages.items():
        for link in {*reader.links, *reader.loads}:
            if link and not re.match(r"[a-z]+:", link):
                target, place = led(page, link)
                assert (SITE / target).exists(), f"{page}: {link}"
                if place and target in pages:
                    assert place in pages[target].places, f"{page}: {link}"


def test_every_public_name_has_an_entry():
    content = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[-1]
    known = {line.split()[0] for line in zlib.decompress(content).decode().splitlines()}
    modules = ["rwalk", *(f"rwalk.{name}" for name in rwalk._SHOWN)]
    public = {f"{name}.{shown}": shown for name in modules for shown in importlib.import_module(name).__all__}
    assert not [name for name, shown in public.items() if name not in known and f"rwalk.{shown}" not in known]
    hosts = ("transformers.protect", "lightning.ConsolidationCallback", "avalanche.RWalkPlugin", "sklearn.RWalkClassifier")
    assert not {f"rwalk.integrations.{name}" for name in hosts} - known


@pytest.fixture
def visit(browser):
    """Return a function that opens a page; what it asks the network for, and complains about, is refused at the end."""
    contexts, heard = [], []

    def opened(page, width, scheme="light"):
        if not contexts:
            contexts.append(browser.new_context(color_scheme=scheme))
        sheet = contexts[0].new_page()
        sheet.set_viewport_size({"width": width, "height": 900})
        sheet.on("console", lambda message: heard.append(f"{page}: {message.text}"))
        sheet.on("pageerror", lambda error: heard.append(f"{page}: {error}"))
        sheet.on("request", lambda request: request.url.startswith(("file:", "data:")) or heard.append(request.url))
        sheet.goto(f"{SITE.as_uri()}/{page}")
        return sheet

    yield opened
    for context in contexts:
        context.close()
    assert not heard


def test_no_page_is_wider_than_the_screen(visit):
    for page in PAGES:
        sheet = visit(page, 1280)
        for width in (1280, 390):
            sheet.set_viewport_size({"width": width, "height": 900})
            assert sheet.evaluate("document.documentElement.scrollWidth") <= width, page
        sheet.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", SHOWN)
def test_axe_finds_nothing_serious(visit, page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    sheet = visit(page, 1280, scheme)
    # it preloads style sheets by requests of its own, which browsers refuse to pages from disk
    found = [
        v
        for v in axe.Axe().run(sheet, options={"preload": False}).response["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert not [(v["id"], len(v["nodes"]), v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in found]


def test_the_search_works_from_disk(visit):
    sheet = visit("search.html?q=herding", 1280)
    sheet.wait_for_selector("#search-results li a")
    assert "Replay" in sheet.locator("#search-results").inner_text()


def test_a_plot_of_a_notebook_is_shown(visit):
    sheet = visit("notebooks/first_steps.html", 1280)
    sizes = sheet.eval_on_selector_all(".cell_output img", "all => all.map(image => image.naturalWidth)")
    assert sizes
    assert min(sizes) > 300
