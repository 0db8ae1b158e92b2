"""A link of a lab, clicked in JupyterLab as `labkit open` starts it: the page opens, laid out, and so do its own."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Server
from tests.browser.test_labs import NOTEBOOKS


@pytest.mark.timeout(400)
def test_a_lab_leads_to_the_glossary_and_that_to_the_claims(page: Page, server: Server) -> None:
    page.goto(f"{server.address}/lab/tree/{NOTEBOOKS[0].name}?reset&token={server.token}")
    page.locator(".jp-RenderedMarkdown a").get_by_text("glossary").first.click(timeout=90_000)
    expect(page.locator(".jp-MarkdownViewer h1").first).to_contain_text("Glossary", timeout=60_000)
    page.locator(".jp-MarkdownViewer a").get_by_text("All of them").first.click()
    expect(page.locator(".jp-MarkdownViewer h1").last).to_contain_text("Claims", timeout=60_000)
