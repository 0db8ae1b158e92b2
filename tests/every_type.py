"""A tiny random model of every type that transformers generates text with, made by shrinking the type's own config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TEXT = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(TEXT))
VOCAB, PAD, WINDOW = 61, 0, 6
LARGEST = 3_000_000  # parameters: a model above this is not tiny

# What configs call a size, and a small value for it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_query_groups", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "attention_head_size", "d_head", "kv_channels"), 8),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("feed_forward_size",), 48),
    **dict.fromkeys(("max_position_embeddings", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("sliding_window_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    # Attention to latent vectors, and indexers that choose keys.
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"qk_head_dim": 12, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "o_lora_rank": 8, "rotary_dim": 4},
    # States.
    **{"mamba_d_state": 6, "mamba_dt_rank": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8},
    **{"mamba_d_ssm": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "state_size": 6, "ssm_state_size": 6},
    **{"time_step_rank": 4, "chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "num_heads": 4},
    **{"mamba_n_groups": 1, "n_groups": 1},
    # What some types have besides.
    **{"hidden_size_per_layer_input": 8, "laurel_rank": 8, "shape_embed_dim": 8, "shape_vocab_size": VOCAB},
    **{"pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCAB, "encoder_layers": 2, "decoder_layers": 2},
    **{"num_encoder_layers": 2, "num_decoder_layers": 2, "hc_lowrank": 8, "num_layers_per_stack": 2, "d_rel": 8},
    **{"rel_extent": 32, "gated_norm_rank": 8, "adapter_rank": 8, "prompt_mid_dim": 8},
    # Vision towers.
    **{"image_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "out_hidden_size": 32},
}
TOKENS: dict[str, Any] = {
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "begin_suppress_tokens"), None),
    **{"pad_token_id": PAD, "bos_token_id": 1, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1},
}
# What shrinking alone gets wrong, by type.
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "blt": {},
}  # fmt: skip


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """The config that the type has by default, every size that is known made small, one layer of each kind kept."""
    return _shrunk(CONFIG_MAPPING[kind], **OWN.get(kind, {}), **changes)


def _shrunk(cls: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    default = cls()
    stated = default.to_dict()
    real = {name: alias for alias, name in cls.attribute_map.items()}
    said: dict[str, Any] = {}
    for key, value in stated.items():
        for sizes in (SIZES, TOKENS):
            for name in (key, real.get(key)):
                if name in sizes and (value is not None or name == "head_dim" or sizes is TOKENS):
                    said[key] = sizes[name]
    said |= _layers(stated, real)
    for key in cls.sub_configs:
        sub = getattr(default, key, None)
        if isinstance(sub, PretrainedConfig):
            kind = sub.model_type
            said[key] = _shrunk(type(sub), **OWN.get(kind, {}))
    return cls(**said | changes)


def _layers(stated: dict[str, Any], real: dict[str, str]) -> dict[str, Any]:
    """Two layers, or one of each kind; what is said of each layer is said of those that are kept."""
    names = [key for key in stated if "num_hidden_layers" in (key, real.get(key)) or key in ("n_layers", "num_blocks")]
    if not names or not isinstance(layers := stated[names[0]], int):
        return {}
    lists = {key: value for key, value in stated.items() if isinstance(value, list) and len(value) == layers > 2}
    kinds = lists.get("layer_types") or lists.get("layers_block_type") or lists.get("mlp_layer_types")
    kept = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values()) if kinds else []
    if len(kept) < 2:
        kept = [0, layers - 1] if layers > 1 else [0]
    return {names[0]: len(kept)} | {key: [value[index] for index in kept] for key, value in lists.items()}


def tiny_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A float32 model of that type. Weights are wide: attention is far from uniform, and a mistake in it shows.

    Raises ValueError when what shrinking leaves is not tiny.
    """
    config = tiny_config(kind, **changes)
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True
    auto = AutoModelForCausalLM if kind in TEXT else AutoModelForImageTextToText
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.2)
    return model
