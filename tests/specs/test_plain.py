"""Configs of a type that transformers lacks: each key is used by a rule, or the config is refused and the key named."""

import pytest

from labkit.specs import SpecError, from_hf_config
from labkit.specs.keys import READ, SIZES, WEIGHTS, is_aside

U = {
    "model_type": "foo", "num_hidden_layers": 8, "hidden_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 4096,
}  # fmt: skip
S, F = "sliding_attention", "full_attention"
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
WITHOUT = {key: value for key, value in U.items() if key != "num_key_value_heads"}


def read(change: dict, base: dict = U):
    return from_hf_config(base | change, parameters=10**9)


def letters(change: dict) -> str:
    return "".join(layer.kind[0] for layer in read(change).each_layer)


# Of the flags, and the numbers that mean what is so anyhow, no rule is needed.
ALONE = {
    "no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "num_kv_shared_layers", "sliding_window",
    "sliding_window_size", "attention_chunk_size", "v_head_dim", "use_cla", "multi_query", "multi_query_attention",
    "group_query_attention", "use_cache_quantization",
    "new_decoder_architecture", "use_mla", "mamba_enabled", "layer_types", "layers_block_type", "attn_type_list",
    "attn_layer_indices", "sliding_window_pattern",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(READ - ALONE))
def test_a_key_that_means_nothing_alone_is_refused_and_named(key):
    with pytest.raises(SpecError, match=key if key not in ("attn_layer_period", "full_attention_interval") else "is"):
        read({key: 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 4}, "mamba_d_conv, mamba_d_state, mamba_expand"),
        ({"layer_types": [S, F] * 4}, "sliding_window is missing"),
        ({"sliding_window_pattern": 2}, "sliding_window is missing"),
        ({"use_sliding_window": True}, "no 'sliding_window'"),
        ({"use_mla": True}, "no 'kv_lora_rank'"),
        (LATENT | {"use_mla": False}, "use_mla is false"),
        ({"qk_head_dim": 192, "v_head_dim": 128}, "qk_head_dim"),
        (LATENT | {"qk_head_dim": 100}, "qk_head_dim is not"),
        ({"multi_query": True}, "num_key_value_heads is 4"),
        ({"attn_layer_indices": [1], "sliding_window": 8, "conv_L_cache": 3}, "sliding_window"),
        ({"cla_share_factor": 2}, "cla_share_factor"),
        ({"full_attention_interval": 2, "conv_L_cache": 3, **DELTA}, "conv_L_cache"),
        ({"attn_config": {"kv_n_heads": 4, "window": 5}}, r"attn_config\.window"),
        # the same said twice
        ({"n_layer": 4}, "num_hidden_layers and n_layer"),
        ({"num_kv_heads": 2}, "num_key_value_heads and num_kv_heads"),
        ({"kv_channels": 64}, "head_dim and kv_channels"),
        ({"d_model": 64}, "hidden_size and d_model"),
        ({"sliding_window": 8, "attention_chunk_size": 9}, "sliding_window and attention_chunk_size"),
        ({"layer_types": [F] * 8, "layers_block_type": [S] * 8, "sliding_window": 4}, "layer_types and layers_block"),
        ({"attn_layer_period": 2, "full_attention_interval": 3, "conv_L_cache": 3}, "attn_layer_period and full_att"),
        # each state is its own layer's
        ({"layer_types": ["conv"] * 4 + [F] * 4, **DELTA}, "conv_L_cache: none is there"),
        ({"layer_types": ["linear_attention"] * 4 + [F] * 4, "conv_L_cache": 3}, "linear_num_value_heads: none is"),
        # what no config can mean
        ({"attn_layer_indices": [3, 99], "conv_L_cache": 3}, "numbers layers from 0 to 7"),
        ({"attn_layer_indices": [False], "conv_L_cache": 3}, "numbers layers from 0 to 7"),
        ({"attn_config": "x"}, "attn_config holds sizes by name; got 'x'"),
        ({"multi_query_attention": True}, "no multi_query_group_num"),
        ({"group_query_attention": True}, "no num_query_groups"),
        ({"multi_query_attention": False}, "multi_query_attention is false, but num_key_value_heads is 4 and num_att"),
        ({"group_query_attention": False}, "group_query_attention is false, but num_key_value_heads is 4"),
        ({"multi_query_attention": False, "num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"multi_query": False, "num_key_value_heads": 1}, "multi_query is false, but num_key_value_heads is 1"),
        ({"use_cache_quantization": True}, "use_cache_quantization: alone"),
        ({"layer_types": [["a"]] * 8}, r"a layer of type \['a'\] is not known"),
        ({"attn_layer_indices": [-1, 3], "conv_L_cache": 3}, "numbers layers from 0 to 7"),
        ({"attn_layer_period": -4, "conv_L_cache": 3}, "attn_layer_period must be a whole number, at least 1"),
        ({"attn_layer_period": 2, "attn_layer_offset": 2, "conv_L_cache": 3}, "attn_layer_offset is from 0 to 1"),
        ({"sliding_window": 8, "max_window_layers": -3}, "max_window_layers must be a whole number, at least 0"),
        ({"mamba_enabled": True, "mamba_step": 99, "mamba_num_heads": 2, "mamba_d_state": 4}, "mamba_step is from 2"),
        ({"mamba_enabled": True, "mamba_step": 2, "mamba_num_heads": 2, "mamba_d_state": 16.7}, "mamba_d_state must"),
        (LATENT | {"kv_lora_rank": 512.5}, "kv_lora_rank must be a whole number"),
        ({"v_head_dim": 0}, "v_head_dim must be a whole number, at least 1; got 0"),
        ({"use_cla": True, "cla_share_factor": 0}, "cla_share_factor must be a whole number"),
        ({"use_cla": True, "cla_share_factor": -1}, "cla_share_factor must be a whole number"),
        ({"no_rope_layers": [1, 0], "attention_chunk_size": 8}, "no_rope_layers names 2 layers"),
        ({"no_rope_layers": [1, 7] * 4, "attention_chunk_size": 8}, "no_rope_layers holds 0 and 1"),
    ],
)
def test_what_is_said_without_effect_or_twice_or_absurdly_is_refused(change, said):
    with pytest.raises(SpecError, match=said) as error:
        read(change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flag", ["use_cla", "use_mla", "use_sliding_window", "multi_query", "mamba_enabled", "tie_word_embeddings"]
)
@pytest.mark.parametrize("kind", ["foo", "llama"])
def test_text_is_no_boolean(flag, kind):
    with pytest.raises(SpecError, match=f"{flag} is true or false; got 'false'"):
        read({"model_type": kind, flag: "false"})


@pytest.mark.parametrize(
    ("change", "heads"),
    [
        ({"multi_query_attention": False, "multi_query_group_num": 2}, 8),
        ({"multi_query_attention": True, "multi_query_group_num": 2}, 2),
        ({"multi_query_attention": False, "num_key_value_heads": 8}, 8),
        ({"multi_query_attention": False}, 8),
        ({"group_query_attention": True, "num_query_groups": 2}, 2),
        ({"group_query_attention": False, "num_query_groups": 2}, 8),
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 8),
        ({"attn_config": {"kv_n_heads": 2}}, 2),
    ],
)
def test_flags_say_how_many_heads_of_k_and_v_there_are(change, heads):
    assert read(change, WITHOUT).num_kv_heads == heads


def test_a_group_without_its_number_is_refused():
    with pytest.raises(SpecError, match="no multi_query_group_num"):
        read({"multi_query_attention": True}, WITHOUT)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0] * 2}, "wwwfwwwf"),
        ({"layer_types": [S, F] * 4, "sliding_window": 8, "sliding_window_pattern": 2}, "wfwfwfwf"),  # they agree
        ({"sliding_window": 8, "n_layer": 8}, "wwwwwwww"),
        ({"no_rope_layers": [1, 0] * 4}, "ffffffff"),
        ({"attn_type_list": [1] * 8}, "ffffffff"),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 4}, "ffffffff"),
    ],
)
def test_what_is_understood_is_read(change, expected):
    assert letters(change) == expected


# As published, beside the sizes: keys of models that bring code of their own.
REMOTE = {
    "chatglm": {
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "original_rope": True,
        "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "rmsnorm": True,
        "bias_dropout_fusion": True, "fp32_residual_connection": False, "kv_channels": 128, "rope_ratio": 500,
        "layernorm_epsilon": 1e-5, "post_layer_norm": True, "prefix_projection": False, "quantization_bit": 0,
        "seq_length": 131_072, "pre_seq_len": None,
    },
    "qwen": {
        "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "bf16": True, "fp16": False, "fp32": False, "no_bias": True,
        "rotary_emb_base": 10_000, "rotary_pct": 1.0, "scale_attn_weights": True, "use_flash_attn": "auto",
        "use_dynamic_ntk": True, "use_logn_attn": True, "use_cache_quantization": False, "use_cache_kernel": False,
        "softmax_in_fp32": False, "seq_length": 8192, "onnx_safe": None,
    },
    "bailing_moe": {
        "embedding_dropout": 0.0, "output_dropout": 0.0, "norm_head": True, "norm_softmax": False, "multi_gate": False,
        "router_dtype": "fp32", "moe_router_enable_shared_expert": True, "mtp_loss_scaling_factor": 0,
        "score_function": "sigmoid", "max_window_layers": 28, "sliding_window": None, "use_rmsnorm": True,
    },
    "telechat": {
        "flash_attn": True, "training_seqlen": 8192, "base_seqlen": 8192, "logn": False, "embed_layernorm": False,
        "offset_alibi": 100, "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False,
    },
    "phi-msft": {"flash_attn": False, "flash_rotary": False, "fused_dense": False, "img_processor": None},
    "minimax_text_01": {
        "layernorm_full_attention_alpha": 3.5, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": 3.5,
        "postnorm": True, "shared_moe_mode": "sigmoid", "router_jitter_noise": 0.0, "sliding_window": None,
    },
    "grok-1": {
        "attn_output_multiplier": 0.088, "embedding_multiplier_scale": 78.4, "output_multiplier_scale": 0.58,
        "max_attn_value": 30.0,
    },
    "jais": {
        "mup_embeddings_scale": 14.6, "mup_scale_qk_dot_by_d": True, "embeddings_scale": 14.6, "width_scale": 0.1,
        "scale_qk_dot_by_d": True, "summary_first_dropout": 0.1, "summary_type": "cls_index", "alibi_scaling": None,
    },
    "arctic": {
        "parallel_attn_mlp_res": True, "use_residual": True, "enable_expert_tensor_parallelism": False,
        "moe_eval_capacity_factor": 1, "moe_min_capacity": 0, "moe_token_dropping": True, "moe_layer_frequency": 2,
    },
    "exaone": {"embed_dropout": 0.0, "layer_norm_epsilon": 1e-5},
    "xverse": {"max_tokenizer_truncation": 6144, "tokenizer_padding_side": "right", "max_sequence_length": 8192},
}  # fmt: skip


@pytest.mark.parametrize("kind", REMOTE)
def test_keys_that_say_nothing_of_a_cache_keep_no_published_config_from_being_read(kind):
    assert letters(REMOTE[kind] | {"model_type": kind}) == "ffffffff"


@pytest.mark.parametrize("key", ["window_norm", "flash_window_size", "norm_layer_types", "mamba_dropout", "flash"])
def test_a_key_that_speaks_of_layers_is_not_known_by_its_family(key):
    with pytest.raises(SpecError, match=f"{key} is not read here"):
        read({key: 3})


@pytest.mark.parametrize(
    "key",
    ["kv_cache_dropout", "fused_kv_groups", "rotary_num_kv_heads", "token_dropout_budget", "norm_rank", "norm_of_cache",
     "summary_tokens", "mup_kv_heads", "prenormalized", "lossless_eps", "initializer_num_heads", "flash_attn_kv"],
)  # fmt: skip
def test_a_key_with_a_word_that_is_not_known_is_refused_whatever_else_is_in_it(key):
    with pytest.raises(SpecError, match=f"{key} is not read here"):
        read({key: 3})


@pytest.mark.parametrize(
    "key", ["mlp_dropout", "post_attention_norm_eps", "router_z_loss_coef", "pad_token_id", "ln_eps"]
)
def test_a_key_all_of_whose_words_are_about_something_else_needs_no_list(key):
    assert letters({key: 3}) == "ffffffff"


def test_no_key_that_says_something_is_taken_for_one_that_says_nothing():
    assert [key for key in sorted(READ | SIZES | WEIGHTS) if is_aside(key)] == []


def test_of_several_lengths_the_shortest_is_the_longest_context_and_a_tokenizers_counts_if_there_is_no_other():
    assert read({"max_position_embeddings": 32_768, "seq_length": 8192}).max_seq_len == 8192
    bare = {key: value for key, value in U.items() if key != "max_position_embeddings"}
    assert read({"model_max_length": 4096}, bare).max_seq_len == 4096
    assert read({"model_max_length": 10**30, "max_model_len": 2048}, bare).max_seq_len == 2048
    with pytest.raises(SpecError, match="no 'max_position_embeddings'"):
        read({"model_max_length": 10**30}, bare)


def test_layers_of_two_kinds_of_state_have_each_their_own_size():
    kinds = ["conv", "linear_attention", F, F] * 2
    conv, delta, *_ = read({"layer_types": kinds, "conv_L_cache": 3, **DELTA}).each_layer
    assert conv.state_bytes == 2 * 1024 * 3
    assert delta.state_bytes == 2 * (2 * 32 + 128) * 4 + 4 * 128 * 16
