"""`labkit release`: what it refuses and makes, that twice gives the same bytes, that it claims only what was run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from labkit.course import cli
from labkit.course.release import make, pack, runs, verified
from labkit.course.release.runs import ReleaseError, Run
from tests.tracked import copy_tree

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.1.0"
WHEN = "2026-01-02T03:04:05+00:00"
WHERE = {
    "commit": "c" * 40,
    "date": "2026-01-02",
    "device": "x86_64 CPU, 2 threads",
    "python": "3.11.7",
    "torch": "2.13.0",
}
GPU = {**WHERE, "device": "NVIDIA H100 80GB HBM3", "cuda": "13.0"}
JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="2" time="1.5"
timestamp="2026-01-02T03:04:05" hostname="a-machine">
<testcase classname="editions.self-paced.01_a.ipynb" name="Cell 0" time="0.1"/>
<testcase classname="editions.self-paced.02_b.ipynb" name="Cell 0" time="0.1">{}</testcase></testsuite></testsuites>"""
LABS = {"self-paced": ["01", "02"]}


def git(folder: Path, *arguments: str) -> None:
    own = {"GIT_AUTHOR_DATE": WHEN, "GIT_COMMITTER_DATE": WHEN, "GIT_CONFIG_GLOBAL": os.devnull}
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, env=os.environ | own, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A repository with this tree in one commit, but for what takes long: two labs, no site."""
    folder = tmp_path_factory.mktemp("original") / "repo"
    copy_tree(ROOT, folder)
    for path in folder.glob("notebooks/*.ipynb"):
        if not path.name.startswith(("01", "02")):
            path.unlink()
    for name, old, new in (("CHANGELOG.md", "(unreleased)", "(2026-01-02)"), ("Makefile", "\nsite:", "\nno-site:")):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    git(folder, "init", "-q")
    commit(folder)
    return folder


@pytest.fixture
def repo(original: Path, tmp_path: Path, monkeypatch) -> Path:
    """A clone of one's own of it, whose one edition is the notebooks as they are."""

    def plain(tree: Path, out: Path) -> dict[str, Path]:
        shutil.copytree(tree / "notebooks", out / "self-paced")
        return {"self-paced": out / "self-paced"}

    monkeypatch.setattr(make, "make_editions", plain)
    subprocess.run(["git", "clone", "-q", original, tmp_path / "repo"], check=True)
    return tmp_path / "repo"


@pytest.fixture
def junit(repo: Path, tmp_path: Path) -> Path:
    """What a run of both labs on a CPU at this commit leaves."""
    path = tmp_path / "junit.xml"
    path.write_text(runs.settled(JUNIT.format(""), WHERE | {"commit": make.head(repo).hash}))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def insides(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Files by name, and what is in those that are archives, wheels and archives in archives too, unpacked."""
    for name, content in files.items():
        yield name, content
        held: dict[str, bytes] = {}
        if name.endswith((".zip", ".whl")):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                held = {entry: archive.read(entry) for entry in archive.namelist()}
                yield f"{name} itself", archive.comment + b"".join(entry.extra for entry in archive.infolist())
        elif name.endswith((".tar.gz", ".tgz", ".tar")):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = [member for member in archive.getmembers() if member.isfile()]
                held = {member.name: archive.extractfile(member).read() for member in members}
        elif name.endswith(".gz"):
            held = {"": gzip.decompress(content)}
        yield from insides({f"{name}/{entry}": inner for entry, inner in held.items()})


@pytest.mark.parametrize("kind", ["zip", "whl", "tar.gz", "gz"])
def test_what_an_archive_holds_is_looked_at_unpacked(kind: str, tmp_path: Path) -> None:
    said = b"made in /home/somebody/labs " * 50
    packed = io.BytesIO()
    if kind in ("zip", "whl"):
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/said", said)
    elif kind == "tar.gz":
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            entry = tarfile.TarInfo("a/said")
            entry.size = len(said)
            archive.addfile(entry, io.BytesIO(said))
    else:
        packed.write(gzip.compress(said))
    pack.zip_files(tmp_path / "outer.zip", [(f"inner.{kind}", packed.getvalue())], 0)
    outer = (tmp_path / "outer.zip").read_bytes()
    assert b"/home/somebody" not in outer
    found = [name for name, content in insides({"outer.zip": outer}) if b"/home/somebody" in content]
    assert len(found) == 1
    assert found[0].startswith(f"outer.zip/inner.{kind}/")


SITE_PAGES = "docs/index.md,docs/glossary.md,docs/claims.md,docs/reading_order.md,docs/api/engine.md,notebooks/01*"


@pytest.mark.timeout(900)
def test_the_site_made_twice_has_the_same_bytes_wherever_and_by_whom(
    original: Path, tmp_path: Path, monkeypatch
) -> None:
    """A small one, of each kind of page: prose, a notebook with pictures, API with sources; as a release makes it."""
    made = []
    for place, zone, mask, processes in (("one", "UTC", 0o022, 1), ("elsewhere/é", "Pacific/Auckland", 0o077, 2)):
        tree = tmp_path / place
        tree.parent.mkdir(exist_ok=True)
        before = os.umask(mask)
        try:
            subprocess.run(["git", "clone", "-q", original, tree], check=True)
            monkeypatch.setenv("TZ", zone)
            monkeypatch.setenv("PYTHONHASHSEED", str(processes))
            own = ["-D", f"include_patterns={SITE_PAGES}", "-j", str(processes), "-d", str(tree / "build/doctrees")]
            sphinx = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html", "-c", "docs", *own]
            make.run(tree, make.head(tree), *sphinx, ".", str(tree / make.SITE))
        finally:
            os.umask(before)
        made.append(dict(pack.files_in(tree / make.SITE)))
    first, second = made
    assert {"docs/index.html", "notebooks/01_attention_basics.html", "docs/api/engine.html"} <= first.keys()
    assert any(name.startswith("_modules/") for name in first)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert [name for name, content in insides(first) if str(tmp_path).encode() in content] == []


@pytest.mark.timeout(900)
def test_twice_gives_the_same_bytes_in_another_folder_by_another_user_at_another_time(
    repo: Path, original: Path, junit: Path, tmp_path: Path, monkeypatch
) -> None:
    first = contents(make.release(VERSION, repo, [junit], say=lambda line: None))
    other = tmp_path / "elsewhere" / "é"
    other.parent.mkdir()
    subprocess.run(["git", "clone", "-q", original, other], check=True)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    time.tzset()
    before = os.umask(0o077)
    try:
        second = contents(make.release(VERSION, other, [junit], say=lambda line: None))
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    names = f"kv-cache-labs-{VERSION}"
    assert first.keys() == {
        "SHA256SUMS", "VERIFIED.md", "requirements.lock", f"{names}-html.zip", f"{names}-results.zip",
        f"{names}-kill-table.zip", f"{names}-self-paced.zip", f"kv_cache_labs-{VERSION}.tar.gz",
        f"kv_cache_labs-{VERSION}-py3-none-any.whl", "nbval-cpu-x86-64-cpu-2-threads.xml",
    }  # fmt: skip
    sums = dict(reversed(line.split("  ")) for line in first["SHA256SUMS"].decode().splitlines())
    assert sums == {name: hashlib.sha256(first[name]).hexdigest() for name in first if name != "SHA256SUMS"}
    target = repo / "dist" / VERSION
    with zipfile.ZipFile(target / f"{names}-self-paced.zip") as archive:
        assert sum(name.endswith(".ipynb") for name in archive.namelist()) == 2
    with zipfile.ZipFile(target / f"{names}-html.zip") as archive:
        page = archive.read("kv-cache-labs/self-paced/01_attention_basics.html").decode()
    assert "data:image/png;base64" in page  # what the notebooks store is in them
    places = [str(tmp_path).encode(), str(original).encode()]
    assert [name for name, content in insides(first) if any(place in content for place in places)] == []
    assert [path.name for path in (repo / "dist").iterdir()] == [VERSION]
    said = (target / "VERIFIED.md").read_text()
    assert "| 01 | self-paced | x86_64 CPU, 2 threads | 1 | passed | 2026-01-02 |" in said
    assert "| 01 | self-paced | GPU | | **not run** |" in said
    assert "No lab was run on a GPU at this commit." in said


@pytest.mark.parametrize(
    ("version", "change", "says"),
    [
        ("1", None, "no semantic version"),
        ("0.1", None, "no semantic version"),
        ("v0.1.0", None, "no semantic version"),
        ("00.1.0", None, "no semantic version"),
        ("0.1.0-", None, "no semantic version"),
        ("0.1.0-01", None, "no semantic version"),
        ("../0.1.0", None, "no semantic version"),
        ("0.2.0", None, "pyproject.toml says version 0.1.0"),
        (VERSION, ("CHANGELOG.md", "## 0.1.0", "## 0.1.00"), "no section"),
        (VERSION, ("CHANGELOG.md", "(2026-01-02)", "(unreleased)"), "unreleased"),
        (VERSION, ("README.md", "# KV", "# My KV"), r"changes that no commit holds \(README.md\)"),
        (VERSION, ("new.txt", "", ""), r"changes that no commit holds \(new.txt\)"),
    ],
)
def test_what_cannot_be_released_is_refused_and_nothing_is_made(
    repo: Path, version: str, change: tuple[str, str, str] | None, says: str
) -> None:
    if change:
        path = repo / change[0]
        path.write_text(path.read_text().replace(change[1], change[2]) if path.exists() else "new")
    with pytest.raises(ReleaseError, match=says) as caught:
        make.release(version, repo)
    assert "\n" not in str(caught.value)
    assert not (repo / "dist").exists()


@pytest.mark.parametrize("version", ["1.0.0", "0.10.0", "2.0.0-rc.1", "1.0.0-alpha+build.5", "1.2.3+007"])
def test_a_semantic_version_is_one(version: str) -> None:
    assert make.SEMVER.fullmatch(version)


def test_a_tree_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text().replace("(unreleased)", ""))
    with pytest.raises(ReleaseError, match="git status"):
        make.release(VERSION, tmp_path)


@pytest.mark.parametrize(
    ("where", "case", "says"),
    [
        ({"commit": "d" * 40}, "", "is of commit dddddddddd"),
        ({}, "<failure/>", "cells failed on x86_64 CPU, 2 threads: self-paced/02"),
        ({}, "<error/>", "cells failed"),
        ({}, "<skipped/>", "cells failed"),
        ({"date": ""}, "", "does not say its date"),
    ],
)
def test_a_run_of_another_commit_or_with_a_failure_ends_the_release(
    repo: Path, junit: Path, where: dict[str, str], case: str, says: str
) -> None:
    junit.write_text(runs.settled(JUNIT.format(case), WHERE | {"commit": make.head(repo).hash} | where))
    with pytest.raises(ReleaseError, match=says):
        make.release(VERSION, repo, [junit], say=lambda line: None)
    assert not (repo / "dist" / VERSION).exists()


def test_a_run_of_its_own_is_kept_when_a_cell_failed(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tree: Path, folders: object, where: dict[str, str], target: Path) -> None:
        target.write_text(runs.settled(JUNIT.format("<failure>why</failure>"), where))

    monkeypatch.setattr(runs, "run_notebooks", run)
    said: list[str] = []
    with pytest.raises(ReleaseError, match="cells failed"):
        make.release(VERSION, repo, say=said.append)
    kept = repo / "dist" / f"nbval-{VERSION}.xml"
    assert "why" in kept.read_text()
    assert f"dist/{kept.name}" in said[0]
    assert os.listdir(repo / "dist") == [kept.name]


def test_a_lab_that_was_not_run_ends_the_release(repo: Path, junit: Path) -> None:
    one = JUNIT.format("").replace('<testcase classname="editions.self-paced.02_b.ipynb" name="Cell 0" time="0.1">', "")
    junit.write_text(runs.settled(one.replace("</testcase>", ""), WHERE | {"commit": make.head(repo).hash}))
    with pytest.raises(ReleaseError, match="not run on a CPU: self-paced/02"):
        make.release(VERSION, repo, [junit], say=lambda line: None)


@pytest.mark.parametrize("text", ["", "<x", "<testsuites/>"])
def test_a_file_that_is_no_run_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ReleaseError, match=r"a\.xml") as caught:
        runs.read(tmp_path / "a.xml")
    assert "\n" not in str(caught.value)


def test_junit_tells_nothing_of_the_host_and_the_minute() -> None:
    text = runs.settled(JUNIT.format(""), WHERE)
    assert "a-machine" not in text
    assert "time" not in text.replace("testcase", "")
    assert text == runs.settled(text, WHERE)  # settled once is settled


@pytest.mark.timeout(600)
def test_notebooks_are_run_and_what_failed_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "tree/editions/self-paced"
    folder.mkdir(parents=True)
    for name, stored in (("01_good", "4"), ("02_stale", "5")):
        cell = nbformat.v4.new_code_cell("2 + 2", execution_count=1)
        cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": stored}, execution_count=1)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / f"{name}.ipynb")
    runs.run_notebooks(tmp_path / "tree", [folder], WHERE, tmp_path / "junit.xml")
    run = runs.read(tmp_path / "junit.xml")
    assert run.cells == {("self-paced", "01"): (1, 0), ("self-paced", "02"): (1, 1)}
    assert run.failed == ["self-paced/02"]
    assert run.where == WHERE


RECORD = {"benchmark": "kernels", "device": GPU["device"], "versions": {**GPU, "date": "2026-01-01"}, "bars": []}


def of(where: dict[str, str], *labs: str) -> Run:
    return Run(where, {("self-paced", lab): (3, 0) for lab in labs})


@pytest.mark.parametrize(
    ("ran", "kept", "says"),
    [
        ([of(WHERE, "01", "02")], [RECORD], "not run on a GPU at this commit: self-paced/01, self-paced/02"),
        ([of(GPU, "01")], [RECORD], "not run on a GPU at this commit: self-paced/02"),
        ([of(GPU, "01", "02")], [], "no record of a GPU for kernels"),
        ([of(GPU, "01", "02")], [RECORD | {"versions": WHERE}], "no record of a GPU for kernels"),
        (
            [of(GPU, "01", "02")],
            [RECORD | {"versions": {**GPU, "date": "2025-11-30"}}],
            r"more than 30 days ago: kernels \(2025-11-30\)",
        ),
        ([of(GPU, "01", "02")], [RECORD], None),
        ([of(GPU, "01", "02")], [RECORD | {"versions": {**GPU, "date": "2025-01-01"}}, RECORD], None),
    ],
)
def test_rows_of_a_gpu_that_are_missing_or_stale_end_a_release_that_asks_for_them(ran, kept, says) -> None:
    held = [(record, "") for record in kept]
    if says is None:
        verified.check_gpu(LABS, ran, held, ["kernels"], "2026-01-02")
    else:
        with pytest.raises(ReleaseError, match=says):
            verified.check_gpu(LABS, ran, held, ["kernels"], "2026-01-02")


def test_the_page_has_a_row_for_what_ran_and_says_what_did_not() -> None:
    page = verified.page(
        VERSION, "c" * 40, "2026-01-02", LABS, [of(WHERE, "01", "02"), of(GPU, "01")], [(RECORD, "abc")]
    )
    rows = [line for line in page.splitlines() if line.startswith("| 0")]
    then = "3 | passed | 2026-01-02 | `cccccccccc` | python 3.11.7, torch 2.13.0"
    assert rows == [
        f"| 01 | self-paced | x86_64 CPU, 2 threads | {then} |",
        f"| 01 | self-paced | NVIDIA H100 80GB HBM3 | {then}, cuda 13.0 |",
        f"| 02 | self-paced | x86_64 CPU, 2 threads | {then} |",
        "| 02 | self-paced | GPU | | **not run** | | | |",
    ]
    assert "| kernels | NVIDIA H100 80GB HBM3 | 2026-01-01 | `abc` | none set |" in page
    assert "No lab was run" not in page


def test_the_gpu_benchmarks_are_those_of_make_gpu_under_the_names_of_their_records() -> None:
    from benchmarks.on_gpu import BENCHMARKS

    names = make.gpu_benchmarks(ROOT)
    assert len(names) == len(BENCHMARKS)
    known = {json.loads(path.read_text())["benchmark"] for path in (ROOT / "data/results").glob("*.json")}
    assert set(names) <= known


def test_a_manifest_is_what_sha256sum_checks(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two").write_bytes(b"2")
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / pack.MANIFEST).write_text(pack.manifest(tmp_path))
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "--check", "--quiet", pack.MANIFEST], cwd=tmp_path, check=True)
        (tmp_path / "one").write_bytes(b"3")
        assert subprocess.run([program, "--check", "--status", pack.MANIFEST], cwd=tmp_path).returncode == 1


def test_the_command_says_in_a_line_what_is_wrong(capsys, monkeypatch, tmp_path: Path) -> None:
    assert cli.main(["release", "one"]) == 1
    assert capsys.readouterr().err == "labkit: one is no semantic version: give one like 1.4.0 or 2.0.0-rc.1\n"
    monkeypatch.setattr("labkit.places.checkout", lambda: None)
    assert cli.main(["release", VERSION]) == 1
    assert "not from an installed wheel" in capsys.readouterr().err
