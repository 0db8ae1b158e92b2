"""A Llama decoder to read in one sitting. It runs real weights, with any labkit cache or with none.

Four matrix products per layer: Q, K and V in one, the attention output, gate and up in one, down. Decoding one token
reads every weight once, so fewer and larger reads are all the tuning there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.attention import Constants, fused_attention
from labkit.cache import Cache, LayerCache, Step
from labkit.prepacked import PrepackedLinear, can_prepack, product
from labkit.rotation import rotate, signed
from labkit.specs import ModelSpec

IDS = (torch.int64, torch.int32)


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Radians per position for each pair of dimensions, float32 `[head_dim / 2]` (RoFormer, arXiv:2104.09864)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if not scaling:
        return frequencies
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    # "llama3": slow rotations are stretched by `factor`, fast ones kept, those between blended.
    trained = scaling["original_max_position_embeddings"]
    turns = trained * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class Attention(nn.Module):
    """Grouped-query attention through a layer's cache."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self.head_dim, self.constants = spec.head_dim, Constants(window=spec.window)
        self.qkv = nn.Linear(spec.hidden_size, sum(self.heads) * spec.head_dim, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.num_heads * spec.head_dim, spec.hidden_size, bias=False)

    def forward(
        self, x: Tensor, norm: nn.RMSNorm, cos: Tensor, sin: Tensor, cache: LayerCache | None, step: Step
    ) -> Tensor:
        """`x`, `[batch, new_tokens, hidden_size]`, plus what `norm(x)` finds in the cache; `cos`, `sin` of `angles`."""
        qkv = self.project(x, norm)
        num_heads, num_kv_heads, _ = self.heads
        qk = rotate(qkv[:, : num_heads + num_kv_heads], cos, sin)
        q, k, v = qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_heads + num_kv_heads :]
        if cache is None:
            return self.merge(attend_alone(q, k, v, self.constants, step), x)
        cache.append(k, v, step)
        return self.merge(cache.attend(q, step), x)

    def project(self, x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """Q, K and V of `x`, not rotated, `[batch, all heads, new_tokens, head_dim]`: a view of one product."""
        batch, new_tokens, _ = x.shape
        qkv = product(self.qkv, x, norm=norm)
        return qkv.view(batch, new_tokens, sum(self.heads), self.head_dim).transpose(1, 2)

    def merge(self, mixed: Tensor, residual: Tensor | None = None) -> Tensor:
        """What attention gave, `[batch, num_heads, new_tokens, head_dim]`, as `[batch, new_tokens, hidden_size]`."""
        return product(self.out, mixed.transpose(1, 2).flatten(2), residual=residual)


def attend_alone(q: Tensor, k: Tensor, v: Tensor, constants: Constants, step: Step) -> Tensor:
    """Attention of tokens that nothing came before, laid out as `step` says."""
    if step.is_rectangle:
        return fused_attention(q, k, v, constants, step.visible)
    rows = zip(*(step.split(x, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([fused_attention(q, k, v, constants) for q, k, v in rows if q.shape[2]], dim=2)


class MLP(nn.Module):
    """SwiGLU: x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=False)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """`[..., hidden_size]` in and out."""
        return product(self.down, product(self.gate_up, x, norm=norm, gated=True), residual=x)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normed residual stream. The norm is x / rms(x) * weight."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = Attention(spec)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, step: Step) -> Tensor:
        """The residual stream after this layer, `[batch, new_tokens, hidden_size]`."""
        return self.mlp(self.attention(x, self.attention_norm, cos, sin, cache, step), self.mlp_norm)

    def around(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with any attention of the normed stream."""
        return self.mlp(x + attend(self.attention_norm(x)), self.mlp_norm)


class Llama(nn.Module):
    """A decoder of any `ModelSpec`.

    `model(tokens)` runs without a cache; `model(tokens, cache)` appends to one, so a prompt may come in one pass, in
    chunks, or token by token, with the same logits.
    """

    def __init__(self, spec: ModelSpec) -> None:
        spec.check_runs()
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))  # type: ignore
        self.norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head: nn.Module | None = None
        if not spec.tied_head:
            self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.frequencies = rope_frequencies(spec)  # no buffer: `to(bfloat16)` must not round the angles

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor | Sequence[Tensor],
        cache: Cache | None = None,
        *,
        padding: Sequence[int] | Tensor | None = None,
        last_only: bool = False,
    ) -> Any:
        """Logits `[batch, new_tokens, vocab_size]` of `tokens`, int `[batch, new_tokens]`.

        tokens: or a list of rows, int `[any]` each, an empty one for a row that gets none: they run end to end, with no
        padding in between, and the logits are a list of `[tokens of the row, vocab_size]`.
        cache: what came before; the new tokens' K and V are appended to it, or, whatever is raised, none of them.
        padding: int `[batch]`, left padding of each row of a rectangle; with a cache it is said with the first tokens.
        last_only: logits of the last token alone of each row that got any, `[rows, 1, vocab_size]`: all that decoding
        needs.
        Raises ValueError for what does not fit.
        """
        counts, laid, skipped = laid_out(tokens, padding)
        by_row = not last_only and not isinstance(tokens, Tensor)
        if cache is None:
            if any(skip > count for skip, count in zip(skipped, counts, strict=False)):
                raise ValueError(f"padding of {list(skipped)} tokens by row is more than the {counts[0]} there are")
            step = Step(counts, (0,) * len(counts), skipped)
            return self.logits(laid, [None] * len(self.blocks), step, last_only, by_row)
        cache.check_fits(len(self.blocks), self.blocks[0].attention.constants)
        with cache.step(counts, padding=None if padding is None else skipped) as step:
            return self.logits(laid, cache.layers, step, last_only, by_row)

    def logits(
        self, tokens: Tensor, layers: Sequence[LayerCache | None], step: Step, last_only: bool, by_row: bool
    ) -> Any:
        """What `forward` returns, of tokens laid out as `step` says, through these layers."""
        x = self.run(tokens, layers, step)
        if last_only:
            x = x[:, -1:] if step.is_rectangle else x[0, step.last_places()][:, None]
        x = self.predict(x)
        return list(step.split(x.flatten(0, 1), dim=0)) if by_row else x

    def run(self, tokens: Tensor, layers: Sequence[LayerCache | None], step: Step) -> Tensor:
        """The residual stream after all blocks, `[batch, new_tokens, hidden_size]`."""
        cos, sin = self.angles(step.positions(self.device))
        try:
            x = self.embedding(tokens.to(self.device))
        except IndexError:
            raise ValueError(f"tokens are ids from 0 to {self.spec.vocab_size - 1}") from None
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, cos, sin, layer, step)
        return x

    def predict(self, x: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of the residual stream `[..., hidden_size]`."""
        if self.head is None:
            return F.linear(self.norm(x), self.embedding.weight)
        return product(self.head, x, norm=self.norm)

    def cache(self, capacity: int | None = None) -> Cache:
        """An empty cache for this model: with room for `capacity` tokens per row, or a growing one without."""
        if capacity is None:
            return Cache.growing(self.spec.num_layers, window=self.spec.window)
        return Cache.preallocated(self.spec.num_layers, capacity, window=self.spec.window)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin of each position, `[rows, 1, new_tokens, head_dim]`, in the model's dtype.

        position: int `[rows, new_tokens]`.
        """
        self.frequencies = self.frequencies.to(self.device)
        angle = position[:, None, :, None] * self.frequencies
        return signed(angle.cos().to(self.dtype), angle.sin().to(self.dtype))

    def kv_weights(self) -> Iterator[tuple[Tensor, float]]:
        """Each weight that projects K or V, with its share of one layer's K/V projection (for the work ledger)."""
        for block in self.blocks:
            yield block.attention.qkv.weight, 1.0

    @property
    def is_prepacked(self) -> bool:
        """Whether a weight is laid out for the CPU's kernels, by `prepack`."""
        return any(isinstance(module, PrepackedLinear) for module in self.modules())

    def prepack(self) -> Llama:
        """Lay the weights out for this CPU's kernels, where that helps (see `prepacked`); they cannot change after.

        Each is kept in that form alone, but a tied head, which serves as the embedding too, in both.
        """
        for module in [*self.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and can_prepack(child.weight):
                    setattr(module, name, PrepackedLinear(child.weight, child.bias))
        if self.head is None and can_prepack(self.embedding.weight):
            self.head = PrepackedLinear(self.embedding.weight, copied=True)
        return self

    def load(self, weights: Mapping[str, Tensor]) -> Llama:
        """Take weights under Hugging Face's names; ValueError when they do not fit, and then nothing is changed."""
        if self.is_prepacked:
            raise ValueError("the model is prepacked: load the weights first, then prepack()")
        self.check_shapes({name: tuple(value.shape) for name, value in weights.items()})
        for name, parameter in self.named_parameters():
            parts = [weights[source] for source in hf_names(name)]
            with torch.no_grad():
                parameter.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])
        return self

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless weights of these shapes fill this model: none missing, misshapen, or without a place."""
        unused = {name for name in shapes if not name.endswith(("lm_head.weight", "rotary_emb.inv_freq"))}
        for name, parameter in self.named_parameters():
            sources = hf_names(name)
            if missing := [source for source in sources if source not in shapes]:
                raise ValueError(f"the weights have no {', '.join(missing)}")
            parts = [shapes[source] for source in sources]
            # Parts of one parameter lie one below the other: they must agree in all but the first number.
            there = (sum(part[0] for part in parts), *parts[0][1:]) if all(parts) else ()
            if there != tuple(parameter.shape) or any(part[1:] != parts[0][1:] for part in parts):
                raise ValueError(f"{name} is {list(parameter.shape)} here, {list(there)} in the weights")
            unused.difference_update(sources)
        if unused:
            first, *others = sorted(unused)
            more = f" and {len(others)} more" if others else ""
            raise ValueError(f"the decoder has no place for {first}{more}: is the spec another model's?")


def laid_out(
    tokens: Tensor | Sequence[Tensor], padding: Sequence[int] | Tensor | None
) -> tuple[tuple[int, ...], Tensor, tuple[int, ...]]:
    """How many new tokens each row has; all of them as a model runs them, a rectangle or end to end; padding by row."""
    skipped = as_numbers(padding)
    if isinstance(tokens, Tensor):
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in IDS:
            raise ValueError(
                f"tokens are int [batch, new_tokens], at least one token; got {tokens.dtype} {list(tokens.shape)}"
            )
        if padding is not None and (len(skipped) != len(tokens) or min(skipped) < 0):
            raise ValueError(f"padding is int [{len(tokens)}], one number per row, 0 or more; got {list(skipped)}")
        return (tokens.shape[1],) * len(tokens), tokens, skipped
    rows = [torch.as_tensor(row) for row in tokens]
    if not rows or any(row.dim() != 1 or (len(row) and row.dtype not in IDS) for row in rows):
        raise ValueError(f"rows of tokens are int [any] each; got {[f'{row.dtype} {list(row.shape)}' for row in rows]}")
    if padding is not None:
        raise ValueError("rows of their own lengths need no padding: give a rectangle, or rows and no padding")
    counts = tuple(len(row) for row in rows)
    if max(counts) == 0:
        raise ValueError("there are no tokens: every row is empty")
    laid = torch.stack(rows) if len(set(counts)) == 1 else torch.cat([row for row in rows if len(row)])[None]
    return counts, laid, skipped


def as_numbers(padding: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    """Padding by row as plain numbers; empty where there is none. ValueError unless it is a row of them."""
    if isinstance(padding, Tensor) and padding.dim() != 1:
        raise ValueError(f"padding is int [batch], one number per row; got {list(padding.shape)}")
    return () if padding is None else tuple(padding.tolist() if isinstance(padding, Tensor) else padding)


def hf_names(name: str) -> list[str]:
    """Where one of our parameters lies in a Hugging Face checkpoint; fused ones lie in several."""
    fixed = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if name in fixed or name == "head.weight":
        return [fixed.get(name, "lm_head.weight")]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    sources = {
        "attention_norm": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }[module]
    return [f"model.layers.{layer}.{source}.{kind}" for source in sources]
