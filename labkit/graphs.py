"""Decode without waiting for Python: one step captured as a CUDA graph, and replayed once per token.

A decode step of a small model is hundreds of launches, each of which takes the CPU longer than the GPU. A graph holds
the launches of a whole step. It replays exactly what was captured, so all that differs from step to step lies in
tensors on the device: the newest tokens, where they go in the cache, and which keys they see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import kernels
from labkit.attention import PLAIN as PLAIN_ATTENTION
from labkit.attention import Constants, is_count
from labkit.cache import Cache, PreallocatedCache
from labkit.kernels.decode_attention import decode_between
from labkit.kernels.decode_step import (
    add_norm,
    add_norm_plain,
    gate,
    gate_plain,
    rotate_and_store,
    rotate_and_store_plain,
)
from labkit.kernels.matvec import matvec
from labkit.kernels.split import DTYPES
from labkit.llama import Llama

WARMUP = 3  # steps before the capture: kernels are compiled and libraries set up in them


def attend_between(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, constants: Constants = PLAIN_ATTENTION
) -> Tensor:
    """The twin of `decode_between` in PyTorch: keys `first[b] <= i < end[b]` for row b, and no other number is used."""
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, capacity = k.shape[1], k.shape[2]
    place = torch.arange(capacity, device=q.device)
    seen = ((place >= first[:, None]) & (place < end[:, None]))[:, None, None]
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (grouped.to(wide) @ k.to(wide).transpose(-2, -1)) * constants.scale_for(head_dim)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).masked_fill(~seen, 0.0)
    out = weights @ v.to(wide).masked_fill(~seen.transpose(-2, -1), 0.0)
    return out.to(q.dtype).view(batch, num_heads, 1, head_dim)


@dataclass(frozen=True)
class Parts:
    """What a step is made of besides matrix products: kernels, or their twins in PyTorch."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_and_store: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    gate: Callable[[Tensor], Tensor]


KERNELS = Parts(add_norm, rotate_and_store, decode_between, gate)
PLAIN = Parts(add_norm_plain, rotate_and_store_plain, attend_between, gate_plain)


class DecodeGraph:
    """Greedy decode of a model through a preallocated cache that holds the prompt already.

        cache = model.cache(capacity)
        first = model(prompt, cache, last_only=True)[:, -1].argmax(-1)
        answer = DecodeGraph(model, cache).run(first, 100)

    The step is captured once, for this model, this cache's memory and this many rows; rows may differ in length, and
    have padding at the left. `run` may be called again and again, with passes of the model or `cache.truncate` in
    between. `logits`: of the last step, `[batch, vocab_size]`; the next overwrites them.

    capture: False runs the same step, launch by launch, which any device can. fused: products through
    `kernels.matvec`, norms, gates and residuals within them; by default at batch 1 where Triton runs on a GPU, else
    through PyTorch's with kernels in between.
    Raises ValueError for what cannot be captured, with the reason and what to do.
    """

    def __init__(self, model: Llama, cache: Cache, *, capture: bool = True, fused: bool | None = None) -> None:
        self.batch, self.capacity = check_can_decode(model, cache)
        if capture and model.device.type != "cuda":
            raise ValueError(
                f"a CUDA graph needs a CUDA GPU, and the model is on {model.device}: move the model there, or say "
                f"capture=False, which runs the same step without a graph"
            )
        can = kernels.available(model.device) and model.dtype in DTYPES
        if fused and (self.batch != 1 or not can):
            raise ValueError(
                f"fused products take one row, in float32, float16 or bfloat16, where Triton runs; got batch "
                f"{self.batch} of {model.dtype} on {model.device}: leave fused out"
            )
        self.model, self.cache = model, cache
        self.fused = self.batch == 1 and can and model.device.type == "cuda" if fused is None else fused
        self.parts = KERNELS if can else PLAIN
        self.constants = model.blocks[0].attention.constants
        self.weights = [parameter.data for parameter in model.parameters()]  # held, so that none is freed
        self.buffers = [buffers(layer) for layer in cache.layers]
        with torch.inference_mode(False), torch.no_grad():
            self.tokens = torch.zeros(self.batch, dtype=torch.int64, device=model.device)
            self.place, self.end, self.first, self.skipped = torch.zeros(
                4, self.batch, dtype=torch.int32, device=model.device
            )
            self.step_number = torch.zeros(1, dtype=torch.int64, device=model.device)
            self.answer = torch.zeros(self.capacity, self.batch, dtype=torch.int64, device=model.device)
            angles = model.angles(torch.arange(self.capacity, device=model.device)[None])
            self.cos, self.sin = (x[0, 0].contiguous() for x in angles)
        self.logits: Tensor | None = None
        self.graph = self.captured() if capture else None

    def run(self, tokens: Tensor, count: int) -> Tensor:
        """The `count` likeliest tokens that follow, one after the other: int64 `[batch, count]`, on the device.

        tokens: int `[batch]`, the newest of each row, which no pass has run; those on a GPU are not looked at, which
        would be a wait. K and V of these and of all but the last
        of those that follow are in the cache afterwards, and its lengths say so; where something is raised, the cache
        is what it was. Nothing waits for the device: reading the answer does.
        Raises ValueError for tokens that do not fit, or more than there is room for.
        """
        self.check(tokens, count)
        with torch.inference_mode(), self.cache.step((count,) * self.batch) as step:
            self.begin(tokens, step.before, step.skipped)
            for _ in range(count):
                self.step() if self.graph is None else self.graph.replay()
            written, read = self.traffic(step.before, step.skipped, count)
            for layer in self.cache.layers:
                layer.lengths = step.after
                layer.bytes_written += written
                layer.bytes_read += read
        return self.answer[:count].T.clone()

    def step(self) -> None:
        """One step, from `tokens` to `tokens`; all it reads and writes lies on the device."""
        model, parts = self.model, self.parts
        x = F.embedding(self.tokens, model.embedding.weight)
        x, normed = (x, x) if self.fused else parts.add_norm(x, None, *norm_of(model.blocks[0].attention_norm))
        nexts = [*(block.attention_norm for block in model.blocks[1:]), model.norm]
        for block, held, following in zip(model.blocks, self.buffers, nexts, strict=True):
            if self.fused:
                x = self.fused_block(block, x, *held)
                continue
            out = F.linear(
                self.mix(block, F.linear(normed, *weights_of(block.attention.qkv)), *held), block.attention.out.weight
            )
            x, normed = parts.add_norm(x, out, *norm_of(block.mlp_norm))
            hidden = parts.gate(F.linear(normed, block.mlp.gate_up.weight))
            x, normed = parts.add_norm(x, F.linear(hidden, block.mlp.down.weight), *norm_of(following))
        head: Any = model.embedding.weight if model.head is None else model.head.weight
        if self.fused:
            logits = matvec(x, head, norm=norm_of(model.norm))
        else:
            logits = F.linear(normed, head)
        self.logits = logits  # in a graph's own memory, which stays while this name does
        self.advance(logits)

    def fused_block(self, block: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer in seven launches."""
        qkv = matvec(x, *weights_of(block.attention.qkv), norm=norm_of(block.attention_norm))
        x = matvec(self.mix(block, qkv, k, v), block.attention.out.weight, residual=x)
        hidden = matvec(x, block.mlp.gate_up.weight, norm=norm_of(block.mlp_norm), gated=True)
        return matvec(hidden, block.mlp.down.weight, residual=x)

    def mix(self, block: Any, qkv: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention's answer, `[batch, num_heads * head_dim]`, once the new K and V are in the cache."""
        q = self.parts.rotate_and_store(qkv, self.cos, self.sin, self.place, self.skipped, k, v)
        return self.parts.attend(q, k, v, self.first, self.end, self.constants).view(self.batch, -1)

    def advance(self, logits: Tensor) -> None:
        """Choose the next tokens, note them, and move on by one place."""
        self.tokens.copy_(logits.argmax(dim=-1))
        self.answer.index_copy_(0, self.step_number, self.tokens[None])
        self.step_number.add_(1)
        self.place.add_(1)
        self.end.add_(1)
        self.look_back()

    def look_back(self) -> None:
        """Where a window begins that ends at `end`."""
        if self.constants.window is not None:
            torch.maximum(self.skipped, self.end - self.constants.window, out=self.first)

    def begin(self, tokens: Tensor, before: tuple[int, ...], skipped: tuple[int, ...]) -> None:
        """Say on the device where the rows stand."""
        self.tokens.copy_(tokens)
        rows = torch.tensor([before, skipped], dtype=torch.int32).to(self.place.device)
        self.place.copy_(rows[0])
        self.end.copy_(rows[0] + 1)
        self.skipped.copy_(rows[1])
        self.first.copy_(rows[1])
        self.look_back()
        self.step_number.zero_()

    def captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Steps before the capture write behind the rows' ends, which is room."""
        lengths = self.cache.lengths
        skipped = self.cache.padding or (0,) * self.batch
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(), torch.cuda.device(self.model.device):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARMUP):
                        self.begin(torch.zeros_like(self.tokens), lengths, skipped)
                        self.step()
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph):
                    self.step()
        finally:
            for layer in self.cache.layers:
                layer.restore(layer.mark())  # the room behind the ends holds numbers now
        return graph

    def check(self, tokens: Tensor, count: int) -> None:
        """ValueError unless these tokens can be run, and the memory is what was captured."""
        if not is_count(count) or count < 1:
            raise ValueError(f"count is a number of steps, at least 1; got {count}")
        if tokens.shape != (self.batch,) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens are int [{self.batch}], one per row; got {tokens.dtype} {list(tokens.shape)}")
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.model.spec.vocab_size:
            raise ValueError(f"tokens are ids from 0 to {self.model.spec.vocab_size - 1}")
        held = zip(map(buffers, self.cache.layers), self.buffers, strict=True)
        if any(now is not then for pairs in held for now, then in zip(*pairs, strict=True)):
            raise ValueError(
                "the cache has other memory than at the capture (reset() and select_rows() change it): make "
                "a new DecodeGraph"
            )
        now = [parameter.data_ptr() for parameter in self.model.parameters()]
        if now != [weight.data_ptr() for weight in self.weights]:
            raise ValueError("the model's weights lie elsewhere than at the capture: make a new DecodeGraph")
        longest = self.cache.seq_len
        if longest + count > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens and holds {longest}: {count} more do not fit. Make it "
                f"with a larger capacity"
            )

    def traffic(self, before: tuple[int, ...], skipped: tuple[int, ...], count: int) -> tuple[int, int]:
        """Bytes of K and V that `count` steps write and read in each layer."""
        k, v = self.buffers[0]
        of_one = (k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]) * k.element_size()
        window = self.constants.window
        reads = 0
        for held, skip in zip(before, skipped, strict=True):
            seen = range(held - skip + 1, held - skip + count + 1)
            reads += sum(seen) if window is None else sum(min(keys, window) for keys in seen)
        return of_one * self.batch * count, of_one * reads


def check_can_decode(model: Llama, cache: Cache) -> tuple[int, int]:
    """Rows of the cache and its capacity; ValueError for a model or a cache that a fixed step cannot serve."""
    cache.check_fits(len(model.blocks), model.blocks[0].attention.constants)
    for layer in cache.layers:
        if type(layer) is not PreallocatedCache:
            raise ValueError(
                f"a fixed step needs K and V that stay where they are, and this is a {type(layer).__name__}: take "
                f"model.cache(capacity), or decode with generation.generate"
            )
    products = [module for block in model.blocks for module in (block.attention.qkv, block.mlp.down)]
    if any(not isinstance(module, nn.Linear) for module in (*products, *([model.head] if model.head else []))):
        raise ValueError("the model is prepacked for this CPU: load it with prepack=False")
    lengths = cache.lengths
    if not lengths:
        raise ValueError("the cache is empty: run the prompt through the model first, model(prompt, cache)")
    if not cache.knows_padding:
        raise ValueError("the cache does not know which tokens are padding: set cache.padding, or reset() it")
    capacity = min(layer.capacity or 0 for layer in cache.layers)
    if max(lengths) >= capacity:
        raise ValueError(
            f"the cache has room for {capacity} tokens and holds {max(lengths)}: none more fits. Make it with a larger "
            f"capacity"
        )
    k, _ = buffers(cache.layers[0])
    if k.dtype != model.dtype or k.device != model.device:
        raise ValueError(f"the cache holds {k.dtype} on {k.device}, the model is {model.dtype} on {model.device}")
    return len(lengths), capacity


def buffers(layer: Any) -> tuple[Tensor, Tensor]:
    """K and V of a layer, whole."""
    return layer.k, layer.v


def norm_of(norm: Any) -> tuple[Tensor, float]:
    """Weight and eps of a norm."""
    return norm.weight, norm.eps


def weights_of(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a product."""
    return linear.weight, linear.bias
