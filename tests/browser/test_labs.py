"""The labs in a real browser: every cell runs, widgets answer, a learner's answer passes.

A lab runs long, so what is looked at in a lab that has run is looked at in one go: errors, widgets by mouse and by
keyboard, axe-core in the light and in the dark theme, figures on a wide and on a narrow page. What a lab measures at
length is done on little: that its figures are right, other tests see.
"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser import widgets
from tests.browser.accessible import violations
from tests.browser.conftest import ROOT, Server

IDLE = "Python 3 (ipykernel) | Idle"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RUN_SECONDS = 600
WIDE, NARROW = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
PICTURES = ".jp-OutputArea-output img"


def open_lab(page: Page, server: Server, name: str) -> None:
    """Open a notebook and wait until its kernel is ready: before that, Run All asks for a kernel."""
    page.goto(server.notebook(name))
    expect(page.locator("#jp-main-statusbar")).to_contain_text(IDLE, timeout=90_000)


def menu(page: Page, *entries: str) -> None:
    """Choose from JupyterLab's menus."""
    for entry in entries:
        # By what is written there: an entry's name has its shortcut in it, too.
        page.locator(".lm-MenuBar-item, .lm-Menu-item").filter(has=page.get_by_text(entry, exact=True)).click()


def run_all(page: Page) -> None:
    """Run every cell and wait for the last."""
    menu(page, "Run", "Run All Cells")
    last = page.locator(".jp-CodeCell .jp-InputArea-prompt").last
    expect(last).to_have_text(r"[\d+]:".replace(r"\d+", last_count(page)), timeout=RUN_SECONDS * 1000)
    settle(page)


def last_count(page: Page) -> str:
    """The execution count that the last code cell will have: cells run in order from 1."""
    return str(page.locator(".jp-CodeCell").count())


def settle(page: Page) -> None:
    """Wait until nothing runs any more."""
    expect(page.locator("#jp-main-statusbar")).to_contain_text(IDLE, timeout=RUN_SECONDS * 1000)


def choose_theme(page: Page, name: str) -> None:
    """JupyterLab Light or JupyterLab Dark."""
    menu(page, "Settings", "Theme", f"JupyterLab {name}")
    expect(page.locator("body")).to_have_attribute(
        "data-jp-theme-light", "true" if name == "Light" else "false", timeout=60_000
    )


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_lab_runs_and_its_figures_and_widgets_serve_every_learner(page: Page, server: Server, notebook: Path) -> None:
    open_lab(page, server, notebook.name)
    run_all(page)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.get_by_text("%|").count() == 0, "a bar stayed"
    shown = widgets.widgets(page)
    assert len(shown) == notebook.read_text(encoding="utf-8").count(f"labkit.labs.lab{notebook.name[:2]}.widget import")
    for widget in shown:
        assert widgets.use_every_control(page, widget, lambda: settle(page)) > 0
        widgets.reach_every_control(page, widget)
        for slider in widget.locator(".noUi-handle").all()[:1]:
            slider.focus()
            widgets.changes(widget, "an arrow key", lambda slider=slider: widgets.press_an_arrow(page, slider))
            settle(page)
    assert violations(page) == []
    choose_theme(page, "Dark")
    try:
        assert violations(page, ["color-contrast"]) == []
    finally:
        choose_theme(page, "Light")
    for size in (WIDE, NARROW):
        page.set_viewport_size(size)
        page.wait_for_timeout(300)
        keep_pictures(page, notebook.stem, size["width"])
        assert wider_than_the_page(page) == []
        assert shrunk(page) == []


def shrunk(page: Page) -> list[str]:
    """Pictures that are shown so much smaller than they were drawn that their labels cannot be read."""
    return page.evaluate(
        """pictures => [...document.querySelectorAll(pictures)]
            .filter(each => each.width > 0 && each.width < 0.7 * each.naturalWidth).map(each => each.alt)""",
        PICTURES,
    )


def wider_than_the_page(page: Page) -> list[str]:
    """Parts of widgets that end to the right of what is visible, and pictures that do where nothing can be scrolled."""
    return page.evaluate(
        """([pictures, parts]) => {
            const end = document.documentElement.clientWidth + 1;
            const beyond = each => each.getBoundingClientRect().right > end;
            const hidden = each => !["auto", "scroll"].includes(getComputedStyle(each).overflowX);
            const around = each => each.closest(".jp-OutputArea-output");
            return [...document.querySelectorAll(parts)].filter(beyond).map(each => each.textContent)
                .concat([...document.querySelectorAll(pictures)]
                    .filter(each => beyond(around(each)) || (beyond(each) && hidden(around(each))))
                    .map(each => each.alt));
        }""",
        [PICTURES, f".jp-OutputArea-output .widget-inline-hbox:not(:has(img)), .jp-OutputArea-output {widgets.LABEL}"],
    )


def keep_pictures(page: Page, lab: str, width: int) -> None:
    """Screenshots of each figure and widget, for eyes, where LABKIT_SCREENSHOTS names a folder."""
    if folder := os.environ.get("LABKIT_SCREENSHOTS"):
        outputs = page.locator(".jp-OutputArea-output").filter(has=page.locator("img"))
        for number, output in enumerate(outputs.all()):
            output.screenshot(path=Path(folder) / f"{lab[:2]}_{width}_{number:02}.png")


@pytest.mark.timeout(200)
def test_a_figure_that_does_not_follow_and_one_without_words_are_found(page: Page, server: Server) -> None:
    """The tests of the labs can fail: here is a widget that forgets its slider, and a figure that says nothing."""
    forgets = [
        "import ipywidgets, matplotlib.pyplot as plt",
        "from labkit.plots import described, figure",
        "from labkit.widgets import picture",
        "plt.plot([1, 2])",
        "plt.show()",
        "told = described(figure()[0], 'an empty figure')",
        "plt.show()",
        "label, image = ipywidgets.HTML('a label').add_class('labkit-label'), picture('image')",
        "image.show(described(figure()[0], 'an empty figure'))",
        "ipywidgets.VBox([ipywidgets.IntSlider(3, 0, 9, description='forgotten'), label, image])",
    ]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(forgets))])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, server.folder / "forgets.ipynb")
    open_lab(page, server, "forgets.ipynb")
    run_all(page)
    (widget,) = widgets.widgets(page)
    with pytest.raises(AssertionError, match="did not follow: slider forgotten"):
        widgets.use_every_control(page, widget, lambda: settle(page), seconds=2)
    assert [finding.partition(":")[0] for finding in violations(page)] == ["image-alt"]
    page.evaluate("() => document.querySelector('.noUi-handle').removeAttribute('aria-label')")
    assert [finding.partition(":")[0] for finding in violations(page)] == ["aria-input-field-name", "image-alt"]
    page.evaluate("() => document.querySelector('.noUi-handle').tabIndex = -1")
    with pytest.raises(AssertionError, match="does not reach forgotten"):
        widgets.reach_every_control(page, widget)
    page.set_viewport_size(NARROW)
    page.wait_for_timeout(300)
    assert (wider_than_the_page(page), shrunk(page)) == ([], [])
    page.evaluate("() => document.querySelectorAll('img').forEach(img => (img.width = 100))")
    assert len(shrunk(page)) == 3
    page.evaluate("() => document.querySelector('.labkit-label').style.minWidth = '2000px'")
    assert wider_than_the_page(page) == ["a label"]


CLOSE_BUT_WRONG = (
    "    rows = torch.arange(new_tokens)[:, None] + past\n    return torch.arange(past + new_tokens) < rows"
)
RIGHT = "    rows = torch.arange(new_tokens)[:, None] + past\n    return torch.arange(past + new_tokens) <= rows"


@pytest.mark.timeout(240)
def test_a_learner_errs_takes_a_hint_passes_and_finds_it_kept_after_a_restart(page: Page, server: Server) -> None:
    open_lab(page, server, "01_attention_basics.ipynb")
    settle(page)
    first, guess, blank = (cell_with(page, text) for text in ("= Lab(", 'lab.predict("01.p1"', 'lab.check("01.2"'))
    run(page, first)
    asked = text_of(guess)
    write(page, guess, asked.replace("guess=...", "guess=12"))
    expect(output_of(guess)).to_contain_text("01.p1 · kept: 12")

    run(page, blank)
    expect(output_of(blank)).to_contain_text("01.2 · pending")
    stub = text_of(blank)
    head = stub[: stub.index("raise NotImplementedError")].rstrip()
    check = 'causal_mask = lab.check("01.2", causal_mask)'
    write(page, blank, "\n".join([head, CLOSE_BUT_WRONG, "", check]))
    for said in ("01.2 · not yet", "seen", "likely", "look at", 'lab.hint("01.2")'):
        expect(output_of(blank)).to_contain_text(said)
    write(page, blank, "\n".join([head, CLOSE_BUT_WRONG, "", check, 'lab.hint("01.2")']))
    expect(output_of(blank)).to_contain_text("01.2 · hint 1 of")
    write(page, blank, "\n".join([head, RIGHT, "", check]))
    expect(output_of(blank)).to_contain_text("01.2 · pass")

    menu(page, "Kernel", "Restart Kernel…")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    settle(page)
    run(page, first)
    write(page, guess, asked)
    expect(output_of(guess)).to_contain_text("01.p1 · kept: 12")
    write(page, blank, 'print(lab.progress.get("exercises", "01.2"))')
    expect(output_of(blank)).to_contain_text("'passed': True")
    expect(output_of(blank)).to_contain_text("'hints': 1")


def cell_with(page: Page, text: str) -> Locator:
    """The first code cell that has `text` in its source now, by its place: the source will change."""
    cells = page.locator(".jp-CodeCell")
    sources = cells.locator(".cm-content").all_inner_texts()
    return cells.nth(next(place for place, source in enumerate(sources) if text in source))


def output_of(cell: Locator) -> Locator:
    """What a cell shows."""
    return cell.locator(".jp-OutputArea").first


def text_of(cell: Locator) -> str:
    """A cell's source."""
    return cell.locator(".cm-content").inner_text()


def write(page: Page, cell: Locator, text: str) -> None:
    """Put `text` in place of a cell's source, as by paste, and run it."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.keyboard.press("Control+V")
    run(page, cell)


def run(page: Page, cell: Locator) -> None:
    """Run one cell and wait for it."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    settle(page)
