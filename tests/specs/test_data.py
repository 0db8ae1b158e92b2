"""The files in `data/models`: valid, sourced, dated, named as files, and right where they can be recounted."""

import dataclasses
import datetime
import json
import os
import shutil

import pytest
import torch

from labkit import specs
from labkit.llama import Llama
from labkit.specs import DECODER_TYPES, SpecError

NAMES = sorted(path.stem for path in (specs.DATA / "models").glob("*.json"))
RUNNABLE = [name for name in NAMES if specs.model(name).model_type in DECODER_TYPES]


def test_there_are_at_least_35_real_models_of_every_family_that_the_labs_speak_of():
    assert len(NAMES) >= 35
    types = {specs.model(name).model_type for name in NAMES}
    assert types >= {
        "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "gemma2", "gemma3_text",
        "gemma3n_text", "phi3", "falcon", "palm", "deepseek_v2", "deepseek_v3", "gpt_oss", "opt", "dbrx", "jamba",
    }  # fmt: skip
    kinds = {layer.kind for name in NAMES for layer in specs.model(name).each_layer}
    assert kinds == {"full", "window", "latent", "shared", "state"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_and_where_its_numbers_come_from(name):
    spec = specs.model(name)
    assert spec.name == name == name.lower()
    assert spec.title
    assert spec.source.startswith("https://") or "metadata of" in spec.source
    assert datetime.date(2019, 1, 1) < datetime.date.fromisoformat(spec.date) < datetime.date.today()
    assert spec.parameters is not None
    assert len(spec.each_layer) == spec.num_layers


@pytest.mark.parametrize("name", RUNNABLE)
def test_published_parameters_of_a_llama_shape_are_those_that_its_shape_gives(name):
    spec = specs.model(name)
    assert dataclasses.replace(spec, parameters=None).num_parameters == spec.parameters  # exact


@pytest.mark.parametrize("name", RUNNABLE)
def test_our_decoder_of_a_llama_shape_has_the_published_parameters(name):
    with torch.device("meta"):
        model = Llama(specs.model(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == specs.model(name).parameters  # exact


@pytest.mark.parametrize(
    ("name", "published"),
    [  # billions, as the paper or the model's page gives them: all, and those that one token meets
        ("mixtral-8x7b", (46.7, 12.9)),  # mistral.ai, 11 December 2023
        ("mixtral-8x22b", (141, 39)),  # mistral.ai, 17 April 2024
        ("deepseek-v2", (236, 21)),  # arXiv:2405.04434
        ("deepseek-v3", (671, 37)),  # arXiv:2412.19437
        ("qwen3-30b-a3b", (30.5, 3.3)),  # arXiv:2505.09388
        ("qwen3-235b-a22b", (235, 22)),  # arXiv:2505.09388
        ("qwen3-next-80b-a3b", (80, 3)),
        ("dbrx", (132, 36)),  # databricks/dbrx, README
        ("jamba-v0.1", (52, 12)),  # arXiv:2403.19887
        ("hunyuan-large", (389, 52)),  # arXiv:2411.02265
        ("llama-4-scout", (109, 17)),  # with its vision encoder
    ],
)
def test_parameters_of_a_mixture_of_experts_are_those_that_were_published(name, published):
    spec = specs.model(name)
    # Bounded: publications round, some to whole billions, and differ on whether embeddings are met.
    assert spec.num_parameters / 1e9 == pytest.approx(published[0], rel=0.02)
    assert spec.num_active_parameters / 1e9 == pytest.approx(published[1], abs=1)


@pytest.mark.parametrize(
    ("name", "elements"),
    [  # K and V of one token, all layers; at two bytes each these are 57,344, 131,072 and 327,680 bytes and so on
        ("qwen2.5-7b", 28_672),
        ("llama-3-8b", 65_536),
        ("llama-3-70b", 163_840),
        ("llama-2-7b", 262_144),
        ("opt-13b", 409_600),  # 800 KB in float16: arXiv:2309.06180, section 3
        ("palm-540b", 118 * 2 * 256),
        ("falcon-7b", 32 * 2 * 64),
        ("deepseek-v3", 61 * 576),
        ("hunyuan-large", 32 * 2 * 8 * 80),
        ("jamba-v0.1", 4 * 2 * 8 * 128),
    ],
)
def test_one_tokens_keys_and_values(name, elements):
    assert sum(layer.elements_per_token for layer in specs.model(name).each_layer) == elements


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("gemma-3-27b", {"window": 52, "full": 10}),
        ("gemma-3-1b", {"window": 22, "full": 4}),
        ("gemma-2-27b", {"window": 23, "full": 23}),
        ("gpt-oss-120b", {"window": 18, "full": 18}),
        ("gemma-3n-e4b", {"window": 16, "full": 4, "shared": 15}),
        ("qwen3-next-80b-a3b", {"state": 36, "full": 12}),
        ("jamba-v0.1", {"state": 28, "full": 4}),
        ("hunyuan-large", {"full": 32, "shared": 32}),
        ("llama-4-scout", {"window": 36, "full": 12}),
        ("mistral-7b", {"window": 32}),
        ("mistral-7b-v0.3", {"full": 32}),
        ("deepseek-v2-lite", {"latent": 27}),
    ],
)
def test_how_many_layers_there_are_of_each_kind(name, kept):
    found: dict[str, int] = {}
    for layer in specs.model(name).each_layer:
        found[layer.kind] = found.get(layer.kind, 0) + 1
    assert found == kept


class TestAFileOfOnesOwn:
    GOOD = json.loads((specs.DATA / "models" / "llama-2-7b.json").read_text())

    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        (tmp_path / "models").mkdir()
        monkeypatch.setattr(specs, "DATA", tmp_path)

        def write(change, stem="mine"):
            content = {key: value for key, value in {**self.GOOD, "name": "mine", **change}.items() if value != "-"}
            (tmp_path / "models" / f"{stem}.json").write_text(json.dumps(content, indent=1))

        return write

    def test_it_is_there_under_its_name(self, write):
        write({})
        assert specs.model("mine").num_parameters == 6_738_415_616
        assert list(specs.models()) == ["mine"]

    @pytest.mark.parametrize(
        ("change", "line", "said"),
        [
            ({"num_heads": 0}, 6, "num_heads must be a whole number, at least 1; got 0"),
            ({"num_heads": "32"}, 6, "num_heads must be a whole number, at least 1; got '32'"),
            ({"num_heads": 32.5}, 6, "num_heads must be a whole number, at least 1; got 32.5"),
            ({"hidden_size": -4096}, 9, "hidden_size must be a whole number, at least 1; got -4096"),
            ({"head_dim": "-"}, 1, "head_dim is missing: add it"),
            ({"heads": 32}, 16, "heads is no field of a spec: take it out, or correct its name"),
            ({"num_kv_heads": 5}, 1, r"mine: num_heads (32) must be a multiple of num_kv_heads (5)"),
            ({"parameters": 7}, 1, "mine: parameters (7) are fewer than the embeddings alone (131,072,000): write"),
            ({"layers": [{"kind": "window"}]}, 1, 'mine: a layer of kind "window" needs a window'),
            ({"layers": [{"kind": "shared"}]}, 1, "mine: the first layer cannot be shared"),
        ],
    )
    def test_what_is_wrong_is_named_with_file_line_field_and_remedy(self, write, change, line, said):
        write(change)
        with pytest.raises(SpecError) as error:
            specs.model("mine")
        assert specs.models() == {}
        assert str(error.value).startswith(f"mine.json, line {line}: {said}")
        assert "\n" not in str(error.value)

    def test_a_file_under_another_name_than_its_own_is_an_error(self, write):
        write({}, stem="other")
        with pytest.raises(SpecError, match=r'other\.json: its name is "mine": call the file mine\.json'):
            specs.model("other")


class TestOneBadFile:
    """Among good ones: these are read, and it is named."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        for name in ("llama-2-7b", "gpt2"):
            (tmp_path / "models").mkdir(exist_ok=True)
            shutil.copy(specs.DATA / "models" / f"{name}.json", tmp_path / "models")
        shutil.copy(specs.DATA / "gpus.json", tmp_path)
        monkeypatch.setattr(specs, "DATA", tmp_path)
        return tmp_path / "models"

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"{", "line 1: not valid JSON"),
            (b"\xff\xfe", "cannot be read as UTF-8 text"),
            (b'{"name": "bad",\n "num_heads": 4,\n "num_heads": 8}', 'line 3: "num_heads" is given twice'),
            (b"[" * 100_000, "cannot be read"),
            (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        ],
    )
    def test_is_named_and_hides_no_other(self, folder, content, said):
        (folder / "bad.json").write_bytes(content)
        assert sorted(specs.models()) == ["gpt2", "llama-2-7b"]
        (problem,) = specs.problems()
        assert "bad.json" in problem
        assert said in problem
        assert "\n" not in problem
        with pytest.raises(SpecError, match=r"bad\.json"):
            specs.model("bad")

    def test_a_folder_a_pipe_and_a_dangling_link_are_no_files(self, folder):
        (folder / "folder.json").mkdir()
        os.mkfifo(folder / "pipe.json")
        (folder / "link.json").symlink_to(folder / "nowhere")
        assert sorted(specs.models()) == ["gpt2", "llama-2-7b"]
        said = specs.problems()
        assert len(said) == 3
        assert sum("not a file" in problem for problem in said) == 2

    def test_files_of_other_programs_are_left_alone(self, folder):
        (folder / "._gpt2.json").write_bytes(b"\x00\x05\x16\x07")
        (folder.parent / "._gpus-mine.json").write_bytes(b"\x00")
        assert specs.problems() == []
        assert "h100-80gb" in specs.gpus()

    def test_a_byte_order_mark_is_no_fault(self, folder):
        path = folder / "gpt2.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert specs.model("gpt2").num_layers == 12

    def test_a_bad_file_of_gpus_breaks_no_built_in_one(self, folder):
        (folder.parent / "gpus-mine.json").write_text("{")
        assert specs.gpu("h100-80gb").memory_gib == 79.1
        (problem,) = specs.problems()
        assert problem.startswith("gpus-mine.json, line 1: not valid JSON")
        with pytest.raises(SpecError, match=r"no GPU is called 'mine'; .*; gpus-mine\.json, line 1: not valid JSON"):
            specs.gpu("mine")
