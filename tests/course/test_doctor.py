import builtins
import errno
import json
import os
import re
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from labkit import device, lab_model, limits
from labkit.course import doctor

NAMES = ["Python", "torch", "weights", "device", "profile", "model", "working folder", "cache folder", "widgets"]


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    for name in ("LABKIT_DEVICE", "LABKIT_PROFILE", "LABKIT_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LABKIT_THREADS", "1")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    device.cuda_problem.cache_clear()
    yield
    device.cuda_problem.cache_clear()


@pytest.fixture
def model_there(monkeypatch):
    monkeypatch.setattr(lab_model, "damage", lambda folder, thorough=False: None)


def line(name):
    return next(found for found in doctor.checks() if found.name == name)


def test_one_line_per_thing_and_all_are_well_where_the_tests_run(model_there):
    lines = doctor.checks()
    assert [found.name for found in lines] == NAMES
    assert [str(found) for found in lines if not found.ok] == []
    assert all("\n" not in str(found) for found in lines)


def test_every_failing_line_shows_its_remedy():
    failing = doctor.Line("torch", False, "does not import", "run make")
    assert str(failing).startswith("FAIL")
    assert str(failing).endswith("→ run make")
    assert "→" not in str(doctor.Line("torch", True, "there", "run make"))


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 13, 5), True), ((3, 14, 0), False)]
)
def test_python_outside_the_tested_versions_fails(version, ok):
    found = doctor.check_python(version)
    assert found.ok == ok
    assert "PYTHON=" in found.remedy


@pytest.mark.parametrize(("module", "name"), [("torch", "torch"), ("ipywidgets", "widgets")])
def test_a_package_that_does_not_import_is_a_failing_line_not_a_crash(monkeypatch, module, name):
    found, real = None, builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == module:
            raise ImportError(f"No module named {module!r}")
        return real(wanted, *args, **kwargs)

    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    found = line(name)
    monkeypatch.undo()
    assert not found.ok
    assert module in found.detail
    assert "make lab" in found.remedy


@pytest.mark.parametrize("setting", ["LABKIT_DEVICE", "LABKIT_PROFILE", "LABKIT_THREADS"])
def test_a_wrong_setting_fails_its_line_and_names_itself(monkeypatch, setting):
    monkeypatch.setenv(setting, "wrong")
    failing = [found for found in doctor.checks() if setting in found.detail]
    assert len(failing) == 1
    assert not failing[0].ok


def test_a_gpu_asked_for_and_not_had_fails_and_says_that_labs_still_run(monkeypatch):
    monkeypatch.setenv("LABKIT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = line("device")
    assert not found.ok
    assert "LABKIT_DEVICE=cuda cannot be met" in found.detail
    assert "run on the CPU" in found.remedy


@pytest.mark.parametrize(("free", "ok"), [(1_900_000_000, False), (2_100_000_000, True)])
def test_too_little_memory_fails(monkeypatch, free, ok):
    monkeypatch.setenv("LABKIT_DEVICE", "cpu")
    memory = SimpleNamespace(available=free, total=8_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(limits, "_group_memory", lambda root: [])
    assert line("device").ok == ok
    assert "of 8.0 GB free" in line("device").detail


def test_memory_that_a_container_does_not_give_is_not_free(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DEVICE", "cpu")
    monkeypatch.setattr(limits, "_group_memory", lambda root: [(700_000_000, 500_000_000)])
    found = line("device")
    assert not found.ok
    assert "0.2 of 0.7 GB free" in found.detail
    assert "limit" in found.remedy


@pytest.mark.parametrize(
    "error", [MemoryError(), ImportError(f"libtorch.so: failed to map: {os.strerror(errno.ENOMEM)}"), OSError(12, "x")]
)
def test_memory_that_runs_out_in_a_check_is_named_and_not_taken_for_a_broken_installation(monkeypatch, error):
    def fail():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) if isinstance(error, OSError) else error

    monkeypatch.setattr(doctor, "check_torch", fail)
    found = line("torch")
    assert not found.ok
    assert "memory ran out" in found.detail
    assert "ulimit" in found.remedy


CACHES = {
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "file": lambda path: path.touch(),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("below", ["", "a/b"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_path_that_can_be_no_folder_fails(monkeypatch, tmp_path, kind, below):
    CACHES[kind](tmp_path / "odd")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "odd" / below))
    assert not line("cache folder").ok
    assert not line("model").ok
    assert "make clean" not in str(line("cache folder"))


def test_a_link_to_a_folder_is_a_cache_as_good_as_any(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "link/deeper"))
    assert line("cache folder").ok


@pytest.mark.parametrize("variable", ["LABKIT_CACHE", "LABKIT_PROGRESS"])
@pytest.mark.parametrize("named", ["~nobody-of-this-name/c", "n" * 300])
def test_a_setting_that_can_be_no_path_fails_its_line_and_names_itself(monkeypatch, variable, named):
    monkeypatch.setenv(variable, named)
    found = line({"LABKIT_CACHE": "cache folder", "LABKIT_PROGRESS": "working folder"}[variable])
    assert not found.ok
    assert variable in str(found)
    assert "make clean" not in str(found)


def test_a_current_folder_that_was_deleted_fails_and_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    found = line("working folder")
    assert not found.ok
    assert "deleted" in found.detail
    assert "make clean" not in found.remedy


def test_a_missing_model_fails_with_the_command_that_fetches_it(tmp_path):
    found = line("model")
    assert not found.ok
    assert "labkit model" in found.remedy
    assert not (tmp_path / "cache").exists()  # looking changes nothing


def test_another_model_named_by_the_learner_is_shown(monkeypatch):
    monkeypatch.setenv("LABKIT_MODEL", "owner/name")
    assert line("model").ok
    assert "owner/name" in line("model").detail
    assert "model owner/name" in doctor.card()


@pytest.mark.parametrize("named", ["/no/such/folder", "~nobody-of-this-name/model", "no folder", "here"])
def test_a_folder_that_is_named_as_the_model_and_holds_none_fails_and_names_the_setting(monkeypatch, tmp_path, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("LABKIT_MODEL", named)
    found = line("model")
    assert not found.ok
    assert ("LABKIT_MODEL" if named != "here" else "there is no file") in found.detail
    assert found.remedy == doctor.SETTING


def test_a_folder_that_holds_a_model_is_well(monkeypatch, tmp_path):
    shape = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 96, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    monkeypatch.setenv("LABKIT_MODEL", str(tmp_path))
    assert line("model").ok


@pytest.mark.parametrize("named", ["file/progress.json", "link/deeper/progress.json"])
def test_a_progress_file_whose_folder_cannot_be_fails_and_names_the_setting(monkeypatch, tmp_path, named):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setenv("LABKIT_PROGRESS", str(tmp_path / named))
    found = line("working folder")
    assert not found.ok
    assert found.detail.startswith(f"of LABKIT_PROGRESS, {(tmp_path / named).parent} cannot be written to")
    assert "set it to a file" in found.remedy


def test_a_cache_folder_that_cannot_be_written_fails_unless_the_model_is_in_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
    assert not line("cache folder").ok
    assert "LABKIT_CACHE" in line("cache folder").remedy
    monkeypatch.setattr(lab_model, "damage", lambda folder, thorough=False: None)
    assert line("cache folder").ok


def test_a_working_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only")))
    found = line("working folder")
    assert not found.ok
    assert "Read-only" in found.detail


def test_widgets_without_their_jupyterlab_extension_fail(monkeypatch, tmp_path):
    import jupyter_core.paths

    monkeypatch.setattr(jupyter_core.paths, "jupyter_path", lambda: [str(tmp_path)])
    assert not line("widgets").ok
    assert "extension missing" in line("widgets").detail


def test_the_card_is_three_lines_and_names_no_folder_when_all_is_well(model_there, tmp_path):
    card = doctor.card()
    assert len(card.splitlines()) == 3
    assert "profile quick" in card
    assert "model SmolLM2-135M-Instruct" in card
    assert str(tmp_path) not in card
    assert not re.search(r"(^|\s)/\w", card)


def test_the_card_adds_each_failing_line_with_its_remedy(monkeypatch):
    monkeypatch.setenv("LABKIT_PROFILE", "huge")
    failing = doctor.card().splitlines()[3:]
    assert len(failing) == 2
    assert "LABKIT_PROFILE" in failing[0]
    assert "labkit model" in failing[1]
