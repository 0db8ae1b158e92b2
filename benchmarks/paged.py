"""Paged attention and its engine: memory on a trace, the block manager's cost, tokens per second beside others.

    python -m benchmarks.paged [--rounds 3] [--vllm FOLDER] [--only trace blocks speed]

*Trace*: 256 requests, prompts and answers of U(100, 1,024) tokens, all there at once; the engine's own scheduler runs
them over blocks that hold nothing. Waste is the share of held slots that have no token, over all steps. Requests that
run at once, while others wait, are compared with reserving for each its prompt and the longest answer (2,048), and the
model's positions (8,192), under the same cap; beside each the ratio that arithmetic allows: tokens reserved for a
request over those that one really holds, on average over the same steps.

*Blocks*: one request's admission, a token more, and its release, in a pool all of whose blocks have been used, of 1,000
and of 1,000,000 blocks, in alternation.

*Speed*: the lab model answers 16 requests, 64 tokens each. The engine, transformers' `generate` and ours one request at
a time, transformers' `generate_batch`, and vLLM in an environment of its own (`make vllm`), all on the same prompts of
the project's texts, in alternation, none with prefix reuse; medians over rounds of tokens per second. `own` is what a
step takes outside the model's pass. Where token ids differ, it is told in how many of 16 answers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch

from benchmarks.paged_vllm import MARK
from benchmarks.report import bar, begin, finish
from labkit import models, quality
from labkit.cache import Cache
from labkit.device import pick_device, set_threads
from labkit.engine import BlockManager, Engine, Request
from labkit.engine.request import InFlight
from labkit.engine.scheduler import Scheduler
from labkit.generation import generate
from labkit.llama import Llama
from labkit.measure import device_name

BLOCK_SIZE, CAP = 16, 65_536  # the cap in tokens: 3.02 GB of the lab model's K and V in float32
LONGEST_ANSWER, POSITIONS = 2048, 8192
ROWS, NEW_TOKENS = 16, 64
PROMPTS = {"prompts of 32 to 512": (32, 512), "prompts of 8 to 32": (8, 32)}
SPEEDUPS = {"transformers generate": 6.0, "one at a time": 3.5, "transformers generate_batch": 2.5}
VLLM = {"float32": 1.2, "bfloat16": 0.9}
ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-vllm"
VLLM_TOKENS = 16_384  # tokens that its K and V have room for: more than all the requests have
Runs = dict[str, Callable[[Sequence[Sequence[int]]], tuple[float, list[list[int]]]]]


def trace() -> tuple[dict[str, float], list[dict]]:
    """The trace under one cap, paged and reserved."""
    draw = random.Random(0)
    lengths = [(draw.randint(100, 1024), draw.randint(100, 1024)) for _ in range(256)]
    blocks = BlockManager(CAP // BLOCK_SIZE, BLOCK_SIZE)
    scheduler = Scheduler(blocks, token_budget=10**9, max_rows=10**9)
    for number, (prompt, answer) in enumerate(lengths):
        request = Request(str(number), [draw.randrange(49_152) for _ in range(prompt)], answer)
        scheduler.waiting.append(InFlight(request, 0.0))
    at_once, held_then, slots, tokens = [], 0, 0, 0
    while chunks := scheduler.plan():
        held = sum(len(blocks.table(flight.id).tokens) for flight in scheduler.running)
        slots, tokens = slots + (blocks.num_blocks - blocks.num_free) * BLOCK_SIZE, tokens + held
        if scheduler.waiting:
            at_once.append(len(scheduler.running))
            held_then += held
        for chunk in chunks:
            blocks.computed(chunk.flight.id, chunk.end)
            chunk.flight.tokens.append(0)
            if len(chunk.flight.tokens) == sum(lengths[int(chunk.flight.id)]):
                scheduler.remove(chunk.flight)
    paged, waste = statistics.mean(at_once), 1 - tokens / slots
    held_on_average = held_then / sum(at_once)
    figures = {
        "trace, waste at block size 16, per cent": round(100 * waste, 3),
        "trace, requests at once, paged": round(paged, 1),
        "trace, preemptions": scheduler.preemptions,
        "trace, tokens that a request holds on average": round(held_on_average, 1),
    }
    bars = [bar("waste at block size 16", waste, "<=", 0.02)]
    mean_prompt = statistics.mean(p for p, _ in lengths)
    for name, needs, mean, least in (
        ("prompt and longest answer", [p + LONGEST_ANSWER for p, _ in lengths], mean_prompt + LONGEST_ANSWER, 2),
        ("the model's positions", [POSITIONS] * len(lengths), POSITIONS, 6),
    ):
        reserved = reserve(lengths, needs)
        figures[f"trace, requests at once, reserving {name}"] = round(reserved, 1)
        figures[f"trace, ratio to reserving {name}"] = round(paged / reserved, 2)
        figures[f"trace, ratio that arithmetic allows to reserving {name}"] = round(mean / held_on_average, 2)
        bars.append(bar(f"requests at once over those reserving {name}", paged / reserved, ">=", least))
    return figures, bars


def reserve(lengths: Sequence[tuple[int, int]], needs: Sequence[int]) -> float:
    """Requests that run at once, on average while others wait, where each reserves what it may need."""
    waiting, running, free, at_once = list(range(len(lengths))), {}, CAP, []
    while waiting or running:
        while waiting and needs[waiting[0]] <= free:
            number = waiting.pop(0)
            free -= needs[number]
            running[number] = lengths[number][1]
        if waiting:
            at_once.append(len(running))
        for number in [number for number in running if running[number] == 1]:
            free += needs[number]
            del running[number]
        running = {number: left - 1 for number, left in running.items()}
    return statistics.mean(at_once)


def used_manager(num_blocks: int) -> BlockManager:
    """One all of whose blocks have been used and let go, and can be found: what a free block costs most."""
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    whole = 8 * BLOCK_SIZE
    for number in range(num_blocks // 8):
        manager.admit(str(number), range(number * whole, (number + 1) * whole))
        manager.computed(str(number), whole)
    for number in range(num_blocks // 8):
        manager.release(str(number))
    return manager


def block_cost(rounds: int = 2000) -> dict[int, float]:
    """Seconds of one operation, by the number of blocks: the mean over an admission of 4 blocks, K and V written, 16
    tokens one by one, written each, and a release; the median over rounds."""
    managers = {size: used_manager(size) for size in (1_000, 1_000_000)}
    samples: dict[int, list[float]] = {size: [] for size in managers}
    for turn in range(rounds):
        prompt = [turn + 1, *range(63)]
        for size, manager in managers.items():
            start = time.perf_counter()
            manager.admit("x", prompt)
            manager.computed("x", 64)
            for token in range(16):
                manager.extend("x", [token])
                manager.computed("x", 65 + token)
            manager.release("x")
            samples[size].append((time.perf_counter() - start) / 35)
    return {size: statistics.median(taken) for size, taken in samples.items()}


def prompts_of(low: int, high: int) -> list[list[int]]:
    """Ragged prompts out of the project's texts."""
    tokenizer, draw = models.tokenizer(), random.Random(0)
    texts = [tokenizer(quality.load_text(path.stem)).input_ids for path in sorted(quality.TEXTS.glob("*.txt"))]
    cut = []
    for number in range(ROWS):
        text, count = texts[number % len(texts)], draw.randint(low, high)
        begin = draw.randrange(len(text) - count)
        cut.append(text[begin : begin + count])
    return cut


class Timed:
    """A model that keeps how long its passes took."""

    def __init__(self, model: Llama) -> None:
        self.model, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A pass of the model, timed."""
        start = time.perf_counter()
        try:
            return self.model(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start


def engine_run(model: Llama, own: list[float]) -> Callable:
    """Our engine; `own` collects the share of a run that is spent outside the model."""

    def run(prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        timed = Timed(model)
        engine = Engine(timed, 1024, BLOCK_SIZE, reuse=False)  # type: ignore[arg-type]
        start = time.perf_counter()
        answers = engine.run(Request(str(i), prompt, NEW_TOKENS) for i, prompt in enumerate(prompts))
        seconds = time.perf_counter() - start
        own.append(1 - timed.seconds / seconds)
        return seconds, [answers[str(i)] for i in range(len(prompts))]

    return run


def alone_run(model: Llama) -> Callable:
    """Our own generation, one request at a time."""

    def run(prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        start, answers = time.perf_counter(), []
        for prompt in prompts:
            cache = Cache.preallocated(model.spec.num_layers, len(prompt) + NEW_TOKENS, window=model.spec.window)
            answers.append(generate(model, torch.tensor([prompt]), NEW_TOKENS, cache=cache).tokens[0].tolist())
        return time.perf_counter() - start, answers

    return run


def transformers_runs(dtype: torch.dtype) -> Runs:
    """transformers, one request at a time, and its continuous batching."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    theirs = AutoModelForCausalLM.from_pretrained(models.folder(), dtype=dtype).eval()
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None  # nobody stops early
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    def alone(prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        start, answers = time.perf_counter(), []
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
            answers.append(out[0, len(prompt) :].tolist())
        return time.perf_counter() - start, answers

    def batch(prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        outputs = theirs.generate_batch([list(prompt) for prompt in prompts], generation_config=greedy)
        seconds = time.perf_counter() - start
        return seconds, [list(output.generated_tokens) for output in outputs.values()]

    with torch.no_grad():
        return {"transformers generate": alone, "transformers generate_batch": batch}


class Vllm:
    """vLLM in its own environment, in processes that stand still while others are measured."""

    def __init__(self, python: Path, dtype: str) -> None:
        spec, size = models.spec(), getattr(torch, dtype).itemsize
        kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * size * VLLM_TOKENS
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM", "TRITON"))}
        kept |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        script = Path(__file__).with_name("paged_vllm.py")
        self.process = subprocess.Popen(
            [str(python), "-P", str(script), str(models.folder()), dtype, str(NEW_TOKENS), str(kv_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=kept | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip

    def run(self, prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        """Seconds and answers; RuntimeError when the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps([list(prompt) for prompt in prompts]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(MARK):
                os.killpg(self.process.pid, signal.SIGSTOP)
                told = json.loads(line.removeprefix(MARK))
                return told["seconds"], told["answers"]
        raise RuntimeError(f"vLLM ended with exit code {self.process.wait()}: what it said stands above")

    def close(self) -> None:
        """End its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def speed(dtype: str, rounds: int, vllm: Path | None) -> tuple[dict[str, float], list[dict]]:
    """Tokens per second of each way, and the bars of one dtype."""
    figures: dict[str, float] = {}
    bars: list[dict] = []
    own: list[float] = []
    model = models.load(dtype=getattr(torch, dtype), device="cpu")
    ours: Runs = {"engine": engine_run(model, own)}
    others: Runs = {}
    if dtype == "float32":
        others = {"one at a time": alone_run(model), **transformers_runs(model.dtype)}
    server = Vllm(vllm, dtype) if vllm else None
    if server:
        ours["vLLM"] = server.run
    try:
        for index, (name, (low, high)) in enumerate(PROMPTS.items()):
            prompts = prompts_of(low, high)
            runs = ours if index else ours | others
            samples: dict[str, list[float]] = {way: [] for way in runs}
            answers: dict[str, list[list[int]]] = {}
            own.clear()
            for turn, (way, run) in itertools.product(range(rounds + 1), runs.items()):
                if turn == 0 and way in others:
                    run(prompts[:1])  # enough to warm up what answers one at a time
                    continue
                seconds, answers[way] = run(prompts)
                print(
                    f"    {dtype}, {name}, round {turn}, {way}: {ROWS * NEW_TOKENS / seconds:.1f} tokens/s", flush=True
                )
                if turn:
                    samples[way].append(ROWS * NEW_TOKENS / seconds)
            medians = {way: statistics.median(rates) for way, rates in samples.items()}
            for way, median in medians.items():
                spread = max(samples[way]) - min(samples[way])
                figures[f"{dtype}, {name}, tokens/s, {way}"] = round(median, 1)
                figures[f"{dtype}, {name}, tokens/s, {way}, highest less lowest"] = round(spread, 1)
                if way != "engine":
                    same = sum(mine == theirs for mine, theirs in zip(answers["engine"], answers[way], strict=True))
                    figures[f"{dtype}, {name}, answers of {ROWS} equal to those of {way}"] = same
                    if dtype == "float32":
                        bars.append(bar(f"{dtype}, {name}, answers equal to those of {way}", same, ">=", ROWS))
                    least = VLLM[dtype] if way == "vLLM" else SPEEDUPS[way]
                    bars.append(bar(f"{dtype}, {name}, engine over {way}", medians["engine"] / median, ">=", least))
            figures[f"{dtype}, {name}, engine's own share of a step"] = round(statistics.median(own), 4)
            figures[f"{dtype}, {name}, ms of a step of {ROWS} rows and one token"] = round(
                1e3 * decode_step(model, prompts), 2
            )
            bars.append(bar(f"{dtype}, {name}, engine's own share of a step", statistics.median(own), "<=", 0.05))
    finally:
        if server:
            server.close()
    return figures, bars


def decode_step(model: Llama, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds of a step in which every request gets a token: the median of 20."""
    engine = Engine(model, 1024, BLOCK_SIZE, reuse=False)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, NEW_TOKENS))
    while any(not flight.timing.new_tokens for flight in engine.flights.values()):
        engine.step()
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=list(VLLM), choices=list(VLLM))
    parser.add_argument("--vllm", type=Path, default=ENVIRONMENT, help="vLLM's environment, as `make vllm` makes it")
    parser.add_argument("--only", nargs="+", default=["trace", "blocks", "speed"], choices=["trace", "blocks", "speed"])
    arguments = parser.parse_args()
    vllm = arguments.vllm / "bin" / "python"
    if not vllm.is_file():
        print(f"vLLM is left out: there is no {vllm}; `make vllm` makes it")
    set_threads()
    begin()
    device = pick_device().torch_device
    figures: dict[str, float] = {}
    bars: list[dict] = []
    print(device_name(device))

    def add(found: tuple[dict[str, float], list[dict]]) -> None:
        for name, value in found[0].items():
            print(f"  {name:<88} {value:g}", flush=True)
        for entry in found[1]:
            print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
        figures.update(found[0])
        bars.extend(found[1])

    if "trace" in arguments.only:
        add(trace())
    costs = block_cost() if "blocks" in arguments.only else {}
    if "speed" in arguments.only:
        for dtype in arguments.dtype:
            add(speed(dtype, arguments.rounds, vllm if vllm.is_file() else None))
    if costs:
        few, many = costs[1_000], costs[1_000_000]
        told = {
            f"microseconds of a block operation, {size:,} blocks": round(1e6 * cost, 2) for size, cost in costs.items()
        }
        steps = [value for name, value in figures.items() if "ms of a step" in name]
        limits = [bar("a block operation at 1,000,000 blocks over one at 1,000", many / few, "<=", 2)]
        if steps:
            limits.append(bar("a block operation over a step", max(costs.values()) * 1e3 / min(steps), "<=", 0.02))
        add((told, limits))
    command = f"python -m benchmarks.paged --rounds {arguments.rounds}"
    return finish("paged", figures, bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
