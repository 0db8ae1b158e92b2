"""Configs of a type that transformers lacks: each key is used by a rule, or the config is refused and the key named."""

import pytest

from labkit.specs import SpecError, from_hf_config
from labkit.specs.keys import READ

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


def test_layers_of_two_kinds_of_state_have_each_their_own_size():
    kinds = ["conv", "linear_attention", F, F] * 2
    conv, delta, *_ = read({"layer_types": kinds, "conv_L_cache": 3, **DELTA}).each_layer
    assert conv.state_bytes == 2 * 1024 * 3
    assert delta.state_bytes == 2 * (2 * 32 + 128) * 4 + 4 * 128 * 16
