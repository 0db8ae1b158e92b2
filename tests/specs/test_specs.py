"""Model specs: counts that agree with the decoder they describe, and configs read as transformers means them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from labkit import specs
from labkit.llama import Llama
from labkit.specs import LayerGroup, ModelSpec, SpecError, decoder_spec, from_hf_config
from tests.tiny import LLAMA3, config, hf_model

SMALL = ModelSpec(
    name="small",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    intermediate_size=48,
    vocab_size=50,
    max_seq_len=64,
)


@st.composite
def model_specs(draw):
    num_kv_heads = draw(st.integers(1, 4))
    return ModelSpec(
        name="drawn",
        num_layers=draw(st.integers(1, 4)),
        num_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        hidden_size=draw(st.integers(1, 4096)),
        intermediate_size=draw(st.integers(1, 8192)),
        vocab_size=draw(st.integers(1, 150_000)),
        max_seq_len=draw(st.integers(1, 10**6)),
        tied_head=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )


@settings(max_examples=50, deadline=None)
@given(model_specs())
def test_num_parameters_is_the_decoders_own_count(spec):
    with torch.device("meta"):
        model = Llama(spec)
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())  # exact


@pytest.mark.parametrize("name", ["llama", "llama, tied head", "llama, wide heads", "mistral, window 6", "qwen2"])
def test_num_parameters_is_transformers_count(name):
    model = hf_model(name)
    spec = from_hf_config(model.config.to_dict())
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())  # exact


def test_the_lab_models_spec_is_that_of_its_config(lab_model):
    read = from_hf_config(json.loads((lab_model / "config.json").read_text()))
    known = specs.model("smollm2-135m")
    # Bounded: the model's file carries the epsilon in float32.
    assert read.norm_eps == pytest.approx(known.norm_eps, rel=torch.finfo(torch.float32).eps)
    told = {name: getattr(known, name) for name in ("name", "title", "norm_eps", "parameters", "source", "date")}
    assert dataclasses.replace(read, **told) == known
    assert known.num_parameters == read.num_parameters == 134_515_008


class TestFromHfConfig:
    def test_it_reads_the_shape(self):
        spec = from_hf_config(config("llama").to_dict(), name="mine")
        assert dataclasses.asdict(spec) == {
            **dataclasses.asdict(SMALL),
            "name": "mine",
            "num_layers": 3,
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 8,
            "hidden_size": 48,
            "intermediate_size": 80,
            "vocab_size": 89,
            "max_seq_len": 256,
            "norm_eps": 1e-6,
            "found": spec.found,
        }

    def test_a_saved_config_reads_the_same_as_one_in_memory(self, tmp_path):
        for name in ("llama, llama3 rope", "mistral, window 6", "qwen2, window 6"):
            config(name).save_pretrained(tmp_path)
            saved = json.loads((tmp_path / "config.json").read_text())
            assert from_hf_config(saved) == from_hf_config(config(name).to_dict())

    def test_kv_heads_that_are_not_named_are_as_many_as_heads(self):
        shape = config("llama").to_dict()
        shape["num_key_value_heads"] = None
        assert from_hf_config(shape).num_kv_heads == 6

    def test_rotary_settings_are_read_where_either_generation_of_configs_has_them(self):
        new = config("llama, llama3 rope").to_dict()
        old = {name: value for name, value in new.items() if name != "rope_parameters"}
        old |= {"rope_theta": 10_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        for shape in (new, old):
            spec = from_hf_config(shape)
            assert spec.rope_theta == 10_000.0
            assert spec.rope_scaling is not None
            assert {name: spec.rope_scaling[name] for name in LLAMA3 if name != "rope_theta"} == {
                name: value for name, value in LLAMA3.items() if name != "rope_theta"
            }

    def test_plain_rotary_positions_need_no_scaling(self):
        assert from_hf_config(config("llama").to_dict()).rope_scaling is None

    @pytest.mark.parametrize(
        ("shape", "window"),
        [
            (MistralConfig(sliding_window=77), 77),
            (MistralConfig(sliding_window=None), None),
            (LlamaConfig(), None),
            (Qwen2Config(), None),
            (Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=0), 9),
            (Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=32), None),
        ],
    )
    def test_the_window_is_the_one_transformers_attends_with(self, shape, window):
        assert from_hf_config(shape.to_dict()).window == window

    def test_layers_of_two_kinds_are_read_with_and_without_a_list_of_them(self):
        shape = Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=5)
        without_types = {name: value for name, value in shape.to_dict().items() if name != "layer_types"}
        for config_dict in (shape.to_dict(), without_types):
            spec = from_hf_config(config_dict)
            assert [layer.window for layer in spec.each_layer] == [None] * 5 + [9] * 27

    def test_a_missing_key_has_the_value_of_the_class(self):
        spec = from_hf_config({"model_type": "llama"})
        assert (spec.num_layers, spec.num_heads, spec.hidden_size, spec.vocab_size) == (32, 32, 4096, 32_000)
        assert spec.num_parameters == specs.model("llama-2-7b").num_parameters

    def test_a_config_without_a_type_names_what_is_missing(self):
        with pytest.raises(ValueError, match="no 'num_hidden_layers'"):
            from_hf_config({"hidden_size": 64})


class TestDecoderSpec:
    """The specs that `labkit.llama` can run: `from_hf_config`, and an error for every other model."""

    @pytest.mark.parametrize("name", ["llama", "llama, llama3 rope", "llama, tied head", "mistral, window 6", "qwen2"])
    def test_of_a_model_that_runs_it_is_that_of_from_hf_config(self, name):
        shape = config(name).to_dict()
        assert decoder_spec(shape, "mine") == from_hf_config(shape, "mine")

    def test_a_folder_and_a_file_read_as_the_dict_they_hold(self, tmp_path):
        config("llama").save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert decoder_spec(tmp_path, "mine") == decoder_spec(tmp_path / "config.json", "mine")
        assert decoder_spec(tmp_path, "mine") == decoder_spec(saved, "mine")

    def test_layers_of_two_kinds_are_an_error(self):
        shape = Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=5)
        without_types = {name: value for name, value in shape.to_dict().items() if name != "layer_types"}
        for config_dict in (shape.to_dict(), without_types):
            with pytest.raises(SpecError, match="only one kind for all is supported"):
                decoder_spec(config_dict)

    @pytest.mark.parametrize("kind", ["gpt2", "gemma2", None])
    def test_another_architecture_is_an_error(self, kind):
        with pytest.raises(SpecError, match=f"model_type {kind!r} is not supported; one of llama, mistral, qwen2"):
            decoder_spec({"model_type": kind})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attention_bias": True}, "attention_bias is not supported"),
            ({"mlp_bias": True}, "mlp_bias is not supported"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
            ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_"),
            ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
            ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling of type linear has no factor"),
            ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ],
    )
    def test_what_the_decoder_cannot_do_is_an_error_and_not_a_wrong_model(self, change, message):
        with pytest.raises(SpecError, match=message):
            decoder_spec({**config("llama").to_dict(), **change})

    def test_a_model_of_mixed_layers_has_sizes_but_no_decoder(self):
        mixed = dataclasses.replace(SMALL, window=4, layers=[LayerGroup("window"), LayerGroup("full")])
        assert [layer.kind for layer in mixed.each_layer] == ["window", "full"]
        with pytest.raises(SpecError, match=r"small \(llama, layers: window and full\) is no Llama-style model"):
            Llama(mixed)

    def test_rotary_scaling_that_the_decoder_lacks_leaves_the_sizes_readable(self):
        shape = {**config("llama").to_dict(), "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
        spec = from_hf_config(shape, "stretched")
        assert spec.num_parameters == from_hf_config(config("llama").to_dict()).num_parameters
        with pytest.raises(SpecError, match="stretched: rope_type 'yarn' is not supported"):
            Llama(spec)


class TestModelSpec:
    @pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
    @pytest.mark.parametrize("field", ["num_layers", "vocab_size", "window"])
    def test_a_size_that_is_no_positive_whole_number_is_an_error(self, field, value):
        with pytest.raises(ValueError, match=f"small: {field} must be a whole number, at least 1"):
            dataclasses.replace(SMALL, **{field: value})

    def test_heads_that_do_not_divide_are_an_error(self):
        with pytest.raises(ValueError, match="multiple of num_kv_heads"):
            dataclasses.replace(SMALL, num_kv_heads=3)

    def test_an_odd_head_dim_is_an_error(self):
        with pytest.raises(ValueError, match=r"head_dim \(7\) must be even"):
            dataclasses.replace(SMALL, head_dim=7)

    def test_query_heads_per_kv_head(self):
        assert SMALL.num_queries_per_kv == 2

    def test_it_can_be_a_key(self):
        scaled = dataclasses.replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0})
        assert {SMALL: 1, scaled: 2}[scaled] == 2


class TestNamedModels:
    def test_each_file_is_a_spec_that_says_where_its_numbers_come_from(self):
        assert "smollm2-135m" in specs.models()
        for name, spec in specs.models().items():
            assert spec.name == name
            assert spec.source
            assert spec.date

    def test_an_unknown_name_offers_the_nearest(self):
        with pytest.raises(ValueError, match=r"no model spec is called 'smolm2-135'; nearest: .*smollm2-135m"):
            specs.model("smolm2-135")

    def test_a_name_near_to_none_offers_some(self):
        with pytest.raises(ValueError, match=r"nearest: [a-z]"):
            specs.model("@@@@")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('{"name": "x"}', "line 1: num_layers is missing: add it"),
            ("[]", "line 1: "),
            ("{not json", "line 1: not valid JSON"),
            ('{\n"name": "x",\n"heads": 3}', "line 3: heads is no field of a spec"),
        ],
    )
    def test_a_file_that_is_no_spec_is_named_with_its_line(self, text, said, tmp_path, monkeypatch):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "broken.json").write_text(text)
        monkeypatch.setattr(specs, "DATA", tmp_path)
        with pytest.raises(SpecError) as error:
            specs.model("broken")
        assert str(error.value).startswith(f"broken.json, {said}")
        assert "\n" not in str(error.value)
        assert specs.models() == {}


def test_specs_need_no_torch():
    code = "import sys, labkit.specs; labkit.specs.models(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


SHAPE = {
    "name": "small", "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64,
    "intermediate_size": 128, "vocab_size": 100, "max_seq_len": 512, "parameters": 10**6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": -5.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of rope_scaling must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor of rope_scaling must be a number above 0"),
        ({"layers": [LayerGroup("none"), LayerGroup("shared")]}, "layer 1 cannot be shared: no earlier one keeps"),
        ({"layers": [LayerGroup("state", state_bytes=8), LayerGroup("shared")]}, "layer 1 cannot be shared"),
        ({"layers": [LayerGroup("none")]}, 'all layers are of kind "none": the model keeps nothing of the text'),
        ({"layers": [LayerGroup("none"), LayerGroup("none", count=2)]}, 'all layers are of kind "none"'),
        ({"layers": [LayerGroup("full", count=4), LayerGroup("none")]}, r"layers\[1\] begins after 4 layers"),
        ({"parameters": 6401}, r"parameters \(6,401\) are fewer than the embeddings and the head have \(12,800\)"),
        ({"active_parameters": 12_799}, r"active_parameters \(12,799\) are fewer than the embeddings and the head"),
        ({"parameters": 6399, "tied_head": True}, r"parameters \(6,399\) are fewer than the embeddings alone"),
        ({"active_parameters": 5}, r"active_parameters \(5\) cannot be"),
        ({"active_parameters": 5, "num_experts": 8, "experts_per_token": 2}, r"active_parameters \(5\) cannot be"),
    ],
)
def test_a_spec_that_no_model_can_have_is_refused(change, said):
    with pytest.raises(SpecError, match=said):
        ModelSpec(**SHAPE | change)


def test_a_model_file_that_was_changed_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "DATA", tmp_path)
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "small.json"
    for layers in (4, 12):
        path.write_text(json.dumps(SHAPE | {"num_layers": layers}))
        assert specs.model("small").num_layers == layers
