"""The server that the browser tests start is gone when they are, however they end. No browser is needed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.conftest import running
from tests.ports import free_port

SLEEPS = [sys.executable, "-c", "print('starting', flush=True); import time; time.sleep(60)"]


def test_a_server_that_never_answers_is_ended_and_its_log_shown(tmp_path: Path, monkeypatch) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )
    with pytest.raises(AssertionError, match="starting"):
        with running(SLEEPS, f"http://127.0.0.1:{free_port()}", tmp_path / "log", seconds=1.5):
            pass
    assert started[0].poll() is not None


def test_a_server_that_ends_at_once_is_said_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such module"):
        with running(
            [sys.executable, "-c", "raise SystemExit('no such module')"],
            f"http://127.0.0.1:{free_port()}",
            tmp_path / "log",
        ):
            pass


def test_a_server_is_ended_when_a_test_fails(tmp_path: Path) -> None:
    port = free_port()
    serves = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with pytest.raises(RuntimeError):
        with running(serves, f"http://127.0.0.1:{port}", tmp_path / "log") as process:
            raise RuntimeError("a test fails")
    assert process.poll() is not None
