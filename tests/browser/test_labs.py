"""The labs in a real browser: every cell runs, widgets answer, a learner's answer passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import ROOT, Server

IDLE = "Python 3 (ipykernel) | Idle"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LABEL = ".labkit-label"  # every widget of the labs has one
RUN_SECONDS = 180


def open_lab(page: Page, server: Server, name: str) -> None:
    """Open a notebook and wait until its kernel is ready: before that, Run All asks for a kernel."""
    page.goto(server.notebook(name))
    expect(page.locator("#jp-main-statusbar")).to_contain_text(IDLE, timeout=90_000)


def run_all(page: Page) -> None:
    """Run every cell and wait for the last."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = page.locator(".jp-CodeCell .jp-InputArea-prompt").last
    expect(last).to_have_text(r"[\d+]:".replace(r"\d+", last_count(page)), timeout=RUN_SECONDS * 1000)
    settle(page)


def last_count(page: Page) -> str:
    """The execution count that the last code cell will have: cells run in order from 1."""
    return str(page.locator(".jp-CodeCell").count())


def settle(page: Page) -> None:
    """Wait until nothing runs any more."""
    expect(page.locator("#jp-main-statusbar")).to_contain_text(IDLE, timeout=RUN_SECONDS * 1000)


def picture(label: Locator) -> Locator:
    """The picture in the output that holds `label`."""
    return label.page.locator(".jp-CodeCell").filter(has=label).locator("img").last


def source(picture: Locator) -> str:
    """Where the browser has a picture from, anew for each that it is sent."""
    return picture.get_attribute("src") or ""


def change(page: Page, label: Locator, act) -> None:
    """Do something to a widget and wait until the kernel has answered with another text."""
    before = label.inner_text()
    act()
    expect(label).not_to_have_text(before)
    settle(page)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_cell_runs_without_an_error_and_the_widget_draws_anew(page: Page, server: Server, notebook: Path) -> None:
    open_lab(page, server, notebook.name)
    run_all(page)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.get_by_text("%|").count() == 0, "a bar stayed"
    if f"lab{notebook.name[:2]}.widget" not in notebook.read_text(encoding="utf-8"):
        return
    label = page.locator(LABEL).first
    label.scroll_into_view_if_needed()
    cell = page.locator(".jp-CodeCell").filter(has=label)
    handle = cell.locator(".noUi-handle").first
    drawn = picture(label)
    seen = [source(drawn)]
    for _ in range(2):
        change(page, label, lambda: (handle.focus(), page.keyboard.press("ArrowRight")))
        expect(drawn, "the picture did not follow the slider").not_to_have_attribute(
            "src", seen[-1], timeout=RUN_SECONDS * 1000
        )  # it comes after the text
        seen.append(source(drawn))
    assert len(set(seen)) == 3


@pytest.mark.timeout(200)
def test_a_learner_types_an_answer_and_the_check_passes(page: Page, server: Server) -> None:
    open_lab(page, server, "01_attention_basics.ipynb")
    settle(page)
    cells = page.locator(".jp-CodeCell")
    run(page, cells.first)
    blank = cells.filter(has_text='lab.check("01.2"').first
    expect(blank.locator(".jp-OutputArea-output").first).to_contain_text("01.2 · pending")
    source = blank.locator(".cm-content").inner_text()
    head = source[: source.index("raise NotImplementedError")].rstrip()
    body = "    rows = torch.arange(new_tokens)[:, None] + past\n    return torch.arange(past + new_tokens) <= rows"
    tail = 'causal_mask = lab.check("01.2", causal_mask)'
    blank.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.evaluate("text => navigator.clipboard.writeText(text)", "\n".join([head, body, "", tail]))
    page.keyboard.press("Control+V")
    run(page, blank)
    expect(blank.locator(".jp-OutputArea-output").first).to_contain_text("01.2 · pass")


def run(page: Page, cell: Locator) -> None:
    """Run one cell and wait for it."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    settle(page)
