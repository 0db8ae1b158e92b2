"""Requests per second on a GPU: `labkit.engine` and transformers' `generate_batch` on the same weights and requests.

    python -m benchmarks.gpu_engine [--requests 256] [--compared 64] [--seconds 200]
    python -m benchmarks.gpu_engine --tiny --device cpu          # whether it runs, no figures

The workload is nano-vLLM's: prompts and answers of U(100, 1024) tokens each, random ids, greedy, no end token. The
model has the sizes of Qwen3 0.6B, as a Llama: labkit's decoder has no norms of queries and keys. Its weights are random
bfloat16, made on the device.

The two are compared on the first `--compared` of these requests, which each gets alone; then labkit's engine runs all
of them. transformers 5.17 takes one `max_new_tokens` in `generate_batch`; its manager, which that drives, takes one for
each request, and that is used here. Both engines are told all requests at once and have as many blocks as all of them
need, so that neither preempts, and both are timed from when requests that warm them up have ended. What attention
transformers runs with is printed: without the flash-attn package it is PyTorch's, over gathered K and V of all requests
together.

An engine that does not end all requests in its part of `--seconds` has no tokens/s that could be compared. Where ours
has ended and transformers has not, though it ended half of them, the time it had already is a bound: how many times it
takes at least.

nano-vLLM's own README says 1,434 tokens/s on an RTX 4070 laptop for 256 such requests: another machine, a note only.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.hugging_face import as_hugging_face
from benchmarks.report import SEEN, bar, begin, finish
from labkit import models, specs
from labkit.engine import BlockManager, Engine, Request, Token
from labkit.llama import Llama
from labkit.measure import device_name, give_back, synchronize
from labkit.specs import ModelSpec

SPEEDUP = 3.0
SHORTEST, LONGEST = 100, 1024
NOTE = "note: nano-vLLM's README says 1,434 tokens/s on an RTX 4070 laptop (Qwen3-0.6B, 256 requests): another machine"


def shape(tiny: bool) -> ModelSpec:
    """Qwen3 0.6B's sizes, as a decoder that labkit runs."""
    of = specs.model("qwen3-0.6b")
    sizes = {name: getattr(of, name) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size")}
    sizes |= {"intermediate_size": of.intermediate_size, "vocab_size": of.vocab_size}
    if tiny:
        sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64}
        sizes |= {"intermediate_size": 96, "vocab_size": 512}
    return ModelSpec("llama-0.6b", **sizes, max_seq_len=4096, tied_head=True)


def workload(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[Request]:
    """The same requests every time."""
    draw, shortest = random.Random(seed), min(SHORTEST, longest // 2)
    sizes = [(draw.randint(shortest, longest), draw.randint(shortest, longest)) for _ in range(count)]
    return [
        Request(f"r{i}", [draw.randrange(vocab_size) for _ in range(prompt)], answer)
        for i, (prompt, answer) in enumerate(sizes)
    ]


class Timed(Engine):
    """An engine that says where its time goes: `launching` the model's pass, `waiting` for its end; the rest are books.

    Python hands the device its work while the device does what it has: launching and the device's time overlap.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.launching = self.waiting = 0.0
        self.passes = 0

    def _pass(self, chunks: list) -> Tensor:
        start = time.perf_counter()
        logits = super()._pass(chunks)
        self.launching += time.perf_counter() - start
        self.passes += 1
        return logits

    def _pick(self, chunks: list, logits: Tensor) -> list:
        start = time.perf_counter()
        synchronize(logits.device)
        self.waiting += time.perf_counter() - start
        return super()._pick(chunks, logits)


def run_ours(model: Llama, requests: list[Request], arguments: argparse.Namespace, limit: float) -> dict[str, float]:
    """All requests through labkit's engine, until the time is over."""
    size = arguments.block_size
    needed = sum(-(-(len(request.tokens) + request.max_new_tokens) // size) for request in requests)
    manager = BlockManager(needed + len(requests), size, reuse=False)  # and one to spare for each that runs
    engine = Timed(model, manager=manager, token_budget=arguments.token_budget, max_rows=len(requests))
    warm_up(engine, model.spec.vocab_size)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine.launching = engine.waiting = 0.0
    engine.passes = 0
    synchronize(model.device)
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    tokens: list[Token] = []
    while engine.flights and time.perf_counter() - start < limit:
        tokens += engine.step()
    seconds = time.perf_counter() - start
    written = sum(token.token is not None for token in tokens)
    ended = [engine.finished[request.id] for request in requests if request.id in engine.finished]
    if bad := [timing.finished for timing in ended if timing.finished != "length"]:
        raise RuntimeError(f"{len(bad)} requests did not end by their length: {sorted({*map(str, bad)})}")
    read = sum(len(request.tokens) for request in requests)
    figures = {
        "requests finished": len(ended),
        "seconds": seconds,
        "output tokens/s": written / seconds,
        "total tokens/s": (written + (read if len(ended) == len(requests) else 0)) / seconds,
        "passes": engine.passes,
        "ms a pass": seconds / engine.passes * 1e3,
        "share of time launching": engine.launching / seconds,
        "share of time waiting for the device": engine.waiting / seconds,
        "share of time in books": 1 - (engine.launching + engine.waiting) / seconds,
        "preemptions": float(engine.scheduler.preemptions),
        "cache GB": engine.cache.nbytes / 1e9,
    }
    for name, values in (("TTFT s", [t.ttft for t in ended]), ("TPOT ms", [t.tpot * 1e3 for t in ended])):
        values = sorted(value for value in values if value == value)
        if values:
            figures |= {f"{name}, median": values[len(values) // 2], f"{name}, 95%": values[int(0.95 * len(values))]}
    if model.device.type == "cuda":
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def warm_up(engine: Engine, vocab_size: int) -> None:
    """Compile kernels and let libraries choose theirs: passes of one row and of many, whole prompts and chunks."""
    draw = random.Random(1)
    longest = min(engine.scheduler.token_budget, 2040, engine.blocks.num_blocks * engine.blocks.block_size // 4)
    for count in (1, 2, 3, engine.scheduler.max_rows):
        prompt = max(4, longest // count)
        made = [
            Request(f"warm {count} {i}", [draw.randrange(vocab_size) for _ in range(prompt)], 3 + i % 3)
            for i in range(count)
        ]
        engine.run(made)


def check_same(model: Llama, theirs: Any, requests: list[Request]) -> float:
    """How far their logits are from ours over the standard deviation of ours: that it is the same model."""
    tokens = torch.tensor([requests[0].tokens[:64]], device=model.device)
    kept = theirs.config._attn_implementation
    theirs.set_attn_implementation("sdpa")
    with torch.inference_mode():
        mine, other = model(tokens).float(), theirs(tokens, use_cache=False).logits.float()
    theirs.set_attn_implementation(kept)
    return ((mine - other).abs().max() / mine.std()).item()


def run_theirs(theirs: Any, requests: list[Request], block_size: int, limit: float) -> dict[str, float]:
    """All requests through transformers' continuous batching, until the time is over, which begins when it is warm."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    device = theirs.device
    cuda = device.type == "cuda"
    longest = max(len(request.tokens) + request.max_new_tokens for request in requests)
    room: dict[str, Any] = {} if cuda else {"num_blocks": 64, "max_batch_tokens": 256}
    told = ContinuousBatchingConfig(
        block_size=block_size, allow_block_sharing=False, max_requests_per_batch=len(requests), **room
    )
    generation = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ended = 0
    began = time.perf_counter()
    with theirs.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=told, block=True, timeout=5
    ) as manager:
        print(f"  attention: {theirs.config._attn_implementation}", flush=True)
        warm_theirs(manager, requests, min(60.0, limit))
        print(f"  transformers is warm after {time.perf_counter() - began:.1f} s", flush=True)
        start = time.perf_counter()
        lengths: dict[str, int] = {}
        for request in requests:
            manager.add_request(list(request.tokens), request_id=request.id, max_new_tokens=request.max_new_tokens)
        while ended < len(requests) and time.perf_counter() - start < limit:
            result = manager.get_result(timeout=0.5)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' generation thread ended early")
                continue
            if result.error is not None:
                raise RuntimeError(f"transformers failed at request {result.request_id}: {result.error}")
            lengths[result.request_id] = len(result.generated_tokens)
            ended += result.is_finished()
        for name, state in (
            [*manager.batch_processor.scheduler.active_requests.items()] if ended < len(requests) else []
        ):
            lengths.setdefault(name, state.generated_len())  # what was written counts although a request has not ended
        seconds = time.perf_counter() - start
        if ended < len(requests):
            manager.stop(block=True, timeout=10, hard_stop=True)  # by itself it would write all answers to their ends
    written = sum(lengths.values())
    figures = {"requests finished": float(ended), "seconds": seconds, "output tokens/s": written / seconds}
    if ended == len(requests):
        figures["total tokens/s"] = (written + sum(len(request.tokens) for request in requests)) / seconds
    if cuda:
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def warm_theirs(manager: Any, requests: list[Request], limit: float) -> None:
    """A few requests to their ends: what a first pass sets up is no part of the time. RuntimeError after `limit` s."""
    end, few = time.perf_counter() + limit, requests[:4]
    for request in few:
        manager.add_request(list(request.tokens), request_id=f"warm {request.id}", max_new_tokens=4)
    ended = 0
    while ended < len(few):
        result = manager.get_result(timeout=0.5)
        if result is not None and result.error is not None:
            raise RuntimeError(f"transformers failed at a request to warm it up: {result.error}")
        if result is None and not manager.is_running():
            raise RuntimeError("transformers' generation thread ended before it was warm")
        if result is None and time.perf_counter() > end:
            raise RuntimeError(f"transformers did not end {len(few)} requests of 4 tokens within {limit:.0f} s")
        ended += result is not None and result.is_finished()


def judged(ours: dict[str, float], theirs: dict[str, float], count: int) -> tuple[dict[str, Any] | None, str]:
    """The bar, and in words what the comparison of `count` requests says; no bar where there is none to draw."""
    name, done = "output tokens/s over transformers' continuous batching", "requests finished"
    for who, found in (("labkit's engine", ours), ("transformers", theirs)):
        if not found:
            return None, f"no comparison: {who} did not run"
    if ours[done] < count:
        return None, f"no comparison: labkit's engine ended {ours[done]:.0f} of {count} requests in its time"
    if theirs[done] == count:
        ratio = theirs["seconds"] / ours["seconds"]
        found = bar(name, ratio, ">=", SPEEDUP)
        verdict = "holds" if found["holds"] else "MISSED"
        return found, f"{verdict}: {ratio:.2f} times transformers' tokens/s (>= {SPEEDUP:g})"
    told = f"transformers ended {theirs[done]:.0f} of {count} requests in {theirs['seconds']:.0f} s"
    least = theirs["seconds"] / ours["seconds"]
    if 2 * theirs[done] < count or least < SPEEDUP:
        return None, f"no comparison: {told}"
    return bar(f"{name}, at least", least, ">=", SPEEDUP), f"holds: {told}, {least:.2f} times ours for all"


def stage(name: str, run: Callable[[], dict[str, float]], figures: dict[str, float]) -> dict[str, float]:
    """The figures of one stage, entered under its name; nothing where it fails, and why is printed."""
    print(f"{name}:", flush=True)
    try:
        found = run()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        figures[f"{name}: failed"] = 1.0
        return {}
    finally:
        give_back("cuda" if torch.cuda.is_available() else "cpu")
    for what, value in found.items():
        print(f"  {what:<40} {value:,.4g}", flush=True)
        figures[f"{name}: {what}"] = round(value, 4)
    return found


def main() -> int:
    """Run, print, and say with the exit code whether the bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=200, help="for all but warming up; engines stop in time")
    parser.add_argument("--compared", type=int, default=64, help="requests that transformers gets too, 0: all")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short requests: whether it runs")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        SEEN.update({"driver": driver()})
    elif not arguments.tiny:
        begin()
    if arguments.tiny:
        arguments.requests, arguments.block_size = min(arguments.requests, 6), 16
        arguments.token_budget = min(arguments.token_budget, 64)
    spec = shape(arguments.tiny)
    dtype = torch.float32 if arguments.tiny and device.type == "cpu" else torch.bfloat16
    requests = workload(arguments.requests, spec.vocab_size, 24 if arguments.tiny else LONGEST)
    compared = requests[: arguments.compared or None]
    asked = sum(request.max_new_tokens for request in requests)
    read = sum(len(request.tokens) for request in requests)
    print(f"{device_name(device)}; {spec.num_parameters:,} parameters, {dtype}; {len(requests)} requests:", end=" ")
    print(f"{read:,} tokens in, {asked:,} out", flush=True)
    model = models.random(spec, dtype, device, prepack=False)
    figures: dict[str, float] = {"requests": len(requests), "tokens in": read, "tokens out": asked}

    few = "" if compared == requests else f", {len(compared)} requests"
    mine = stage(f"labkit{few}", lambda: run_ours(model, compared, arguments, 0.2 * arguments.seconds), figures)

    def against() -> dict[str, float]:
        theirs = as_hugging_face(model, "paged|sdpa")
        apart = check_same(model, theirs, requests)
        print(f"  logits apart, over their standard deviation: {apart:.4f}", flush=True)
        if not apart < 0.5:
            raise RuntimeError(f"these are not the same weights: logits are {apart} standard deviations apart")
        return run_theirs(theirs, compared, arguments.block_size, 0.6 * arguments.seconds) | {"logits apart": apart}

    theirs = stage(f"transformers{few}", against, figures)
    if few:
        stage("labkit", lambda: run_ours(model, requests, arguments, 0.2 * arguments.seconds), figures)
    found, words = judged(mine, theirs, len(compared))
    bars = [found] if found else []
    print(words)
    print(NOTE, flush=True)
    command = f"python -m benchmarks.gpu_engine --requests {arguments.requests} --seconds {arguments.seconds:g}"
    command += f" --compared {arguments.compared}"
    code = finish("engine", figures, bars, device, command)
    return code if bars else 1


def driver() -> str:
    """The GPU's driver, empty where nvidia-smi does not say."""
    import subprocess

    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout.strip().splitlines()[0] if told.stdout.strip() else ""


if __name__ == "__main__":
    raise SystemExit(main())
