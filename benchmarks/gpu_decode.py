"""Decode on a GPU through a CUDA graph: a 7B shape against the floor, the lab model against transformers' `generate()`.

    python -m benchmarks.gpu_decode [--seconds 60] [--model lab|random] [--sizes]

Qwen2.5-7B's shape has random bfloat16 weights. Its floor is the bytes that one step must read (every weight but the
table of embeddings once, K and V of the context once) over the bandwidth of a large copy in the same run, counted read
and written; MBU is the floor over the time taken. Steps of two sorts are compared: products through PyTorch with small
kernels in between, and products of our own (`kernels.matvec`). Then each product alone, over copies of its matrix that
no cache holds together, and attention alone; with --sizes also products in other sizes of block.

The lab model and transformers run the same weights after the same 512 tokens, in alternation; a step's time is that of
a long generation less that of a short one, over the tokens in between. In float32 their tokens are compared: where they
part, our logits of the two must be a tie. Where the lab model's files are not here, nothing is fetched: random weights
of its shape take as long.

Every stage has its share of `--seconds`, and its clock starts when its kernels are compiled and its weights made; that
comes on top, up to a minute where Triton has compiled nothing yet. What does not fit is left out and said. A stage that
fails prints its traceback, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hugging_face import as_hugging_face
from benchmarks.report import bar, finish, step_bytes
from labkit import models, specs
from labkit.cache import Cache
from labkit.generation import generate
from labkit.graphs import DecodeGraph
from labkit.kernels.decode_attention import decode_between
from labkit.kernels.matvec import matvec, matvec_plain
from labkit.lab_model import damage, lab_model_folder
from labkit.llama import Llama
from labkit.measure import device_name, give_back, read_bandwidth
from labkit.specs import ModelSpec

MBU_BAR, SPEEDUP_BAR = 0.85, 5.0
CONTEXTS = (512, 32768, 4096)  # in order of value
SHARES = {"7B": 0.35, "products": 0.25, "bfloat16": 0.2, "float32": 0.2}  # of the time
PROMPT = 512
SHAPE, LAB_SHAPE = "qwen2.5-7b", "smollm2-135m"
TIE = 1e-3  # of the logits' standard deviation: how near two float32 logits are that rounding may order either way
L2 = 100e6  # bytes, more than any GPU's cache holds: what is timed again and again rotates over more than this


class Budget:
    """The seconds that a stage has, from now on."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.perf_counter()


def median_ms(
    run: Callable[[], object], *, repeats: int = 5, warmup: int = 1, most: float = 2.0
) -> tuple[float, float]:
    """Median and half the distance of the quartiles, in ms, of `run` between two events on the device."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    samples, ends = [], time.perf_counter() + most
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
        if time.perf_counter() > ends:
            break
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, (high - low) / 2


def graphed_ms(calls: Sequence[Callable[[], object]], *, rounds: int = 1) -> float:
    """ms of one of these calls, launched by a graph of all of them, `rounds` times over: no launch gap of the CPU's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return median_ms(graph.replay, repeats=7, warmup=2, most=0.5)[0] / (rounds * len(calls))


def copy_bandwidth(nbytes: int = 4 * 2**30) -> float:
    """Bytes read plus written per second of a large copy on the device."""
    half = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(half)
    ms, _ = median_ms(lambda: to.copy_(half), repeats=9, warmup=3)
    return nbytes / ms * 1e3


def filled_cache(model: Llama, context: int, capacity: int) -> Cache:
    """A cache that holds `context` tokens of random K and V: what a step takes does not depend on their values."""
    cache, spec = model.cache(capacity), model.spec
    shape = (1, spec.num_kv_heads, context, spec.head_dim)
    for layer in cache.layers:
        layer.append(
            torch.randn(shape, device=model.device, dtype=model.dtype),
            torch.randn(shape, device=model.device, dtype=model.dtype),
        )
    return cache


def step_ms(graph: DecodeGraph, cache: Cache, context: int, steps: int) -> tuple[float, float]:
    """ms of a step, and the spread, of runs of `steps` from `context` on; the answer is read once a run."""
    first = torch.zeros(graph.batch, dtype=torch.int64, device="cuda")

    def run() -> None:
        cache.truncate(context)
        graph.run(first, steps)

    ms, spread = median_ms(run, repeats=7, warmup=1, most=1.5)
    return ms / steps, spread / steps


def ready(what: str, prepare: Callable[[], object]) -> None:
    """Run once what is timed later: its kernels are compiled then, outside of every budget."""

    def timed() -> None:
        begun = time.perf_counter()
        prepare()
        torch.cuda.synchronize()
        print(f"  {what}: compiled and run once in {time.perf_counter() - begun:.1f} s", flush=True)

    guarded(timed)


def large(seconds: float, bandwidth: float, figures: dict[str, float], bars: list[dict], more_sizes: bool) -> None:
    """The 7B shape at each context, both sorts of step; then its parts."""
    model = models.random(specs.model(SHAPE), torch.bfloat16, "cuda")
    spec, steps = model.spec, 16
    sorts = {"own products": True, "PyTorch's products": False}
    print(f"  {SHAPE}, random weights")

    def once(context: int, fused: bool) -> None:
        cache = filled_cache(model, context, context + 2 * steps)
        DecodeGraph(model, cache, capture=False, fused=fused).run(
            torch.zeros(1, dtype=torch.int64, device=model.device), 2
        )

    ready(SHAPE, lambda: [once(context, fused) for fused in sorts.values() for context in CONTEXTS])
    budget = Budget(SHARES["7B"] * seconds)
    best: dict[int, float] = {}
    for name, fused in sorts.items():
        for context in CONTEXTS:
            if budget.left < 0:
                print(f"  left out for lack of time: {name} at {context}")
                continue
            floor = step_bytes(spec, context, dtype="bfloat16") / bandwidth * 1e3
            cache = None  # the one before goes first
            try:
                cache = filled_cache(model, context, context + 2 * steps)
                ms, spread = step_ms(DecodeGraph(model, cache, fused=fused), cache, context, steps)
            except Exception:
                traceback.print_exc()
                continue
            best[context] = min(ms, best.get(context, ms))
            print(
                f"  {context:>6} tokens, {name:<18} {ms:7.3f} ms ± {spread:.3f}; floor {floor:.3f}; "
                f"MBU {floor / ms:.3f}",
                flush=True,
            )
            figures[f"{SHAPE} {context} tokens, {name}: ms per token"] = round(ms, 4)
            figures[f"{SHAPE} {context} tokens, {name}: spread ms"] = round(spread, 4)
    for context, ms in best.items():
        floor = step_bytes(spec, context, dtype="bfloat16") / bandwidth * 1e3
        figures[f"{SHAPE} {context} tokens: bytes per step"] = step_bytes(spec, context, dtype="bfloat16")
        figures[f"{SHAPE} {context} tokens: floor ms"] = round(floor, 4)
        figures[f"{SHAPE} {context} tokens: MBU, weights and KV"] = round(floor / ms, 4)
        bars.append(bar(f"{SHAPE} {context} tokens: MBU, weights and KV", floor / ms, ">=", MBU_BAR))
    cache = None
    guarded(parts, model, SHARES["products"] * seconds, bandwidth, figures, more_sizes)


OWN_SIZES = ((2, 1024, 4), (4, 512, 4), (4, 1024, 8), (8, 512, 8), (1, 2048, 4), (2, 512, 2))


def product_calls(weights: Sequence[Tensor], gated: bool, more_sizes: bool) -> dict[str, Callable[[Tensor], object]]:
    """Ways of one product: PyTorch's (without the gate), our own as it is, and with other sizes."""
    x = torch.randn(1, weights[0].shape[1], device=weights[0].device, dtype=weights[0].dtype)
    calls: dict[str, Callable[[Tensor], object]] = {
        "own": lambda w: matvec(x, w, gated=gated),
        "PyTorch": lambda w: F.linear(x, w),
    }
    for rows, block_size, num_warps in OWN_SIZES if more_sizes else ():
        sizes = {"rows": rows, "block_size": block_size, "num_warps": num_warps}
        calls[f"{rows}x{block_size} {num_warps}w"] = partial(matvec, x, gated=gated, **sizes)
    return calls


def totals(us: dict[str, dict[str, float]], times: dict[str, int]) -> dict[str, float]:
    """ms of all products of a step, for each way in which every one of them was measured. us: of one call of each
    product, by product and way. times: how often a step needs it."""
    found = {}
    for way in ("PyTorch", "own"):
        if all(way in us.get(name, {}) for name in times):
            found[way] = sum(us[name][way] * count for name, count in times.items()) / 1e3
    other = {name: [taken for way, taken in us.get(name, {}).items() if way != "PyTorch"] for name in times}
    if all(len(taken) > 1 for taken in other.values()):
        found["best own"] = sum(min(other[name]) * count for name, count in times.items()) / 1e3
    return found


def attention_us(spec: ModelSpec, context: int, dtype: torch.dtype) -> float:
    """us of one layer's attention, over copies of K and V that no cache holds together."""
    one = 2 * spec.num_kv_heads * context * spec.head_dim * dtype.itemsize
    shape = (1, spec.num_kv_heads, context, spec.head_dim)
    kv = [[torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)] for _ in range(min(64, int(L2 / one) + 2))]
    q = torch.randn(1, spec.num_heads, 1, spec.head_dim, device="cuda", dtype=dtype)
    first, end = (torch.full((1,), x, dtype=torch.int32, device="cuda") for x in (0, context))
    return graphed_ms([partial(decode_between, q, k, v, first, end) for k, v in kv]) * 1e3


def parts(model: Llama, seconds: float, bandwidth: float, figures: dict[str, float], more_sizes: bool) -> None:
    """Each product alone, PyTorch's and our own, and attention alone: us, and share of the copy's."""
    spec = model.spec
    products = {
        "qkv": [b.attention.qkv.weight for b in model.blocks],
        "out": [b.attention.out.weight for b in model.blocks],
        "gate and up": [b.mlp.gate_up.weight for b in model.blocks],
        "down": [b.mlp.down.weight for b in model.blocks],
        "head": [model.head.weight if model.head is not None else model.embedding.weight],
    }
    calls = {name: product_calls(weights, name == "gate and up", more_sizes) for name, weights in products.items()}
    ready("products", lambda: [call(products[name][0]) for name, ways in calls.items() for call in ways.values()])
    budget = Budget(seconds)
    us: dict[str, dict[str, float]] = {}
    todo = [(name, way) for place in range(len(calls["qkv"])) for name in calls for way in [list(calls[name])[place]]]
    for number, (name, way) in enumerate(todo):  # one way of all products, then the next
        if budget.left < 0:
            print(f"  left out for lack of time: {', '.join(f'{name} {way}' for name, way in todo[number:])}")
            break
        weights = products[name]
        try:
            taken = graphed_ms([partial(calls[name][way], w) for w in weights]) * 1e3
        except Exception:
            traceback.print_exc()
            continue
        us.setdefault(name, {})[way] = taken
        floor = weights[0].nbytes / bandwidth * 1e6
        print(
            f"  {name:<12} {list(weights[0].shape)!s:<16} {way:<12} {taken:8.2f} us; floor {floor:.2f}; "
            f"{floor / taken:.3f}",
            flush=True,
        )
        figures[f"{name}, {way}: us"] = round(taken, 3)
    for way, ms in totals(us, {name: 1 if name == "head" else spec.num_layers for name in products}).items():
        print(f"  all products of a step, {way}: {ms:.3f} ms")
        figures[f"all products, {way}: ms"] = round(ms, 4)
    for context in CONTEXTS:
        if budget.left < 0:
            print(f"  left out for lack of time: attention alone at {context}")
            continue
        taken = attention_us(spec, context, model.dtype)
        least = 2 * spec.num_kv_heads * context * spec.head_dim * model.dtype.itemsize / bandwidth * 1e6
        whole = taken * spec.num_layers / 1e3
        print(f"  attention of a layer, {context:>6} tokens: {taken:8.2f} us; floor {least:.2f}; {whole:.3f} ms a step")
        figures[f"attention of a layer, {context} tokens: us"] = round(taken, 3)


def files_are_here() -> bool:
    """Whether the model in use can be loaded without fetching anything."""
    named = models.named_model()
    return Path(named).expanduser().is_dir() if named else damage(lab_model_folder()) is None


def lab_weights(which: str) -> tuple[Llama, str]:
    """The lab model in float32, or random weights of its shape where its files are not here."""
    if which == "lab" and files_are_here():
        return models.load(torch.float32, "cuda", prepack=False), "the lab model"
    if which == "lab":
        print("  the lab model's files are not here, and nothing is fetched: random weights of its shape")
    return models.random(specs.model(LAB_SHAPE), torch.float32, "cuda", prepack=False), f"random weights of {LAB_SHAPE}"


def small(which: str, seconds: float, bandwidth: float, figures: dict[str, float], bars: list[dict]) -> None:
    """The lab model in bfloat16 and float32."""
    exact, what = lab_weights(which)
    print(f"  {what}, after a prompt of {PROMPT} tokens")
    figures["lab model: random weights"] = float(what != "the lab model")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, exact.spec.vocab_size, (1, PROMPT), generator=generator).cuda()
    for dtype in (torch.bfloat16, torch.float32):
        ours = exact if dtype == torch.float32 else models.random(exact.spec, dtype, "cuda", prepack=False)
        if ours is not exact:
            with torch.no_grad():
                for mine, other in zip(ours.parameters(), exact.parameters(), strict=True):
                    mine.copy_(other)
        share = SHARES[str(dtype).removeprefix("torch.")] * seconds
        guarded(small_one, ours, tokens, share, bandwidth, figures, bars)


def small_one(
    ours: Llama, tokens: Tensor, share: float, bandwidth: float, figures: dict[str, float], bars: list[dict]
) -> None:
    """One dtype: ours by a graph of either sort, ours launched by Python, and transformers', in alternation."""
    name, few, many = str(ours.dtype).removeprefix("torch."), 4, 36
    begun = time.perf_counter()
    theirs = as_hugging_face(ours)
    mask = torch.ones_like(tokens)

    def run_theirs(count: int) -> Tensor:
        with torch.inference_mode():
            return theirs.generate(
                tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )[:, tokens.shape[1] :]

    def run_eager(count: int) -> Tensor:
        return generate(ours, tokens, count, cache=ours.cache(PROMPT + many)).tokens

    graphs = {}
    for sort, fused in (("graph, own products", True), ("graph, PyTorch's products", False)):
        cache = ours.cache(PROMPT + many)
        ours(tokens, cache, last_only=True)
        graphs[sort] = DecodeGraph(ours, cache, fused=fused), cache

    first = ours(tokens, last_only=True)[:, -1].argmax(-1)

    def from_prompt(sort: str, count: int) -> Tensor:
        """The first token is the prefill's, which is the same for all: `count - 1` are decoded."""
        graph, cache = graphs[sort]
        cache.truncate(PROMPT)
        return torch.cat((first[:, None], graph.run(first, count - 1)), dim=1)

    runs: dict[str, Callable[[int], Tensor]] = {
        **{sort: (lambda count, sort=sort: from_prompt(sort, count)) for sort in graphs},
        "launched by Python": run_eager,
        "transformers": run_theirs,
    }
    samples: dict[str, list[float]] = {sort: [] for sort in runs}
    said: dict[str, Tensor] = {}
    budget = Budget(share)
    for turn in range(6):
        if turn == 1:  # all is compiled
            print(f"  {name}: ready in {time.perf_counter() - begun:.1f} s", flush=True)
            budget = Budget(share)
        at_turn = time.perf_counter()
        for sort, run in runs.items():
            seconds = []
            for count in (few, many):
                torch.cuda.synchronize()
                start = time.perf_counter()
                said[sort] = run(count)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            if turn:
                samples[sort].append((seconds[1] - seconds[0]) / (many - few) * 1e3)
        if turn > 1 and budget.left < time.perf_counter() - at_turn:
            break
    medians = {sort: statistics.median(values) for sort, values in samples.items()}
    floor = step_bytes(ours.spec, PROMPT, dtype=name) / bandwidth * 1e3
    for sort, ms in medians.items():
        spread = (max(samples[sort]) - min(samples[sort])) / 2
        print(f"  {name:<9} {sort:<26} {ms:7.3f} ms a token ± {spread:.3f}; floor {floor:.3f}; MBU {floor / ms:.3f}")
        figures[f"lab model {name}, {sort}: ms per token"] = round(ms, 4)
    best = min(medians[sort] for sort in graphs)
    figures[f"lab model {name}: floor ms"] = round(floor, 4)
    figures[f"lab model {name}: MBU, weights and KV"] = round(floor / best, 4)
    bars.append(
        bar(
            f"lab model {name}: times faster than transformers' generate()",
            medians["transformers"] / best,
            ">=",
            SPEEDUP_BAR,
        )
    )
    if ours.dtype == torch.float32:
        for sort in (*graphs, "launched by Python"):
            gap = parting(ours, tokens, said[sort], said["transformers"])
            figures[f"lab model float32, {sort}: gap of logits where tokens part, in deviations"] = round(gap, 6)
            bars.append(bar(f"lab model float32, {sort}: tokens are transformers', or a tie", gap, "<=", TIE))


def parting(ours: Llama, prompt: Tensor, mine: Tensor, other: Tensor) -> float:
    """How far apart, in deviations, the logits of two tokens are where two answers part; 0 where they never do."""
    length = min(mine.shape[1], other.shape[1])
    apart = (mine[0, :length] != other[0, :length]).nonzero()
    if not len(apart):
        return 0.0
    place = int(apart[0])
    logits = ours(torch.cat((prompt, mine[:, :place]), 1), last_only=True)[0, -1].double()
    return float((logits[mine[0, place]] - logits[other[0, place]]).abs() / logits.std())


def kernels_are_right() -> None:
    """Our products against float64 on this GPU, before they are timed."""
    for outs, columns, gated in ((4608, 3584, False), (37888, 3584, True), (3584, 18944, False), (100, 77, False)):
        x, weight = (torch.randn(n, columns, device="cuda", dtype=torch.bfloat16) for n in (1, outs))
        norm = torch.randn(columns, device="cuda", dtype=torch.bfloat16), 1e-6
        got = matvec(x, weight, norm=norm, gated=gated).double()
        wanted = matvec_plain(x.double(), weight.double(), norm=(norm[0].double(), 1e-6), gated=gated)
        error = ((got - wanted).norm() / wanted.norm()).item()
        print(f"  matvec {outs}x{columns}{' gated' if gated else ''}: relative error {error:.1e}")
        if not error < 4e-3:  # bounded: one rounding to bfloat16
            raise RuntimeError("matvec is wrong on this GPU")


def guarded(stage: Callable[..., None], *arguments: object) -> None:
    """A stage whose failure is printed and does not end the others."""
    try:
        stage(*arguments)
    except Exception:
        traceback.print_exc()
    give_back("cuda")


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long measuring may take")
    parser.add_argument("--model", choices=["lab", "random"], default="lab")
    parser.add_argument("--sizes", action="store_true", help="products in other sizes too: each is compiled first")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; benchmarks.decode measures a CPU")
    figures: dict[str, float] = {}
    bars: list[dict] = []
    bandwidth = copy_bandwidth()
    figures["copy bandwidth, read and written, GB/s"] = round(bandwidth / 1e9, 1)
    figures["read bandwidth GB/s"] = round(read_bandwidth("cuda", nbytes=2 * 2**30) / 1e9, 1)
    print(
        f"{device_name('cuda')}; copy {bandwidth / 1e12:.3f} TB/s (read and written), "
        f"read {figures['read bandwidth GB/s'] / 1e3} TB/s"
    )
    guarded(kernels_are_right)
    guarded(large, arguments.seconds, bandwidth, figures, bars, arguments.sizes)
    guarded(small, arguments.model, arguments.seconds, bandwidth, figures, bars)
    for entry in bars:
        print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
    command = f"python -m benchmarks.gpu_decode --seconds {arguments.seconds:g} --model {arguments.model}"
    command += " --sizes" * arguments.sizes
    return finish("gpu_decode", figures, bars, torch.device("cuda"), command)


if __name__ == "__main__":
    raise SystemExit(main())
