"""The benchmark of eviction, on a tiny model: what it feeds, counts and judges."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import eviction
from labkit import models
from labkit.cache import Cache, EvictingCache
from labkit.quality.reading import read
from labkit.specs import ModelSpec

TINY = ModelSpec(
    "tiny", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, hidden_size=64, intermediate_size=96,
    vocab_size=128, max_seq_len=1024, tied_head=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.random(TINY, torch.float32, prepack=False)


def text(count, seed=0):
    chance = random.Random(seed)
    return [chance.randrange(128) for _ in range(count)]


def test_a_cache_that_is_fed_holds_what_one_that_reads_the_text_does(model):
    tokens = text(150)
    reading = read(model, torch.tensor([tokens]))
    for policy in eviction.policies(model).values():
        own, given = (Cache.evicting(2, policy, 70, during="prompt") for _ in range(2))
        model(torch.tensor([tokens]), own)
        reading.given(given)
        for one, other in zip(own.layers, given.layers, strict=True):
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.held()[0], other.held()[0])  # exact


def test_an_answer_counts_when_every_token_of_it_is_the_likeliest(model):
    tokens = text(40)
    right = []
    for _ in range(3):
        cache = model.cache()
        right.append(model(torch.tensor([tokens + right]), cache)[0, -1].argmax().item())
    reading = read(model, torch.tensor([tokens[:30]]))
    assert eviction.recalls(model, reading.given(model.cache()), tokens[30:], right)
    wrong = [*right[:2], (right[2] + 1) % 128]
    assert not eviction.recalls(model, reading.given(model.cache()), tokens[30:], wrong)


def test_a_cache_that_selects_is_asked_one_token_at_a_time(model):
    tokens = torch.tensor([text(90)])
    reading = read(model, tokens[:, :70])
    cache = reading.given(eviction.quest(model, 32))
    before = cache[0].bytes_read
    logits = eviction.logits_of(model, tokens[:, 70:73], cache)
    token = 2 * TINY.num_kv_heads * TINY.head_dim * 4
    newest = (7, 8, 9)  # of 71, 72 and 73 tokens, in pages of 16: one page and what the newest has
    assert cache[0].bytes_read - before == token * sum(16 + held for held in newest) + 3 * 5 * token
    assert logits.shape == (3, 128)
    whole = reading.given(model.cache())
    torch.testing.assert_close(
        eviction.logits_of(model, tokens[:, 70:73], whole), model(tokens[:, :73])[0, 70:], rtol=0, atol=1e-4
    )  # bounded


def test_recall_is_counted_cell_by_cell_and_judged_at_a_quarter():
    found = {
        ("full", 1.0, True, "early"): (10, 10), ("full", 1.0, False, "early"): (10, 10),
        ("SnapKV", 0.25, True, "early"): (8, 10), ("TOVA", 0.25, True, "early"): (3, 10),
        ("TOVA", 0.5, True, "early"): (10, 10), ("TOVA", 0.25, False, "early"): (10, 10),
    }  # fmt: skip
    figures, (entry, trials) = eviction.recall_figures(found)
    assert (entry["value"], entry["holds"]) == (0.8, False)
    assert (trials["value"], trials["holds"]) == (10, False)
    assert figures["best recall at 25% over the full cache's, not known"] == 1.0
    found["Quest", 0.25, True, "early"] = (10, 10)  # it evicts nothing
    assert not eviction.recall_figures(found)[1][0]["holds"]
    cell = "recall, SnapKV at 25%, known, early"
    assert figures[cell] == 0.8
    assert figures[f"{cell}, low"] == pytest.approx(0.4902, abs=1e-4)  # Wilson's, from a table
    assert figures[f"{cell}, high"] == pytest.approx(0.9433, abs=1e-4)
    found["SnapKV", 0.25, True, "early"] = (9, 10)
    assert eviction.recall_figures(found)[1][0]["holds"]


def test_bytes_that_are_not_the_budgets_are_found(model, monkeypatch):
    tokens = torch.tensor([text(81)])
    assert eviction.wrong_bytes(model, tokens) == 0
    held = EvictingCache.nbytes.fget
    monkeypatch.setattr(EvictingCache, "nbytes", property(lambda self: held(self) + 1))
    assert eviction.wrong_bytes(model, tokens) > 0


def test_one_run_prints_figures_and_judges_every_part(model, monkeypatch, capsys):
    def tokenizer(said, **_):
        tokens = [ord(letter) % 128 for letter in said]
        return SimpleNamespace(input_ids=torch.tensor([tokens]) if _.get("return_tensors") else tokens)

    monkeypatch.setattr(eviction.models, "load", lambda **_: model)
    monkeypatch.setattr(eviction.models, "tokenizer", lambda: tokenizer)
    monkeypatch.setattr(eviction.quality, "load_text", lambda name: "".join(map(chr, text(1900))))
    monkeypatch.setattr(eviction, "set_threads", lambda: None)
    monkeypatch.setattr(eviction, "begin", lambda: None)
    monkeypatch.setattr(eviction, "SEEN", 320)
    monkeypatch.setattr(eviction, "PASSAGES", (0,))
    monkeypatch.setattr(eviction, "RANKING", ("SnapKV", "random"))
    monkeypatch.setattr(eviction, "OVERHEAD", {"TOVA": 1, "key norm": 3})
    names = ("half", "sinks", "recall", "bytes", "time")
    monkeypatch.setattr(sys, "argv", ["eviction", "--texts", "1", "--trials", "1", "--rounds", "2", "--only", *names])
    code = eviction.main()
    said = capsys.readouterr().out
    written = json.loads(said.strip().splitlines()[-1])
    figures = written["figures"]
    for name in ("SnapKV", "random", "SnapKV, int4", "SnapKV, heads share", "merging", "Quest"):
        assert figures[f"half, {name}: perplexity"] > 0
    assert figures["window, 4 sinks, places in the cache: perplexity"] > 0
    held = {entry["name"]: entry["holds"] for entry in written["bars"]}
    assert figures["bytes a step reads at 2000 tokens, full at 100%"] == 2001 * 2 * 2 * 2 * 32 * 4
    assert figures["bytes a step reads at 2000 tokens, sinks and window at 25%"] == 500 * 2 * 2 * 2 * 32 * 4
    assert "recall, Quest at 12%, not known, late" in figures
    assert "fewest trials in a cell of recall" in held
    for name in ("TOVA", "key norm"):
        assert figures[f"ms a step at 2000 tokens, {name}"] > 0
        assert f"{name}: a quarter of 8000 tokens, times as fast" in held
    assert held["bytes beside the budget's, all steps and policies"]
    assert code == (0 if all(held.values()) else 1)
