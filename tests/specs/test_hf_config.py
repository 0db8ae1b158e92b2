"""Published configs of every family, read as the hand-written specs have them; and what is no decoder's config."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from labkit import specs
from labkit.specs import LayerGroup, SpecError, from_hf_config

CONFIGS = Path(__file__).parents[1] / "configs"  # of published config.json files, the keys that matter
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
GIVEN = {"hunyuan-large": 389_000_000_000}  # an architecture that transformers does not have
TOLD = ("title", "source", "date")  # what no config says


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def kinds(shape: dict, **change) -> list[str]:
    return [layer.kind for layer in from_hf_config({**shape, **change}, parameters=10**12).each_layer]


def test_there_are_configs_of_at_least_20_models_and_of_every_family():
    assert len(NAMES) >= 20
    types = {specs.model(name).model_type for name in specs.models()} - {"palm"}  # which has none
    assert {specs.model(name).model_type for name in NAMES} == types


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_agrees_with_the_hand_written_spec(name):
    known, read = specs.model(name), from_hf_config(config(name), name, parameters=GIVEN.get(name))
    assert read.each_layer == known.each_layer
    assert read.num_parameters == known.num_parameters  # exact
    told = {field: getattr(known, field) for field in (*TOLD, "parameters")}
    if name in GIVEN:  # published in whole billions
        assert read.num_active_parameters == pytest.approx(known.num_active_parameters, rel=0.02)
        told["active_parameters"] = known.active_parameters
    assert dataclasses.replace(read, **told) == known


def test_a_file_a_folder_and_a_dict_read_the_same(tmp_path):
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("llama-3-70b")))
    by_file, by_folder = from_hf_config(folder / "config.json"), from_hf_config(str(folder))
    assert by_file == by_folder == from_hf_config(config("llama-3-70b"), name="Some-Model")


def test_of_a_multimodal_config_the_language_model_is_read():
    nested = {"model_type": "llava", "text_config": config("llama-3-70b"), "vision_config": {"hidden_size": 1024}}
    for key in ("text_config", "llm_config", "language_config"):
        outer = {"model_type": "some_vlm", key: nested["text_config"]}
        assert from_hf_config(outer, "x") == from_hf_config(config("llama-3-70b"), "x")


def test_a_type_that_nobody_knows_is_read_by_its_usual_keys_when_parameters_are_given():
    shape = {**config("llama-3-70b"), "model_type": "brandnew"}
    spec = from_hf_config(shape, "mine", parameters=70_000_000_000)
    assert (spec.model_type, spec.num_parameters) == ("brandnew", 70_000_000_000)
    assert spec.each_layer == specs.model("llama-3-70b").each_layer
    with pytest.raises(SpecError, match=r"the weights of a 'brandnew' model cannot be counted .*: give parameters="):
        from_hf_config(shape)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "dbrx", "deepseek-v3", "jamba-v0.1", "deepseek-v2"])
def test_where_parameters_are_given_the_experts_that_a_token_does_not_meet_are_taken_off(name):
    known = specs.model(name)
    assert from_hf_config(config(name), parameters=known.parameters).active_parameters == known.active_parameters


def test_biases_that_a_spec_does_not_state_are_counted():
    plain = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    biased = {**plain.to_dict(), "attention_bias": True}
    more = from_hf_config(biased).num_parameters - from_hf_config(plain.to_dict()).num_parameters
    assert more == 2 * 4 * 64  # q, k, v and the output, in two layers


class TestLayerKinds:
    LLAMA = config("llama-3-70b") | {"num_hidden_layers": 6}

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({}, "FFFFFF"),
            ({"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}, "WFWFWF"),
            ({"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": None}, "FFFFFF"),
            ({"sliding_window": 8}, "WWWWWW"),
            ({"sliding_window": 8, "use_sliding_window": False}, "FFFFFF"),
            ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, "FFFFWW"),
            ({"sliding_window": 8, "sliding_window_pattern": 3}, "WWFWWF"),
            ({"sliding_window": 8, "sliding_window_pattern": "LLLG"}, "WWWFWW"),
            ({"num_kv_shared_layers": 2}, "FFFFHH"),
            ({"num_kv_shared_layers": 2, "sliding_window": 8, "sliding_window_pattern": 2}, "WFWFHH"),
            ({"use_cla": True, "cla_share_factor": 3}, "FHHFHH"),
            ({"use_cla": False, "cla_share_factor": 3}, "FFFFFF"),
            ({"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}, "LLLLLL"),
            ({"full_attention_interval": 3, "conv_L_cache": 3}, "SSFSSF"),
            ({"attn_layer_period": 3, "attn_layer_offset": 1, "conv_L_cache": 3}, "SFSSFS"),
            ({"layer_types": ["conv", "conv", "full_attention"] * 2, "conv_L_cache": 3}, "SSFSSF"),
        ],
    )
    def test_of_each_way_in_which_configs_say_them(self, change, expected):
        letters = {"full": "F", "window": "W", "shared": "H", "latent": "L", "state": "S"}
        shape = {**self.LLAMA, "model_type": "some_llama"}
        assert "".join(letters[kind] for kind in kinds(shape, **change)) == expected

    @pytest.mark.parametrize(
        ("model_type", "expected"),
        [
            ("gemma2", ["window", "full"] * 3),
            ("gemma3_text", ["window"] * 5 + ["full"]),
            ("cohere2", ["window"] * 3 + ["full"] + ["window"] * 2),
            ("gpt_oss", ["window", "full"] * 3),
            ("qwen3_moe", ["full"] * 6),
            ("mixtral", ["window"] * 6),
            ("starcoder2", ["window"] * 6),
        ],
    )
    def test_of_a_type_whose_configs_do_not_list_them(self, model_type, expected):
        assert kinds({**self.LLAMA, "model_type": model_type, "sliding_window": 8}) == expected

    def test_chunked_attention_holds_at_most_a_chunk(self):
        spec = from_hf_config(config("llama-4-scout"), parameters=109 * 10**9)
        assert [layer.tokens_held(10_000) for layer in spec.each_layer[:4]] == [8192, 8192, 8192, 10_000]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=40))
    def test_a_list_of_types_comes_back_in_its_order_however_it_repeats(self, types):
        shape = {**self.LLAMA, "num_hidden_layers": len(types), "layer_types": types, "sliding_window": 8}
        shape["model_type"] = "some_llama"
        known = {"full_attention": "full", "sliding_attention": "window"}
        assert kinds(shape) == [known[kind] for kind in types]

    def test_a_pattern_is_stated_once(self):
        spec = from_hf_config({**self.LLAMA, "model_type": "gemma2", "sliding_window": 8}, parameters=10**12)
        assert spec.layers == [LayerGroup("window"), LayerGroup("full")]
        assert spec.window == 8

    def test_a_kind_that_is_not_known_is_named(self):
        with pytest.raises(SpecError, match="a layer of type 'odd' is not known here: one of full_attention, "):
            kinds({**self.LLAMA, "model_type": "some_llama"}, layer_types=["odd"] * 6)

    @pytest.mark.parametrize("kind", ["llama", "some_llama"])
    @pytest.mark.parametrize("key", ["hybrid_override_pattern", "linear_attn_config", "index_head_dim"])
    def test_layers_said_in_a_way_that_is_not_read_are_an_error_and_not_full_attention(self, key, kind):
        with pytest.raises(SpecError, match=f"{key} is not read .*write the layers into a file"):
            kinds({**self.LLAMA, "model_type": kind}, **{key: "M-M*-"})

    def test_a_state_of_unknown_size_is_an_error(self):
        with pytest.raises(SpecError, match=r"is said by one of .*linear_num_value_heads, .*: none is there"):
            kinds({**self.LLAMA, "model_type": "some_llama"}, full_attention_interval=3)


class TestHeads:
    @pytest.mark.parametrize(
        ("change", "num_kv_heads"),
        [
            ({"multi_query": True, "new_decoder_architecture": False}, 1),
            ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, 8),
            ({"multi_query": False, "new_decoder_architecture": False}, 71),
            ({"new_decoder_architecture": False}, 1),
        ],
    )
    def test_falcon_says_multi_query_also_where_its_newer_form_is_grouped(self, change, num_kv_heads):
        shape = {key: value for key, value in config("falcon-7b").items() if key != "multi_query"} | change
        shape["num_attention_heads"] = 71 if num_kv_heads != 8 else 64
        shape["hidden_size"] = 64 * shape["num_attention_heads"]
        assert from_hf_config(shape, parameters=10**10).num_kv_heads == num_kv_heads

    def test_the_latent_keeps_one_vector_per_token_and_its_heads_are_wider_in_k_than_in_v(self):
        spec = from_hf_config(config("deepseek-v3"), parameters=10**12)
        assert (spec.head_dim, spec.v_head_dim, spec.num_kv_heads) == (192, 128, 128)
        assert {layer.elements_per_token for layer in spec.each_layer} == {512 + 64}


class TestErrors:
    LLAMA = config("llama-3-70b")

    @pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "clip", "resnet", "t5", "whisper"])
    def test_a_model_that_decodes_nothing_is_said_to_be_none(self, kind):
        with pytest.raises(SpecError, match=f"model_type '{kind}' is no decoder"):
            from_hf_config({**self.LLAMA, "model_type": kind})

    def test_neither_does_one_with_an_encoder_nor_a_text_encoder_inside(self):
        with pytest.raises(SpecError, match="model_type 'newt5' is no decoder"):
            from_hf_config({**self.LLAMA, "model_type": "newt5", "is_encoder_decoder": True})
        with pytest.raises(SpecError, match="model_type 'clip_text_model' is no decoder"):
            from_hf_config({"model_type": "some_clip", "text_config": {"model_type": "clip_text_model"}})

    @pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv"])
    def test_a_model_of_states_alone_keeps_no_cache(self, kind):
        with pytest.raises(SpecError, match=f"model_type '{kind}' keeps no KV cache"):
            from_hf_config({"model_type": kind, "hidden_size": 768})

    @pytest.mark.parametrize("keys", [("num_hidden_layers",), ("hidden_size",), ("vocab_size",)])
    def test_a_missing_size_of_a_type_without_a_class_is_named_by_its_usual_key(self, keys):
        shape = {key: value for key, value in self.LLAMA.items() if key not in keys} | {"model_type": "brandnew"}
        with pytest.raises(SpecError, match=f"^the config has no '{keys[0]}': is it a text model's config.json"):
            from_hf_config(shape)

    def test_missing_sizes_of_a_latent_are_named(self):
        shape = {key: value for key, value in config("deepseek-v3").items() if key != "qk_rope_head_dim"}
        shape = {key: shape[key] for key in shape if not key.startswith("rope")} | {"model_type": "brandnew"}
        with pytest.raises(SpecError, match="the config has no 'qk_rope_head_dim'"):
            from_hf_config(shape, parameters=10**12)

    @pytest.mark.parametrize("value", ["many", 0, [1, 2], {"a": 1}])
    @pytest.mark.parametrize("key", ["num_attention_heads", "hidden_size", "num_hidden_layers"])
    def test_a_size_that_is_no_number_is_one_line(self, key, value):
        with pytest.raises(SpecError) as error:
            from_hf_config({**self.LLAMA, key: value})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_type": ["llama"]}, r"model_type must be text, as in \"llama\"; got \['llama'\]"),
            ({"rms_norm_eps": "a"}, "the config cannot be read"),
            ({"rope_scaling": "linear"}, "the config cannot be read"),
            ({"num_hidden_layers": 4_000_000_000}, "num_hidden_layers is 4,000,000,000: more than 10,000 cannot be"),
        ],
    )
    def test_what_else_cannot_be_read_is_one_line(self, change, said):
        with pytest.raises(SpecError, match=said) as error:
            from_hf_config({**self.LLAMA, **change})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("given", [5, None, ["config.json"]])
    def test_what_is_neither_dict_nor_path_says_so(self, given):
        with pytest.raises(SpecError, match=r"a config is a dict, a config\.json or a folder; got a "):
            from_hf_config(given)

    @pytest.mark.parametrize("given", ["nul\0byte", "a" * 5000])
    def test_a_name_that_no_file_can_have_is_one_line(self, given):
        with pytest.raises(SpecError, match="cannot be read"):
            from_hf_config(given)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "config.json, line 1: not valid JSON"),
            ("[1]", "config.json holds a list, no object"),
            ('"x"', "a str"),
            ("[" * 100_000, "'config.json' cannot be read: maximum recursion depth"),
            ('{"hidden_size": ' + "9" * 5000 + "}", "'config.json' cannot be read: Exceeds the limit"),
        ],
    )
    def test_a_file_that_holds_no_config_says_so(self, tmp_path, text, said):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SpecError, match=said):
            from_hf_config(tmp_path)

    def test_a_home_of_nobody_is_one_line(self):
        with pytest.raises(SpecError, match=r"cannot be read: .*write the path out"):
            from_hf_config("~nobody-is-called-so/x.json")

    @pytest.mark.parametrize("given", ["a" * 300, "a" * 300 + ".json"])
    def test_a_name_that_is_too_long_is_one_short_line(self, given):
        with pytest.raises(SpecError, match="cannot be read") as error:
            from_hf_config(given)
        assert len(str(error.value)) < 200

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "config.json")
        for path in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(SpecError, match=r"config\.json cannot be read: it is a pipe, not a file"):
                from_hf_config(path)

    def test_a_file_larger_than_any_config_is_not_read(self, tmp_path):
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(10**9)
        with pytest.raises(SpecError, match=r"config\.json cannot be read: it is larger than 10 MB"):
            from_hf_config(tmp_path)

    def test_a_byte_order_mark_is_no_fault_and_a_key_given_twice_is_one(self, tmp_path):
        text = json.dumps(self.LLAMA)
        (tmp_path / "config.json").write_text("\ufeff" + text, encoding="utf-8")
        assert from_hf_config(tmp_path).num_layers == 80
        (tmp_path / "config.json").write_text(text[:-1] + ',\n"num_hidden_layers": 8}', encoding="utf-8")
        with pytest.raises(SpecError, match=r'config\.json, line 2: "num_hidden_layers" is given twice'):
            from_hf_config(tmp_path)

    def test_a_file_that_is_not_there_says_what_to_name(self, tmp_path):
        for path in (tmp_path, tmp_path / "config.json", tmp_path / "nothing"):
            with pytest.raises(SpecError, match=r"there is no file .*: name a config\.json, or a folder"):
                from_hf_config(path)


@pytest.mark.parametrize("call", ["from_hf_config(PATH)", "from_hf_config(PATH, parameters=8_030_261_248)"])
def test_a_llama_config_is_read_without_torch(call):
    code = f"import sys; from labkit.specs import *; PATH = sys.argv[1]; {call}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONFIGS / "llama-3.1-8b.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
