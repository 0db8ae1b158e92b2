"""The site in a browser: found by searching, read in the dark and on a phone, and nothing comes from elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import npm, site
from tests.browser.conftest import CHROMIUM, FLAGS, running
from tests.ports import free_port

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BRIGHTNESS = (
    """getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b) / 3"""
)
UNSEEN = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"


@dataclass
class Visit:
    """A browser page on the site, and what it asked for and complained of."""

    address: str
    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, place: str) -> Any:
        self.page.goto(f"{self.address}/{place}")
        return self.page


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Iterator[str]:
    folder = site.built()
    port = free_port()
    serves = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with running(serves, f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("site") / "log"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def visit(address: str) -> Iterator[Visit]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        page.set_default_timeout(60_000)
        made = Visit(address, page)
        page.on("request", lambda request: made.asked.append(request.url))
        page.on("pageerror", lambda error: made.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and made.complaints.append(said.text))
        try:
            yield made
        finally:
            browser.close()
    assert [url for url in made.asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []
    assert made.complaints == []


pytestmark = pytest.mark.timeout(900)  # the first may have to build the site


def test_the_front_page_leads_to_a_lab_and_a_word_of_it_to_the_glossary(visit: Visit) -> None:
    page = visit.open("")
    page.wait_for_url(re.compile(r"/docs/index\.html$"))
    page.get_by_role("navigation").get_by_role("link", name="Lab 02 · The cache from scratch").first.click()
    page.wait_for_url(re.compile(r"/notebooks/02_cache_from_scratch\.html$"))
    assert page.locator("article h1").inner_text().startswith("Lab 02 · The cache from scratch")
    page.wait_for_load_state("load")
    assert page.evaluate(UNSEEN) == []
    page.locator("a.term", has_text="TTFT").click()
    page.wait_for_url(re.compile(r"/docs/glossary\.html#term-ttft$"))
    assert page.locator("p#term-ttft").inner_text().startswith("TTFT · Time to first token")


def test_a_word_is_found_by_searching(visit: Visit) -> None:
    page = visit.open("docs/index.html")
    page.get_by_role("button", name="Search").locator("visible=true").first.click()
    field = page.locator("dialog input[type=search]")
    field.fill("heavy hitters")
    field.press("Enter")
    page.wait_for_url(re.compile(r"search\.html\?q=heavy"))
    page.locator("#search-results li a", has_text="Lab 07 · Eviction").first.wait_for()
    assert page.locator("#search-results li", has_text="Glossary").count()


def test_a_word_that_is_nowhere_is_not_found(visit: Visit) -> None:
    page = visit.open("search.html?q=zyzzyva")
    page.locator("#search-results", has_text="did not match any documents").wait_for()
    assert page.locator("#search-results li").count() == 0


def test_it_is_dark_when_told_so_and_stays_dark(visit: Visit) -> None:
    page = visit.open("notebooks/05_quantization.html")
    assert page.evaluate(BRIGHTNESS) > 200
    page.get_by_role("button", name="Color mode").locator("visible=true").first.click()
    page.get_by_role("button", name="Dark", exact=True).locator("visible=true").first.click()
    assert page.evaluate(BRIGHTNESS) < 60
    page.reload()
    assert page.evaluate(BRIGHTNESS) < 60


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_the_window(width: int, visit: Visit) -> None:
    visit.page.set_viewport_size({"width": width, "height": 1000})
    folder = site.built()
    places = {
        str(path.relative_to(folder)) for room in ("docs", "notebooks") for path in (folder / room).rglob("*.html")
    }
    wider = {
        place: over
        for place in {*places, "_modules/labkit/llama.html"}
        if (over := visit.open(place).evaluate(OVERFLOW)) > 0
    }
    assert wider == {}


def test_the_test_of_width_finds_what_is_too_wide(visit: Visit) -> None:
    page = visit.open("docs/glossary.html")
    page.evaluate("document.querySelector('article h1').style.width = '3000px'")
    assert page.evaluate(OVERFLOW) > 0


READABLE = ("docs/index.html", "notebooks/02_cache_from_scratch.html", "docs/glossary.html", "docs/api/attention.html")
RULES = [
    "aria-input-field-name",
    "button-name",
    "color-contrast",
    "image-alt",
    "label",
    "link-name",
    "list",
    "listitem",
]
AXE = """rules => axe.run(document.querySelector("article"), {runOnly: rules, resultTypes: ["violations"]})"""


def violations(page: Any) -> list[str]:
    """What axe finds wrong with the article of a page, a line each."""
    page.evaluate((npm.package("axe-core") / "axe.min.js").read_text(encoding="utf-8"))
    return [
        f"{found['id']}: {node['html'][:160]}: {' '.join(node['failureSummary'].split())}"
        for found in page.evaluate(AXE, RULES)["violations"]
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("place", READABLE)
def test_text_stands_out_and_pictures_and_links_have_words(place: str, theme: str, visit: Visit) -> None:
    visit.page.emulate_media(color_scheme=theme)
    page = visit.open(place)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert violations(page) == []


def test_the_test_of_contrast_finds_what_does_not_stand_out(visit: Visit) -> None:
    page = visit.open("docs/glossary.html")
    page.evaluate("document.querySelector('article p').style.color = '#eeeeee'")
    assert any(line.startswith("color-contrast") for line in violations(page))
