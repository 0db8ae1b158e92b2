"""Every kernel against the memory's bandwidth, PyTorch's attention, and float64.

    python -m benchmarks.kernels [--seconds 90] [--quick] [--only dense paged packed store append float32 flex] [--tune]

The ceilings are measured in the same run: a large copy (bytes read and written) and a bfloat16 product. A floor is the
bytes that must move, each input and output once, over the copy's bandwidth; a share is floor over time. Times are
medians over replays of a CUDA graph of several calls, over inputs that together do not fit the L2; "eager" is one call
among many as Python launches them. Every kernel's answer is compared once with float64, its output filled with NaN
before. The most valuable cases come first; what the time does not allow is left out and named.

--device cpu --tiny, with TRITON_INTERPRET=1, runs all of it in Triton's interpreter: its times say nothing.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import bar, begin, finish
from labkit.attention import PLAIN, Visibility, fused_attention
from labkit.cache import QuantizedCache
from labkit.kernels.decode_attention import decode_attention, decode_between
from labkit.kernels.packed_decode_attention import packed_decode_attention
from labkit.kernels.paged_decode_attention import paged_decode_attention
from labkit.kernels.paged_packed_decode_attention import paged_packed_decode_attention
from labkit.kernels.paged_store import paged_store
from labkit.kernels.quantize import quantize_tiles
from labkit.measure import device_name, give_back
from labkit.quantization import Packed, Quantizer

STAGES = ("dense", "paged", "packed", "store", "append", "float32", "flex")
KV_HEADS, HEAD_DIM, BLOCK_SIZE, GROUP = 8, 128, 16, 64
LARGE = 1e9  # bytes of K and V from which the bandwidth must be reached
SHARE, SHARE_OF_STORE, NEAR = 0.85, 0.8, 1.2
GAIN = {8: 1.7, 4: 2.8}  # over our own bfloat16 kernel
L2 = 200e6  # bytes that inputs must have together, so that no replay finds them in a cache
MOST = 20e9  # bytes of K and V, at most
ERROR = 1e-2  # bfloat16 operands and results: the norm of the difference over the answer's
CASES = [  # batch, context, query heads per KV head
    (1, 32768, 4), (16, 32768, 4), (64, 4096, 4), (1, 131072, 4), (1, 1024, 4), (64, 1024, 4), (1, 32768, 8),
    (16, 32768, 8), (64, 4096, 8), (1, 4096, 4), (4, 32768, 4), (16, 4096, 4), (4, 131072, 4), (4, 4096, 4),
    (4, 1024, 4), (16, 1024, 4), (1, 131072, 8), (1, 1024, 8), (1, 4096, 8), (4, 4096, 8), (16, 4096, 8), (64, 1024, 8),
    (4, 32768, 8), (64, 32768, 4), (16, 1024, 8), (4, 1024, 8), (4, 131072, 8),
]  # fmt: skip
TINY = [(1, 128, 4), (2, 64, 8)]
Made = tuple[list[tuple[Any, ...]], Callable[..., Tensor]]  # sets of inputs, and what is run on one of them


@dataclass
class Run:
    """What this run has: its device, ceilings and end, and what it has found."""

    device: torch.device
    tiny: bool
    quick: bool
    end: float
    figures: dict[str, float] = field(default_factory=dict)
    bars: list[dict] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    copy: float = 1.0

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def say(self, line: str, keep: bool = True) -> None:
        """Print now, and again in the table at the end."""
        print(line, flush=True)
        if keep:
            self.table.append(line)

    def bound(self, name: str, value: float, comparison: str, limit: float) -> None:
        """A bar."""
        self.bars.append(bar(name, value, comparison, limit))

    def cases(self, of: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        """Cases while there is time; what is left out is named."""
        for index, case in enumerate(of):
            if self.left < 0:
                self.say(f"  left out for want of time: {of[index:]}")
                return
            yield case

    def guard(self, name: str, run: Callable[..., Any], *arguments: Any) -> Any:
        """What `run` gives; None, with the traceback, when it fails: the others go on."""
        try:
            return run(*arguments)
        except Exception:
            self.say(f"  FAILED {name}: {traceback.format_exc(limit=-1).strip().splitlines()[-1][:200]}")
            traceback.print_exc()
            self.bars.append(bar(f"{name} ran", 0, ">=", 1))
            return None
        finally:
            give_back(self.device)


def seconds(run: Run, calls: list[Callable[[], Any]], *, budget: float = 0.15) -> dict[str, float]:
    """Seconds of one call: the median over graph replays, half the distance of the quartiles, and eager."""
    if run.device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        taken = time.perf_counter() - start
        return {"time": taken, "spread": 0.0, "eager": taken}
    for call in (calls[0], *calls):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    eager = (time.perf_counter() - start) / len(calls)
    count = len(calls) * max(1, min(10, round(2e-3 / eager / len(calls))))
    todo = [calls[i % len(calls)] for i in range(count)]

    def every() -> None:
        for call in todo:
            call()

    start = time.perf_counter()
    every()
    torch.cuda.synchronize()
    eager = (time.perf_counter() - start) / count
    replay = every
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        replay = graph.replay
    except Exception as error:
        torch.cuda.synchronize()
        run.say(f"  no graph, timed as launched: {str(error).splitlines()[0][:150]}")
    replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    until = time.monotonic() + budget
    while len(samples) < 5 or (len(samples) < 40 and time.monotonic() < until):
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begins.record()
        replay()
        ends.record()
        ends.synchronize()
        samples.append(begins.elapsed_time(ends) * 1e-3 / count)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"time": middle, "spread": (high - low) / 2, "eager": eager}


def poisoned(call: Callable[[], Any]) -> Any:
    """The answer of a call, all whose new memory was NaN before."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def apart(ours: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm of what is right."""
    return ((ours.double() - right.double()).norm() / right.double().norm()).item()


def exact(q: Tensor, of_row: Callable[[int], tuple[Tensor, Tensor]], rows: list[int]) -> Tensor:
    """Attention of some rows in float64, one KV head at a time; `of_row` gives K and V, `[heads, tokens, head_dim]`."""
    outs = []
    for row in rows:
        k, v = of_row(row)
        grouped = q[row].unflatten(0, (k.shape[0], -1))[:, :, 0].double()
        heads = []
        for head in range(k.shape[0]):
            weights = (grouped[head] @ k[head].double().T * q.shape[3] ** -0.5).softmax(-1)
            heads.append(weights @ v[head].double())
        outs.append(torch.stack(heads).flatten(0, 1))
    return torch.stack(outs)[:, :, None]


def some_rows(batch: int) -> list[int]:
    """Rows that are checked: up to four, the first and last among them."""
    return sorted({0, batch // 3, 2 * batch // 3, batch - 1})


def sets_of(nbytes: float, tiny: bool) -> int:
    """Sets of inputs, so that they do not fit the L2 together."""
    return 1 if tiny else max(1, min(32, -(-int(L2) // int(nbytes))))


def check(run: Run, name: str, call: Callable[[], Tensor], right: Tensor, rows: list[int] | None = None) -> None:
    """Compare one answer; a bar."""
    out = poisoned(call)
    error = apart(out if rows is None else out[rows], right)
    run.figures[f"{name}, error"] = float(f"{error:.3g}")
    run.bound(f"{name}, norm of the error over the answer's", error, "<=", ERROR)


def time_it(run: Run, name: str, calls: list[Callable[[], Any]], nbytes: float) -> float:
    """Time, print and keep; the median in seconds."""
    found = seconds(run, calls)
    share = nbytes / run.copy / found["time"]
    error = run.figures.get(f"{name}, error", float("nan"))
    run.say(
        f"  {name:<52} {found['time'] * 1e6:9.1f} us ±{found['spread'] * 1e6:6.1f} eager {found['eager'] * 1e6:8.1f} "
        f"share {share:5.3f} of {nbytes / 1e6:8.1f} MB, error {error:.1e}"
    )
    run.figures |= {
        f"{name}, us": round(found["time"] * 1e6, 2),
        f"{name}, spread us": round(found["spread"] * 1e6, 2),
        f"{name}, eager us": round(found["eager"] * 1e6, 1),
        f"{name}, share of copy bandwidth": round(share, 4),
    }
    return found["time"]


def ceilings(run: Run) -> None:
    """Copy bandwidth and matrix rate."""
    size = 2**20 if run.tiny else 4 * 2**30
    source, target = torch.randint(0, 255, (size,), dtype=torch.uint8, device=run.device), None
    target = torch.empty_like(source)
    found = seconds(run, [lambda: target.copy_(source)], budget=0.4)
    run.copy = 2 * size / found["time"]
    side = 64 if run.tiny else 8192
    a, b = torch.randn(2, side, side, device=run.device, dtype=torch.bfloat16)
    product = seconds(run, [lambda: a @ b])
    run.figures["copy bandwidth GB/s"] = round(run.copy / 1e9, 1)
    run.figures["bfloat16 matrix rate TFLOP/s"] = round(2 * side**3 / product["time"] / 1e12, 1)
    run.say(f"{device_name(run.device)}: copy {run.copy / 1e9:.0f} GB/s, bf16 product "
            f"{2 * side**3 / product['time'] / 1e12:.0f} TFLOP/s")  # fmt: skip


def shapes(run: Run) -> tuple[int, int]:
    """KV heads and head_dim."""
    return (2, 64) if run.tiny else (KV_HEADS, HEAD_DIM)


def kv_bytes(run: Run, batch: int, context: int) -> int:
    """Bytes of K and V in bfloat16."""
    heads, head_dim = shapes(run)
    return 2 * 2 * batch * context * heads * head_dim


def queries(run: Run, batch: int, per_kv: int) -> Tensor:
    """Queries, with weights that are neither all alike nor all on one key."""
    heads, head_dim = shapes(run)
    return 2 * torch.randn(batch, heads * per_kv, 1, head_dim, device=run.device, dtype=torch.bfloat16)


def random_kv(run: Run, *shape: int) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors of fresh random numbers."""
    k, v = (torch.empty(shape, device=run.device, dtype=torch.bfloat16).normal_() for _ in range(2))
    return k, v


def dense_inputs(run: Run, batch: int, context: int, per_kv: int) -> Made:
    """Sets of q, K and V, and the kernel."""
    heads, head_dim = shapes(run)
    visible = Visibility.newest(1, context)
    count = sets_of(kv_bytes(run, batch, context), run.tiny)
    made = [(queries(run, batch, per_kv), *random_kv(run, batch, heads, context, head_dim)) for _ in range(count)]
    return made, lambda q, k, v, **more: decode_attention(q, k, v, PLAIN, visible, **more)


def on_each(run_one: Callable[..., Any], sets: list[tuple[Any, ...]], **more: Any) -> list[Callable[[], Any]]:
    """A call for each set of inputs."""
    return [lambda one=one: run_one(*one, **more) for one in sets]  # type: ignore[misc]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlashAttention."""
    if q.device.type != "cuda":
        return torch_default(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def torch_default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention as it comes: it chooses among FlashAttention, cuDNN's and others."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def torch_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a KV head's queries as rows of one head, which a single new token allows."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)


def dense_case(run: Run, batch: int, context: int, per_kv: int) -> None:
    """One case of dense decode, against PyTorch's attention."""
    name, nbytes = f"batch {batch}, {context} tokens, GQA {per_kv}", kv_bytes(run, batch, context)
    sets, ours = dense_inputs(run, batch, context, per_kv)
    q, k, v = sets[0]
    moved, rows = nbytes + 2 * 2 * q.numel(), some_rows(batch)
    right = exact(q, lambda row: (k[row], v[row]), rows)
    rivals: dict[str, float] = {}
    for rival, call in (("torch flash", flash), ("torch default", torch_default), ("torch grouped", torch_grouped)):
        if (taken := run.guard(f"{rival} {name}", time_it, run, f"{rival} {name}", on_each(call, sets), moved)) is None:
            continue
        rivals[rival] = taken
        run.figures[f"{rival} {name}, error"] = float(f"{apart(call(q, k, v)[rows], right):.3g}")
    check(run, f"dense {name}", lambda: ours(*sets[0]), right, rows)
    mine = time_it(run, f"dense {name}", on_each(ours, sets), moved)
    if nbytes >= LARGE:
        run.bound(f"dense {name}, share of copy bandwidth", moved / run.copy / mine, ">=", SHARE)
    if rivals:
        limit = NEAR if (batch, context) == (1, 32768) else 1.0
        run.bound(f"dense {name}, time over the fastest of PyTorch's", mine / min(rivals.values()), "<=", limit)


def paged_inputs(run: Run, batch: int, context: int, per_kv: int) -> Made:
    """Sets of q, pools and a shuffled table, and the kernel."""
    heads, head_dim = shapes(run)
    visible, blocks = Visibility.newest(1, context), -(-context // BLOCK_SIZE)
    sets = []
    for _ in range(sets_of(kv_bytes(run, batch, context), run.tiny)):
        table = torch.randperm(batch * blocks, device=run.device).int().view(batch, blocks)
        pools = random_kv(run, batch * blocks, BLOCK_SIZE, heads, head_dim)
        sets.append((queries(run, batch, per_kv), *pools, table))
    return sets, lambda q, k, v, table, **more: paged_decode_attention(q, k, v, table, visible, **more)


def paged_case(run: Run, batch: int, context: int, per_kv: int) -> None:
    """One case of paged decode, against our own dense."""
    name, nbytes = f"batch {batch}, {context} tokens, GQA {per_kv}", kv_bytes(run, batch, context)
    sets, ours = paged_inputs(run, batch, context, per_kv)
    q, k, v, table = sets[0]
    moved, rows = nbytes + 2 * 2 * q.numel() + 4 * table.numel(), some_rows(batch)

    def of_row(row: int) -> tuple[Tensor, Tensor]:
        return tuple(x[table[row].long()].flatten(0, 1)[:context].transpose(0, 1) for x in (k, v))  # type: ignore

    check(run, f"paged {name}", lambda: ours(*sets[0]), exact(q, of_row, rows), rows)
    mine = time_it(run, f"paged {name}", on_each(ours, sets), moved)
    if nbytes >= LARGE:
        run.bound(f"paged {name}, share of copy bandwidth", moved / run.copy / mine, ">=", SHARE)
    dense = run.figures.get(f"dense {name}, us")
    if dense:
        run.figures[f"paged {name}, time over dense"] = round(mine * 1e6 / dense, 3)


def quantizers(nbits: int) -> tuple[Quantizer, Quantizer]:
    """K per channel, V per token, as the caches have them."""
    return Quantizer(nbits, GROUP, "channel"), Quantizer(nbits, GROUP, "token")


def many_tiles(run: Run, quantizer: Quantizer, tiles: int, batch: int) -> Packed:
    """Packed random numbers: up to 64 MB are quantized, and repeated, each time turned by some tiles."""
    heads, head_dim = shapes(run)
    few = max(1, min(tiles, int(64e6) // (batch * heads * head_dim * GROUP * 4)))
    x = torch.randn(batch, heads, few * GROUP, head_dim, device=run.device)
    rows = quantizer.quantize(x).rows
    out = torch.empty(tiles, *rows.shape[1:], dtype=torch.uint8, device=run.device)
    for start in range(0, tiles, few):
        out[start : start + few] = rows[: tiles - start]
    return Packed(quantizer, out)


def packed_inputs(run: Run, nbits: int, batch: int, context: int, per_kv: int) -> Made:
    """Sets of q and packed K and V, and the kernel."""
    visible, tiles = Visibility.newest(1, context), context // GROUP
    sets = [
        (queries(run, batch, per_kv), *(many_tiles(run, quantizer, tiles, batch) for quantizer in quantizers(nbits)))
        for _ in range(sets_of(kv_bytes(run, batch, context) * nbits / 16, run.tiny))
    ]
    return sets, lambda q, k, v, **more: packed_decode_attention(q, k, v, PLAIN, visible, **more)


def paged_packed_inputs(run: Run, nbits: int, batch: int, context: int, per_kv: int) -> Made:
    """As `packed_inputs`, in blocks of a shuffled table, none of which waits."""
    heads, head_dim = shapes(run)
    visible, blocks = Visibility.newest(1, context), context // GROUP
    waiting = random_kv(run, 1, heads, GROUP, head_dim)
    sets = []
    for _ in range(sets_of(kv_bytes(run, batch, context) * nbits / 16, run.tiny)):
        k, v = (many_tiles(run, quantizer, batch * blocks, 1) for quantizer in quantizers(nbits))
        table = torch.randperm(batch * blocks, device=run.device).int().view(batch, blocks)
        sets.append((queries(run, batch, per_kv), k, v, table))
    return sets, lambda q, k, v, table, **more: paged_packed_decode_attention(
        q, k, v, waiting, table, visible, PLAIN, **more
    )


def packed_case(run: Run, nbits: int, paged: bool, batch: int, context: int, per_kv: int) -> None:
    """One case of packed decode, against our own kernel on bfloat16."""
    case = f"batch {batch}, {context} tokens, GQA {per_kv}"
    name, nbytes = f"{'paged ' if paged else ''}int{nbits} {case}", kv_bytes(run, batch, context)
    sets, ours = (paged_packed_inputs if paged else packed_inputs)(run, nbits, batch, context, per_kv)
    q, k, v = sets[0][:3]
    moved, rows = k.nbytes + v.nbytes + 2 * 2 * q.numel(), some_rows(batch)

    def of_row(row: int) -> tuple[Tensor, Tensor]:
        if paged:
            blocks = sets[0][3][row].long()
            parts = [Packed(x.quantizer, x.rows[blocks]) for x in (k, v)]
        else:
            parts = [Packed(x.quantizer, x.rows[:, row : row + 1]) for x in (k, v)]
        return tuple(part.dequantize()[0] for part in parts)  # type: ignore[return-value]

    check(run, name, lambda: ours(*sets[0]), exact(q, of_row, rows), rows)
    mine = time_it(run, name, on_each(ours, sets), moved)
    base = f"{'paged' if paged else 'dense'} {case}, us"
    if base not in run.figures:
        del sets, k, v
        other, run_one = (paged_inputs if paged else dense_inputs)(run, batch, context, per_kv)
        time_it(run, base.removesuffix(", us"), on_each(run_one, other), nbytes + 2 * 2 * q.numel())
    gain = run.figures[base] * 1e-6 / mine
    run.figures[f"{name}, times faster than bfloat16"] = round(gain, 3)
    run.say(f"  {'':<52} {gain:.2f} times as fast as our bfloat16 kernel")
    if nbytes >= LARGE:
        run.bound(f"{name}, times faster than our bfloat16 kernel", gain, ">=", GAIN[nbits])


def store_case(run: Run, tokens: int) -> None:
    """New K and V to shuffled slots, as a model gives them: tokens before heads."""
    heads, head_dim = shapes(run)
    nbytes = 2 * 2 * 2 * tokens * heads * head_dim + 8 * tokens
    sets = []
    for _ in range(sets_of(nbytes, run.tiny)):
        new = [x.transpose(1, 2) for x in random_kv(run, 1, tokens, heads, head_dim)]
        pools = random_kv(run, -(-tokens // BLOCK_SIZE) + 4, BLOCK_SIZE, heads, head_dim)
        slots = torch.randperm(len(pools[0]) * BLOCK_SIZE, device=run.device)[:tokens]
        sets.append((*new, *pools, slots))
    k, v, keys, values, slots = sets[0]
    for pool in (keys, values):
        pool.fill_(float("nan"))
    paged_store(*sets[0])
    right = (
        all(torch.equal(pool.flatten(0, 1)[slots], x[0].transpose(0, 1)) for pool, x in ((keys, k), (values, v)))
        and int(keys[..., 0, 0].isnan().sum()) == keys.shape[0] * BLOCK_SIZE - tokens
    )
    run.bound(f"store of {tokens} tokens is exact", right, ">=", 1)
    taken = time_it(run, f"store of {tokens} tokens", on_each(paged_store, sets), nbytes)
    if tokens >= 8192:
        run.bound(f"store of {tokens} tokens, share of copy bandwidth", nbytes / run.copy / taken, ">=", SHARE_OF_STORE)


def append_case(run: Run, nbits: int, tokens: int) -> None:
    """Quantizing a chunk, K and V, with the kernel and with PyTorch's operations; and the cache's whole append."""
    heads, head_dim = shapes(run)
    name = f"quantize {tokens} tokens to int{nbits}"
    of_keys, of_values = quantizers(nbits)
    read = 2 * 2 * tokens * heads * head_dim
    sets = [random_kv(run, 1, heads, tokens, head_dim) for _ in range(sets_of(read, run.tiny))]
    written = 0
    for quantizer, x in zip((of_keys, of_values), sets[0], strict=True):
        got, right = poisoned(lambda q=quantizer, x=x: quantize_tiles(x, q)), quantizer.quantize(x)
        differ = int((got.rows != right.rows).sum())
        run.bound(f"{name}, axis {quantizer.axis}: bytes unlike the twin's", differ, "<=", 0)
        written += got.nbytes
        one = time_it(
            run, f"{name}, axis {quantizer.axis}", on_each(lambda *kv, q=quantizer: quantize_tiles(
                kv[q.axis == "token"], q), sets), read / 2 + got.nbytes
        )  # fmt: skip
        run.figures[f"{name}, axis {quantizer.axis}, GB/s"] = round((read / 2 + got.nbytes) / one / 1e9, 1)
    del got, right

    def both(k: Tensor, v: Tensor) -> None:
        quantize_tiles(k, of_keys)
        quantize_tiles(v, of_values)

    def plainly(k: Tensor, v: Tensor) -> None:
        of_keys.quantize(k)
        of_values.quantize(v)

    taken = time_it(run, name, on_each(both, sets), read + written)
    time_it(run, f"{name}, PyTorch's operations", on_each(plainly, sets[:1]), read + written)
    if run.device.type == "cuda":  # the cache looks whether a group was lost, and so waits: no graph
        samples = []
        for k, v in (sets * 5)[:8]:
            cache = QuantizedCache(nbits, residual_length=0)
            torch.cuda.synchronize()
            start = time.perf_counter()
            cache.append(k, v)
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        whole = statistics.median(samples[2:])
        run.figures[f"append of {tokens} tokens as int{nbits}, us"] = round(whole * 1e6, 1)
        run.say(f"  append of {tokens} tokens as int{nbits}: {whole * 1e6:.0f} us, share "
                f"{(read + written) / run.copy / whole:.3f}")  # fmt: skip
    share = (read + written) / run.copy / taken
    if read >= 128e6:
        run.bound(f"{name}, share of copy bandwidth", share, ">=", SHARE_OF_STORE)


def float32_case(run: Run, dtype: torch.dtype, tokens: int) -> None:
    """Time and memory of square causal attention with grouped queries, and of what could stand in its place."""
    heads, head_dim = shapes(run)
    per_kv = 4
    q = torch.randn(1, heads * per_kv, tokens, head_dim, device=run.device, dtype=dtype)
    k, v = torch.randn(2, 1, heads, tokens, head_dim, device=run.device, dtype=dtype)

    def expanded() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k.repeat_interleave(per_kv, 1), v.repeat_interleave(per_kv, 1), is_causal=True
        )

    def of_each_kv_head() -> Tensor:  # K and V repeated as a view
        grouped = (x[:, :, None].expand(-1, -1, per_kv, -1, -1).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, *grouped, is_causal=True)

    def one_query_of_each() -> Tensor:  # query 0 of all KV heads, then query 1, ...: K and V as they are
        rows = q.unflatten(1, (heads, per_kv))
        outs = [F.scaled_dot_product_attention(rows[:, :, i], k, v, is_causal=True) for i in range(per_kv)]
        return torch.stack(outs, 2).flatten(1, 2)

    def as_batch() -> Tensor:  # KV heads as rows of a batch, K and V broadcast by a stride of 0
        rows = q.unflatten(1, (heads, per_kv))[0]
        grouped = (x[0, :, None].expand(-1, per_kv, -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(rows, *grouped, is_causal=True).flatten(0, 1)[None]

    forms: dict[str, Callable[[], Tensor]] = {
        "fused_attention": lambda: fused_attention(q, k, v),  # labkit's: in float32 on a GPU the last of these
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "expanded": expanded,
        "expanded as a view": of_each_kv_head,
        "one query head of each group at a time": one_query_of_each,
        "KV heads as a batch, stride 0": as_batch,
    }
    right: Tensor | None = None
    kind = str(dtype).removeprefix("torch.")
    for form, call in forms.items():
        try:
            out = call()
            right = expanded() if right is None else right
            error = apart(out, right)
            del out
            if run.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = call()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before - out.nbytes
                del out
            else:
                peak = 0
            taken = seconds(run, [call], budget=0.05)["time"]
        except Exception as error_:
            run.say(f"  FAILED {kind} {tokens} {form}: {type(error_).__name__} {str(error_).splitlines()[0][:150]}")
            continue
        run.figures[f"{kind}, {tokens} tokens, {form}, ms"] = round(taken * 1e3, 3)
        run.figures[f"{kind}, {tokens} tokens, {form}, MB beside the output"] = round(peak / 1e6, 1)
        run.say(
            f"  {kind}, {tokens} tokens, {form:<40} {taken * 1e3:9.3f} ms, {peak / 1e6:9.1f} MB beside the output, "
            f"{error:.1e} from expanded; K+V {(k.nbytes + v.nbytes) / 1e6:.1f} MB, scores "
            f"{q.shape[1] * tokens**2 * q.itemsize / 1e6:.0f} MB"
        )


def flex_case(run: Run, batch: int, context: int, per_kv: int, page: int = 128) -> None:
    """PyTorch's flex attention over pages of 128 tokens, its own default, of a shuffled table."""
    if run.device.type != "cuda":
        run.say("  flex attention is compiled for a GPU alone")
        return
    from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

    heads, head_dim = shapes(run)
    name, pages = f"batch {batch}, {context} tokens, GQA {per_kv}", context // page
    order = torch.randperm(batch * pages, device=run.device).int().view(batch, 1, 1, pages)
    k, v = random_kv(run, 1, heads, batch * context, head_dim)
    indices = torch.zeros(batch, 1, 1, batch * pages, dtype=torch.int32, device=run.device)
    indices[..., :pages] = order
    full = torch.full((batch, 1, 1), pages, dtype=torch.int32, device=run.device)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(full), torch.zeros_like(indices), full, indices, BLOCK_SIZE=(page, page), mask_mod=noop_mask,
        seq_lengths=(1, batch * context), compute_q_blocks=False,
    )  # fmt: skip
    q, compiled = queries(run, batch, per_kv), torch.compile(flex_attention)

    def call() -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    start = time.perf_counter()
    out = call()
    torch.cuda.synchronize()
    print(f"  compiled in {time.perf_counter() - start:.1f} s", flush=True)

    def of_row(row: int) -> tuple[Tensor, Tensor]:
        at = order[row].flatten().long()
        return tuple(x[0].unflatten(1, (-1, page))[:, at].flatten(1, 2) for x in (k, v))  # type: ignore[return-value]

    rows = some_rows(batch)
    run.figures[f"flex {name}, error"] = float(f"{apart(out[rows], exact(q, of_row, rows)):.3g}")
    taken = time_it(run, f"flex {name}", [call], kv_bytes(run, batch, context) + 2 * 2 * q.numel())
    if ours := run.figures.get(f"paged {name}, us"):
        run.bound(f"paged {name}, time over flex attention's", ours * 1e-6 / taken, "<=", 1.0)


def tune(run: Run, only: list[str], cases: list[tuple[int, int, int]]) -> None:
    """For each case, the time of every choice that the kernels' keywords allow."""
    kinds: dict[str, tuple[Callable[..., Tensor], Callable[[tuple[int, int, int]], Made]]] = {
        "dense": (decode_between, lambda case: dense_inputs(run, *case)),
        "paged": (paged_decode_attention, lambda case: paged_inputs(run, *case)),
        "int4": (packed_decode_attention, lambda case: packed_inputs(run, 4, *case)),
        "int8": (packed_decode_attention, lambda case: packed_inputs(run, 8, *case)),
        "paged int4": (paged_packed_decode_attention, lambda case: paged_packed_inputs(run, 4, *case)),
    }
    wanted = [kind for kind in kinds if kind in only or ("packed" in only and "int" in kind)]
    for case, kind in itertools.product(cases, wanted):
        if run.left < 0:
            run.say(f"  left out for want of time: {kind} {case} and what follows")
            return
        run.guard(f"tuning {kind} {case}", tune_one, run, kind, case, *kinds[kind])


def tune_one(
    run: Run, kind: str, case: tuple[int, int, int], kernel: Callable[..., Tensor], inputs: Callable[..., Made]
) -> None:
    """One kernel's choices for one case, best first."""
    takes = inspect.signature(kernel).parameters
    tile = next((name for name in ("block_size", "tile_size") if name in takes), None)
    batch, context = case[:2]
    sets, call = inputs(case)
    programs = batch * shapes(run)[0]
    whole = 132 if not run.tiny else 4
    splits = sorted({max(1, min(context // 64, round(whole * waves / programs))) for waves in (1, 2, 4, 8)})
    choices: dict[str, list[Any]] = {} if tile is None else {tile: [16] if run.tiny else [32, 64, 128]}
    choices |= {name: values for name, values in (("num_warps", [2, 4, 8]), ("num_stages", [2, 3, 4])) if name in takes}
    choices["num_splits"] = [None, *splits]
    if "int" in kind and "num_stages" in choices:
        choices["num_stages"] = [1, 2, 3]
    if run.quick or run.tiny:
        choices |= {name: values[1:2] or values for name, values in choices.items() if name.startswith("num_")}
    nbytes = sum(x.nbytes for x in sets[0])
    first: Tensor | None = None
    found = []
    for chosen in itertools.product(*choices.values()):
        if run.left < 0:
            run.say(f"  {kind} {case}: the time was up after {len(found)} choices")
            break
        options = dict(zip(choices, chosen, strict=True))
        try:
            out = call(*sets[0], **options)
            first = out if first is None else first
            error = apart(out, first)
            taken = seconds(run, on_each(call, sets, **options), budget=0.02)["time"]
        except Exception as error_:  # more shared memory than there is, for one
            print(
                f"    {kind} {case} {options}: {type(error_).__name__} {str(error_).splitlines()[0][:100]}", flush=True
            )
            continue
        found.append((taken, error, options))
    if not found:
        raise RuntimeError(f"no choice for {kind} {case} ran")
    for place, (taken, error, options) in enumerate(sorted(found, key=lambda one: one[0])[:40]):
        told = " ".join(f"{name}={value}" for name, value in options.items())
        line = (
            f"  {kind} {case} {taken * 1e6:8.1f} us, share {nbytes / run.copy / taken:.3f}, {told}, apart {error:.0e}"
        )
        run.say(line, keep=place < 4)
        if place == 0:
            run.figures[f"best {kind} {case}: {told}, us"] = round(taken * 1e6, 2)


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--quick", action="store_true", help="the first cases of each kind alone")
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tune", action="store_true", help="instead: every choice of the decode kernels' keywords")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for Triton's interpreter")
    arguments = parser.parse_args()
    begin()
    torch.manual_seed(int(time.time()))
    device = torch.device(arguments.device)
    run = Run(device, arguments.tiny, arguments.quick, time.monotonic() + arguments.seconds)
    with torch.inference_mode():
        run.guard("ceilings", ceilings, run)
        cases = TINY if run.tiny else [case for case in CASES if kv_bytes(run, *case[:2]) <= MOST]
        few = cases[: 6 if run.quick else None]
        large = cases if run.tiny else [case for case in cases if kv_bytes(run, *case[:2]) >= LARGE]
        packed = [*large[:2], *(cases[:1] if not run.tiny else []), *large[2:]][: 3 if run.quick else None]
        chunks = (40, 256) if run.tiny else (65536, 256, 8192)
        if arguments.tune:
            tune(run, arguments.only, cases[: 4 if run.quick else 8])
        # A stage may use a share of what is left: later stages are not to starve.
        whole, shares = run.end, {"dense": 0.35, "paged": 0.35, "packed": 0.5}
        for stage in [] if arguments.tune else [stage for stage in STAGES if stage in arguments.only]:
            run.say(f"{stage} ({whole - time.monotonic():.0f} s left)")
            later = any(STAGES.index(other) > STAGES.index(stage) for other in arguments.only)
            share = shares.get(stage, 1.0) if later else 1.0
            run.end = time.monotonic() + (whole - time.monotonic()) * share
            if stage == "dense":
                for case in run.cases(few):
                    run.guard(f"dense {case}", dense_case, run, *case)
            elif stage == "paged":
                for case in run.cases(few):
                    run.guard(f"paged {case}", paged_case, run, *case)
            elif stage == "packed":
                for case in run.cases(packed):
                    for nbits, paged in ((4, False), (8, False), (4, True), (8, True)):
                        run.guard(f"packed {case}", packed_case, run, nbits, paged, *case)
            elif stage == "store":
                for tokens in chunks:
                    run.guard(f"store {tokens}", store_case, run, tokens)
            elif stage == "append":
                for tokens, nbits in itertools.product([128] if run.tiny else [65536, 8192], (8, 4)):
                    run.guard(f"append {tokens}", append_case, run, nbits, tokens)
            elif stage == "float32":
                for tokens, dtype in itertools.product(
                    (64,) if run.tiny else (2048, 8192), (torch.float32, torch.bfloat16)
                ):
                    run.guard(f"float32 {tokens}", float32_case, run, dtype, tokens)
            elif stage == "flex":
                for case in run.cases(cases[1:2] if run.quick else cases[:3]):
                    run.guard(f"flex {case}", flex_case, run, *case)
    print("\n--- in short", *run.table, sep="\n")
    for entry in run.bars:
        if not entry["holds"]:
            print(f"  MISSED {entry['name']}: {entry['value']} ({entry['bar']})")
    print(f"  {sum(entry['holds'] for entry in run.bars)} of {len(run.bars)} bars hold")
    command = f"python -m benchmarks.kernels --seconds {arguments.seconds:g}" + (" --tune" if arguments.tune else "")
    return finish("kernels", run.figures, run.bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
