"""The eviction benchmark's other side: a fake kvpress for what can go wrong, the real one where its environment is."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import eviction, kvpress_environment, kvpress_inside, kvpress_side
from benchmarks.kvpress_environment import FOLDER, STAMP, NotMade, ready
from benchmarks.kvpress_side import PRESSES, KvpressError, Press
from labkit import models, quality
from labkit.cache import Cache
from labkit.cache.evicting import Window
from labkit.course import environments
from tests import tiny

FAKE = Path(__file__).with_name("fake_kvpress.py")
PASSAGES = [list(range(7, 37)), list(range(50, 80))]
SMALL = {"prompt": 20, "kept": 10, "chunk": 4}
PYTHON_IS_THERE = os.access(FOLDER / "bin" / "python", os.X_OK)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole environment whose Python is the fake, in a folder of a name as people have them."""
    folder = tmp_path / "kv labs é 'x' $HOME" / FOLDER.name
    (folder / "bin").mkdir(parents=True)
    (folder / STAMP).touch()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(models, "folder", lambda: tmp_path)
    return folder


# What is asked, and what comes back.


def test_perplexities_come_by_press_with_draws_and_passages_pooled(environment: Path) -> None:
    found = kvpress_side.measure(PASSAGES, environment=environment, **SMALL)
    assert list(found) == list(PRESSES)
    assert found["TOVA"] == pytest.approx(math.exp(0.005))
    assert found["random"] == pytest.approx(math.exp(0.005 + 1))  # of three draws: 0, 1 and 2
    answer = kvpress_side.ask(PASSAGES, environment=environment, **SMALL)
    assert answer.surprises["random"].shape == (3, 2, 9)
    assert answer.versions["kvpress"] == kvpress_environment.VERSION


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("dies", "without an answer: AssertionError: Query length 20 should be greater than the window size 32"),
        ("killed", "without an answer: SIGKILL ended it, probably because memory ran out"),
        ("silent", "ended well and gave no answer"),
        ("hangs", "not answered within 1 s"),
        ("upgraded", r"holds kvpress 0\.5\.5, transformers 5\.3\.0.*remove that folder"),
        ("short", "'full' is not of 1 draws of .2, 9. tokens"),
        ("forgets", "'TOVA' is not of 1 draws"),
        ("nan", "'TOVA' are not finite"),
    ],
)
def test_what_goes_wrong_there_is_one_error(mode: str, said: str, environment: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_KVPRESS", mode)
    with pytest.raises(KvpressError, match=said):
        kvpress_side.measure(PASSAGES, environment=environment, seconds=1 if mode == "hangs" else 60, **SMALL)


@pytest.mark.parametrize(
    ("passages", "sizes", "said"),
    [
        ([], {}, "at least one; got lengths \\[\\]"),
        ([[1] * 30, [1] * 31], {}, "one length.*\\[30, 31\\]"),
        ([[1] * 21], {}, "21 tokens leaves nothing to predict behind a prompt of 20: take at least 22"),
        ([[1] * 30], {"kept": 20}, "got 20 of 20"),
        ([[1] * 30], {"kept": 0}, "got 0 of 20"),
        ([[1] * 30], {"chunk": 0}, "chunk.*got 0"),
    ],
)
def test_passages_and_sizes_that_cannot_be_are_refused_before_anything_is_made(passages, sizes, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        kvpress_side.measure(passages, environment=tmp_path / "nowhere", **(SMALL | sizes))
    assert not (tmp_path / "nowhere").exists()


def test_kvpress_sees_nothing_of_this_python(monkeypatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "LABKIT_MODEL"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    seen = kvpress_side.surroundings()
    assert not {"PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "LABKIT_MODEL"} & set(seen)
    assert seen["HF_HOME"] == "kept"
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["OMP_NUM_THREADS"] == str(torch.get_num_threads())


def test_presses_have_the_names_and_the_parameters_of_our_policies() -> None:
    ours = eviction.policies(models.from_hf(tiny.hf_model("llama")))
    assert set(PRESSES) - set(ours) == {"full"}
    theirs = {name: dict(press.parameters) for name, press in PRESSES.items()}
    for name in ("SnapKV", "SnapKV, window of 64"):
        assert theirs[name] == {"window_size": ours[name].window, "kernel_size": ours[name].pool}
    expected = ours["expected attention"]
    assert theirs["expected attention"] == {
        "n_future_positions": expected.future, "n_sink": expected.sinks, "use_covariance": expected.covariance,
        "use_vnorm": expected.value_norm, "epsilon": expected.epsilon,
    }  # fmt: skip
    assert theirs["sinks and window"] == {"n_sink": ours["sinks and window"].sinks}
    assert (ours["H2O, mean"].recent, ours["H2O, mean"].mean) == (0, True)


# What is done inside, with a press of our own in a model of transformers.


class Newest:
    """A press as kvpress makes them, by hooks: every layer keeps the newest tokens of the pass in which it is on."""

    def __init__(self, kept: int) -> None:
        self.kept = kept

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [x.self_attn.register_forward_hook(self.cut, with_kwargs=True) for x in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def cut(self, module, arguments, options, output):
        layer = options["past_key_values"].layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, -self.kept :], layer.values[:, :, -self.kept :]


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_what_follows_a_compressed_prompt_is_read_at_its_positions_in_the_text(chunk: int) -> None:
    theirs = tiny.hf_model("llama")
    ours = models.from_hf(theirs)
    tokens = torch.tensor(PASSAGES[:1])
    full = kvpress_inside.surprises(theirs, None, PASSAGES[0], 20, 20, chunk)
    cut = kvpress_inside.surprises(theirs, Newest(10), PASSAGES[0], 20, 10, chunk)
    for found, cache in (
        (full, ours.cache()),
        (cut, Cache.evicting(ours.spec.num_layers, Window(), 10, during="prompt")),
    ):
        ours(tokens[:, :20], cache)
        logs = ours(tokens[:, 20:29], cache)[0].double().log_softmax(dim=-1)
        meant = -logs.gather(1, tokens[0, 21:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), meant, atol=1e-3, rtol=1e-4)
    assert abs(torch.tensor(full) - torch.tensor(cut)).max() > 0.1


def test_a_press_that_keeps_another_number_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Newest left \[9\] of 20 tokens where 10 were meant"):
        kvpress_inside.surprises(tiny.hf_model("llama"), Newest(9), PASSAGES[0], 20, 10, 4)


# Making the environment.


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch):
    """The commands of an installation, noted and not run. `fails`: a word of one that fails; `raises`: with what."""

    class Steps(list):
        fails, raises = "", None

    noted = Steps()

    def note(command, otherwise):
        noted.append(" ".join(command))
        if "venv" in command:
            Path(command[-1], "lib").mkdir(parents=True)
        if noted.fails and noted.fails in noted[-1]:
            raise noted.raises or NotMade(otherwise)

    monkeypatch.setattr(kvpress_environment, "step", note)
    monkeypatch.setattr(environments, "require_space", lambda folder, needed: None)
    return noted


def test_it_gets_a_torch_and_a_transformers_of_its_own_and_is_tried(steps, tmp_path: Path) -> None:
    assert kvpress_environment.main(tmp_path / "env", ["--more"]) == 0
    venv, install, check = steps
    assert "-m venv" in venv
    assert install.endswith("--more torch==2.13.0 transformers==5.2.0 kvpress==0.5.5")
    assert "import kvpress" in check


@pytest.mark.parametrize("step", ["venv", "install", "-c"])
def test_whatever_step_fails_nothing_is_left(step: str, steps, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "env"
    (folder / "leftover").mkdir(parents=True)
    (folder / ".lock").touch()
    steps.fails = f" {step} "
    assert kvpress_environment.main(folder) == 1
    assert capsys.readouterr().err.startswith("kvpress: ")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_an_interrupt_leaves_nothing_either(steps, tmp_path: Path) -> None:
    steps.fails, steps.raises = "install", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        kvpress_environment.main(tmp_path / "env")
    assert list((tmp_path / "env").iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch, capsys) -> None:
    usage = shutil._ntuple_diskusage(1, 1, int(1e9))
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda path: usage)
    assert kvpress_environment.main(tmp_path / "env") == 1
    assert "1.0 GB are free on this disk and 3 GB are needed" in capsys.readouterr().err
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "disk is full"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(x)': /simple/kvpress/\n"
            "ERROR: No matching distribution found for kvpress==0.5.5\n",
            "no package index that has it was reached",
        ),
        (
            "ERROR: Cannot install kvpress==0.5.5 and transformers==5.23.0 because these package versions have "
            "conflicting dependencies.\nERROR: ResolutionImpossible: for help visit a page\n",
            "versions conflict.*Cannot install kvpress==0.5.5 and transformers==5.23.0 because",
        ),
        ("Traceback\nAssertionError: {'kvpress': '0.5.4'} where 0.5.5 is meant\n", "AssertionError: .*0.5.4.*meant"),
        ("", "it said nothing"),
    ],
)
def test_a_step_that_fails_says_why(said: str, reason: str, capsys) -> None:
    code = f"import sys; sys.stderr.write({said!r}); sys.exit(3)"
    with pytest.raises(NotMade, match=rf"it could not be had: (.* )?{reason}"):
        kvpress_environment.step([sys.executable, "-c", code], "it could not be had")
    assert said.strip() in capsys.readouterr().err


def test_without_an_index_a_half_made_one_is_taken_away_and_the_reason_is_said(tmp_path: Path, monkeypatch, capfd):
    folder = tmp_path / "kv labs é 'x' $HOME" / FOLDER.name
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "half made").touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(NotMade, match=r"no environment for kvpress 0\.5\.5 \(exit 1\); the reason stands above"):
        ready(folder=folder)
    assert "pip could not install it: no package index that has it was reached" in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_it_is_made_when_it_is_asked_for_and_only_once(tmp_path: Path, monkeypatch) -> None:
    making = """
        import sys
        from pathlib import Path
        what, folder, *more = sys.argv[1:]
        assert (what, more) == ("--in", ["--more"])
        python = Path(folder, "bin", "python")
        python.parent.mkdir()
        python.symlink_to(sys.executable)
        with Path("made").open("a") as file:
            file.write("once")
        """
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "kvpress_environment.py").write_text(textwrap.dedent(making))
    monkeypatch.setattr(kvpress_environment, "ROOT", tmp_path)
    folder = tmp_path / "env"
    for _ in range(2):
        assert ready(["--more"], folder) == folder / "bin" / "python"
    assert (tmp_path / "made").read_text() == "once"
    assert (folder / STAMP).is_file()


def test_a_python_that_is_gone_is_named_with_what_to_do(environment: Path) -> None:
    (environment / "bin" / "python").unlink()
    with pytest.raises(NotMade, match=rf"Python of {FOLDER.name} is gone: remove that folder"):
        ready(folder=environment)


def test_git_does_not_see_it() -> None:
    root = kvpress_environment.ROOT
    seen = subprocess.run(["git", "check-ignore", "-q", f"{FOLDER.name}/x"], cwd=root, check=False)
    if seen.returncode == 128:
        pytest.skip("this is no git checkout")
    assert seen.returncode == 0


# The real one.


@pytest.mark.skipif(
    not ((FOLDER / STAMP).is_file() and PYTHON_IS_THERE),
    reason=f"kvpress is not there: `python -m benchmarks.kvpress_environment` makes {FOLDER.name} (1.4 GB)",
)
def test_the_real_kvpress_finds_what_our_policies_find(lab_model: Path) -> None:
    model = models.load(device="cpu")
    text = models.tokenizer()(quality.load_text("lighthouse"), return_tensors="pt").input_ids[:, :100]
    presses = {name: press for name, press in PRESSES.items() if name != "SnapKV, window of 64"}
    presses["random"] = Press("RandomPress", draws=2)
    found = kvpress_side.ask([text[0].tolist()], prompt=68, kept=34, chunk=16, presses=presses).surprises
    first, second = found.pop("random")[:, 0]
    assert abs(first - second).mean() > 0.1
    policies = eviction.policies(model)
    for name in found:
        layers = model.spec.num_layers
        cache = model.cache() if name == "full" else Cache.evicting(layers, policies[name], 34, during="prompt")
        model(text[:, :68], cache, last_only=True)
        logs = model(text[:, 68:99], cache)[0].double().log_softmax(dim=-1)
        ours = -logs.gather(1, text[0, 69:, None])[:, 0]
        assert abs(ours - found[name][0, 0]).mean() < 0.01, name
