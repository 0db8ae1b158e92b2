"""Claims as markdown: a table for a lab, and the page of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit.claims.claim import Claim, Source, entries

HEAD = """# Claims, recomputed

What five popular texts say of the KV cache, recomputed figure by figure. [`data/claims.yaml`](../data/claims.yaml)
holds each claim with its computation, written as data; a test runs them all and derives every verdict from the figures.

- **holds**: ours is the text's figure, to the last digit that it prints.
- **holds if**: that depends on something the text leaves out; the figure that follows otherwise stands beside it.
- **wrong**: it is another figure; why stands beside it.

GB is 10⁹ bytes and GiB 2³⁰; K in a context length is 1,024. Where a text gives a formula or an order of growth, the
figure is what that gives for the case named; where it gives a measured time, ours is the bound that judges it.
A text's title links to it where its address is known.
`make docs` writes this page.
"""
VERDICTS = ("holds", "holds if", "wrong")
COUNTED_THINGS = ("conversations", "layers", "requests", "users")


class Table(str):
    """Markdown that a notebook shows as a table, and print as it is."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


def rows(claims: Sequence[Claim], columns: Mapping[str, Callable[[Claim], str]]) -> str:
    """A table of claims. columns: the heading of each, and what stands in it."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for claim in claims:
        lines.append("| " + " | ".join(escaped(cell(claim)) for cell in columns.values()) + " |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """As a table's cell shows it: a bar would end the cell, two dollar signs in one text would make a formula, even
    when Markdown has taken the backslashes away."""
    return text.replace("|", "\\|").replace("$", "<span>\\$</span>")


def for_a_lab(sources: Mapping[str, Source], claims: Sequence[Claim]) -> Table:
    """A table that a lab shows: which text says it in place of which lab settles it."""
    columns = {"claim": named, "made in": lambda claim: made_in(claim.source, sources[claim.source]), **FIGURES}
    return Table(rows(claims, columns))


def made_in(key: str, source: Source) -> str:
    """A text by key and short title, linked where its address is known."""
    return f"{key} {linked(f'*{source.short}*', source)}"


def linked(title: str, source: Source) -> str:
    """A title with the text's address, if it is known."""
    return f"[{title}]({source.url})" if source.url else title


def named(claim: Claim) -> str:
    """A claim and its id."""
    return f"{claim.id} · {claim.claim}"


def ours(claim: Claim) -> str:
    """The figure as it was recomputed."""
    return figures(claim.recomputed, claim.ours or claim.unit)


def page(sources: Mapping[str, Source], claims: Sequence[Claim]) -> str:
    """The page with all claims, text by text."""
    parts = [HEAD, summary(sources, claims)]
    for key, source in sources.items():
        by = f" · {source.by}" if source.by else ""
        columns = {"claim": named, **FIGURES, "lab": lambda claim: claim.lab}
        table = rows([claim for claim in claims if claim.source == key], columns)
        parts.append(f"## {key} · {linked(source.title, source)}\n\nIn the labs: *{source.short}*{by}\n\n{table}\n")
    return "\n".join(parts)


def summary(sources: Mapping[str, Source], claims: Sequence[Claim]) -> str:
    """How many claims of each text have which verdict."""
    lines = [f"| text | {' | '.join(VERDICTS)} | claims |", "|---|---|---|---|---|"]
    names = {key: f"{key} *{source.short}*" for key, source in sources.items()} | {"": "all"}
    for key, name in names.items():
        of_text: list[str] = [claim.verdict for claim in claims if claim.source.startswith(key)]
        numbers = [*map(of_text.count, VERDICTS), len(of_text)]
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def claimed(claim: Claim) -> str:
    """The text's figure as it means it."""
    if claim.relation == "within":
        low, high = entries(claim.claimed)
        return f"{figures(low, claim.unit) if claim.unit == '$' else low} to {figures(high, claim.unit)}"
    said = "" if claim.relation == "equals" else f"{claim.relation} "
    return said + figures(claim.claimed, claim.unit)


def why(claim: Claim) -> str:
    """The verdict, what it depends on or what is right, and a note."""
    said = f"**{claim.verdict}**"
    if claim.otherwise:
        other = figures(claim.otherwise.recomputed, claim.otherwise.unit or claim.unit)
        said += f" {claim.condition}; {other} {claim.otherwise.when}"
    if claim.correction:
        said += f": {claim.correction}"
    return said + (f". {claim.note}" if claim.note else "")


def figures(value: Any, unit: str) -> str:
    """Figures with their thousands set off, and their unit; of lists, a long unit once."""
    values = entries(value)
    texts = [f"{one:,}" for one in values]
    separator = "; " if any("," in text for text in texts) and len(texts) > 1 else ", "
    if unit == "$":
        return separator.join(f"${text}" for text in texts)
    if unit in ("%", "x"):
        return separator.join(f"{text}{unit}" for text in texts)
    if values == [1] and unit in COUNTED_THINGS:
        unit = unit.removesuffix("s")
    return f"{separator.join(texts)} {unit}".rstrip()


FIGURES: Mapping[str, Callable[[Claim], str]] = {"the text": claimed, "recomputed": ours, "verdict": why}
