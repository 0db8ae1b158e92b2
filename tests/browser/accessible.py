"""axe-core on what is ours in a notebook: prose, outputs, figures, widgets; JupyterLab's own parts are left out."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

from tests.npm import package

OURS = ".jp-MarkdownOutput, .jp-OutputArea-output"
RULES = [
    "aria-input-field-name",
    "button-name",
    "color-contrast",
    "image-alt",
    "input-button-name",
    "label",
    "link-name",
    "select-name",
    "svg-img-alt",
]


def violations(page: Page, rules: list[str] = RULES) -> list[str]:
    """What axe finds against `rules`, a line each: rule, element, what is wrong."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate((package("axe-core") / "axe.min.js").read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate(
        """([ours, rules]) => axe.run(
            {include: [...document.querySelectorAll(ours)]}, {runOnly: rules, resultTypes: ["violations"]}
        )""",
        [OURS, rules],
    )
    return [
        f"{violation['id']}: {node['html'][:200]}: {' '.join(node['failureSummary'].split())}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
