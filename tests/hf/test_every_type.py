"""Every type that transformers generates text with, and every way to give it a labkit cache: right, or refused."""

from contextlib import suppress

import pytest

from tests.every_type import TEXT, UNTRIED, VISION, outcomes

SERVED = ("equal", "ran")


def tried(kind):
    """What the type does; the test is skipped where no tiny model of it can be made or run, whatever its cache."""
    try:
        return outcomes(kind)
    except Exception as error:
        return pytest.skip(f"{kind}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", [kind for kind in TEXT if kind not in UNTRIED])
def test_every_type_makes_its_own_tokens_or_is_refused(kind):
    found = outcomes(kind)
    assert {how: what for how, what in found.items() if not what.startswith((*SERVED, "refused: "))} == {}
    assert {what for how, what in found.items() if how.startswith("afterwards")} == {"equal"}


@pytest.mark.parametrize("kind", VISION)
def test_every_type_that_sees_makes_its_own_tokens_of_text_or_is_refused(kind):
    found = tried(kind)
    assert {how: what for how, what in found.items() if not what.startswith((*SERVED, "refused: "))} == {}
    assert {what for how, what in found.items() if how.startswith("afterwards")} == {"equal"}


def test_most_types_are_served():
    served = {
        how: sum(outcomes(kind)[how] in SERVED for kind in TEXT if kind not in UNTRIED) for how in outcomes("llama")
    }
    assert served["wrap(cache), padded"] >= 125
    assert served["wrap(cache, model), padded"] >= 90
    assert served["wrap(int8), padded"] >= 110
    assert served["wrap(int8, model), padded"] >= 80


def test_no_type_is_left_out_that_could_be_tried():
    could = []
    for kind in UNTRIED:
        with suppress(Exception):  # for whatever reason
            could.append(outcomes(kind) and kind)
    assert could == []
