"""A cache that forgets, and packs what it keeps: fewer tokens, and fewer bits for each.

A packed token cannot be taken out of its group. So where nothing is packed yet, as at the end of a long prompt, the cut
chooses tokens one by one, as `EvictingCache` does, and those that are left are packed, `group_size` neighbours among
them to a group; from then on whole groups go, each KV head's own. A group is as good as its tokens are on average
(settled here: by the mean, so that one token does not hold 31 others). Tokens wait in full precision until a group is
complete; groups are packed at the end of a step, before one is chosen to go.

**Bytes.** Those of the format for the tokens held, and of each token and KV head 4 for its position, 4 more where a
policy notes a number for each token in later steps too. Nothing else: victims are whole groups, and not chosen ahead.

With `during="always"` a full cache gives up a group when the next token would be one too many: it holds `budget` tokens
at most, and `budget` - `group_size` + 1 at least. How many depends on `seq_len` alone, whatever pieces tokens came in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from labkit.cache.evicting.budgets import Budget, tokens_of
from labkit.cache.evicting.choosing import highest
from labkit.cache.evicting.kept import Kept
from labkit.cache.evicting.layer import EvictingCache, Plan
from labkit.cache.evicting.policy import Notes, Policy
from labkit.cache.layer import Observer, size_of
from labkit.cache.quantized import check_device_has, check_format, decode_kernel
from labkit.cache.step import Step
from labkit.kernels.packed_attention import packed_attention, wants_gradient
from labkit.kernels.quantize import quantized
from labkit.quantization import Packed, Quantizer
from labkit.sizing import Evicting, Quantized


@dataclass(frozen=True, eq=False)
class KeptPacked:
    """What is held, as one value that never changes, in the order of positions.

    packed: keys and values of the older tokens, None before there are any. k, v: those that wait, `[batch,
    num_kv_heads, waiting, head_dim]`. positions: int32 `[batch, num_kv_heads, tokens]`, of all. notes: of all.
    """

    packed: tuple[Packed, Packed] | None
    k: Tensor
    v: Tensor
    positions: Tensor
    notes: Notes = field(default_factory=Notes)
    victims_left: int = field(default=0, init=False)  # none is chosen ahead
    hides: bool = field(default=False, init=False)

    @property
    def tokens(self) -> int:
        """Tokens held in each row, by each KV head."""
        return self.positions.shape[2]

    @property
    def packed_tokens(self) -> int:
        """Those of them that are packed."""
        return 0 if self.packed is None else self.packed[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        tensors = [self.k, self.v, self.positions, self.notes.tokens, *self.notes.rows]
        return sum(size_of(x) for x in tensors if x is not None) + sum(x.nbytes for x in self.packed or ())

    @property
    def numbers(self) -> int:
        """Bytes of K and V, packed and waiting."""
        return size_of(self.k) + size_of(self.v) + sum(x.nbytes for x in self.packed or ())

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V of all that is held, the packed ones as they come back."""
        if self.packed is None:
            return self.k, self.v
        k, v = (x.dequantize(self.k.dtype) for x in self.packed)
        return torch.cat((k, self.k), dim=2), torch.cat((v, self.v), dim=2)

    def noted(self, notes: Notes) -> KeptPacked:
        """The same with other notes."""
        return KeptPacked(self.packed, self.k, self.v, self.positions, notes)

    def extended(self, k: Tensor, v: Tensor, positions: Tensor) -> KeptPacked:
        """With new tokens behind those held."""
        longer = Kept(self.k, self.v, self.positions, self.notes).extended(k, v, positions)
        return KeptPacked(self.packed, longer.k, longer.v, longer.positions, longer.notes)

    def chosen(self, index: Tensor) -> KeptPacked:
        """Only the tokens at `index`, int64 `[batch, num_kv_heads, any]`, where none is packed yet."""
        left = Kept(self.k, self.v, self.positions, self.notes).chosen(index)
        return KeptPacked(None, left.k, left.v, left.positions, left.notes)

    def without(self, tiles: Tensor) -> KeptPacked:
        """Without the packed groups at `tiles`, int64 `[batch, num_kv_heads, any]`."""
        assert self.packed is not None
        (count, batch, heads, *_), size = self.packed[0].rows.shape, self.packed[0].quantizer.group_size
        stays = torch.ones(batch, heads, count, dtype=torch.bool, device=tiles.device).scatter(2, tiles, False)
        left = stays.nonzero()[:, 2].view(batch, heads, -1)
        tokens = (left[..., None] * size + torch.arange(size, device=tiles.device)).flatten(2)
        behind = torch.arange(self.packed_tokens, self.tokens, device=tiles.device).expand(batch, heads, -1)
        tokens = torch.cat((tokens, behind), dim=2)
        rows = left.permute(2, 0, 1)[..., None, None]
        k, v = (Packed(x.quantizer, x.rows.gather(0, rows.expand(-1, -1, -1, *x.rows.shape[3:]))) for x in self.packed)
        noted = self.notes.tokens
        notes = Notes(None if noted is None else noted.gather(2, tokens), self.notes.rows)
        packed = (k, v) if left.shape[2] else None
        return KeptPacked(packed, self.k, self.v, self.positions.gather(2, tokens), notes)

    def with_packed(self, count: int, quantizers: tuple[Quantizer, Quantizer]) -> KeptPacked:
        """The oldest `count` of those that wait packed, behind what is packed."""
        held = self.packed or (None, None)
        waits, packs = [], []
        for x, before, quantizer in zip((self.k, self.v), held, quantizers, strict=True):
            packs.append(joined(x[:, :, :count], before, quantizer))
            waits.append(x[:, :, count:].clone(memory_format=torch.contiguous_format))
        if len({pack.quantizer.metadata for pack in packs}) > 1:  # kernels take K and V of one format
            packs = [widened(pack) for pack in packs]
        return KeptPacked((packs[0], packs[1]), waits[0], waits[1], self.positions, self.notes)

    def of_rows(self, rows: Tensor) -> KeptPacked:
        """The chosen rows of the batch."""
        left = Kept(self.k, self.v, self.positions, self.notes).of_rows(rows)
        packed = None if self.packed is None else (self.packed[0].of_rows(rows), self.packed[1].of_rows(rows))
        return KeptPacked(packed, left.k, left.v, left.positions, left.notes)

    def first(self, tokens: int) -> KeptPacked:
        """The first `tokens`, without notes. What is left of a group that is cut waits again, no more exact."""
        positions, packed, k, v = self.positions[:, :, :tokens].clone(), self.packed, self.k, self.v
        if packed is not None and tokens < self.packed_tokens:
            whole, rest = divmod(tokens, packed[0].quantizer.group_size)
            k, v = (x.tiles(whole, whole + 1).dequantize(self.k.dtype)[:, :, :rest].clone() for x in packed)
            kept = [Packed(x.quantizer, x.rows[:whole].clone()) for x in packed]
            return KeptPacked((kept[0], kept[1]) if whole else None, k, v, positions)
        waiting = tokens - self.packed_tokens
        return KeptPacked(packed, k[:, :, :waiting].clone(), v[:, :, :waiting].clone(), positions)


def joined(x: Tensor, before: Packed | None, quantizer: Quantizer) -> Packed:
    """`x` packed, behind what is packed. Where float16 cannot hold a group's range, its metadata becomes bfloat16."""
    quantizer = quantizer if before is None else before.quantizer
    new = quantized(x, quantizer)
    if new.overflows(x):
        before = None if before is None else widened(before)
        new = quantized(x, replace(quantizer, metadata=torch.bfloat16))
    return new.tiles(0, len(new.rows)) if before is None else before.joined(new)


def widened(packed: Packed) -> Packed:
    """The same numbers with metadata in bfloat16."""
    wide = replace(packed.quantizer, metadata=torch.bfloat16)
    return packed if packed.quantizer == wide else quantized(packed.dequantize(), wide)


class EvictingQuantizedCache(EvictingCache):
    """`EvictingCache` whose tokens are packed as `QuantizedCache`'s are. See the module for when and how.

    nbits, group_size, residual_length, key_axis, symmetric, metadata: as of `QuantizedCache`; sinks are the policy's,
    and are packed with the others. The other options are those of `EvictingCache`, without `every`.
    A policy that looks on at every step (`Policy.lasting`) makes K and V dense for it: take it with `during="prompt"`.
    """

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        nbits: int | torch.dtype = 4,
        *,
        group_size: int = 32,
        residual_length: int = 32,
        key_axis: str = "channel",
        symmetric: bool = False,
        metadata: torch.dtype = torch.float16,
        **options: Any,
    ) -> None:
        check_format(nbits, metadata)
        float8 = isinstance(nbits, torch.dtype)
        self.packing = Quantized(
            nbits=8 if isinstance(nbits, torch.dtype) else nbits, group_size=group_size,
            residual_length=residual_length, metadata=str(metadata), symmetric=symmetric or float8, key_axis=key_axis,
            drops=False,
        )  # fmt: skip
        self.quantizers = tuple(Quantizer(nbits, group_size, axis, symmetric, metadata) for axis in (key_axis, "token"))
        if options.pop("every", 1) != 1:
            raise ValueError("every is a number of single victims; here whole groups go: leave it out")
        if options.pop("safeguard", None) is not None:
            raise ValueError("groups hold as many tokens of every KV head: leave safeguard out")
        super().__init__(policy, budget, **options)

    @property
    def format(self) -> Evicting:
        """What `labkit.sizing` calls this, as of `EvictingCache`."""
        return replace(super().format, victims=0, packing=replace(self.packing, dtype=self.kept_dtype))

    def victims_of(self, room: int) -> int:
        """None is chosen ahead."""
        return 0

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As of `EvictingCache`; ValueError, too, for heads that groups do not divide, or too few groups."""
        super().validate(k, v, step)
        if self.kept is not None:
            return
        if self.frequencies is not None and any(step.padding):
            raise ValueError(
                "groups may mix padding and tokens, so that heads hold different numbers of tokens: leave frequencies "
                "out, or padding"
            )
        self.packing.check_head_dim(k.shape[3], v.shape[3])
        check_device_has(self.quantizers[0].nbits, k.device)
        room, size = tokens_of(self.budget, step), self.packing.group_size
        first = -(-self.policy.sinks // size) * size
        least = first + max(self.packing.residual_length, self.policy.recent_of(room)) + 3 * size
        if self.during == "always" and room < least:
            raise ValueError(
                f"a budget of {room} tokens leaves no group of {size} to evict beside the sinks and the newest: take a "
                f"budget of at least {least}, or smaller groups"
            )

    def has_padding(self, step: Step) -> bool:
        """Whether some slot may hold padding: a group of padding and tokens goes or stays as one."""
        return any(step.padding)

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Let the new tokens wait."""
        if self.room is None:
            self.room = tokens_of(self.budget, step)
        with torch.inference_mode(False):
            positions = step.key_positions(k.shape[1], k.device)
            if self.kept is None:
                k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
                self.kept = KeptPacked(None, k, v, positions.clone())  # type: ignore[assignment]
            else:
                self.bytes_copied += size_of(self.kept.k) + size_of(self.kept.v)
                self.kept = self.kept.extended(k, v, positions)

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """As of `EvictingCache`; K and V are read as they are packed where nobody wants to see more of them."""
        kept = self.kept
        dense = observe is not None or self.frequencies is not None or self.looks_on()
        if not isinstance(kept, KeptPacked) or kept.packed is None or dense:
            return super().attend(q, step, observe=observe)
        self.check_queries(q)
        self.attended = self.constants
        visible, (k, v) = self.visible(step or self.newest(q)), kept.packed
        answer: Callable[..., Tensor] | None = None
        if visible.key_position is None and not wants_gradient(kept.k, kept.v):
            answer = decode_kernel(q, k, v, self.constants)
        self.bytes_read += k.nbytes + v.nbytes + size_of(kept.k) + size_of(kept.v)
        return (answer or packed_attention)(q, k, v, self.constants, visible, after=(kept.k, kept.v))

    def decides(self) -> bool:
        """Whether there is more than the budget."""
        kept, once = self.kept, self.during == "prompt"
        return (
            kept is not None and self.room is not None and kept.tokens > self.room and not (once and self.first_ended)
        )

    def plan(self, step: Step, victims: Tensor | None = None) -> Plan | None:
        """What is left when the step has ended, with the groups packed that are complete."""
        plan = super().plan(step)
        if plan is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            kept = self.with_packed(plan.kept)
        if kept is not plan.kept and not plan.moved:  # packing joins what was packed to what is new, and moves the rest
            plan = replace(plan, moved=kept.numbers)
        return replace(plan, kept=kept)  # type: ignore[arg-type]

    def with_packed(self, kept: Any) -> KeptPacked:
        """`kept` with the complete groups packed."""
        count = self.packing.quantized_tokens(kept.tokens) - kept.packed_tokens
        return kept.with_packed(count, self.quantizers) if count > 0 else kept

    def chosen(self, kept: Any, step: Step, newest: int | Tensor) -> Any:
        """What is held cut to the budget: tokens before any is packed, later whole groups."""
        assert self.room is not None
        size, recent, has_padding = self.packing.group_size, self.policy.recent_of(self.room), self.has_padding(step)
        with torch.no_grad():
            if kept.packed is not None:
                kept = self.with_packed(kept)
            ranks = self.ranked(self.scores(kept, newest), kept, newest, recent, has_padding)
            if kept.packed is None:
                room = self.room if self.during == "prompt" else self.format.keeps(kept.tokens)
                return kept.chosen(highest(ranks, room))
            count = -(-(kept.tokens - self.room) // size)
            of_groups = group_ranks(ranks[:, :, : kept.packed_tokens].unflatten(2, (-1, size)))
            return kept.without(of_groups.topk(count, dim=-1, largest=False).indices)

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows, notes with them."""
        assert self.kept is not None
        with torch.inference_mode(False):
            self.kept = self.kept.of_rows(rows.to(self.kept.k.device))  # type: ignore[arg-type]
        self.bytes_copied += self.kept.nbytes


def group_ranks(ranks: Tensor) -> Tensor:
    """Of groups, `[..., groups]`, from their tokens' ranks, `[..., groups, group_size]`: see the module.

    A group that holds a token that is always kept is always kept; tokens that nobody sees count for nothing.
    """
    useful = ranks.isfinite() & (ranks > torch.finfo(torch.float32).min)
    mean = ranks.masked_fill(~useful, 0.0).double().sum(dim=-1) / useful.sum(dim=-1)
    mean = mean.masked_fill(~useful.any(dim=-1), -torch.inf)
    return mean.masked_fill((ranks == torch.inf).any(dim=-1), torch.inf)
