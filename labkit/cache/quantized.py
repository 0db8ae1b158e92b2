"""K and V in few bits, packed: `nbytes` is what is allocated, and attention reads K and V as they are packed.

Values are quantized in groups along the channels of a token; keys, by default, in groups along the tokens of a channel,
since some channels of keys are large in every token (KIVI, arXiv:2402.02750). Groups lie where their tokens stand, so
the stored bits are the same in whatever pieces the tokens came, and no append quantizes a token twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labkit import kernels
from labkit.attention import Constants, Visibility
from labkit.cache.layer import LayerCache, Observer, size_of
from labkit.cache.step import Step
from labkit.kernels.packed_attention import packed_attention, wants_gradient
from labkit.kernels.packed_decode_attention import packed_decode_attention
from labkit.kernels.quantize import quantized
from labkit.quantization import FLOAT8, Packed, Quantizer, hadamard
from labkit.sizing import Quantized

Pair = tuple[Tensor, Tensor]


class QuantizedCache(LayerCache):
    """Packed K and V, and in full precision the first `sink_length` tokens and the newest.

    nbits: 8, 4 or 2, or torch.float8_e4m3fn or torch.float8_e5m2. group_size: numbers that share a scale, and tokens
    that are packed at once; it divides head_dim. residual_length: newest tokens in full precision, at least; up to
    `group_size` - 1 more wait until their group is complete. key_axis: "channel" or "token".
    symmetric: scales without zero points (float8 is). metadata: dtype of both, torch.float16 or torch.bfloat16. When
    float16 cannot hold a group's range it becomes bfloat16, and what was packed before is packed anew.
    rotate_keys: turn packed keys by a Hadamard matrix, which spreads a large channel over all.
    sink_length: first tokens that stay in full precision; of a row with left padding they would be padding, so such a
    batch takes 0.

    `format` is what `labkit.sizing` calls this. `k` and `v` hold the packed tokens, None before there are any.
    A chunk's own queries see its tokens as later queries will: packed, but for the newest.
    Raises ValueError (SizeError where sizing refuses it too) for what cannot be.
    """

    def __init__(
        self,
        nbits: int | torch.dtype = 4,
        *,
        group_size: int = 64,
        residual_length: int = 64,
        key_axis: str = "channel",
        symmetric: bool = False,
        metadata: torch.dtype = torch.float16,
        rotate_keys: bool = False,
        sink_length: int = 0,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        check_format(nbits, metadata)
        self.format = Quantized(
            nbits=8 if isinstance(nbits, torch.dtype) else nbits,
            group_size=group_size,
            residual_length=residual_length,
            metadata=str(metadata),
            symmetric=symmetric or isinstance(nbits, torch.dtype),
            key_axis=key_axis,
            sink_length=sink_length,
            drops=False,
        )
        self.quantize_keys = Quantizer(nbits, group_size, key_axis, symmetric, metadata)
        self.quantize_values = Quantizer(nbits, group_size, "token", symmetric, metadata)
        self.rotate_keys = rotate_keys
        self.as_made = self.format, self.quantize_keys, self.quantize_values
        self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self.format, self.quantize_keys, self.quantize_values = self.as_made
        self.narrow: tuple[Quantized, Quantizer, Quantizer, Packed | None, Packed | None] | None = None
        self.rotation: Tensor | None = None
        self.sinks: Pair | None = None
        self.k: Packed | None = None
        self.v: Packed | None = None
        self.recent: Pair | None = None  # there, if perhaps of no tokens, as soon as anything is held

    def mark(self) -> Any:
        """The dense parts, which are never written in place, and how many tiles there are: these are never changed.

        But once, when their metadata becomes wider: what was there before is kept until the next mark.
        """
        self.narrow = None
        return self.lengths, self.rotation, self.sinks, self.recent, self.packed_len // self.format.group_size

    def restore(self, mark: Any) -> None:
        """The dense parts and tiles that were, to the bit."""
        self.lengths, self.rotation, self.sinks, self.recent, tiles = mark
        if self.narrow is not None:
            self.format, self.quantize_keys, self.quantize_values, self.k, self.v = self.narrow
            self.narrow = None
        self.k, self.v = (
            None if x is None or not tiles else x.tiles(0, tiles)  # a view: going back must not need memory
            for x in (self.k, self.v)
        )

    @property
    def packed_len(self) -> int:
        """Tokens held in few bits."""
        return 0 if self.k is None else self.k.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, and of the tokens in full precision."""
        dense = (*(self.sinks or ()), *(self.recent or ()))
        packed = (self.k, self.v, *(self.narrow[3:] if self.narrow else ()))
        return sum(map(size_of, dense)) + sum(part.nbytes for part in packed if part is not None)

    def template(self) -> Tensor | None:
        """The newest keys."""
        return None if self.recent is None else self.recent[0]

    def held(self) -> tuple[Tensor, Tensor] | None:
        """K and V dense, as they come back from the codes: for what cannot read them packed."""
        if self.recent is None:
            return None
        parts = [self.sinks, self.dequantized(self.k, self.v), self.recent]
        k, v = (torch.cat(side, dim=2) for side in zip(*(pair for pair in parts if pair is not None), strict=True))
        return k, v

    def dequantized(self, k: Packed | None, v: Packed | None) -> Pair | None:
        """Packed tokens as numbers, the keys turned back."""
        if k is None or v is None or self.recent is None:
            return None
        dtype = self.recent[0].dtype
        if self.rotation is None:
            return k.dequantize(dtype), v.dequantize(dtype)
        turned = k.dequantize(torch.promote_types(dtype, torch.float32))
        return (turned @ self.rotation.to(turned.dtype).mT).to(dtype), v.dequantize(dtype)

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As for every cache; ValueError, too, for heads that groups do not divide or a dtype that the device lacks."""
        super().validate(k, v, step)
        self.check_sinks(step)
        if self.recent is not None:
            return
        self.format.check_head_dim(k.shape[3], v.shape[3])
        check_device_has(self.quantize_keys.nbits, k.device)

    def check_sinks(self, step: Step) -> None:
        """ValueError when the first tokens of a row are padding and should be kept as sinks."""
        if self.format.sink_length and any(step.padding):
            raise ValueError(
                "the first tokens of a padded row are no sinks but padding: take sink_length=0 for this batch"
            )

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Keep the new tokens in full precision; pack the oldest of these if their group is complete."""
        missing = self.format.sink_length - tokens_of(self.sinks)
        sinks = self.sinks
        if missing > 0:
            sinks = self.extended(sinks, (k[:, :, :missing], v[:, :, :missing]))
            k, v = k[:, :, missing:], v[:, :, missing:]
        count = self.format.quantized_tokens(step.after[0]) - self.packed_len
        if count <= 0:
            self.recent, self.sinks = self.extended(self.recent, (k, v)), sinks
            return
        k, v = (k, v) if self.recent is None else (torch.cat(side, 2) for side in zip(self.recent, (k, v), strict=True))
        keys, values = self.quantized(k[:, :, :count], v[:, :, :count])
        recent = both(lambda x: own(x[:, :, count:]), (k, v))
        self.join(keys, values)
        self.sinks, self.recent = sinks, recent

    def join(self, keys: Packed, values: Packed) -> None:
        """Add packed tokens behind those held; the old keys are let go before the values are copied."""
        if self.k is None or self.v is None:
            self.k, self.v = keys.tiles(0, len(keys.rows)), values.tiles(0, len(values.rows))  # rows, no overflow
            return
        self.bytes_copied += self.k.nbytes + self.v.nbytes
        self.k = self.k.joined(keys)
        self.v = self.v.joined(values)

    def extended(self, held: Pair | None, new: Pair) -> Pair:
        """Dense tokens with new ones behind them, in memory of their own."""
        if held is None:
            return both(own, new)
        self.bytes_copied += size_of(held[0]) + size_of(held[1])
        return torch.cat((held[0], new[0]), dim=2), torch.cat((held[1], new[1]), dim=2)

    def quantized(self, k: Tensor, v: Tensor) -> tuple[Packed, Packed]:
        """Whole groups of tokens, packed."""
        if self.rotate_keys:
            if self.rotation is None:
                with torch.inference_mode(False):  # made inside, it could not be used where gradients are wanted
                    self.rotation = hadamard(k.shape[3], device=k.device)
            k = k.to(torch.promote_types(k.dtype, torch.float32))
            k = k @ self.rotation.to(k.dtype)
        keys, values = quantized(k, self.quantize_keys), quantized(v, self.quantize_values)
        if keys.overflows(k) or values.overflows(v):
            self.widen()
            return quantized(k, self.quantize_keys), quantized(v, self.quantize_values)
        return keys, values

    def widen(self) -> None:
        """Keep scales and zero points in bfloat16 from now on, which has float32's range."""
        before = self.format, self.quantize_keys, self.quantize_values, self.k, self.v
        formats = [replace(x, metadata=torch.bfloat16) for x in before[1:3]]
        packed = [None if x is None else quantized(x.dequantize(), f) for f, x in zip(formats, before[3:], strict=True)]
        self.narrow = self.narrow or before
        self.format = replace(self.format, metadata=str(torch.bfloat16))
        (self.quantize_keys, self.quantize_values), (self.k, self.v) = formats, packed

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Causal attention of the newest tokens' queries over all held, read as it is packed.

        Queries that no kernel takes go to the kernels' plain-PyTorch twin. With `observe`, which gets the weights, K
        and V are made dense.
        """
        self.check_queries(q)
        if step is not None:
            self.check_sinks(step)
        if self.k is None or self.v is None or observe is not None:
            return super().attend(q, step, observe=observe)
        visible = (step or self.newest(q)).visible
        k, v, before, visible = self.in_sight(self.k, self.v, visible)
        assert self.recent is not None
        if not len(k.rows):  # all that is packed has left the window
            return self.answer(q, self.recent, visible)
        self.bytes_read += k.nbytes + v.nbytes + sum(map(size_of, (*(before or ()), *(self.recent or ()))))
        answer = self.kernel_for(q) or packed_attention
        return answer(q, k, v, self.constants, visible, before=before, after=self.recent, rotation=self.rotation)

    def in_sight(self, k: Packed, v: Packed, visible: Visibility) -> tuple[Packed, Packed, Pair | None, Visibility]:
        """Packed keys and values, the sinks, and who sees them, without what has left every query's window."""
        sinks = tokens_of(self.sinks)
        tiles = min(len(k.rows), (visible.unseen(self.constants) - sinks) // self.format.group_size)
        if tiles <= 0:
            return k, v, self.sinks, visible
        visible = visible.of_keys(sinks + tiles * self.format.group_size, visible.kv_len)
        return k.tiles(tiles, len(k.rows)), v.tiles(tiles, len(v.rows)), None, visible

    def kernel_for(self, q: Tensor) -> Callable[..., Tensor] | None:
        """The kernel that answers these queries, if there is one: for one new token, no soft cap and no gradient.

        On a GPU float8 needs compute capability 8.9; on a CPU codes must fill 16-bit words.
        """
        if self.k is None or self.v is None or wants_gradient(*(self.sinks or ()), *(self.recent or ())):
            return None
        return decode_kernel(q, self.k, self.v, self.constants)

    def forget_from(self, seq_len: int) -> None:
        """Forget the tokens from place `seq_len` on.

        What is left of a group that is cut waits in full precision again, no more exact than it was; it is the one case
        in which a token can be quantized twice.
        """
        assert self.recent is not None
        first = tokens_of(self.sinks)
        kept = max(0, seq_len - first - self.packed_len)
        recent, packed = both(lambda x: x[:, :, :kept], self.recent), [self.k, self.v]
        if self.k is not None and self.v is not None and seq_len < first + self.packed_len:
            whole, rest = divmod(max(0, seq_len - first), self.format.group_size)
            cut = self.dequantized(self.k.tiles(whole, whole + 1), self.v.tiles(whole, whole + 1))
            assert cut is not None
            recent = both(lambda x: x[:, :, :rest], cut)
            packed = [Packed(x.quantizer, own(x.rows[:whole])) if whole else None for x in (self.k, self.v)]
        recent, sinks = both(own, recent), self.sinks
        if sinks is not None and seq_len < first:
            sinks = both(lambda x: own(x[:, :, :seq_len]), sinks)
        self.recent, self.sinks, (self.k, self.v) = recent, sinks, packed
        self.bytes_copied += self.nbytes

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows."""
        assert self.recent is not None
        rows = rows.to(self.recent[0].device)
        recent, sinks = (
            None if pair is None else both(lambda x: x.index_select(0, rows), pair)
            for pair in (self.recent, self.sinks)
        )
        packed = [None if x is None else x.of_rows(rows) for x in (self.k, self.v)]
        self.recent, self.sinks, (self.k, self.v) = recent, sinks, packed
        self.bytes_copied += self.nbytes


def decode_kernel(q: Tensor, k: Packed, v: Packed, constants: Constants) -> Callable[..., Tensor] | None:
    """The kernel that answers these queries over these packed tokens, if there is one."""
    if q.shape[2] != 1 or constants.soft_cap is not None or q.dtype == torch.float64 or wants_gradient(q):
        return None
    if q.is_cuda:
        return packed_decode_attention if gpu_reads(k.quantizer.nbits, q.device) else None
    if q.device.type == "cpu":
        from labkit.kernels import packed_attention_cpu as on_cpu  # Numba takes a while to import

        return on_cpu.packed_decode_attention_cpu if on_cpu.takes(q, k, v) else None
    return None


def check_format(nbits: int | torch.dtype, metadata: torch.dtype) -> None:
    """ValueError for a dtype that codes or metadata cannot have; what sizing refuses it refuses itself."""
    if isinstance(nbits, torch.dtype) and nbits not in FLOAT8:
        known = " or ".join(str(dtype) for dtype in FLOAT8) or "none"
        raise ValueError(f"nbits is 8, 4 or 2, or a float8 dtype (this torch has {known}); got {nbits}")
    if metadata not in (torch.bfloat16, torch.float16):
        raise ValueError(f"metadata is torch.bfloat16 or torch.float16; got {metadata}")


def tokens_of(pair: Pair | None) -> int:
    """Tokens in a pair of dense K and V."""
    return 0 if pair is None else pair[0].shape[2]


def both(change: Callable[[Tensor], Tensor], pair: Pair) -> Pair:
    """K and V, each changed."""
    return change(pair[0]), change(pair[1])


def own(x: Tensor) -> Tensor:
    """A copy: a view would keep all of its owner's memory, and change when the owner changes."""
    return x.clone(memory_format=torch.contiguous_format)


def gpu_reads(nbits: int | torch.dtype, device: torch.device) -> bool:
    """Whether Triton kernels read these codes on a GPU: float8 needs compute capability 8.9."""
    return kernels.available(device) and (isinstance(nbits, int) or torch.cuda.get_device_capability(device) >= (8, 9))


def check_device_has(nbits: int | torch.dtype, device: torch.device) -> None:
    """ValueError when `nbits` is a float8 dtype that PyTorch cannot keep on this device."""
    if isinstance(nbits, int):
        return
    try:
        torch.ones(1, device=device).to(nbits).to(torch.float32)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"PyTorch has no {nbits} on {device.type}: take nbits=8") from error
