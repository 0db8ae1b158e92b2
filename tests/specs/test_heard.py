"""Configs of types that transformers has: what its class does not read agrees with what was measured, or is refused."""

import pytest

from labkit.specs import SpecError, from_hf_config

L = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32}


def read(change: dict):
    return from_hf_config({key: value for key, value in (L | change).items() if value is not None})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_cla": True}, "use_cla"),
        ({"cla_share_factor": 2}, "cla_share_factor"),
        ({"attn_layer_indices": [1]}, "attn_layer_indices"),
        ({"full_attention_interval": 2}, "full_attention_interval"),
        ({"mamba_enabled": True}, "mamba_enabled"),
        ({"kv_lora_rank": 32, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}, "kv_lora_rank, qk_nope"),
        ({"v_head_dim": 4}, "v_head_dim"),
        ({"multi_query": True}, "multi_query"),
        ({"multi_query_attention": False}, "multi_query_attention"),
        ({"multi_query": False, "num_key_value_heads": 1}, "multi_query"),
        ({"group_query_attention": True, "num_key_value_heads": 8}, "group_query_attention"),
        ({"num_key_value_heads_per_layer": [1, 2, 4, 4]}, "num_key_value_heads_per_layer"),
        ({"model_type": "qwen3", "num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"model_type": "qwen3", "full_attention_layers": [1]}, "full_attention_layers"),
        ({"model_type": "falcon_h1", "attn_layer_indices": [1]}, "attn_layer_indices"),
        ({"model_type": "hunyuan_v1_moe", "use_cla": True}, "use_cla"),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": 2}, "_sliding_window_pattern"),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 0, 1, 1]}, "attn_type_list"),
        ({"model_type": "qwen3_5_text", "mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
    ],
)
def test_what_a_class_does_not_read_is_refused(change, named):
    with pytest.raises(SpecError, match=f"^{named}.* is not read by transformers'"):
        read(change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads is 2, .* makes 4"),
        ({"kv_channels": 64}, "kv_channels is 64, .* makes 8"),
        ({"n_layer": 2}, "n_layer is 2, .* makes 4"),
        ({"model_type": "gpt_neox", "num_key_value_heads": 2}, "num_key_value_heads is 2, .* makes 8"),
        ({"model_type": "nemotron_h", "head_dim": None, "attention_head_dim": 16}, "attention_head_dim is 16"),
        ({"model_type": "gpt_oss", "experts_per_token": 4, "num_experts_per_tok": 2}, "experts_per_token is 4"),
    ],
)
def test_a_size_under_a_name_that_a_class_does_not_read_is_refused(change, said):
    with pytest.raises(SpecError, match=said):
        read(change)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"num_kv_heads": 4, "kv_channels": 8, "v_head_dim": 8, "use_cla": False}, "ffff"),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": 6}, "wwww"),
        ({"model_type": "minimax_m2", "attn_type_list": [1] * 4}, "ffff"),
        ({"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": "LLLG"}, "wwwf"),
        ({"text_config": {}}, "ffff"),
        ({"multi_query_attention": False, "num_key_value_heads": 8}, "ffff"),
        ({"multi_query": False}, "ffff"),
        ({"multi_query_attention": True, "group_query_attention": None}, "ffff"),
        ({"model_type": "hunyuan_v1_moe", "use_cla": False, "cla_share_factor": 2, **EXPERTS}, "ffff"),
        ({"model_type": "qwen3_5_text", "mamba_ssm_dtype": "float32"}, "sssf"),
        ({"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 0}, "ffff"),  # it is off unless set
    ],
)
def test_what_agrees_with_the_class_is_read(change, kinds):
    assert "".join(layer.kind[0] for layer in read(change).each_layer) == kinds


def test_heads_that_do_not_go_together_are_named_as_the_config_names_them():
    with pytest.raises(SpecError, match=r"num_attention_heads \(8\) must be a multiple of num_key_value_heads \(16\)"):
        read({"num_key_value_heads": 16})


def test_a_zero_is_no_missing_value():
    assert read({"rms_norm_eps": 0}).norm_eps == 0
    with pytest.raises(SpecError, match="rope_theta"):
        read({"rope_theta": 0})
