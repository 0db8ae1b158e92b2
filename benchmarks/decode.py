"""The lab model against Hugging Face's `generate`, against the floor that memory sets, and in batches.

    python -m benchmarks.decode [--dtype float32 bfloat16] [--context 512] [--rounds 5] [--new-tokens 24]

Both run the same weights on the same prompt, in alternation in one run. A generation of one token gives the prefill; a
longer one, less that, gives the time of a decode step, over (tokens - 1). Figures are medians over rounds. The floor is
the bytes that one step must read (every weight once, K and V of the context once) over the read bandwidth, measured in
the same run; MBU is the floor over the time taken. In float32 a batch of 16 is decoded as well.

Logits are compared on the project's texts, 256 tokens of each. One prompt would not do for bfloat16: on a sentence said
again and again, two layouts of the same weights differ by 10% in their errors, over six texts by less than 1%.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch
from torch import Tensor

from benchmarks.report import bar, begin, finish, step_bytes
from labkit import models, quality
from labkit.cache import Cache
from labkit.device import pick_device, set_threads
from labkit.generation import generate
from labkit.llama import Llama
from labkit.measure import device_name, read_bandwidth, time_call

SPEEDUP = {"float32": 1.8, "bfloat16": 2.0}
MBU = {"float32": 0.7, "bfloat16": 0.5}
PREFILL_SPEEDUP = 1.7  # float32
BATCH, BATCH_GAIN = 16, 6.0  # float32: tokens per second of a batch over those of batch 1
# Contracts, bounded. float32: the largest difference from Hugging Face's logits over the logits' standard deviation; 30
# layers of sums of up to 1,536 terms in another order. bfloat16: both sides round at every layer, so both are judged by
# their distance from float32 logits.
LOGIT_BOUND = 1e-3
BFLOAT16_ERROR_RATIO = 1.1
TEXT_TOKENS = 256


def prompt(context: int, device: torch.device) -> torch.Tensor:
    """A prompt of exactly `context` tokens of English, int `[1, context]`."""
    text = "The cache keeps the keys and values of every token, so that no step computes them again. "
    tokens = models.tokenizer()(text * (context // 12 + 1), return_tensors="pt").input_ids
    return tokens[:, :context].to(device)


def seconds(run: Callable[[int], object], new_tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of one prefill, and of one decode step."""
    prefill = time_call(lambda: run(1), device=device)
    return {
        "prefill": prefill,
        "step": (time_call(lambda: run(new_tokens), device=device) - prefill) / (new_tokens - 1),
    }


def squared(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared differences, all of them added, in float64."""
    return (ours.double() - theirs.double()).square().sum()


def compare_logits(
    dtype: str, ours: Llama, theirs: torch.nn.Module, device: torch.device
) -> tuple[dict[str, float], dict]:
    """How far the logits of the texts are apart: in float32 from each other, in bfloat16 from float32's."""
    tokenizer, exact = models.tokenizer(), models.load(dtype=torch.float32, device=device)
    apart = spread = mine = other = 0.0
    for path in sorted(quality.TEXTS.glob("*.txt")):
        tokens = tokenizer(quality.load_text(path.stem), return_tensors="pt").input_ids[:, :TEXT_TOKENS].to(device)
        got, wanted = ours(tokens), theirs(tokens).logits
        if dtype == "float32":
            apart, spread = max(apart, (got - wanted).abs().max().item()), max(spread, wanted.std().item())
        else:
            reference = exact(tokens)
            mine, other = mine + squared(got, reference).item(), other + squared(wanted, reference).item()
    if dtype == "float32":
        name = "float32 largest logit difference over the logits' standard deviation"
        return {"float32 largest logit difference": apart}, bar(name, apart / spread, "<=", LOGIT_BOUND)
    name = f"{dtype} RMS logit error over Hugging Face's"
    return {}, bar(name, (mine / other) ** 0.5, "<=", BFLOAT16_ERROR_RATIO)


def batch_stepper(model: Llama, tokens: Tensor) -> Callable[[], object]:
    """A decode step of `BATCH` rows that all hold `tokens`; what it appends is forgotten again."""
    cache = model.cache(tokens.shape[1] + 1)
    model(tokens, cache, last_only=True)
    cache.select_rows(torch.zeros(BATCH, dtype=torch.long, device=tokens.device))
    newest = tokens[:, -1:].expand(BATCH, -1).contiguous()

    def step() -> None:
        with torch.inference_mode():
            model(newest, cache, last_only=True)
            cache.truncate(tokens.shape[1])

    return step


def compare(dtype: str, arguments: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars for one dtype."""
    from transformers import AutoModelForCausalLM

    torch_dtype, context = getattr(torch, dtype), arguments.context
    ours = models.load(dtype=torch_dtype, device=device)
    theirs = AutoModelForCausalLM.from_pretrained(models.folder(), dtype=torch_dtype).to(device).eval()
    tokens = prompt(context, device)

    def run_ours(count: int):
        cache = Cache.preallocated(ours.spec.num_layers, context + count)
        return generate(ours, tokens, count, cache=cache)

    def run_theirs(count: int):
        mask = torch.ones_like(tokens)
        return theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    runs = {"ours": run_ours, "theirs": run_theirs}
    with torch.no_grad():
        logit_figures, logit_bar = compare_logits(dtype, ours, theirs, device)
        batch_step = batch_stepper(ours, tokens) if dtype == "float32" else None
        batch_samples = []
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        bandwidths = []
        for turn in range(arguments.rounds + 1):
            bandwidths.append(read_bandwidth(device, repeats=3))
            for name, run in runs.items():
                found = seconds(run, arguments.new_tokens, device)
                if turn:  # the first round warms up
                    samples[name].append(found)
            if batch_step:
                batch_samples += [time_call(batch_step, device=device) for _ in range(8)][0 if turn else 8 :]

    def median(name: str, what: str) -> float:
        return statistics.median(sample[what] for sample in samples[name])

    mine, other = median("ours", "step"), median("theirs", "step")
    bandwidth = statistics.median(bandwidths)
    floor = step_bytes(ours.spec, context, dtype=dtype) / bandwidth
    prefill = median("theirs", "prefill") / median("ours", "prefill")
    figures = {
        f"{dtype} ms per token": round(mine * 1e3, 2),
        f"{dtype} ms per token, Hugging Face": round(other * 1e3, 2),
        f"{dtype} speedup": round(other / mine, 3),
        f"{dtype} ms of a prefill": round(median("ours", "prefill") * 1e3, 1),
        f"{dtype} ms of a prefill, Hugging Face": round(median("theirs", "prefill") * 1e3, 1),
        f"{dtype} read bandwidth GB/s": round(bandwidth / 1e9, 1),
        f"{dtype} floor ms per token": round(floor * 1e3, 2),
        f"{dtype} MBU, weights and KV": round(floor / mine, 3),
        **logit_figures,
    }
    bars = [
        bar(f"{dtype} speedup over Hugging Face", other / mine, ">=", SPEEDUP[dtype]),
        bar(f"{dtype} MBU, weights and KV", floor / mine, ">=", MBU[dtype]),
        logit_bar,
    ]
    if dtype == "float32":
        batched = statistics.median(batch_samples)
        gain = BATCH * mine / batched
        figures[f"float32 ms per step, batch {BATCH}"] = round(batched * 1e3, 2)
        bars.append(bar(f"float32 tokens per second of batch {BATCH} over batch 1's", gain, ">=", BATCH_GAIN))
        bars.append(bar("float32 prefill speedup over Hugging Face", prefill, ">=", PREFILL_SPEEDUP))
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
    begin()
    device = pick_device().torch_device
    figures: dict[str, float] = {}
    bars: list[dict] = []
    print(f"{device_name(device)}; context {arguments.context}, {arguments.rounds} rounds in alternation")
    for dtype in arguments.dtype:
        new_figures, new_bars = compare(dtype, arguments, device)
        for name, value in new_figures.items():
            print(f"  {name:<44} {value:g}")
        for entry in new_bars:
            print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
        figures |= new_figures
        bars += new_bars
    command = f"python -m benchmarks.decode --context {arguments.context} --rounds {arguments.rounds}"
    return finish("decode", figures, bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
