"""Decoding one token: our decoder against Hugging Face's `generate`, and against the floor that memory sets.

    python -m benchmarks.decode [--dtype float32 bfloat16] [--context 512] [--rounds 5] [--new-tokens 24]

Both run the same weights on the same prompt at batch 1, in alternation in one run; the figure is the median over rounds
of (time of the whole generation - time of a one-token generation) / (tokens - 1), so that prefill is left out on both
sides. The floor is the bytes that one step must read (every weight once, K and V of the context once) over the read
bandwidth, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch

from benchmarks.report import bar, finish
from labkit import models
from labkit.cache import Cache
from labkit.device import pick_device, set_threads
from labkit.generation import generate
from labkit.llama import Llama
from labkit.measure import device_name, read_bandwidth, synchronize

SPEEDUP = {"float32": 1.1, "bfloat16": 1.5}
# Contracts, bounded. float32: against Hugging Face's logits, whose magnitude is about 40; sums of up to 1,536 terms in
# another order. bfloat16: both sides round at every layer, so both are judged by their distance from float32 logits.
LOGIT_BOUND = 1e-4
BFLOAT16_ERROR_RATIO = 1.1


def prompt(context: int, device: torch.device) -> torch.Tensor:
    """A prompt of exactly `context` tokens of English, int `[1, context]`."""
    text = "The cache keeps the keys and values of every token, so that no step computes them again. "
    tokens = models.tokenizer()(text * (context // 12 + 1), return_tensors="pt").input_ids
    return tokens[:, :context].to(device)


def decode_seconds(run: Callable[[int], object], new_tokens: int, device: torch.device) -> float:
    """Seconds per decoded token of one generation."""

    def timed(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        run(count)
        synchronize(device)
        return time.perf_counter() - start

    one = timed(1)
    return (timed(new_tokens) - one) / (new_tokens - 1)


def floor_bytes(model: Llama, context: int) -> int:
    """Bytes one decode step must read: every weight once (the embedding serves as the tied head), and all K and V."""
    spec, size = model.spec, model.dtype.itemsize
    table = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size  # untied: one row of it, not the table
    cache = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context
    return (spec.num_parameters - table + cache) * size


def compare_logits(
    dtype: str, ours: Llama, theirs: torch.nn.Module, tokens: torch.Tensor, device: torch.device
) -> tuple[dict[str, float], dict]:
    """How far the logits of the whole prompt are apart: in float32 from each other, in bfloat16 from float32's."""
    mine, other = ours(tokens), theirs(tokens).logits
    if dtype == "float32":
        apart = (mine - other).abs().max().item()
        name = "float32 largest logit difference"
        return {name: apart}, bar(name, apart, "<=", LOGIT_BOUND)
    exact = models.load(dtype=torch.float32, device=device)(tokens)
    my_error, other_error = ((logits.float() - exact).square().mean().sqrt().item() for logits in (mine, other))
    figures = {f"{dtype} RMS logit error": my_error, f"{dtype} RMS logit error, Hugging Face": other_error}
    name = f"{dtype} RMS logit error over Hugging Face's"
    return figures, bar(name, my_error / other_error, "<=", BFLOAT16_ERROR_RATIO)


def compare(dtype: str, arguments: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars for one dtype."""
    from transformers import AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype)
    ours = models.load(dtype=torch_dtype, device=device)
    theirs = AutoModelForCausalLM.from_pretrained(models.folder(), dtype=torch_dtype).to(device).eval()
    tokens = prompt(arguments.context, device)

    def run_ours(count: int):
        cache = Cache.preallocated(ours.spec.num_layers, arguments.context + count)
        return generate(ours, tokens, count, cache=cache)

    def run_theirs(count: int):
        mask = torch.ones_like(tokens)
        return theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    with torch.no_grad():
        logit_figures, logit_bar = compare_logits(dtype, ours, theirs, tokens, device)
        samples: dict[str, list[float]] = {"ours": [], "theirs": []}
        bandwidths = []
        for turn in range(arguments.rounds + 1):
            bandwidths.append(read_bandwidth(device, repeats=3))
            for name, run in (("ours", run_ours), ("theirs", run_theirs)):
                seconds = decode_seconds(run, arguments.new_tokens, device)
                if turn:  # the first round warms up
                    samples[name].append(seconds)
    mine, other = statistics.median(samples["ours"]), statistics.median(samples["theirs"])
    floor = floor_bytes(ours, arguments.context) / statistics.median(bandwidths)
    figures = {
        f"{dtype} ms per token": round(mine * 1e3, 2),
        f"{dtype} ms per token, Hugging Face": round(other * 1e3, 2),
        f"{dtype} speedup": round(other / mine, 3),
        f"{dtype} read bandwidth GB/s": round(statistics.median(bandwidths) / 1e9, 1),
        f"{dtype} floor ms per token": round(floor * 1e3, 2),
        f"{dtype} MBU, weights and KV": round(floor / mine, 3),
        **logit_figures,
    }
    bars = [
        bar(f"{dtype} speedup over Hugging Face", other / mine, ">=", SPEEDUP[dtype]),
        logit_bar,
    ]
    return figures, bars


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(SPEEDUP))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    set_threads()
    device = pick_device().torch_device
    figures: dict[str, float] = {}
    bars: list[dict] = []
    print(f"{device_name(device)}; context {arguments.context}, batch 1, {arguments.rounds} rounds in alternation")
    for dtype in arguments.dtype:
        new_figures, new_bars = compare(dtype, arguments, device)
        for name, value in new_figures.items():
            print(f"  {name:<44} {value:g}")
        figures |= new_figures
        bars += new_bars
    command = f"python -m benchmarks.decode --context {arguments.context} --rounds {arguments.rounds}"
    return finish("decode", figures, bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
