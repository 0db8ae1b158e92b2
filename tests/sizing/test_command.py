import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from labkit import sizing, specs
from labkit.course import cli

CONFIGS = Path(__file__).parents[1] / "configs"
H100 = ["--gpu", "h100-80gb"]


def size(*arguments):
    return cli.main(["size", *arguments])


@pytest.fixture
def answer(capsys):
    """What `labkit size ... --json` prints."""

    def ask(*arguments):
        assert size(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def refused(capsys):
    """The one line on stderr that a command ends with, without its beginning."""

    def ask(*arguments):
        assert size(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("labkit: ")
        assert err.count("\n") == 1
        return err.removeprefix("labkit: ").strip()

    return ask


@pytest.fixture
def config(tmp_path):
    """A folder with a Llama's config.json."""
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.2-1b.json").read_text())
    return tmp_path


def test_a_models_sizes_are_printed_with_their_table(capsys):
    assert size("qwen2.5-7b") == 0
    said = capsys.readouterr().out
    assert "28 full (4 KV heads of 128)" in said
    assert "7,615,616,512: 15.23 GB, 14.19 GiB in bfloat16" in said
    assert "57,344" in said
    assert "401,408 bytes per token, 7 times as many" in said
    rows = [line.split() for line in said.splitlines() if line.strip().startswith(("2,048", "131,072"))]
    assert rows == [["2,048", "0.117", "GB", "0.109", "GiB"], ["131,072", "7.516", "GB", "7.000", "GiB"]]


def test_windows_latents_states_and_shared_layers_are_named(capsys):
    for name, words in {
        "gemma-3-27b": ("52 window (16 KV heads of 128, 1,024 tokens)", "windows full      81,920"),
        "deepseek-v3": ("61 latent (576 numbers per token)",),
        "jamba-v0.1": (" state (", "4 full"),
        "gemma-3n-e4b": ("15 shared",),
        "gpt2": ("the same: each head has its own", "longer than the 1,024 tokens"),
        "mixtral-8x7b": ("a token meets",),
    }.items():
        assert size(name) == 0
        said = capsys.readouterr().out
        assert [word for word in words if word not in said] == []


def test_a_gpu_gets_the_plan_and_the_capacity_table(capsys):
    assert size("qwen2.5-7b", *H100, "--context", "8K", "--users", "32") == 0
    said = capsys.readouterr().out
    asked = sizing.plan(specs.model("qwen2.5-7b"), specs.gpu("h100-80gb"), context=8192, users=32)
    assert said.startswith(sizing.table(asked))
    fitting = {row[0]: row[1] for row in map(str.split, said.splitlines()) if len(row) > 8}
    assert [fitting[length] for length in ("2,048", "8,192", "32,768", "131,072")] == ["504", "126", "31", "7"]


def test_json_holds_the_plan_as_sizing_makes_it(answer):
    said = answer(
        "llama-3.1-70b", *H100, "--ranks", "4", "--context", "32K", "--batch", "16", "--kv-dtype", "float8",
        "--weight-dtype", "int8", "--reserve", "0.1", "--link", "pcie5-x16",
    )  # fmt: skip
    model, gpu, link = specs.model("llama-3.1-70b"), specs.gpu("h100-80gb"), specs.link("pcie5-x16")
    how = {"dtype": "float8", "weight_dtype": "int8", "reserve": 0.1, "ranks": 4}
    assert said["plan"] == sizing.plan(model, gpu, context=32_768, users=16, link=link, **how).as_dict()
    assert said["link"] == "pcie5-x16"
    fitting = sizing.max_batch_context_frontier(model, gpu, [row["context"] for row in said["capacity"]], **how)
    assert [(row["context"], row["users"]) for row in said["capacity"]] == fitting
    for row in said["capacity"]:
        asked = sizing.plan(model, gpu, context=row["context"], users=row["users"], link=link, **how)
        assert row["step"] == asked.step
        assert row["bytes_per_user"] * row["users"] == asked.cache


def test_json_without_a_gpu_holds_raw_bytes(answer):
    said, model = answer("gemma-2-9b", "--users", "3", "--kv-dtype", "int8"), specs.model("gemma-2-9b")
    assert said["weights"] == sizing.weight_bytes(model)
    assert said["bytes_per_token"] == sizing.bytes_per_token(model, "int8")
    assert said["bytes_per_token_windows_full"] == sizing.bytes_per_token(model, "int8", position=4096)
    assert said["mha_bytes_per_token"] == sizing.mha_bytes_per_token(model, "int8")
    assert said["parameters"] == model.num_parameters
    lengths = [row["context"] for row in said["cache"]]
    assert lengths == [2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072]
    assert [row["bytes"] for row in said["cache"]] == [sizing.cache_bytes(model, n, 3, "int8") for n in lengths]


def test_every_model_prints_and_every_answer_is_json(answer, capsys):
    for name in specs.models():
        assert answer(name)["model"] == name
        said = answer(name, *H100)
        assert said["plan"]["model"] == name
        assert size(name, *H100) == 0
        assert said["plan"]["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "tokens"), [("128K", 131_072), ("128k", 131_072), ("1M", 2**20), ("10000", 10_000), ("10,000", 10_000)]
)
def test_a_context_is_plain_or_in_units_of_1024(answer, text, tokens):
    assert answer("qwen2.5-7b", *H100, "--context", text)["plan"]["context"] == tokens
    assert tokens in [row["context"] for row in answer("qwen2.5-7b", "--context", text)["cache"]]


def test_gpus_without_a_named_link_use_their_fastest(answer):
    assert answer("qwen2.5-7b", *H100, "--ranks", "2")["link"] == specs.gpu("h100-80gb").links[0]
    assert answer("qwen2.5-7b", *H100)["link"] is None
    mac = next(gpu.name for gpu in specs.gpus().values() if not gpu.links)
    assert answer("qwen2.5-7b", "--gpu", mac, "--ranks", "2")["link"] is None


def test_a_config_or_a_folder_with_one_is_a_model(answer, config, monkeypatch):
    spec = specs.model("llama-3.2-1b")
    for given in (config / "config.json", config):
        said = answer(str(given))
        assert said["bytes_per_token"] == sizing.bytes_per_token(spec)
        assert said["parameters"] == spec.num_parameters
    monkeypatch.chdir(config.parent)
    assert answer(config.name)["parameters"] == spec.num_parameters
    assert answer(str(config), "--parameters", "5,000,000,000")["parameters"] == 5 * 10**9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model"),
        (["qwen2.5-7"], ", qwen2.5-7b"),
        (["Qwen/Qwen2.5-7B"], "nearest: qwen2.5-7b"),
        (["qwen2.5-7b", "--gpu", "h100-80"], "nearest: h100-80gb"),
        (["qwen2.5-7b", *H100, "--ranks", "2", "--link", "nvlnk4"], "nearest: nvlink4"),
        (["qwen2.5-7b", *H100, "--ranks", "8"], "28 query heads do not divide over 8 ranks"),
        (["qwen2.5-7b", "--ranks", "2"], "--ranks needs a device: name one with --gpu"),
        (["qwen2.5-7b", "--reserve", "0.2"], "--reserve needs a device"),
        (["qwen2.5-7b", *H100, "--link", "nvlink4"], "--link connects several GPUs: say with --ranks how many"),
        (["qwen2.5-7b", "--context", "128GB"], "--context counts tokens: 8192, or 128K for 131,072; got '128GB'"),
        (["qwen2.5-7b", "--context", "1.5"], "got '1.5'"),
        (["qwen2.5-7b", "--context", "1,5"], "got '1,5'"),
        (["qwen2.5-7b", "--context", "-5"], "got '-5'"),
        (["qwen2.5-7b", "--context", ""], "got ''"),
        (["qwen2.5-7b", "--context", "0"], "at least 1; got 0"),
        (["qwen2.5-7b", "--context", "9999999M"], "is it in another unit?"),
        (["qwen2.5-7b", "--users", "2K"], "--users is a whole number without a unit, at least 1; got '2K'"),
        (["qwen2.5-7b", "--batch", "0"], "--users is a whole number without a unit, at least 1; got '0'"),
        (["qwen2.5-7b", "--users", "99999999999"], "cannot be meant"),
        (["qwen2.5-7b", *H100, "--ranks", "half"], "--ranks is a whole number"),
        (["qwen2.5-7b", "--kv-dtype", "int3"], "'int3' is no dtype known here"),
        (["qwen2.5-7b", "--weight-dtype", "4bit"], "'4bit' is no dtype known here"),
        (["qwen2.5-7b", *H100, "--reserve", "15%"], "15% is 0.15"),
        (["qwen2.5-7b", *H100, "--reserve", "15"], "15% is 0.15"),
        (["qwen2.5-7b", *H100, "--reserve", "nan"], "15% is 0.15"),
        (["qwen2.5-7b", "--parameters", "5"], "qwen2.5-7b: --parameters (5) are fewer than the embeddings alone"),
        (
            ["mixtral-8x7b", "--parameters", "5000000000"],
            "--parameters 5,000,000,000 are fewer than the 33,822,867,456",
        ),
        (["qwen2.5-7b", "--kv-dtype", "int4", "--group-size", "48"], "--group-size that does, as in --group-size 16"),
        (["qwen2.5-7b", "--kv-dtype", "int4", "--group-size", "3"], "take a --group-size that is a multiple of 4"),
        (["qwen2.5-7b", "--kv-dtype", "int8", "--group-size", "2"], "take a larger --group-size"),
        (
            ["phi-3-mini-4k", "--kv-dtype", "int4"],
            "head_dim of 96: take a --group-size that does, as in --group-size 32",
        ),
        (["qwen2.5-7b", "--sink-length", "4"], "--sink-length is for K and V in few bits, as with --kv-dtype int4"),
        (["qwen2.5-7b", "--kv-dtype", "int2", "--block-size", "16", "--group-size", "16"], "leave --group-size out"),
        (["qwen2.5-7b", "--kv-dtype", "int2", "--block-size", "3"], "take a --block-size that is a multiple of 8"),
        (
            ["phi-3-mini-4k", "--kv-dtype", "int4", "--block-size", "64"],
            "head_dim of 96: take a --block-size that does, as in --block-size 32",
        ),
        (["qwen2.5-7b", "--budget", "512", "--block-size", "16"], "leave --block-size out"),
        (["qwen2.5-7b", "--budget", "32", "--kv-dtype", "int4"], "at least 256, or a smaller --group-size"),
        (["qwen2.5-7b", "--budget", "512", "--kv-dtype", "int4", "--sink-length", "4"], "leave --sink-length out"),
        (["qwen2.5-7b", "--list"], "--list only lists: leave out 'qwen2.5-7b'"),
        (["--list", "gpus", "--users", "3"], "--list only lists: leave out --users"),
        (["~no-such-user/config.json"], "no-such-user"),
        (["x" * 300], "no model spec is called 'xxx"),
        (["a\nb"], r"no model spec is called 'a\nb'"),
        (["a\nb.json"], r"there is no file a\nb.json"),
        (["\x1b[31mred.json"], r"there is no file \x1b[31mred.json"),
        (["qwen2.5-7b", "--gpu", "g\n"], r"no GPU is called 'g\n'"),
        (["--list", "x\n" * 300], "--list knows models, gpus, links; got 'x"),
        (["x" * 300 + ".json"], "name too long"),
        (["--list", ""], "--list knows models, gpus, links; got ''"),
        (["no/such/config.json"], "there is no file no/such/config.json"),
        (["--list", "prices"], "--list knows models, gpus, links; got 'prices'"),
    ],
)
def test_what_cannot_be_is_one_line_on_stderr(refused, arguments, said):
    assert said in refused(*arguments)
    assert len(refused(*arguments)) < 300


def test_a_file_whose_name_has_a_line_break_is_named_on_one_line(refused, tmp_path, capsys):
    for content in ("{", "[]", '{"model_type": "bert"}', '{"model_type": "bert", "model_type": "bert"}'):
        (tmp_path / "a\nb.json").write_text(content)
        refused(str(tmp_path / "a\nb.json"))
    shutil.copy(CONFIGS / "llama-3.2-1b.json", tmp_path / "a\nb.json")
    assert size(str(tmp_path / "a\nb.json")) == 0
    assert capsys.readouterr().out.startswith("a\\nb, trained for")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "bert", "hidden_size": 8}, "'bert' is no decoder"),
        ({"model_type": "mamba"}, "no KV cache"),
        ({"some": "thing"}, "is it a text model's config.json?"),
        ([1, 2], "is it a model's config.json?"),
        ("{", "not valid JSON"),
    ],
)
def test_a_config_of_something_else_is_one_line_on_stderr(refused, tmp_path, content, said):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert said in refused(str(tmp_path))


def test_parameters_of_a_config_are_written_out(refused, config):
    assert "--parameters is a whole number without a unit" in refused(str(config), "--parameters", "7B")


def test_a_folder_without_a_config_says_what_it_needs(refused, tmp_path):
    assert "name a config.json, or a folder that holds one" in refused(str(tmp_path))


def test_everything_that_has_a_name_is_listed(capsys, answer):
    assert size("--list") == 0
    said = capsys.readouterr().out
    names = {"models": specs.models(), "gpus": specs.gpus(), "links": specs.links()}
    first = {line.split()[0] for line in said.splitlines() if line}
    for known in names.values():
        assert set(known) <= first
    assert set(answer("--list")) == set(names)
    listed = answer("--list", "gpus")["gpus"]
    assert set(listed) == set(specs.gpus())
    assert listed["h100-80gb"]["memory"] == specs.gpu("h100-80gb").memory_bytes
    row = next(line for line in said.splitlines() if line.startswith("llama-3.1-8b"))
    assert {"8.03", "131,072"} <= set(row.split())


def test_a_named_model_needs_no_torch_and_answers_in_well_under_a_second():
    code = (
        "import sys, labkit.course.cli as cli\n"
        "assert cli.main(['size', 'qwen2.5-7b', '--gpu', 'h100-80gb', '--json']) == 0\n"
        "print(sorted(sys.modules), file=sys.stderr)"
    )
    seconds = []  # of a processor, so that a busy machine does not count
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    loaded = set(json.loads(result.stderr.replace("'", '"')))
    assert not {"torch", "transformers", "matplotlib", "ipywidgets", "numpy"} & loaded
    assert json.loads(result.stdout)["plan"]["users_that_fit"] == 126
    assert min(seconds) < 1.0


COUNTING = {  # each flag that counts: what it needs beside it, and what it cannot be
    "--users": ([], ["0"]),
    "--parameters": ([], ["0"]),
    "--ranks": (H100, ["0"]),
    "--group-size": (["--kv-dtype", "int4"], ["0"]),
    "--residual-length": (["--kv-dtype", "int4"], []),
    "--sink-length": (["--kv-dtype", "int4"], []),
    "--block-size": ([], ["0"]),
    "--budget": ([], ["0"]),
    "--context": ([], ["0"]),
    "--reserve": (H100, ["1", "1e999"]),
    "--kv-dtype": ([], ["8"]),
    "--weight-dtype": ([], ["8"]),
}


@pytest.mark.parametrize("flag", COUNTING)
def test_what_is_wrong_is_said_of_the_flag_that_was_typed(refused, flag):
    beside, more = COUNTING[flag]
    for text in ["", "-1", "nan", "inf", "true", "1.5", "a lot", "9" * 40, "99999999999999999", "\n", *more]:
        said = refused("qwen2.5-7b", *beside, f"{flag}={text}")
        assert said.startswith(flag), text


@pytest.mark.parametrize(
    "flag", [flag for flag in COUNTING if flag not in ("--reserve", "--kv-dtype", "--weight-dtype")]
)
def test_a_number_that_is_too_large_is_said_to_be_that(refused, flag):
    for text in ["1" + 15 * "0" + "1", "9" * 16, "9" * 40, "9" * 4000, "9,999,999,999,999,999"]:
        said = refused("qwen2.5-7b", *COUNTING[flag][0], f"{flag}={text}")
        assert re.fullmatch(rf"{flag} is [\d,]+: more than [\d,]+ cannot be meant; is it in another unit\?", said) or (
            re.fullmatch(rf"{flag} is a number of \d+ bits: more than [\d,]+ cannot be meant; is it in .*", said)
        ), text


def test_the_largest_number_of_weights_is_taken(answer):
    assert answer("qwen2.5-7b", "--parameters", "1000000000000000")["parameters"] == 10**15


def test_how_k_and_v_are_kept_is_said_by_flags(answer):
    model = specs.model("qwen2.5-7b")
    few = ["--kv-dtype", "int4", "--group-size", "32", "--residual-length", "128", "--sink-length", "4"]
    blocks = ["--kv-dtype", "fp8", "--block-size", "32"]
    for arguments, kept in (
        (few, sizing.Quantized(4, 32, 128, sink_length=4)),
        (blocks, sizing.Paged(32, "float8")),
        (["--kv-dtype", "int4", "--block-size", "32"], sizing.PagedQuantized(4, 32)),
        (["--budget", "512"], sizing.Evicting(512)),
        (["--kv-dtype", "fp8", "--budget", "512"], sizing.Evicting(512, "float8")),
        (["--kv-dtype", "int4", "--budget", "512"], sizing.Evicting(512, victims=0, packing=sizing.Quantized(4))),
    ):
        said = answer("qwen2.5-7b", *arguments)
        assert said["kv_dtype"] == kept.name
        assert said["kv_format"] == {"kind": type(kept).__name__.lower(), **dataclasses.asdict(kept)}
        assert said["cache"] == [
            {
                "context": row["context"],
                "bytes": sizing.cache_bytes(model, row["context"], 1, kept),
                "peak": sizing.peak_bytes(model, row["context"], 1, kept),
            }
            for row in said["cache"]
        ]
        asked = sizing.plan(model, specs.gpu("h100-80gb"), dtype=kept)
        assert answer("qwen2.5-7b", *H100, *arguments)["plan"] == asked.as_dict()


def test_in_few_bits_the_table_says_the_most_on_the_way(capsys, answer):
    assert size("qwen2.5-7b", "--kv-dtype", "int4", "--context", "2K") == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("2,048"))
    assert row == ["2,048", "0.036", "GB", "0.033", "GiB", "0.038", "GB"]
    assert size("qwen2.5-7b") == 0
    assert "at most" not in capsys.readouterr().out
    at_2k = answer("qwen2.5-7b", *H100, "--kv-dtype", "int4")["capacity"][0]
    assert (at_2k["context"], at_2k["users"]) == (2048, 1548)


def test_a_latent_that_stays_as_it_is_is_said(capsys):
    assert size("deepseek-v3", "--kv-dtype", "int4") == 0
    assert "4.5 bits per element; latents stay in 16" in capsys.readouterr().out


def test_weights_in_all_can_be_given_for_any_model(answer, config):
    assert answer("qwen2.5-7b", "--parameters", "8,000,000,000")["weights"] == 16 * 10**9
    mixture, more = specs.model("mixtral-8x7b"), 50 * 10**9
    said = answer("mixtral-8x7b", "--parameters", str(more))
    assert said["parameters"] == more
    assert more - said["active_parameters"] == mixture.num_parameters - mixture.num_active_parameters
    assert answer(str(config), "--parameters", "2000000000")["parameters"] == 2 * 10**9


def test_how_a_shape_was_found_is_said(answer, capsys, monkeypatch):
    named = specs.model("qwen2.5-7b")
    measured = types.SimpleNamespace(**{name: getattr(named, name) for name in dir(named) if not name.startswith("__")})
    measured.found = "measured on a class"
    monkeypatch.setattr(specs, "model", lambda name: measured)
    assert answer("qwen2.5-7b")["found"] == "measured on a class"
    for beside in ([], H100):
        assert size("qwen2.5-7b", *beside) == 0
        assert "measured on a class" in capsys.readouterr().out


class TestFilesThatDoNotRead:
    @pytest.fixture
    def data(self, tmp_path, monkeypatch):
        """A copy of the course's specs, to put files into."""
        shutil.copytree(specs.DATA / "models", tmp_path / "models")
        shutil.copy(specs.DATA / "gpus.json", tmp_path)
        monkeypatch.setattr(specs, "DATA", tmp_path)
        return tmp_path

    def test_each_is_named_and_the_others_are_listed(self, data, capsys):
        known = set(specs.models())
        (data / "models" / "broken.json").write_text("{")
        (data / "models" / "empty.json").write_text("{}")
        (data / "models" / "._qwen2.5-7b.json").write_bytes(b"\0\5\x16\7")
        assert size("--list", "models", "--json") == 1
        out, err = capsys.readouterr()
        assert set(json.loads(out)["models"]) == known
        assert [line.split()[:2] for line in err.splitlines()] == [
            ["labkit:", "broken.json,"],
            ["labkit:", "empty.json,"],
        ]

    @pytest.mark.parametrize("content", ["{", '{"gpus": [{"name": "x"}]}', "[]"])
    def test_a_gpu_file_of_ones_own_does_not_hide_the_courses(self, data, capsys, content):
        gpus, links = set(specs.gpus()), set(specs.links())
        (data / "gpus-mine.json").write_text(content)
        assert size("--list", "--json") == 1
        out, err = capsys.readouterr()
        assert (set(json.loads(out)["gpus"]), set(json.loads(out)["links"])) == (gpus, links)
        assert err.startswith("labkit: gpus-mine.json")
        assert err.count("\n") == 1


def test_a_reader_that_stops_early_gets_no_traceback():
    command = [sys.executable, "-m", "labkit.course.cli", "size", "--list", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_help_shows_examples_that_work(capsys):
    with pytest.raises(SystemExit):
        size("--help")
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split()[2:] for line in lines if line.startswith("  labkit size")]
    assert len(examples) >= 4
    for example in examples:
        if not any(word.startswith("path/") for word in example):
            assert size(*example) == 0
