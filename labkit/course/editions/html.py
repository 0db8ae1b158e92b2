"""For browsers: what a page of HTML links to is HTML, too, without a network and without scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from labkit.course.pages import page

LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)\.(?:ipynb|md)(?=[)#])")
TITLE = re.compile(r"^# (.+)\n")
ANCHOR = re.compile(r'(<h[1-6] id=")([^"]*)(")')
TABLE = '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'


def for_browsers(text: str) -> str:
    """Markdown whose links to notebooks and Markdown pages lead to the HTML that is made of these."""
    return LINK.sub(r"](\1.html", text)


def linked_pages(pages: Mapping[str, bytes]) -> dict[str, bytes]:
    """Pages by their place, those in Markdown as HTML; other files are as they were: browsers show them."""
    return {
        (f"{place.removesuffix('.md')}.html" if place.endswith(".md") else place): (
            as_html(content.decode()).encode() if place.endswith(".md") else content
        )
        for place, content in pages.items()
    }


def as_html(text: str) -> str:
    """A page of Markdown as one file of HTML; its headings have the anchors that links on GitHub name."""
    from nbconvert.filters.markdown import markdown2html

    title = TITLE.match(text)
    body = markdown2html(for_browsers(TITLE.sub("", text, count=1)))
    body = ANCHOR.sub(lambda found: found[1] + slug(found[2]) + found[3], body)
    body = body.replace("<table>", TABLE).replace("</table>", "</table></div>")
    return page(title[1] if title else "", [body])


def slug(anchor: str) -> str:
    """GitHub's anchor of a heading, from nbconvert's: lower case, no marks."""
    return re.sub(r"[^\w-]", "", anchor.lower())
