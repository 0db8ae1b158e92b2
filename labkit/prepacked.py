"""Weights laid out in the order the CPU's matrix kernel reads them: prepacked, once, instead of at every call.

A bfloat16 product with one row of input spends about half its time in rearranging the weight, again at every call, so
bfloat16 is prepacked wherever it can be. What float32 gains depends on the processor, and on which library PyTorch was
built to ask for plain products: that is measured, once per process, and used where it pays.

One row of input, which is a step of decoding, goes through `kernels.matvec_cpu`, over the same memory, wherever oneDNN
lays a weight out in the blocks that those loops read.

*Prepacked* is a layout; *packed* is `quantization`'s word, for numbers of few bits.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

# Gain from which float32 is prepacked; seen: 1.8 to 3.0 on AMD EPYCs, 1.0 to 1.2 on an Intel Xeon. Where one row goes
# through the loops it gains at any rate, and it is enough that many rows lose nothing, within the noise.
LEAST_GAIN, LEAST_WITH_LOOPS = 1.5, 0.9
LEAST_SIZE = 2**16  # entries; smaller weights stay in the core's cache, and a call costs more than reading them
MANY = 32_609  # different numbers, as bits of bfloat16 none of them a NaN: a prime, so that no row repeats another
TRIED = (3072, 576)  # the shape with which a machine is tried: gate and up of the lab model
TUNED_FOR = 16  # rows that the layout is chosen for: as good as any for one row, and better than one row's for more


def prepacked_linear(x: Tensor, prepacked: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` from the prepacked form of `weight`, `[out_features, in_features]`."""
    if has_torch_function_unary(x):  # so that the work ledger sees one product, as it does for F.linear
        return handle_torch_function(prepacked_linear, (x,), x, prepacked, bias)
    return torch.ops.mkldnn._linear_pointwise(x, prepacked, bias, "none", [], "")


def can_prepack(weight: Tensor) -> bool:
    """Whether `weight` gains by it: on a CPU, large, and bfloat16, or float32 where that was measured to be faster."""
    if weight.device.type != "cpu" or weight.numel() < LEAST_SIZE or not has_product(weight.dtype):
        return False
    return weight.dtype == torch.bfloat16 or float32_gain() >= least_gain()


def least_gain() -> float:
    """The gain from which float32 is prepacked on this machine."""
    return LEAST_WITH_LOOPS if has_loops() else LEAST_GAIN


def has_product(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have the product: float32, or bfloat16 where there is AVX-512."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_loops() -> bool:
    """Whether one row in float32 goes through the loops here."""
    from labkit.kernels.threads import available

    return available() and is_in_blocks(TRIED[1], torch.float32)


@functools.cache
def float32_gain() -> float:
    """How many times faster oneDNN is with float32 prepacked: a 3,072 x 576 product with 1 row and with 16, together.

    Measured once per process, in 20 to 50 ms: the least of five times each, plain and prepacked in turn. 0.0 where the
    product fails.
    """
    weight = torch.full(TRIED, 0.5)
    try:
        with torch.inference_mode():
            ways = (F.linear, weight), (prepacked_linear, reorder(weight))
            times = []
            for rows in (1, 16):
                x = torch.full((rows, TRIED[1]), 0.5)
                times.append([[seconds(product, x, form) for product, form in ways] for _ in range(6)])
    except RuntimeError:
        return 0.0
    plain, prepacked = (sum(min(turn[way] for turn in turns[1:]) for turns in times) for way in (0, 1))
    return plain / prepacked


def seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """What one call takes."""
    start = time.perf_counter()
    product(x, weight)
    return time.perf_counter() - start


def reorder(weight: Tensor) -> Tensor:
    """The prepacked form of `weight`: of the same size, and opaque to everything but `prepacked_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TUNED_FOR)


def blocks_of(prepacked: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The memory of `weight`'s prepacked form as `matvec_cpu` reads it.

    None where its loops cannot run, or oneDNN lays such a weight out in another way; that is tried, as it does not say.
    """
    from labkit.kernels.threads import available

    if weight.dtype not in (torch.float32, torch.bfloat16) or not available():
        return None
    from labkit.kernels.matvec_cpu import LANES, Blocks, in_blocks, warm_up

    outs, columns = weight.shape
    if outs % LANES or not columns or not is_in_blocks(columns, weight.dtype):
        return None
    if not lies_in_blocks(prepacked, weight):
        return None
    warm_up(weight.dtype)
    shape = in_blocks(torch.empty_like(weight, device="meta")).shape
    return Blocks(memory_of(prepacked, weight.dtype).view(shape), bias, owner=prepacked)


@functools.cache
def is_in_blocks(columns: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN makes of a weight `[128, columns]` what `in_blocks` does: tried with one whose numbers differ."""
    from labkit.kernels.matvec_cpu import LANES

    has_memory = all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes"))
    if not has_memory or (dtype == torch.bfloat16 and columns % 2):
        return False
    numbers = torch.arange(2 * LANES * columns, dtype=torch.int32) % MANY
    weight = (numbers.short().view(dtype) if dtype == torch.bfloat16 else numbers.float()).view(2 * LANES, columns)
    try:
        return lies_in_blocks(reorder(weight), weight)
    except RuntimeError:
        return False


def lies_in_blocks(prepacked: Tensor, weight: Tensor) -> bool:
    """Whether a prepacked weight is as long as the weight, and its first and last block are as `in_blocks` has them."""
    from labkit.kernels.matvec_cpu import LANES, in_blocks

    if torch.ops.mkldnn._nbytes(prepacked) != weight.nbytes:
        return False
    memory, rows = memory_of(prepacked, weight.dtype).view(len(weight) // LANES, -1), weight.detach().split(LANES)
    return all(torch.equal(bits(memory[end]), bits(in_blocks(rows[end]).flatten())) for end in (0, -1))


def bits(x: Tensor) -> Tensor:
    """The same numbers as whole ones, of which each equals itself."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def memory_of(prepacked: Tensor, dtype: torch.dtype) -> Tensor:
    """All numbers of a prepacked weight, in the order in which they lie."""
    memory = (ctypes.c_char * torch.ops.mkldnn._nbytes(prepacked)).from_address(torch.ops.mkldnn.data_ptr(prepacked))
    return torch.frombuffer(memory, dtype=dtype)


class PrepackedLinear(nn.Module):
    """A linear layer that keeps its weight in prepacked form only. It has no backward pass, and cannot change.

    copied: the weight stays where it came from, too, as an embedding does that serves as the head: this copy of it then
    counts neither among a model's parameters nor in its state.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, copied: bool = False) -> None:
        super().__init__()
        self.dtype, self.copied, prepacked = weight.dtype, copied, reorder(weight)
        self.prepacked = prepacked if copied else nn.Parameter(prepacked, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.blocks = blocks_of(self.prepacked, weight, self.bias)

    def __deepcopy__(self, memo: dict) -> PrepackedLinear:
        """What an opaque tensor lacks."""
        other = type(self)(self.prepacked.to_dense(), copy.deepcopy(self.bias, memo), copied=self.copied)
        return other.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The weight as `nn.Linear` has it, `[out_features, in_features]`, to read: made anew whenever it is asked for.

        PyTorch refuses to change it in place (outside its inference mode), since the layer would not see that.
        """
        with torch.inference_mode():
            dense = self.prepacked.to_dense()
        dense._prepacked = self.prepacked  # type: ignore[attr-defined]  # by which the work ledger knows it as this layer's
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`; RuntimeError for a wanted gradient or another dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a prepacked layer has no backward pass: make the model with prepack=False")
        if x.dtype != self.dtype:
            raise RuntimeError(f"this layer's weights are {self.dtype}, its input is {x.dtype}: they must agree")
        return self.one_row(x) if self.takes(x) else prepacked_linear(x, self.prepacked, self.bias)

    def takes(self, x: Tensor) -> bool:
        """Whether the loops for one row answer: not while gradients are recorded, nor where they would be missed."""
        if self.blocks is None or x.dim() == 0 or not x.numel() == x.shape[-1] == self.blocks.columns:
            return False
        from labkit.kernels import threads

        return x.dtype == self.dtype and not torch.is_grad_enabled() and threads.takes(x)

    def one_row(
        self, x: Tensor, norm: nn.RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """`product` of a row that `takes` says is taken."""
        from labkit.kernels.matvec_cpu import matvec_cpu

        around = None if norm is None or norm.eps is None else (norm.weight, norm.eps)
        return matvec_cpu(x, self.blocks, norm=around, gated=gated, residual=residual)

    def _apply(self, fn: Any, recurse: bool = True) -> PrepackedLinear:
        """What `to`, `double` or `cuda` do to every module: here nothing, or RuntimeError where there is something."""
        probe = torch.empty(0, dtype=self.dtype)
        if (changed := fn(probe)).dtype != probe.dtype or changed.device != probe.device:
            raise RuntimeError(
                f"prepacked weights stay {self.dtype} on the CPU, not {changed.dtype} on {changed.device.type}: make "
                "the model with prepack=False, or load it in that dtype on that device"
            )
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """RuntimeError: the layer cannot change."""
        raise RuntimeError("prepacked weights cannot be loaded into: load the model's weights first, then prepack()")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As `nn.Linear` does, so that the state of a prepacked model fits a plain one."""
        if not self.copied:
            destination[f"{prefix}weight"] = self.prepacked.detach().to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def product(
    layer: nn.Module, x: Tensor, *, norm: nn.RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
) -> Tensor:
    """`layer(norm(x))` on top of `residual`: in one pass where a prepacked layer gets one row, else one after another.

    gated: what the layer gives is gate and up side by side, and becomes silu(gate) * up.
    """
    if can_fuse(layer, x, norm, gated, residual):
        return layer.one_row(x, norm, gated, residual)
    out = layer(x if norm is None else norm(x))
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out if residual is None else residual + out


def can_fuse(
    layer: nn.Module, x: Tensor, norm: nn.Module | None, gated: bool, residual: Tensor | None
) -> TypeGuard[PrepackedLinear]:
    """Whether `product` may be one pass: these very modules, as PyTorch and this file made them, and none watched."""
    if type(layer) is not PrepackedLinear or is_watched(layer) or not layer.takes(x):
        return False
    if norm is not None:
        if type(norm) is not nn.RMSNorm or is_watched(norm) or norm.weight is None or norm.eps is None:
            return False
        if norm.weight.dtype != x.dtype or norm.weight.shape != x.shape[-1:]:
            return False
    outs = layer.blocks.outs_of(gated)
    made = (*x.shape[:-1], outs)
    return bool(outs) and (residual is None or (residual.shape == made and residual.dtype == x.dtype))


def is_watched(module: nn.Module) -> bool:
    """Whether a call of this module would be more than its class's `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or nn.modules.module._has_any_global_hook()
    return bool(hooks) or "forward" in module.__dict__
