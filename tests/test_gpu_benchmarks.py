"""The benchmarks for a GPU, where no GPU is: what they write down when a part was not measured, and whom they judge."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_decode, gpu_engine, positions
from labkit import models
from labkit.graphs import DecodeGraph
from labkit.specs import ModelSpec

TINY = ModelSpec(
    "tiny", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=96,
    vocab_size=128, max_seq_len=256, tied_head=False,
)  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch):
    """The decode benchmark's stages with a tiny model on the CPU, PyTorch's products, and times that are told."""
    made = models.random

    def plain(x, weight, *, gated=False, **sizes):
        return torch.nn.functional.linear(x, weight)

    def graph(model, cache, *, capture=True, fused=None):
        return DecodeGraph(model, cache, capture=False)

    monkeypatch.setattr(gpu_decode.models, "random", lambda *_: made(TINY, torch.float32, prepack=False))
    monkeypatch.setattr(gpu_decode, "matvec", plain)
    monkeypatch.setattr(gpu_decode, "DecodeGraph", graph)
    monkeypatch.setattr(gpu_decode, "CONTEXTS", (3, 9, 5))
    monkeypatch.setattr(gpu_decode, "step_ms", lambda *_: (2.0, 0.1))
    monkeypatch.setattr(gpu_decode, "graphed_ms", lambda *_, **__: 0.5)
    monkeypatch.setattr(gpu_decode, "attention_us", lambda *_: 7.0)
    monkeypatch.setattr(gpu_decode.torch.cuda, "synchronize", lambda *_: None)


def test_the_7b_and_its_products_are_measured_and_added_up(on_cpu, capsys):
    figures, bars = {}, []
    gpu_decode.large(60, 1e9, figures, bars, False)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert [entry["name"].split()[1] for entry in bars] == ["3", "9", "5"]
    assert figures["all products, own: ms"] == figures["all products, PyTorch: ms"] > 0
    assert "all products, best own: ms" not in figures  # other sizes were not tried
    assert said.out.index("compiled") < said.out.index("3 tokens, own products")


def test_what_was_not_measured_has_no_figure_and_no_bar(on_cpu, capsys):
    figures, bars = {}, []
    gpu_decode.large(-1, 1e9, figures, bars, False)
    assert "left out for lack of time" in capsys.readouterr().out
    assert figures == {}
    assert bars == []


def test_a_sum_needs_every_product():
    us = {"a": {"PyTorch": 2.0, "own": 3.0, "1x8": 1.0}, "b": {"PyTorch": 20.0, "own": 10.0}}
    assert gpu_decode.totals(us, {"a": 1000, "b": 100}) == {"PyTorch": 4.0, "own": 4.0}
    assert gpu_decode.totals({"a": us["a"]}, {"a": 1000, "b": 100}) == {}
    assert gpu_decode.totals({"a": us["a"]}, {"a": 1000}) == {"PyTorch": 2.0, "own": 3.0, "best own": 1.0}


@pytest.mark.parametrize(
    ("named", "there"), [("", False), ("{folder}", True), ("{folder}/none", False), ("a/b", False)]
)
def test_nothing_is_fetched_where_no_files_are(named, there, monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_MODEL", named.format(folder=tmp_path))
    monkeypatch.setattr(gpu_decode, "lab_model_folder", lambda: tmp_path / "empty")
    assert gpu_decode.files_are_here() == there


def ran(finished, seconds):
    return {"requests finished": finished, "seconds": seconds}


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [
        (ran(64, 20), ran(64, 100), 5.0),
        (ran(64, 50), ran(64, 100), 2.0),
        (ran(64, 20), ran(40, 100), 5.0),  # at least
        (ran(64, 50), ran(40, 100), None),  # at least 2 says nothing about 3
        (ran(64, 20), ran(0, 100), None),
        (ran(64, 20), {}, None),
        (ran(63, 20), ran(64, 100), None),
        ({}, ran(64, 100), None),
    ],
)
def test_an_engine_that_did_not_run_is_compared_with_nothing(ours, theirs, ratio):
    found, words = gpu_engine.judged(ours, theirs, 64)
    assert (found and found["value"]) == ratio
    assert words.startswith("no comparison" if ratio is None else ("holds", "MISSED"))


def manager(*results, running=True):
    left = list(results)
    return SimpleNamespace(
        add_request=lambda *_, **__: None,
        get_result=lambda timeout: left.pop(0) if left else None,
        is_running=lambda: running,
    )


def result(error=None):
    return SimpleNamespace(request_id="warm", error=error, is_finished=lambda: True)


def test_transformers_is_warm_when_its_first_requests_have_ended():
    requests = gpu_engine.workload(6, 100, 12)
    gpu_engine.warm_theirs(manager(None, *[result()] * 4), requests, 5)
    with pytest.raises(RuntimeError, match="did not end 4 requests"):
        gpu_engine.warm_theirs(manager(result()), requests, 0)
    with pytest.raises(RuntimeError, match="ended before it was warm"):
        gpu_engine.warm_theirs(manager(running=False), requests, 5)
    with pytest.raises(RuntimeError, match="no memory"):
        gpu_engine.warm_theirs(manager(result("no memory")), requests, 5)


def test_rounds_end_with_the_time_but_some_are_always_there():
    assert [*positions.in_time(range(40), 0.0)] == [*range(positions.WARMUP + positions.LEAST)]
    assert [*positions.in_time(range(40), float("inf"))] == [*range(40)]
