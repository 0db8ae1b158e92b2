"""What learners without git get: the wheel, installed outside the checkout, opened in an empty folder.

The fresh environment holds labkit alone; all that it needs is read where the tests' own environment has it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from labkit.course.linked import opened
from labkit.course.release.runs import NBVAL, PLAIN
from tests.links import dead_links
from tests.little import TIME_ONCE
from tests.ports import free_port
from tests.shared import folder_of_the_run
from tests.tracked import copy_tree, tracked

ROOT = Path(__file__).resolve().parents[2]
FIRST_LAB = "01_attention_basics.ipynb"

pytestmark = pytest.mark.timeout(900)


class Built(NamedTuple):
    sdist: Path
    wheel: Path


class Installed(NamedTuple):
    bin: Path
    folder: Path  # of the learner, empty at first
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A program of the environment, in the learner's folder."""
        words = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built once, also where several workers ask for it."""
    folder = folder_of_the_run(tmp_path_factory) / "built"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            copy_tree(ROOT, folder / "tree")
            command = ["build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
            done = subprocess.run(
                [sys.executable, "-m", *command], cwd=folder, env=own(), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, lab_model, tmp_path_factory) -> Installed:
    place = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    bin = place / "venv/bin"
    library = Path(said_by(bin / "python", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    # A path in a .pth file adds that folder, not what its own .pth files add: the editable install stays hidden.
    (library / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    share = place / "venv/share"
    share.mkdir(exist_ok=True)
    (share / "jupyter").symlink_to(Path(sys.prefix, "share/jupyter"))
    command = ["pip", "--python", bin / "python", "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([sys.executable, "-m", *command, built.wheel], check=True, env=own())
    (place / "learner").mkdir()
    homes = {name: str(place / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    (place / "jupyter_runtime_dir").mkdir()
    startup = place / "ipythondir/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "time_once.py").write_text(TIME_ONCE)  # that times are right, other tests see
    return Installed(bin, place / "learner", own() | homes)


def own() -> dict[str, str]:
    """This environment without what leads a Python to the checkout, or a learner elsewhere."""
    out = ("PYTHON", "LABKIT_PROGRESS", "LABKIT_PROFILE", "JUPYTER_TOKEN", "VIRTUAL_ENV", "PYTEST", "COV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(out)}
    return {"GOMP_SPINCOUNT": "20000"} | kept  # as make sets it: threads that wait do not spin for long


def said_by(python: Path, code: str, **how) -> str:
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env=own(), **how
    ).stdout.strip()


def test_the_sdist_holds_every_file_of_the_tree(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in tracked(ROOT) if name not in held and name != ".gitignore"]
    assert missing == [], "say in MANIFEST.in what else the sdist takes"


def test_the_wheel_holds_the_package_data_pages_and_notebooks_byte_for_byte_and_nothing_else(built: Built) -> None:
    wanted = {}
    for name in tracked(ROOT):
        if name.startswith("labkit/"):
            wanted[name] = ROOT / name
        elif name.startswith(("data/", "notebooks/")) or (name.startswith("docs/") and name.endswith(".md")):
            wanted[f"labkit/{name}"] = ROOT / name
    with zipfile.ZipFile(built.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == set(wanted)
        assert [name for name, path in wanted.items() if archive.read(name) != path.read_bytes()] == []


def test_it_is_the_wheel_that_is_imported_and_it_finds_all_that_travels(installed: Installed) -> None:
    code = (
        "import labkit, json; from labkit import claims, specs, results; from labkit.quality.texts import load_text; "
        "print(json.dumps([labkit.__file__, str(specs.DATA), len(specs.models()), len(specs.gpus()), "
        "len(claims.claims()), len(load_text('lighthouse')), len(list(results.records('positions')))]))"
    )
    package, data, *counts = json.loads(installed.run("python", "-c", code).stdout)
    assert Path(package).is_relative_to(installed.bin.parent)
    assert not Path(package).is_relative_to(ROOT)
    assert Path(data) == Path(package).parent / "data"
    assert all(count > 0 for count in counts)


def test_size_knows_the_models(installed: Installed) -> None:
    said = json.loads(installed.run("labkit", "size", "qwen2.5-7b", "--gpu", "h100-80gb", "--json").stdout)
    assert said


def test_the_doctor_finds_all_well(installed: Installed) -> None:
    lines = installed.run("labkit", "doctor").stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok")] == []
    assert len(lines) >= 9


def test_open_fills_an_empty_folder_and_serves_it_to_who_has_the_token(
    installed: Installed,
) -> None:
    port = free_port()
    log = installed.folder.parent / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [installed.bin / "labkit", "open", "--no-browser", "--port", str(port)],
            cwd=installed.folder, env=installed.environment, stdout=written, stderr=written,
        )  # fmt: skip
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not (records := list((installed.folder.parent / "jupyter_runtime_dir").glob("jpserver-*.json"))):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        token = json.loads(records[0].read_text())["token"]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/api/contents", timeout=60)
        with urllib.request.urlopen(f"{address}/api/contents?token={token}", timeout=60) as response:
            names = {entry["name"] for entry in json.load(response)["content"]}
        notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
        assert names == notebooks | {"reading"}
        page = f"{address}/api/contents/reading/docs/glossary.md?token={token}"  # as JupyterLab asks for a link's file
        with urllib.request.urlopen(page, timeout=60) as response:
            said = json.load(response)["content"]
        assert said == (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    made = opened(ROOT / "notebooks")
    assert notebooks <= made.keys()
    assert [name for name, content in made.items() if (installed.folder / name).read_bytes() != content] == []
    assert dead_links(installed.folder) == []


def test_editions_built_from_the_wheel_have_all_that_they_link_to(installed: Installed) -> None:
    installed.run("labkit", "build", "--edition", "self-paced", "instructor", "--out", "../editions")
    for edition in ("self-paced", "instructor"):
        folder = installed.folder.parent / "editions" / edition
        assert (folder / "reading/docs/glossary.md").is_file()
        assert dead_links(folder) == []


def test_lab_01_runs_under_strict_nbval(installed: Installed) -> None:
    for path in (ROOT / "notebooks" / FIRST_LAB, ROOT / "conftest.py"):  # the latter: patience with a busy machine
        shutil.copy(path, installed.folder)
    installed.run("python", "-m", "pytest", *PLAIN, "--rootdir=.", "-c", os.devnull, *NBVAL, FIRST_LAB)
