"""The text that lab 04 scores models on, written for it, and the lab model with other K and V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from labkit.llama import Llama
from labkit.prepacked import PrepackedLinear

FERRY = """\
The ferry left the harbour at seven, as it did every morning, with the post, two crates of bread and whoever \
had business on the island. In winter there was seldom anyone but the teacher. She sat by the stove in the \
cabin, corrected exercise books and looked up only when the boat began to roll. The captain knew the passage \
so well that he hardly looked at the chart. He had learned it from his father, who had learned it from a pilot \
long dead, and each of them had added a mark or two of his own: a rock that shows at low water, a current that \
sets to the north when the wind has blown from the west for three days.

One morning in March the fog came down so quickly that the harbour lights were gone before the ropes were in. \
The captain stopped the engine and listened. Somewhere to the left a bell was ringing, slowly, as if somebody \
were pulling it by hand. He had sailed here for thirty years and had never heard a bell. The teacher came on \
deck with her coat around her shoulders and asked what it was. He said that he did not know, and that he would \
rather wait until he did. So they waited. The water was quite still. After a quarter of an hour the sound \
moved, first behind them and then to the right, and they understood that it was not the bell that moved but \
the boat, which the tide was carrying round in a wide circle.
"""


def rebuilt(model: Llama, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Llama:
    """The model with `change(layer, k, v)` for what makes K and V in every layer; as many KV heads as come back.

    k, v: the weight, `[num_kv_heads * head_dim, hidden_size]`. Everything else is the model's own, not a copy.
    """
    spec, qkvs = model.spec, []
    sizes = [heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
    k = None
    for layer, block in enumerate(model.blocks):
        parts = []
        for whole in (block.attention.qkv.weight, block.attention.qkv.bias):
            if whole is not None:
                q, k, v = whole.detach().split(sizes)
                k, v = change(layer, k, v)
                parts.append(torch.cat((q, k, v)))
        qkvs.append(parts)
    assert k is not None
    with torch.device("meta"):
        other = Llama(replace(spec, num_kv_heads=len(k) // spec.head_dim))
    other.embedding, other.norm, other.head = model.embedding, model.norm, model.head
    for block, own, parts in zip(other.blocks, model.blocks, qkvs, strict=True):
        block.attention_norm, block.mlp_norm, block.mlp = own.attention_norm, own.mlp_norm, own.mlp
        block.attention.out = own.attention.out
        if isinstance(own.attention.qkv, PrepackedLinear):  # the same products, so that equal weights give equal bits
            block.attention.qkv = PrepackedLinear(*parts)  # type: ignore[assignment]
        else:
            block.attention.qkv.load_state_dict(dict(zip(("weight", "bias"), parts, strict=False)), assign=True)
            block.attention.qkv.requires_grad_(False)
    return other
