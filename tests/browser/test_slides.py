"""The slides in a browser: nothing is cut off at 1280 x 720, and nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.course.editions.build import notebooks, read
from labkit.course.editions.slides import HIGH, WIDE, slides
from tests.browser.conftest import CHROMIUM, FLAGS

ROOT = Path(__file__).resolve().parents[2]
# reveal.js shows one section at a time, in this size; here all stand below each other, so that it need not be there.
ALL_SHOWN = f"""
.reveal .slides section {{ display: block; position: relative; width: {WIDE}px; }}
.reveal .slides section:not(:has(section)) {{ height: {HIGH}px !important; }}
.reveal aside.notes {{ display: none; }}
"""
BEYOND = f"""() => [...document.querySelectorAll(".slides section:not(:has(section))")].flatMap(s => {{
  const slide = s.getBoundingClientRect();
  return [...s.querySelectorAll('p, pre, img, table, li, h1, h2, h3')].flatMap(e => {{
    const box = e.getBoundingClientRect();
    const down = box.bottom - slide.top, right = box.right - slide.left;
    return box.width && (down > {HIGH} || right > {WIDE} || e.scrollWidth > e.clientWidth + 2 && e.tagName == 'PRE')
      ? [`${{e.tagName}} ends at ${{Math.round(right)}}, ${{Math.round(down)}}: ${{e.textContent.slice(0, 60)}}`] : [];
  }});
}})"""


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def shown(chromium, page: str, folder: Path):
    """A page without a network, and what it asked of one."""
    (folder / "slides.html").write_text(page, encoding="utf-8")
    made = chromium.new_page(viewport={"width": WIDE, "height": HIGH})
    made.context.set_offline(True)
    asked: list[str] = []
    made.on("request", lambda request: asked.append(request.url))
    made.goto((folder / "slides.html").as_uri(), wait_until="load")
    made.add_style_tag(content=ALL_SHOWN)
    return made, asked


@pytest.mark.parametrize("number", [path.name[:2] for path in notebooks(ROOT)])
def test_no_slide_is_cut_off_and_nothing_is_fetched(number: str, chromium, tmp_path: Path) -> None:
    ((path, lab),) = notebooks(ROOT, [number]).items()
    made, asked = shown(chromium, slides(read(path), lab), tmp_path)
    assert made.evaluate("document.querySelectorAll('.slides section').length") > 40
    assert made.evaluate(BEYOND) == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    made.close()


def test_a_slide_that_is_too_full_is_found(chromium, tmp_path: Path) -> None:
    ((path, lab),) = notebooks(ROOT, ["01"]).items()
    full = "<section><section>" + "<p>one more</p>" * 40 + "</section></section>"
    page = slides(read(path), lab).replace('<div class="slides">', f'<div class="slides">{full}')
    made, _ = shown(chromium, page, tmp_path)
    assert "one more" in made.evaluate(BEYOND)[0]
    made.close()
