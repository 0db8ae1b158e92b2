"""Widgets as a learner uses them: by mouse and by keyboard, the figure watched."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

LABEL = ".labkit-label"  # every widget of the labs has one
CONTROLS = ".noUi-handle, select, input[type=text]"
SECONDS = 60


def widgets(page: Page) -> list[Locator]:
    """The labs' widgets in a notebook that has run: the boxes that hold a label, controls and a picture."""
    return page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator(LABEL)).all()


def controls(widget: Locator) -> list[Locator]:
    """What can be moved, chosen or typed in."""
    return widget.locator(CONTROLS).all()


def name_of(control: Locator) -> str:
    """What is written before a control."""
    row = control.locator("xpath=ancestor::*[contains(@class, 'widget-inline-hbox')][1]")
    return row.locator(".widget-label").inner_text()


def kind_of(control: Locator) -> str:
    """slider, select or input."""
    tag = str(control.evaluate("control => control.tagName.toLowerCase()"))
    return "slider" if tag == "div" else tag


def source(widget: Locator) -> str:
    """The picture, as the browser has it."""
    return widget.locator("img").last.get_attribute("src") or ""


def changes(widget: Locator, what: str, act: Callable[[], None], seconds: float = SECONDS) -> None:
    """Do something to a widget; AssertionError, naming what was done, when its figure stays as it was."""
    before = source(widget)
    act()
    expect(widget.locator("img").last, f"the figure did not follow: {what}").not_to_have_attribute(
        "src", before, timeout=seconds * 1000
    )


def use_every_control(page: Page, widget: Locator, settle: Callable[[], None], seconds: float = SECONDS) -> int:
    """Drag, choose and type, one control after another; each must change the figure. Returns their number."""
    found = controls(widget)
    for control in found:
        control.scroll_into_view_if_needed()
        changes(widget, f"{kind_of(control)} {name_of(control)}", lambda control=control: move(page, control), seconds)
        settle()
    return len(found)


def move(page: Page, control: Locator) -> None:
    """Another value: a slider is dragged to its far end, a list gives its next entry, a text loses its first word."""
    kind = kind_of(control)
    if kind == "slider":
        drag(page, control)
    elif kind == "select":
        index, many = control.evaluate("list => [list.selectedIndex, list.options.length]")
        control.select_option(index=(index + 1) % many)
    else:
        control.fill(control.input_value().partition(" ")[2])
        control.press("Enter")


def drag(page: Page, handle: Locator) -> None:
    """By mouse, from where it is to the end that is farther away."""
    rail = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]").bounding_box()
    at = handle.bounding_box()
    assert rail
    assert at
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    left, right = rail["x"], rail["x"] + rail["width"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + left) / 2, y, steps=2)
    page.mouse.move(right + 5 if x < (left + right) / 2 else left - 5, y, steps=4)
    page.mouse.up()


def reach_every_control(page: Page, widget: Locator) -> None:
    """Tab goes through all controls and Shift+Tab back to the first."""
    found = controls(widget)
    found[0].focus()
    for control in [*found[1:], None]:
        tab(page, "Tab", control)
    for control in reversed(found):
        tab(page, "Shift+Tab", control)


def tab(page: Page, key: str, control: Locator | None) -> None:
    """Press a key until a control has the focus; a slider's figure beside it takes the focus, too."""
    for _ in range(4):
        page.keyboard.press(key)
        if control is None or control.evaluate("control => control === document.activeElement"):
            return
    raise AssertionError(f"{key} does not reach {name_of(control) if control else 'what follows'}")


def press_an_arrow(page: Page, handle: Locator) -> None:
    """The arrow that has somewhere to go, on a slider that has the focus."""
    now, top = (float(handle.get_attribute(f"aria-value{which}") or 0) for which in ("now", "max"))
    page.keyboard.press("ArrowLeft" if now >= top else "ArrowRight")
