"""A quantized cache against the full one and against Hugging Face's: quality, bytes, time and memory of a decode step.

    python -m benchmarks.kv_quantization [--texts 6] [--rounds 5]

One run, the lab model in float32, the same tokens for all. It needs Hugging Face's backends: pip install -e '.[bench]'.

Quality: of each of the project's texts the first 768 tokens go through the model 32 at a time, and the last 512 of them
are scored. Hugging Face's QuantizedCache runs in its own model, with groups of 64 and the axes at which it loses least.
Time: one layer of the lab model's shape with no model around it, a token appended and attended to, the mean over 128
steps so that everybody's packing is in it, in alternation; the figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, cache_utils
from transformers import Cache as HFCache
from transformers.cache_utils import CacheLayerMixin, HQQQuantizedLayer, QuantoQuantizedLayer

from benchmarks.report import bar, begin, finish
from labkit import models, quality
from labkit.cache import Cache, LayerCache, PreallocatedCache, QuantizedCache
from labkit.device import set_threads
from labkit.measure import device_name, peak_memory
from labkit.quality import Quality

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
CONTEXT, CHUNK, SCORED, STEPS = 256, 32, 512, 128
LENGTHS = (2000, 8000)
OURS: dict[str, Callable[..., QuantizedCache]] = {
    "int8": lambda: QuantizedCache(8, residual_length=12, sink_length=4),
    "int4": lambda: QuantizedCache(4, residual_length=12, sink_length=4),
    "int2": lambda: QuantizedCache(2, group_size=32, residual_length=32, sink_length=4),
    "int2, no sinks": lambda: QuantizedCache(2, group_size=32, residual_length=32),
    "int2, groups of 64": lambda: QuantizedCache(2, residual_length=12, sink_length=4),
    "float8 e4m3": lambda: QuantizedCache(torch.float8_e4m3fn, residual_length=12, sink_length=4),
}
# nbits, axis of keys, axis of values, group size, residual length: the axes with the least KL on 256 tokens. quanto's
# per-channel keys take no other lengths than multiples of 64, and so go into the quality part alone.
HF: dict[str, Callable[[], CacheLayerMixin]] = {
    "HF hqq int8": lambda: HQQQuantizedLayer(8, 1, 1, 64, 128),
    "HF hqq int4": lambda: HQQQuantizedLayer(4, 1, 1, 64, 128),
    "HF hqq int2": lambda: HQQQuantizedLayer(2, 1, 1, 64, 128),
    "HF quanto int4": lambda: QuantoQuantizedLayer(4, -1, 0, 64, 128),
    "HF quanto int2": lambda: QuantoQuantizedLayer(2, -1, 0, 64, 128),
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # not in 5.17
    HF["HF fp8"] = cache_utils.Fp8QuantizedLayer
RIVALS = {  # at equal bits per element
    "int8": ("HF hqq int8",),
    "int4": ("HF hqq int4", "HF quanto int4"),
    "int2, groups of 64": ("HF hqq int2", "HF quanto int2"),
}
SPEED = {2000: 3.0, 8000: 4.0}  # int4's step over the best of Hugging Face's, by length; 2.5 for the others
FLOAT8 = 3.0  # times int8's step, at most, at 8,000 tokens
BYTES = {"int8": 0.55, "int4": 0.30, "int2": 0.21}  # of bfloat16's at 2,000 tokens


def hf_bytes(layer: Any) -> int:
    """Bytes that a Hugging Face layer keeps: every tensor in its attributes, quantized tensors' inner ones included."""
    kept: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            look([getattr(value, name) for name in names])
        elif isinstance(value, Tensor):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part)

    look(vars(layer))
    return sum(kept.values())


class TheirModel:
    """Hugging Face's model as `quality.compare` calls it.

    The first 32 tokens of the context, which are not scored, wait for the next 32: quanto's per-channel keys take
    no first pass that is no multiple of 64.
    """

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(models.folder(), dtype=torch.float32).eval()
        self.waiting: dict[int, Tensor] = {}

    def __call__(self, tokens: Tensor, cache: HFCache) -> Tensor:
        """Logits of `tokens`."""
        if cache.get_seq_length() == 0 and id(cache) not in self.waiting:
            self.waiting[id(cache)] = tokens
            return torch.zeros(*tokens.shape, self.model.config.vocab_size)
        first = self.waiting.pop(id(cache), tokens[:, :0])
        logits = self.model(torch.cat((first, tokens), dim=1), past_key_values=cache).logits
        return logits[:, first.shape[1] :]


def measure_quality(names: list[str]) -> dict[str, Quality]:
    """Quality of every cache, ours in our model and theirs in theirs, the texts pooled."""
    ours, theirs, tokenizer = models.load(device="cpu"), TheirModel(), models.tokenizer()
    layers = ours.spec.num_layers
    found: dict[str, list[Quality]] = {}
    for name in names:
        tokens = tokenizer(quality.load_text(name), return_tensors="pt").input_ids[:, : CONTEXT + SCORED]
        mine = {kind: lambda make=make: Cache.of(layers, make) for kind, make in OURS.items()}
        other = {kind: lambda make=make: HFCache(layers=[make() for _ in range(layers)]) for kind, make in HF.items()}
        with torch.inference_mode():
            results = quality.compare(ours, tokens, mine, chunk=CHUNK, context=CONTEXT)
            results |= quality.compare(theirs, tokens, other, full=DynamicCache, chunk=CHUNK, context=CONTEXT)
        for kind, result in results.items():
            found.setdefault(kind, []).append(result)
            print(f"  {name}: {kind}: {result}", flush=True)
    return {kind: Quality.pooled(parts) for kind, parts in found.items()}


def tokens_of(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random K and V of one layer of the lab model's shape."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, KV_HEADS, count, HEAD_DIM, generator=generator).to(dtype)
    return k, v


def stepper(layer: LayerCache | CacheLayerMixin, length: int) -> Callable[[], None]:
    """Fill a layer and return its decode step: append one token's K and V, attend with its query."""
    k, v = tokens_of(length)
    new_k, new_v = tokens_of(1, seed=1)
    q = torch.randn(1, HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    if isinstance(layer, LayerCache):
        layer.append(k, v)

        def step() -> None:
            layer.append(new_k, new_v)
            layer.attend(q)
    else:
        layer.update(k, v)

        def step() -> None:
            F.scaled_dot_product_attention(q, *layer.update(new_k, new_v), enable_gqa=True)

    return step


@torch.inference_mode()
def measure_time(rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds of a decode step by layer and length."""
    found: dict[str, dict[int, float]] = {}
    for length in LENGTHS:
        room = length + (rounds + 1) * STEPS
        makers = {"full": lambda room=room: PreallocatedCache(room), **OURS, **HF}
        # quanto takes its best axes at multiples of 64 only: it starts at one, and packs 128 tokens at a time.
        start = {name: length // 64 * 64 if name.startswith("HF quanto") else length for name in makers}
        steps = {name: stepper(make(), start[name]) for name, make in makers.items()}
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, step in steps.items():
                begun = time.perf_counter()
                for _ in range(STEPS):
                    step()
                if turn:  # the first round warms up
                    samples[name].append((time.perf_counter() - begun) / STEPS * 1e3)
        for name, values in samples.items():
            found.setdefault(name, {})[length] = statistics.median(values)
            print(f"  {length:,} tokens: {name:<16} {statistics.median(values):7.3f} ms a step", flush=True)
    return found


def same_bits(trials: int = 20) -> int:
    """Bytes that differ between tokens appended in random pieces and in one go, over random lengths up to 1,000."""
    chance, differing = random.Random(0), 0
    for trial in range(trials):
        length = chance.randint(1, 1000)
        k, v = tokens_of(length, seed=trial)
        whole, pieces = OURS["int2"](), OURS["int2"]()
        whole.append(k, v)
        begin = 0
        while begin < length:
            end = min(length, begin + chance.randint(1, 200))
            pieces.append(k[:, :, begin:end], v[:, :, begin:end])
            begin = end
        if whole.k is not None and whole.v is not None and pieces.k is not None and pieces.v is not None:
            for mine, other in ((whole.k, pieces.k), (whole.v, pieces.v)):
                differing += int((mine.rows != other.rows).sum())
        differing += int(whole.packed_len != pieces.packed_len)
    return differing


def step_memory(make: Callable[[], QuantizedCache], length: int) -> int:
    """Bytes that decode steps make beside what the cache holds when they begin, at their peak.

    As many steps as a group has tokens, so that one of them packs; the tokens they add are in the figure.
    """

    def steps(step: Callable[[], None]) -> None:
        for _ in range(make().format.group_size):
            step()

    with torch.inference_mode():
        return peak_memory(steps, lambda: stepper(make(), length))


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    texts = sorted(path.stem for path in quality.TEXTS.glob("*.txt"))
    parser.add_argument("--texts", type=int, default=len(texts), help="how many of the project's texts")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    arguments = parser.parse_args()
    set_threads()
    begin()
    print(f"{device_name()}; context {CONTEXT}, chunks of {CHUNK}, {SCORED} tokens scored of each text")
    figures: dict[str, float] = {}
    bars = []

    times = measure_time(arguments.rounds)
    figures |= {f"{name} ms a step, {n} tokens": round(ms, 4) for name, by in times.items() for n, ms in by.items()}

    ratios, sizes = {}, {}
    for name, make in {**OURS, **HF}.items():
        layer, full = make(), 2 * KV_HEADS * LENGTHS[0] * HEAD_DIM * 2
        if isinstance(layer, QuantizedCache):
            layer.append(*tokens_of(LENGTHS[0], torch.bfloat16))
            sizes[name] = layer.nbytes
        else:
            layer.update(*tokens_of(LENGTHS[0] // 64 * 64, torch.bfloat16))
            layer.update(*tokens_of(LENGTHS[0] % 64 or 1, torch.bfloat16))
            sizes[name] = hf_bytes(layer)
        ratios[name] = sizes[name] / full
        figures[f"{name} bytes over bfloat16's, 2000 tokens"] = round(ratios[name], 4)

    results = measure_quality(texts[: arguments.texts])
    for name, result in results.items():
        print(f"{name}: {result}")
        figures |= {
            f"{name} perplexity": round(result.perplexity, 3),
            f"{name} perplexity over full": round(result.ratio, 5),
            f"{name} perplexity over full, spread": round(result.ratio_spread, 5),
            f"{name} KL": round(result.kl, 6),
            f"{name} KL, spread": round(result.kl_spread, 6),
            f"{name} top-1 agreement": round(result.agreement, 4),
        }
    figures["full perplexity"] = round(results["int8"].full_perplexity, 3)
    figures["scored tokens"] = results["int8"].tokens

    bars += [bar(f"{name} perplexity minus full's", abs(results[name].difference), "<=", limit)
             for name, limit in (("int8", 0.02), ("int4", 0.10))]  # fmt: skip
    bars += [bar(f"{name} perplexity over full's", results[name].ratio, "<=", 1.20) for name in ("int2",)]
    bars.append(bar("int2 bytes that depend on the pieces", same_bits(), "<=", 0))
    bars += [bar(f"{name} bytes over bfloat16's", ratios[name], "<=", limit) for name, limit in BYTES.items()]
    for name, rivals in RIVALS.items():
        best = min(results[rival].ratio for rival in rivals)
        least = min(sizes[rival] for rival in rivals)
        bars.append(bar(f"{name} perplexity over the best of {', '.join(rivals)}", results[name].ratio / best, "<=", 1))
        bars.append(bar(f"{name} KL over theirs", results[name].kl / min(results[r].kl for r in rivals), "<=", 1))
        bars.append(bar(f"{name} bytes over theirs", sizes[name] / least, "<=", 1))
        for length in LENGTHS:
            fastest = min(times[rival][length] for rival in rivals)
            least_gain = SPEED[length] if name == "int4" else 2.5
            gain = fastest / times[name][length]
            bars.append(bar(f"{name} speed over theirs, {length} tokens", gain, ">=", least_gain))
    slower = times["float8 e4m3"][8000] / times["int8"][8000]
    bars.append(bar("float8 step over int8's, 8000 tokens", slower, "<=", FLOAT8))
    for name in BYTES:
        for length in LENGTHS:
            peak, block = step_memory(OURS[name], length), 2 * KV_HEADS * 2048 * HEAD_DIM * 4
            figures[f"{name} extra bytes of a step, {length} tokens"] = peak
            bars.append(bar(f"{name} extra memory over one block's, {length} tokens", peak / block, "<=", 1))
    for entry in bars:
        print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
    command = f"python -m benchmarks.kv_quantization --texts {arguments.texts} --rounds {arguments.rounds}"
    return finish("kv_quantization", figures, bars, "cpu", command)


if __name__ == "__main__":
    raise SystemExit(main())
