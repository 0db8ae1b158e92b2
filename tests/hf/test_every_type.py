"""Every type that transformers generates text with, and every way to give it a labkit cache: right, or refused."""

import json
import os
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests import every_type
from tests.every_type import TEXT, UNTRIED, VISION, wrong
from tests.shared import folder_of_the_run

TRIED = [kind for kind in TEXT if kind not in UNTRIED]
Outcomes = Callable[[str], dict[str, str]]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory) -> Outcomes:
    """Those of each type, found once, whichever worker asks first."""
    folder = folder_of_the_run(tmp_path_factory) / "types"
    folder.mkdir(exist_ok=True)

    def of(kind: str) -> dict[str, str]:
        kept = folder / f"{kind}.json"
        if not kept.exists():
            new = kept.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(every_type.outcomes(kind)))
            new.replace(kept)
        return json.loads(kept.read_text())

    return of


@pytest.mark.parametrize("kind", TRIED)
def test_every_type_makes_its_own_tokens_or_is_refused(kind, outcomes: Outcomes):
    assert wrong(outcomes(kind)) == {}


def test_most_types_are_served(outcomes: Outcomes):
    served = {how: sum(outcomes(kind)[how] in ("equal", "ran") for kind in TRIED) for how in outcomes("llama")}
    assert served["wrap(cache), padded"] >= 130
    assert served["wrap(cache, model), padded"] >= 95
    assert served["wrap(int8), padded"] >= 130
    assert served["wrap(int8, model), padded"] >= 95


def test_padding_shows_in_nearly_every_type(outcomes: Outcomes):
    assert {kind for kind in TRIED if outcomes(kind)["padding"] == "ignored"} <= {
        "cpmant", "reformer", "rwkv", "xlm", "xlnet",
    }  # fmt: skip


def test_every_type_that_sees_makes_its_own_tokens_of_text_or_is_refused(outcomes: Outcomes):
    tried, failed = [], {}
    for kind in VISION:
        with suppress(Exception):  # not made tiny, or not run on text alone, whatever its cache
            failed[kind] = wrong(outcomes(kind))
            tried.append(kind)
    assert {kind: found for kind, found in failed.items() if found} == {}
    assert len(tried) >= 40
    assert {"llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma", "idefics3", "internvl"} <= set(tried)


def test_no_type_is_left_out_that_could_be_tried(outcomes: Outcomes):
    could = []
    for kind in UNTRIED:
        with suppress(Exception):  # for whatever reason
            could.append(outcomes(kind) and kind)
    assert could == []
