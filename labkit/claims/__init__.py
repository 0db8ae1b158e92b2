"""The claims ledger: figures that five popular texts give, each recomputed, from `data/claims.yaml`.

Importing it imports no torch; recomputing a claim that is `counted` does.

    from labkit import claims
    claims.claim("000-03").verdict                        # "wrong"
    float(claims.recompute(claims.claim("000-03")))       # 16.384, in the claim's unit, GB
    claims.table("03")                                    # the claims that lab 03 settles, as markdown

`python -m labkit.claims` writes `docs/claims.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from labkit import specs
from labkit.claims.claim import Claim, ClaimsFile, Otherwise, Source, read, same
from labkit.claims.compute import evaluate
from labkit.claims.page import Table, for_a_lab, page

__all__ = [
    "FILE",
    "PAGE",
    "Claim",
    "Otherwise",
    "Source",
    "Table",
    "as_page",
    "claim",
    "claims",
    "read",
    "recompute",
    "same",
    "sources",
    "table",
]

FILE = specs.DATA / "claims.yaml"
PAGE = specs.DATA.parent / "docs" / "claims.md"


@cache
def content() -> ClaimsFile:
    """The project's ledger, read once."""
    return read(FILE)


def sources() -> dict[str, Source]:
    """The texts, by key."""
    return content().sources


def claims(lab: str | None = None) -> list[Claim]:
    """All claims, or those that one lab settles, in the order of the texts. Raises SpecError."""
    return [claim for claim in content().claims if lab in (None, claim.lab)]


def claim(id: str) -> Claim:
    """The claim called `id`, such as "000-03". Raises SpecError."""
    known = {claim.id: claim for claim in claims()}
    if id not in known:
        raise specs.SpecError(specs.unknown("claim", id, known))
    return known[id]


def recompute(claim: Claim | Otherwise) -> Any:
    """The figure anew, in the claim's unit: a Fraction, or a list of them. Raises SpecError or SizeError."""
    return evaluate(claim.compute)


def table(lab: str | None = None, *, ids: Iterable[str] | None = None, verdict: str | None = None) -> Table:
    """Claims as a markdown table: those a lab settles, those of one verdict, or those named, in that order; or all.

    Raises SpecError for an id that is not there, is another lab's or has another verdict, and when none is left.
    """
    chosen = claims() if ids is None else [claim(id) for id in ids]
    fits = [one for one in chosen if lab in (None, one.lab) and verdict in (None, one.verdict)]
    if ids is not None and len(fits) < len(chosen):
        other = next(one for one in chosen if one not in fits)
        raise specs.SpecError(f"claim {other.id} belongs to lab {other.lab} and is {other.verdict!r}: leave its id out")
    if not fits:
        raise specs.SpecError(f"no claim has lab {lab} and verdict {verdict}: leave one of the two out")
    return for_a_lab(sources(), fits)


def as_page() -> str:
    """The text of `docs/claims.md`."""
    return page(sources(), claims())
