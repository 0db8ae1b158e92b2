"""Weights laid out in the order the CPU's matrix kernel reads them, for bfloat16 decoding.

A bfloat16 product with one row of input spends about half its time in rearranging the weight, again at every call.
Packed once, the weight is read straight through. float32 has nothing to gain: its one-row product already streams.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` from the packed form of `weight`, `[out_features, in_features]`."""
    if has_torch_function_unary(x):  # so that the work ledger sees one product, as it does for F.linear
        return handle_torch_function(prepacked_linear, (x,), x, packed, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def can_prepack(weight: Tensor) -> bool:
    """Whether PyTorch and this CPU have the packed product, and `weight` gains by it: bfloat16, with AVX-512."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in needed) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PrepackedLinear(nn.Module):
    """A linear layer whose weight is kept in packed form only."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)  # 1: the row count to tune for
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return prepacked_linear(x, self.weight, self.bias)
