"""A private JupyterLab server on 127.0.0.1 and a headless Chromium to open it with."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from labkit.course.cli import jupyter_environment
from labkit.course.workspace import refresh
from tests.little import TIME_ONCE, TRY_TWICE
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
]
OVERRIDES = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # keep every cell in the page
}


@dataclass
class Server:
    """A running JupyterLab: its address, its token and the folder it serves."""

    address: str
    token: str
    folder: Path

    def notebook(self, name: str) -> str:
        """The address of a notebook, alone on the page."""
        return f"{self.address}/doc/tree/{name}?reset&token={self.token}"


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    home, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    folder = home / "work"
    refresh(ROOT / "notebooks", folder)
    (home / "config/labconfig").mkdir(parents=True)
    (home / "config/labconfig/default_setting_overrides.json").write_text(json.dumps(OVERRIDES))
    startup = home / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "little.py").write_text(TIME_ONCE + TRY_TWICE)
    port = free_port()
    environment = jupyter_environment(dict(os.environ), folder) | {  # as labkit open has it
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "run"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "LABKIT_PROGRESS": str(home / "progress.json"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/api?token={token}", home / "server.log", environment):
        yield Server(address, token, folder)


@contextmanager
def running(
    command: list[str], address: str, log: Path, environment: dict[str, str] | None = None, seconds: float = 90
) -> Iterator[subprocess.Popen]:
    """A server that answers at `address` inside the block; it is gone afterwards, also when it never answered.

    Fails with what the server logged when it ends or does not answer within `seconds`.
    """
    with open(log, "w") as written:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=written)
    deadline = time.monotonic() + seconds
    try:
        while not answers(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.25)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(address: str) -> bool:
    """Whether something answers there."""
    try:
        urllib.request.urlopen(address, timeout=2).read()
    except OSError:
        return False
    return True


@pytest.fixture
def page(server: Server, request) -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = browser.new_page(viewport={"width": 1280, "height": 1000})
        made.set_default_timeout(60_000)
        try:
            yield made
            if folder := os.environ.get("LABKIT_SCREENSHOTS"):
                made.screenshot(path=Path(folder) / f"{request.node.name}.png")
        finally:
            browser.close()
