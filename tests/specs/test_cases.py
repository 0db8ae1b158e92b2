"""Configs from practice whose figures are easily read wrong, with the right ones; bytes per token in 16 bits."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from labkit.sizing import bytes_per_token
from labkit.specs import LayerGroup, ModelSpec, SpecError, from_hf_config, kept
from tests.specs.every_config import build, shrunk, text_of

S, F = "sliding_attention", "full_attention"
BASE = {"intermediate_size": 1, "vocab_size": 1000, "max_position_embeddings": 131_072}
LATE = 10**6  # every window is full
GEMMA4 = {
    "model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 30, "hidden_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    "sliding_window": 1024, "layer_types": ([S] * 5 + [F]) * 5,
}  # fmt: skip
MIMO = {
    "model_type": "mimo_v2_flash", "num_hidden_layers": 48, "hidden_size": 4096, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "swa_num_key_value_heads": 8, "swa_head_dim": 192,
    "swa_v_head_dim": 128, "sliding_window": 128, "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0] + [1, 1, 1, 1, 1, 0] * 7,
}  # fmt: skip
MINIMAX = {
    "model_type": "minimax_m1", "num_hidden_layers": 80, "hidden_size": 6144, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "attn_type_list": ([0] * 7 + [1]) * 10,
}  # fmt: skip
PLAMO = {
    "model_type": "plamo2", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 1, "hidden_size_per_head": 128, "mamba_enabled": True, "mamba_step": 2,
    "mamba_num_heads": 32, "mamba_d_state": 64,
}  # fmt: skip
MLLAMA = {
    "model_type": "mllama_text_model", "num_hidden_layers": 40, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}  # fmt: skip
STEP = {
    "model_type": "step3p5", "num_hidden_layers": 45, "hidden_size": 4096, "num_attention_heads": 64,
    "num_attention_groups": 8, "head_dim": 128, "sliding_window": 512, "layer_types": (([F] + [S] * 3) * 12)[:45],
}  # fmt: skip
MAVERICK = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
        "interleave_moe_layer_step": 2, "num_local_experts": 128, "num_experts_per_tok": 1, "vocab_size": 202_048,
        "max_position_embeddings": 1_048_576, "attention_chunk_size": 8192,
    },
}  # fmt: skip
RECURRENT = {
    "model_type": "recurrent_gemma", "_block_types": ["recurrent", "recurrent", "attention"],
    "attention_window_size": 2048, "num_hidden_layers": 26, "hidden_size": 2560, "num_attention_heads": 10,
    "num_key_value_heads": 1, "intermediate_size": 15_360, "lru_width": 2560, "vocab_size": 256_000, "conv1d_width": 4,
}  # fmt: skip
QWEN3_VL = {
    "model_type": "qwen3_vl", "tie_word_embeddings": False, "vision_config": {"depth": 27},
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288, "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
    },
}  # fmt: skip


def read(config: dict, **change) -> ModelSpec:
    return from_hf_config({**BASE, **config, **change}, parameters=10**12)


def each(spec: ModelSpec) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in spec.each_layer:
        found[layer.kind] = found.get(layer.kind, 0) + 1
    return found


@pytest.mark.parametrize(
    ("config", "first", "late"),
    [
        (GEMMA4, 225_280, 20_480),
        (MIMO, 222_720, 23_040),
        (MINIMAX, 40_960, 40_960),
        (PLAMO, 4096, 4096),
        (MLLAMA, 131_072, 131_072),
        (STEP, 184_320, 49_152),
        ({"model_type": "ernie4_5", "num_hidden_layers": 18, "hidden_size": 1024, "num_attention_heads": 16},)
        + (18_432,) * 2,
    ],
    ids=["gemma4", "mimo", "minimax_m1", "plamo2", "mllama", "step3p5", "ernie4_5"],
)
def test_a_tokens_bytes_are_right_early_and_late(config, first, late):
    spec = read(config)
    assert (bytes_per_token(spec), bytes_per_token(spec, position=LATE)) == (first, late)


def test_layers_without_attention_keep_a_state_and_cross_attention_keeps_nothing_of_the_text():
    assert each(read(PLAMO)) == {"state": 8, "full": 8}
    assert read(PLAMO).each_layer[0].state_bytes == 2 * 4096 * 3 + 4 * 4096 * 64
    assert each(read(MINIMAX)) == {"state": 70, "full": 10}
    assert each(read(MLLAMA)) == {"full": 32, "none": 8}
    assert each(from_hf_config(RECURRENT)) == {"state": 18, "window": 8}
    assert {layer.window for layer in from_hf_config(RECURRENT).each_layer} == {None, 2048}


def test_key_and_value_heads_that_a_config_leaves_out_are_its_classs():
    for kind in ("gemma", "gemma2", "qwen3_next"):  # whose head_dim is not hidden_size / heads
        spec = read({"model_type": kind, "num_hidden_layers": 4, "hidden_size": 2048, "num_attention_heads": 16})
        assert spec.head_dim == 256


class TestActiveParameters:
    def test_of_gemma_4_its_experts_are_counted_whatever_names_them(self):
        more = {
            "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "intermediate_size": 2112,
            "enable_moe_block": True, "hidden_size_per_layer_input": 0, "vocab_size": 262_144,
            "tie_word_embeddings": True,
        }  # fmt: skip
        spec = from_hf_config({**BASE, **GEMMA4, **more})
        assert (spec.num_parameters, spec.num_active_parameters) == (25_233_141_790, 3_822_530_590)
        assert (spec.num_experts, spec.experts_per_token) == (128, 8)

    def test_layers_without_experts_between_others_are_seen(self):
        assert from_hf_config(MAVERICK, parameters=400_710_000_000).active_parameters == 17_182_842_240

    def test_of_a_vision_model_the_language_model_is_counted(self):
        assert from_hf_config(QWEN3_VL).num_parameters == 8_190_735_360

    @pytest.mark.parametrize("kind", ["minimax", "apertus"])
    def test_constants_that_a_class_keeps_beside_its_weights_are_none(self, kind):
        model = build(text_of(shrunk(kind)))
        buffers = [tensor for name, tensor in model.state_dict(keep_vars=True).items() if not tensor.requires_grad]
        assert buffers  # decays, and constants of an activation
        assert from_hf_config(shrunk(kind)).num_parameters == sum(tensor.numel() for tensor in model.parameters())

    def test_biases_that_training_sets_are_weights_whatever_keeps_them(self):
        model = build(text_of(shrunk("deepseek_v3")))
        biases = [tensor.numel() for name, tensor in model.named_buffers() if name.endswith("correction_bias")]
        weights = sum(tensor.numel() for tensor in model.parameters())
        assert from_hf_config(shrunk("deepseek_v3")).num_parameters == weights + sum(biases) > weights

    def test_fewer_weights_than_its_experts_have_are_an_error(self):
        with pytest.raises(SpecError, match=r"the experts that a token does not meet would have .*7B is 7000000000"):
            from_hf_config(MAVERICK, parameters=17 * 10**9)


def test_a_text_part_takes_its_classs_values_where_it_says_nothing():
    part = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32_064}
    spec = from_hf_config({"model_type": "llava", "text_config": part}, parameters=7 * 10**9)
    assert bytes_per_token(spec) == 524_288


class TestHowItWasFound:
    def test_the_spec_says_it(self):
        assert read(GEMMA4).found.startswith("measured on transformers 5.")
        assert read(GEMMA4).found.endswith("'s Gemma4ForCausalLM")
        llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        assert read(llama).found == "by arithmetic: plain Llama shape"
        assert read(MINIMAX).found == "read as a plain decoder: transformers has no such type"

    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
    def test_the_short_way_gives_what_is_measured(self, kind):
        shape = {
            "model_type": kind, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "sliding_window": 77 if kind == "mistral" else None, "rope_theta": 5000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        }  # fmt: skip
        short = from_hf_config({**BASE, **shape})
        measured = from_hf_config({**BASE, **shape, "a_key_of_ones_own": 1})  # so that it is no plain shape
        assert short.found.startswith("by arithmetic")
        assert measured.found.startswith("measured")
        assert short == measured  # exact: `found` is no part of a comparison


class TestUnknownTypes:
    PLAIN: ClassVar = {
        "model_type": "brandnew", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "torch_dtype": "bfloat16", "rope_theta": 10_000.0, "bos_token_id": 1,
    }  # fmt: skip

    def test_a_plain_decoder_is_read_by_its_usual_keys(self):
        assert each(read(self.PLAIN)) == {"full": 4}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("layer_pattern", "MMAM"), ("ssm_state_size", 16), ("attention_window_size", 2048),
            ("full_attention_idx", [3]), ("attention_other_setting", {"num_heads": 8}),
            ("global_attn_every_n_layers", 4),
            ("use_global_attention", False), ("kv_sharing", [1]), ("hybrid_override_pattern", "M-M*"),
            ("linear_attn_config", {"kda_layers": [1]}), ("index_head_dim", 128),
        ],
    )  # fmt: skip
    def test_a_key_that_may_say_otherwise_is_named_and_never_taken_for_full_attention(self, key, value):
        with pytest.raises(SpecError, match=f"has no model_type 'brandnew', and {key} is not read here") as error:
            read(self.PLAIN, **{key: value})
        assert "\n" not in str(error.value)

    def test_a_null_says_nothing(self):
        assert each(read(self.PLAIN, layer_pattern=None)) == {"full": 4}

    @pytest.mark.parametrize("key", ["hybrid_override_pattern", "attention_window_size", "attn_type_list"])
    def test_neither_is_it_of_a_type_whose_class_does_not_read_it(self, key):
        value = {"hybrid_override_pattern": "M-M*", "attention_window_size": 100, "attn_type_list": [0, 1, 0, 1]}[key]
        with pytest.raises(SpecError, match=f"{key} is not read by transformers' LlamaConfig, and is not read here"):
            read(self.PLAIN, model_type="llama", **{key: value})

    def test_experts_of_which_it_is_not_said_how_many_a_token_meets_are_an_error(self):
        with pytest.raises(SpecError, match="num_local_experts is 8, but how many of them a token meets is not said"):
            read(self.PLAIN, num_local_experts=8)

    def test_weights_that_cannot_be_counted_say_how_to_give_them(self):
        with pytest.raises(SpecError, match=r"cannot be counted .*give parameters=, or --parameters on the"):
            from_hf_config({**BASE, **self.PLAIN})


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"num_kv_shared_layers": 10**9}, "num_kv_shared_layers is 1,000,000,000: more than"),
            ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is from 0 to 29, of 30 layers; got -1"),
            ({"num_kv_shared_layers": 30}, "num_kv_shared_layers is from 0 to 29, of 30 layers; got 30"),
            ({"layer_types": [F] * 3}, "layer_types names 3 layers, num_hidden_layers is 30"),
            ({"layer_types": "full"}, "layer_types is a list, one for each layer; got 'full'"),
            ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number, at least 1; got 0"),
            ({"num_key_value_heads": -8}, "num_key_value_heads must be a whole number, at least 1; got -8"),
            ({"num_attention_heads": True}, "num_attention_heads must be a whole number, at least 1; got True"),
            ({"hidden_size": 10**30}, "more than 1,000,000,000 cannot be meant"),
            ({"num_attention_heads": 10**9}, "num_attention_heads is 1,000,000,000: more than"),
            ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1,000,000,000: more than 10,000"),
            ({"num_hidden_layers": 2000, "layer_types": None}, "more than 1,000 layers are not built here"),
        ],
    )
    @pytest.mark.parametrize("kind", ["gemma4_text", "brandnew"])
    def test_sizes_are_refused_before_anything_is_built(self, kind, change, said):
        if kind == "brandnew" and change.get("num_hidden_layers") == 2000:
            pytest.skip("read by arithmetic, so many layers are no trouble")
        start = time.process_time()
        with pytest.raises(SpecError, match=said) as error:
            read({**GEMMA4, "model_type": kind}, **change)
        assert "\n" not in str(error.value)
        assert time.process_time() - start < 30

    @pytest.mark.parametrize(
        ("group", "said"),
        [
            ({"kind": "full", "state_bytes": 8}, 'a layer of kind "full" has no state_bytes'),
            ({"kind": "full", "window": 8}, 'a layer of kind "full" has no window: .*or is the kind window'),
            ({"kind": "state"}, 'a layer of kind "state" needs state_bytes: bytes kept per request'),
            ({"kind": "latent"}, 'a layer of kind "latent" needs latent_dim'),
            ({"kind": "state", "state_bytes": 8, "num_kv_heads": 2}, 'a layer of kind "state" has no num_kv_heads'),
            ({"kind": "shared", "head_dim": 2}, 'a layer of kind "shared" has no head_dim'),
            ({"kind": "full", "num_kv_heads": 0}, "num_kv_heads must be a whole number, at least 1; got 0"),
        ],
    )
    def test_a_group_of_layers_says_only_what_its_kind_has(self, group, said):
        with pytest.raises(SpecError, match=said):
            LayerGroup(**group)


def imported(module: str) -> set[str]:
    """The modules of labkit.specs that a module there is made of, itself included."""
    tree = ast.parse((Path(kept.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "labkit.specs":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("labkit.specs."):
            found.add(node.module.rpartition(".")[2])
    return {module}.union(*map(imported, found - {"files"}))  # which only says what is wrong


def test_an_answer_is_kept_until_any_file_that_it_is_made_by_changes():
    assert {f"{name}.py" for name in imported("measured")} == set(kept.MEASURING)


class TestKeptAnswers:
    CONFIG: ClassVar = {**BASE, **GEMMA4, "num_hidden_layers": 6, "layer_types": [S] * 5 + [F]}

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
        return tmp_path / "specs"

    def test_a_second_call_in_another_process_needs_no_torch(self, folder):
        first = from_hf_config(self.CONFIG)
        code = (
            "import sys, json; from labkit.specs import from_hf_config\n"
            "spec = from_hf_config(json.loads(sys.argv[1])); print(spec.num_parameters, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(self.CONFIG)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [str(first.num_parameters), "False"]

    def test_a_damaged_file_is_not_believed(self, folder):
        first = from_hf_config(self.CONFIG)
        (path,) = folder.iterdir()
        good = path.read_text()
        for damaged in ("", "{", "[]", good[:-20], good.replace('"num_kv_heads": 8', '"num_kv_heads": 4')):
            path.write_text(damaged)
            assert from_hf_config(self.CONFIG) == first
        assert path.read_text() == good

    def test_a_folder_that_cannot_be_written_keeps_nothing(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
        assert from_hf_config(self.CONFIG).num_layers == 6

    def test_a_folder_in_nobodys_home_keeps_nothing(self, monkeypatch):
        monkeypatch.setenv("LABKIT_CACHE", "~nobody9/c")
        assert from_hf_config(self.CONFIG).num_layers == 6

    def test_what_a_writer_that_was_killed_left_is_removed(self, folder):
        first = from_hf_config(self.CONFIG)
        (path,) = folder.iterdir()
        left = folder / f".{path.name}.x.tmp"
        left.write_text("{")
        os.utime(left, (1, 1))
        path.unlink()
        assert from_hf_config(self.CONFIG) == first
        assert list(folder.iterdir()) == [path]
