"""The benchmark of eviction, on a tiny model: what it feeds, counts and judges."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import eviction, eviction_caches, eviction_recall, eviction_times
from labkit import models
from labkit.cache import Cache, EvictingCache
from labkit.quality.reading import read
from labkit.quality.side_by_side import logits_beside
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
    for policy in eviction_caches.policies(model).values():
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
    assert eviction_recall.recalled(model, [reading.given(model.cache())], tokens[30:], right) == [True]
    wrong = [*right[:2], (right[2] + 1) % 128]
    assert eviction_recall.recalled(model, [reading.given(model.cache())], tokens[30:], wrong) == [False]


def test_caches_side_by_side_answer_as_each_alone(model):
    tokens, follow = text(300), torch.tensor([text(9, seed=1)])
    reading = read(model, torch.tensor([tokens]))
    makers = eviction_recall.asked_caches(model, len(tokens), seed=3)
    together = logits_beside(model, [reading.given(make()) for make in makers.values()], follow.expand(len(makers), -1))
    for (name, share), row in zip(makers, together, strict=True):
        policy = eviction_caches.policies(model, seed=3).get(name)  # shares no scores
        cache = makers[name, share]() if policy is None else Cache.evicting(2, policy, share, during="prompt")
        pieces = follow.split(1 if name == "Quest" else 9, dim=1)
        model(torch.tensor([tokens]), cache)
        alone = torch.cat([model(piece, cache)[0] for piece in pieces])
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-4)  # bounded


def test_each_trial_of_recall_has_a_random_policy_of_its_own(model):
    tokens = text(60)
    reading = read(model, torch.tensor([tokens]))
    kept = [
        reading.given(eviction_recall.asked_caches(model, 60, seed)["random", 0.25]()).layers[0].positions.sort().values
        for seed in (0, 0, 1)
    ]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_recall_gives_no_two_trials_the_same_seed(model, monkeypatch):
    seeds = []

    def trial(model, reading, asked, answer, seed):
        seeds.append(seed)
        return {("full", 1.0): True}

    monkeypatch.setattr(eviction_recall, "one_trial", trial)
    found = eviction_recall.measure_recall(model, lambda said: [ord(x) % 128 for x in said],
                                           {"a": torch.tensor([text(1900)])}, 2)  # fmt: skip
    assert {len(hits) for hits in found.values()} == {2}
    assert len(set(seeds)) == 6  # the known question and the unknown one are the same trial's
    assert len(seeds) == 12


def test_a_cache_that_selects_is_asked_one_token_at_a_time(model):
    tokens = torch.tensor([text(90)])
    reading = read(model, tokens[:, :70])
    cache = reading.given(eviction_caches.quest(model, 32))
    before = cache[0].bytes_read
    logits = eviction_caches.logits_of(model, tokens[:, 70:73], cache)
    token = 2 * TINY.num_kv_heads * TINY.head_dim * 4
    newest = (7, 8, 9)  # of 71, 72 and 73 tokens, in pages of 16: one page and what the newest has
    assert cache[0].bytes_read - before == token * sum(16 + held for held in newest) + 3 * 5 * token
    assert logits.shape == (3, 128)
    whole = reading.given(model.cache())
    torch.testing.assert_close(
        eviction_caches.logits_of(model, tokens[:, 70:73], whole), model(tokens[:, :73])[0, 70:], rtol=0, atol=1e-4
    )  # bounded


def half_and_half(chosen, judged):
    """Hits of 20 trials: so many of the ten that choose, and of the ten that judge."""
    return [hit for trial in range(10) for hit in (trial < chosen, trial < judged)]


def test_recall_is_counted_cell_by_cell():
    found = {("SnapKV", 0.25, True, "early"): [True] * 8 + [False] * 2}
    figures, (trials,) = eviction_recall.recall_figures(found)
    assert (trials["value"], trials["holds"]) == (10, False)
    cell = "recall, SnapKV at 25%, known, early"
    assert figures[cell] == 0.8
    assert figures[f"{cell}, low"] == pytest.approx(0.4902, abs=1e-4)  # Wilson's, from a table
    assert figures[f"{cell}, high"] == pytest.approx(0.9433, abs=1e-4)


def test_the_best_policy_is_chosen_on_half_of_the_trials_and_judged_on_the_others():
    found = {
        ("full", 1.0, True, "early"): half_and_half(10, 10), ("full", 1.0, False, "early"): half_and_half(10, 8),
        ("SnapKV", 0.25, True, "early"): half_and_half(9, 7), ("TOVA", 0.25, True, "early"): half_and_half(8, 10),
        ("TOVA", 0.5, True, "early"): half_and_half(10, 10), ("TOVA", 0.25, False, "early"): half_and_half(8, 8),
        ("Quest", 0.25, True, "early"): half_and_half(10, 10),  # it evicts nothing
    }  # fmt: skip
    assert eviction_recall.best_at_quarter(found, known=True) == ("SnapKV", 0.7)  # not the better judged, TOVA
    assert eviction_recall.best_at_quarter(found, known=False) == ("TOVA", 1.0)
    _, (entry, _) = eviction_recall.recall_figures(found)
    assert (entry["value"], entry["holds"]) == (0.7, False)
    assert "best on half of the trials" in entry["name"]
    found["SnapKV", 0.25, True, "early"] = half_and_half(9, 9)
    assert eviction_recall.recall_figures(found)[1][0]["holds"]


def test_both_halves_of_the_trials_have_all_texts():
    """Trials go round 3 texts; only the first of them is found."""
    hits = [trial % 3 == 0 for trial in range(12)]
    found = {("full", 1.0, True, "early"): [True] * 12, ("TOVA", 0.25, True, "early"): hits}
    assert eviction_recall.best_at_quarter(found, known=True, texts=3) == ("TOVA", 1 / 3)


def test_layers_that_keep_another_number_than_half_are_found(model, monkeypatch):
    tokens = torch.tensor([text(256)])
    assert eviction.wrong_counts(model, tokens) == 0
    monkeypatch.setattr(eviction, "KEPT", 129)
    made = Cache.evicting
    monkeypatch.setattr(eviction.Cache, "evicting", lambda count, policy, _, **how: made(count, policy, 128, **how))
    assert eviction.wrong_counts(model, tokens) > 0


def test_a_perplexity_below_kvpress_is_as_good_as_one_beside_it(monkeypatch):
    theirs = {"full": 20.0, "TOVA": 22.0, "KeyDiff": 22.0, "random": 30.0}
    monkeypatch.setattr(eviction.kvpress_side, "measure", lambda *_, **__: theirs)
    monkeypatch.setattr(eviction, "passages", lambda _: [])
    ours = {"full": 20.05, "TOVA": 21.0, "KeyDiff": 22.2, "random": 40.0}
    half = {name: SimpleNamespace(perplexity=value) for name, value in ours.items()}
    held = {entry["name"]: entry["holds"] for entry in eviction.beside_kvpress(half, {})[1]}
    assert held["TOVA: perplexity above kvpress'"]
    assert not held["KeyDiff: perplexity above kvpress'"]
    assert held["the full cache: perplexity apart from kvpress'"]
    half["full"] = SimpleNamespace(perplexity=19.5)  # better than the same model can be: another question
    held = {entry["name"]: entry["holds"] for entry in eviction.beside_kvpress(half, {})[1]}
    assert not held["the full cache: perplexity apart from kvpress'"]


def test_the_slowest_step_of_a_round_is_told_beside_the_mean(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(eviction_times.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(eviction_times, "OVERHEAD", {"TOVA": 4})
    acts = {"full": 0, "TOVA": 0}

    class Named:
        seq_len = 9

        def __init__(self, name):
            self.name = name

        def truncate(self, length):
            assert (self.name, length) == ("full", 9)

    def act(cache):
        acts[cache.name] += 1
        slower = 1.5 ** (acts["full"] // 2)  # a machine that gets slower all the time
        clock[0] += slower * (1.0 if cache.name == "full" else 3.1 if acts["TOVA"] % 4 == 0 else 1.0)

    times = eviction_times.times_of_steps({name: Named(name) for name in acts}, act, 2, rounds=6)
    assert acts == {"full": 18, "TOVA": 18}  # 4 whole rounds, and two steps each before, that are not counted
    assert len(times["full"].mean.samples) == 8
    assert len(times["TOVA"].mean.samples) == 4
    assert all(
        slow > 1.5 * mean
        for slow, mean in zip(*(vars(times["TOVA"])[x].samples for x in ("slowest", "mean")), strict=True)
    )
    assert times["full"].added == [0.0] * 8


def test_what_evicting_adds_is_told_by_neighbours_so_that_a_machine_that_slows_down_changes_nothing():
    full, mine = [1.0, 1.0, 4.0, 4.0, 2.0, 2.0], [1.0, 1.2, 4.0, 4.8, 2.0, 9.0]
    steps = eviction_times.steps_of(mine, full, 2)
    assert steps.mean.median / 2.0 == pytest.approx(2.2)
    assert steps.added == pytest.approx([0.1, 0.1, 1.75])
    assert steps.gain == pytest.approx(1 / 1.1)
    assert steps.full_slowest.samples == (1.0, 4.0, 2.0)
    assert eviction_times.spread_told(steps) == "+10.0% (+10.0% to +175.0%, 3 rounds)"


def test_bytes_that_are_not_the_budgets_are_found(model, monkeypatch):
    tokens = torch.tensor([text(81)])
    assert eviction.wrong_bytes(model, tokens) == 0
    held = EvictingCache.nbytes.fget
    monkeypatch.setattr(EvictingCache, "nbytes", property(lambda self: held(self) + 1))
    assert eviction.wrong_bytes(model, tokens) > 0


def run(model, monkeypatch, names, reason):
    """The benchmark of a tiny model; its exit code."""

    def tokenizer(said, **_):
        tokens = [ord(letter) % 128 for letter in said]
        return SimpleNamespace(input_ids=torch.tensor([tokens]) if _.get("return_tensors") else tokens)

    monkeypatch.setattr(eviction.models, "load", lambda **_: model)
    monkeypatch.setattr(eviction.models, "tokenizer", lambda: tokenizer)
    monkeypatch.setattr(eviction.quality, "load_text", lambda name: "".join(map(chr, text(1900))))
    monkeypatch.setattr(eviction, "set_threads", lambda: None)
    monkeypatch.setattr(eviction.report, "busy", lambda: reason)
    monkeypatch.setattr(eviction, "SEEN", 320)
    monkeypatch.setattr(eviction, "PASSAGES", (0,))
    monkeypatch.setattr(eviction, "RANKING", ("SnapKV", "random"))
    monkeypatch.setattr(eviction_times, "OVERHEAD", {"TOVA": 1, "key norm": 3, "merging": 2})
    monkeypatch.setattr(sys, "argv", ["eviction", "--texts", "1", "--trials", "2", "--rounds", "2", "--only", *names])
    return eviction.main()


def test_one_run_prints_figures_and_judges_every_part(model, monkeypatch, capsys):
    code = run(model, monkeypatch, ("half", "sinks", "recall", "bytes", "time"), reason="")
    said = capsys.readouterr()
    written = json.loads(said.out.strip().splitlines()[-1])
    figures = written["figures"]
    for name in ("SnapKV", "random", "SnapKV, int4", "SnapKV, heads share", "merging", "Quest"):
        assert figures[f"half, {name}: perplexity"] > 0
    assert figures["window, 4 sinks, places in the cache: perplexity"] > 0
    held = {entry["name"]: entry["holds"] for entry in written["bars"]}
    assert figures["bytes a step reads at 2000 tokens, full at 100%"] == 2001 * 2 * 2 * 2 * 32 * 4
    assert figures["bytes a step reads at 2000 tokens, sinks and window at 25%"] == 500 * 2 * 2 * 2 * 32 * 4
    assert "recall, Quest at 12%, not known, late" in figures
    assert "fewest trials in a cell of recall" in held
    for name in ("TOVA", "key norm", "merging", "Quest"):
        assert figures[f"ms a step at 2000 tokens, {name}, slowest"] >= figures[f"ms a step at 2000 tokens, {name}"] > 0
    assert not any(name.startswith(("merging", "Quest")) for name in held)
    for name in ("TOVA", "key norm"):
        assert f"{name}: a quarter of 8000 tokens, times as fast" in held
    assert held["bytes beside the budget's, all steps and policies"]
    assert code == (0 if all(held.values()) else 1)
    done = [line.split("] ")[1] for line in said.err.splitlines() if line.endswith(": done")]
    assert done == ["half: done", "sinks: done", "bytes: done", "recall: done", "time: done"]


def test_a_busy_machine_costs_the_times_and_nothing_else(model, monkeypatch, capsys):
    assert run(model, monkeypatch, ("time", "bytes"), reason="others use 2 cores") == 1
    said = capsys.readouterr().out
    assert "no times: others use 2 cores" in said
    written = json.loads(said.strip().splitlines()[-1])
    assert {entry["name"]: entry["holds"] for entry in written["bars"]} == {
        "bytes beside the budget's, all steps and policies": True, "times were measured": False
    }  # fmt: skip
    assert written["figures"]["bytes a step reads at 2000 tokens, full at 100%"] > 0
