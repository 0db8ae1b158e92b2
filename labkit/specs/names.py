"""What configs call a model's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {  # what a size is called, in the order of looking; a dot goes into a nested dict
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": (
        "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups",
        "num_query_groups", "attn_config.kv_n_heads",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels", "hidden_size_per_head"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_config.ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_seq_len": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
    "num_experts": (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts",
    ),
    "experts_per_token": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_k",
        "moe_top_k", "ffn_config.moe_top_k",
    ),
}  # fmt: skip


def first(config: Any, names: Sequence[str]) -> Any:
    """The first of `names` that the config, a dict or an object, has and that is not null."""
    for name in names:
        value = config
        for step in name.split("."):
            value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
        if value is not None:
            return value
    return None


def said_in_a_line(error: Exception) -> str:
    """What an error of another library says, in one line of reasonable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:160] or type(error).__name__
