"""The first use of a word of the glossary on a page leads to it.

`glossary.md` reads well as plain Markdown too. An entry is a paragraph that begins with its word in bold, other forms
of it behind commas, and ends with the labs that introduce it: `**evict, eviction** · ... *07*`. A lab leads to entries
of its own and of earlier labs; one without a lab is led to from nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

GLOSSARY = Path(__file__).resolve().parents[1] / "glossary.md"
PAGE = "docs/glossary"
ENTRY = re.compile(r"^\*\*(.+?)\*\* · .+?(?:\*(\d\d)(?:, \d\d)*\*)?$", re.DOTALL)
LINKED = "notebooks/"  # pages that lead to the glossary
LEFT_ALONE = (nodes.reference, nodes.title, nodes.literal_block, nodes.raw, nodes.math, nodes.image, nodes.Invisible)


def forms(bold: str) -> list[str]:
    """The forms of an entry, as they stand in a text: `head_dim` without the marks of code."""
    return [form.strip().strip("`") for form in bold.split(", ")]


def anchor(bold: str) -> str:
    """The id of an entry."""
    return "term-" + re.sub(r"[^a-z0-9]+", "-", forms(bold)[0].lower()).strip("-")


def entries(lab: str) -> dict[str, str]:
    """The anchor of every form of the entries that lab NN knows."""
    known = {}
    for paragraph in GLOSSARY.read_text(encoding="utf-8").split("\n\n"):
        if (found := ENTRY.match(paragraph.strip())) and found.group(2) and found.group(2) <= lab:
            known |= {form: anchor(found.group(1)) for form in forms(found.group(1))}
    return known


def pattern(words: list[str]) -> re.Pattern:
    """Any of these, longer ones first, in the singular or plural, with a capital at the beginning of a sentence."""
    either = [f"[{word[0]}{word[0].upper()}]{re.escape(word[1:])}" for word in sorted(words, key=len, reverse=True)]
    return re.compile(rf"(?<![\w-])({'|'.join(either)})(?:s|es)?(?![\w-])")


class Anchors(SphinxTransform):
    """Give each entry of the glossary its id."""

    default_priority = 220

    def apply(self, **kwargs: object) -> None:
        """On that page alone."""
        if self.env.docname != PAGE:
            return
        for paragraph in self.document.findall(nodes.paragraph):
            first = next((child for child in paragraph.children if child.astext()), None)  # MyST makes empty texts
            if isinstance(first, nodes.strong):
                paragraph["ids"].append(anchor(first.astext()))
                paragraph["classes"].append("term")


class FirstUses(SphinxTransform):
    """Link the first use of each entry on a page of a lab."""

    default_priority = 890

    def apply(self, **kwargs: object) -> None:
        """Text word for word, code where all of it is a word."""
        if not self.env.docname.startswith(LINKED):
            return
        self.env.note_dependency(str(GLOSSARY))
        known = entries(self.env.docname.removeprefix(LINKED)[:2])
        words, seen = pattern(list(known)), set()
        for text in list(self.document.findall(nodes.Text)):
            parents = list(above(text))
            if any(isinstance(parent, LEFT_ALONE) for parent in parents):
                continue
            if isinstance(text.parent, nodes.literal):
                if (place := known.get(str(text))) and place not in seen:
                    seen.add(place)
                    text.parent.replace_self(self.link(place, text.parent.deepcopy()))
                continue
            if any(isinstance(parent, nodes.paragraph) for parent in parents):
                self.link_words(text, words, known, seen)

    def link_words(self, text: nodes.Text, words: re.Pattern, known: dict[str, str], seen: set[str]) -> None:
        """Cut a text where an entry is used for the first time."""
        made: list[nodes.Node] = []
        end = 0
        for found in words.finditer(str(text)):
            word = found.group(1)
            place = known.get(word) or known[word[0].lower() + word[1:]]
            if place not in seen:
                seen.add(place)
                made += [nodes.Text(str(text)[end : found.start()]), self.link(place, nodes.inline("", found.group()))]
                end = found.end()
        if made:
            text.parent.replace(text, [*made, nodes.Text(str(text)[end:])])

    def link(self, place: str, inside: nodes.Node) -> nodes.reference:
        """A link to an entry."""
        address = self.app.builder.get_relative_uri(self.env.docname, PAGE) + "#" + place
        return nodes.reference("", "", inside, refuri=address, internal=True, classes=["term"])


def above(node: nodes.Node) -> Iterator[nodes.Element]:
    """The elements that a node stands in, the nearest first."""
    while (parent := node.parent) is not None:
        yield parent
        node = parent


def setup(app: Sphinx) -> dict:
    """Look at every page."""
    app.add_transform(Anchors)
    app.add_transform(FirstUses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
