"""Text 004's experiments on a GPU, at the real sizes of its models, with random weights made there.

    python -m benchmarks.gpu_memory [--seconds 60]
    python -m benchmarks.gpu_memory --tiny --device cpu      # whether it runs: bytes are of tensors, times no figures

1, 2: bytes of K and V against length and batch, as `labkit.sizing` says and as the allocator counts. It hands
out memory in multiples of 512 bytes, and what is measured is what tensors got; each K and V here is a multiple of that.
3: the capacity table, by filling memory with requests' caches until one is refused. 4: grouped queries against a head
for each query head, in bytes and in the time of a decode step. 5: prefill against decode, and the share of the device's
own rates (a copy, a product of matrices) that each reaches.

Every stage stands alone: where one fails the others go on, and an out-of-memory error is explained in bytes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_engine import driver
from benchmarks.report import SEEN, bar, finish, step_bytes
from labkit import models, sizing, specs
from labkit.cache import Cache
from labkit.labs.lab03.filling import refusal
from labkit.llama import Llama
from labkit.measure import device_name, give_back, room_told
from labkit.specs import ModelSpec

GB = 10**9
LENGTHS, BATCHES, CONTEXTS = (128, 1024, 4096, 16_384), (1, 8, 32, 64), (131_072, 32_768, 8192)
RESERVE = 0.15  # what `sizing.capacity` leaves free by default, of what the weights leave

Figures = dict[str, float]


class Bench:
    """The device, the time that is left, and what was found."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.perf_counter() + seconds
        self.figures: Figures = {}
        self.bars: list[dict[str, Any]] = []
        self.dtype = torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def note(self, name: str, value: float) -> None:
        """One figure, printed and kept."""
        self.figures[name] = round(value, 6)
        print(f"  {name:<72} {value:>18,.6g}", flush=True)

    def stage(self, name: str, run: Callable[[], None], needs: float = 2) -> None:
        """One stage, if there is time for it; whatever it raises, the next goes on with its memory given back."""
        if self.left < needs:
            print(f"{name}: left out, {self.left:.0f} s are left", flush=True)
            self.figures[f"{name}: left out"] = 1
            return
        print(f"{name}:", flush=True)
        try:
            run()
        except torch.OutOfMemoryError as error:
            print(f"  refused: {explained(error, self.device)}", flush=True)
            self.figures[f"{name}: refused"] = 1
        except Exception:
            traceback.print_exc(file=sys.stdout)
            self.figures[f"{name}: failed"] = 1
        give_back(self.device)

    def held(self) -> int:
        """Bytes that tensors were given."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else tensors_bytes()

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median time of one call, by the device's own clock where there is one."""
        run()
        if self.device.type != "cuda":
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                samples.append(time.perf_counter() - start)
            return statistics.median(samples)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for before, after in events:
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def tensors_bytes() -> int:
    """Bytes of all tensors on the CPU, each storage once: a stand-in for the GPU's count."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def explained(error: BaseException, device: torch.device) -> str:
    """An out-of-memory error in bytes."""
    if device.type != "cuda":
        return str(error)
    return room_told(device)


def layer_shape(spec: ModelSpec, batch: int, tokens: int) -> tuple[int, int, int, int]:
    """Shape of K and of V of one layer."""
    return batch, spec.num_kv_heads, tokens, spec.head_dim


def filled(bench: Bench, spec: ModelSpec, batch: int, tokens: int) -> Cache:
    """A cache of exactly `tokens` tokens of each row, as `Cache.preallocated` keeps them, without a model."""
    cache = Cache.preallocated(spec.num_layers, tokens)
    new = torch.zeros(layer_shape(spec, batch, 1), dtype=bench.dtype, device=bench.device)
    for layer in cache.layers:
        layer.append(new, new)
    return cache


def bytes_held(bench: Bench, spec: ModelSpec, cases: list[tuple[int, int]]) -> None:
    """1 and 2: what sizing says, what the cache says, what the allocator gave."""
    exact = True
    for batch, tokens in cases:
        said = sizing.cache_bytes(spec, tokens, batch, dtype="bfloat16")
        give_back(bench.device)
        before = bench.held()
        cache = filled(bench, spec, batch, tokens)
        gc.collect()
        given = bench.held() - before
        exact &= given == said == cache.nbytes
        print(
            f"  {batch:>3} x {tokens:>7,} tokens: predicted {said:>15,} B, held {cache.nbytes:>15,}, given {given:>15,}"
        )
        bench.figures[f"{spec.name}, {batch} x {tokens} tokens: bytes given"] = given
        del cache
    bench.bars.append(bar(f"{spec.name}: every cache is given what sizing says, to the byte", float(exact), ">=", 1))


def capacity(bench: Bench, spec: ModelSpec, contexts: tuple[int, ...], limit: int | None) -> None:
    """3: how many requests' caches fit beside the model until one is refused.

    limit: bytes for all of them, where the device's memory is not to be filled.
    """
    for context in contexts:
        give_back(bench.device)
        one = sizing.cache_bytes(spec, context, 1, dtype="bfloat16")
        room = torch.cuda.mem_get_info(bench.device)[0] if bench.device.type == "cuda" else limit or 0
        caches: list[Tensor] = []
        why = "nothing"
        for _ in range(2 * room // one + 2):
            if why := refusal(caches, one, bench.device, limit):
                break
        print(f"  {context:>7,} tokens, {one / GB:.3f} GB each: {len(caches)} fit; the next is refused: {why}")
        fit, most = len(caches), room // one
        caches.clear()
        give_back(bench.device)
        works = torch.ones(64, 64, device=bench.device).sum().item() == 64 * 64
        bench.note(f"{spec.name}, {context} tokens: requests that fit until one is refused", fit)
        bench.note(f"{spec.name}, {context} tokens: free bytes over bytes of one", most)
        kept = int(room * (1 - RESERVE)) // one
        bench.note(f"{spec.name}, {context} tokens: requests with {RESERVE:.0%} kept free", kept)
        name = f"{spec.name}, {context} tokens: requests fewer than free bytes hold, everything goes on"
        bench.bars.append(bar(name, float(most - fit if works else most), "<=", 1))


def rates(bench: Bench, tiny: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and operations a second of a product, as this device reaches them."""
    nbytes, wide = (2**22, 256) if tiny else (2 * GB, 8192)
    source = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * nbytes / bench.seconds(lambda: target.copy_(source))
    a, b = (torch.randn(wide, wide, dtype=bench.dtype, device=bench.device) for _ in "ab")
    product = 2 * wide**3 / bench.seconds(lambda: a @ b)
    bench.note("copy, GB/s read and written", copy / GB)
    bench.note("product in bfloat16, TFLOP/s", product / 1e12)
    return copy, product


def decoder(model: Llama, context: int, batch: int) -> tuple[Callable[[], object], Cache]:
    """A decode step of `batch` rows that hold `context` tokens before it; what it appends is forgotten again."""
    spec = model.spec
    cache = Cache.preallocated(spec.num_layers, context + 1)
    new = torch.randn(layer_shape(spec, batch, 1), dtype=model.dtype, device=model.device)
    rest = new.expand(-1, -1, context, -1)
    for layer in cache.layers:
        layer.append(rest, rest)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        with torch.inference_mode():
            model(tokens, cache, last_only=True)
            cache.truncate(context)

    return step, cache


def grouped(bench: Bench, spec: ModelSpec, context: int, batch: int, copy: float) -> None:
    """4: the same model with a KV head for each query head."""
    every_head = replace(spec, name=f"{spec.name}-mha", num_kv_heads=spec.num_heads, parameters=None)
    times = {}
    for each in (spec, every_head):
        model = models.random(each, bench.dtype, bench.device, prepack=False)
        step, cache = decoder(model, context, batch)
        times[each.name] = seconds = bench.seconds(step)
        read = step_bytes(each, context + 1, batch, dtype="bfloat16")
        bench.note(f"{each.name}: bytes of K and V per token", float(sizing.bytes_per_token(each, "bfloat16")))
        bench.note(f"{each.name}, {batch} x {context}: ms a decode step", seconds * 1e3)
        bench.note(f"{each.name}, {batch} x {context}: share of copy bandwidth", read / seconds / copy)
        del model, step, cache
        give_back(bench.device)
    bench.note("decode time, a KV head per query head over grouped", times[every_head.name] / times[spec.name])


def phases(bench: Bench, spec: ModelSpec, prompt: int, batch: int, copy: float, product: float) -> None:
    """5: a prompt in one pass, and a step behind it, with the rates that each reaches."""
    give_back(bench.device)
    before = bench.held()
    model = models.random(spec, bench.dtype, bench.device, prepack=False)
    weights = bench.held() - before
    bench.note(f"{spec.name}: bytes of the weights, predicted", sizing.weight_bytes(spec, "bfloat16"))
    bench.note(f"{spec.name}: bytes of the weights, given", weights)
    tokens = torch.randint(spec.vocab_size, (1, prompt), device=bench.device)

    def prefill() -> None:
        with torch.inference_mode():
            model(tokens, Cache.preallocated(spec.num_layers, prompt), last_only=True)

    seconds, flops = bench.seconds(prefill, repeats=3), sizing.step_flops(spec, prompt)
    bench.note(f"{spec.name}, prefill of {prompt} tokens: ms", seconds * 1e3)
    bench.note(f"{spec.name}, prefill of {prompt} tokens: tokens/s", prompt / seconds)
    bench.note(f"{spec.name}, prefill of {prompt} tokens: TFLOP/s", flops / seconds / 1e12)
    bench.note(f"{spec.name}, prefill of {prompt} tokens: share of the product's rate", flops / seconds / product)
    for rows in (1, batch):
        step, cache = decoder(model, prompt, rows)
        seconds, read = bench.seconds(step, repeats=9), step_bytes(spec, prompt + 1, rows, dtype="bfloat16")
        bench.note(f"{spec.name}, decode of {rows} x {prompt}: ms a step", seconds * 1e3)
        bench.note(f"{spec.name}, decode of {rows} x {prompt}: tokens/s", rows / seconds)
        bench.note(f"{spec.name}, decode of {rows} x {prompt}: GB/s", read / seconds / GB)
        bench.note(f"{spec.name}, decode of {rows} x {prompt}: share of copy bandwidth", read / seconds / copy)
        flops = sizing.step_flops(spec, 1, past=prompt, batch=rows)
        bench.note(f"{spec.name}, decode of {rows} x {prompt}: TFLOP/s", flops / seconds / 1e12)
        del step, cache
    if bench.left > 2:
        capacity(bench, spec, CONTEXTS if prompt > 64 else (32, 16), None if prompt > 64 else 10**7)


def shapes(tiny: bool) -> Iterator[ModelSpec]:
    """The two models, or small ones."""
    for name in ("qwen2.5-7b", "llama-3-8b"):
        spec = specs.model(name)
        if tiny:
            few = max(1, spec.num_kv_heads // 4)
            spec = replace(
                spec, num_layers=2, num_heads=spec.num_heads // 4, num_kv_heads=few, head_dim=64, hidden_size=64,
                intermediate_size=96, vocab_size=256, parameters=None,
            )  # fmt: skip
        yield spec


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    bench, tiny = Bench(torch.device(arguments.device), arguments.seconds), arguments.tiny
    if bench.device.type == "cuda":
        SEEN.update({"driver": driver()})
        free, total = torch.cuda.mem_get_info(bench.device)
        bench.note("device memory, bytes", total)
        bench.note("free at the beginning, bytes", free)
    print(f"{device_name(bench.device)}; {arguments.seconds:g} s", flush=True)
    found: dict[str, float] = {"copy": float("nan"), "product": float("nan")}
    qwen, llama = shapes(tiny)
    short = tuple(length // 64 for length in LENGTHS) if tiny else LENGTHS
    context = 16 if tiny else 2048

    def measure_rates() -> None:
        found["copy"], found["product"] = rates(bench, tiny)

    bench.stage("the device's own rates", measure_rates)
    for spec in (qwen, llama):
        cases = [(1, length) for length in short] + [(batch, context) for batch in BATCHES]
        bench.stage(f"{spec.name}, bytes", lambda spec=spec, cases=cases: bytes_held(bench, spec, cases))
    for spec in (qwen, llama):
        bench.stage(
            f"{spec.name}, prefill, decode and capacity",
            lambda spec=spec: phases(bench, spec, 64 if tiny else 8192, 16, found["copy"], found["product"]),
            needs=4,
        )
    bench.stage(f"{qwen.name}, grouped queries", lambda: grouped(bench, qwen, context, 8, found["copy"]), needs=6)
    bench.stage(f"{llama.name}, grouped queries", lambda: grouped(bench, llama, context, 8, found["copy"]), needs=6)
    command = f"python -m benchmarks.gpu_memory --seconds {arguments.seconds:g}"
    return finish("memory", bench.figures, bench.bars, bench.device, command)


if __name__ == "__main__":
    raise SystemExit(main())
