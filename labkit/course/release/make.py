"""A release from a commit: checked first, then made from the commit's own files, outside the work tree."""

from __future__ import annotations

import ast
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from labkit.course.release import pack, runs, verified
from labkit.course.release.runs import ReleaseError, Run

NAME = "kv-cache-labs"
IDENTIFIERS = r"(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*))*"
SEMVER = re.compile(
    rf"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*)){{2}}(?:-{IDENTIFIERS})?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)
EXECUTED = ("self-paced", "instructor")  # the editions whose stored outputs are a contract
SITE = "build/site"  # where `make site` puts it


class Commit(NamedTuple):
    """What is released: its full hash, the seconds since 1970 and the day (UTC) of its making."""

    hash: str
    seconds: int
    date: str


def release(
    version: str, top: Path, junit: Sequence[Path] = (), *, gpu: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Make `dist/VERSION` in the checkout `top`; returns that folder.

    junit: files of runs of the notebooks, by `labkit verify`; without one on a CPU the notebooks are run now, and
    `dist/nbval-VERSION.xml` keeps that run. gpu: refuse a release whose GPU rows are missing or stale. Raises
    ReleaseError, and then makes nothing else.
    """
    commit = check(version, top)
    target = top / "dist" / version
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{version}-") as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, version)
        export(top, commit, tree)
        made.mkdir()
        editions = make_editions(tree, Path(scratch, "editions"))
        labs = {name: labs_of(editions[name]) for name in EXECUTED if name in editions}
        kept = [*junit]
        if not any(not runs.read(path).on_gpu for path in kept):
            own = target.parent / f"nbval-{version}.xml"  # outside: an hour's run is not lost with a cell that failed
            say(f"running the notebooks, which takes minutes; what they say goes to dist/{own.name}, fit for --junit")
            kept.append(verify(top, commit, own, device="cpu"))
        known = check_verified(tree, commit, labs, kept, gpu=gpu)
        for name in editions:
            zip_edition(name, editions[name], made / f"{NAME}-{version}-{name}.zip", commit)
            say(f"edition {name}")
        say("wheel and sdist")
        build_package(tree, made, commit)
        say("executed HTML")
        pages = pack_pages(editions)
        pack.zip_files(made / f"{NAME}-{version}-html.zip", pages, commit.seconds)
        if folder := make_site(tree, commit):
            pack.zip_files(made / f"{NAME}-{version}-site.zip", pack.files_in(folder, "site/"), commit.seconds)
            say("site")
        for run, path in zip(known, kept, strict=True):
            kind = re.sub(r"[^a-z0-9]+", "-", run.where["device"].lower()).strip("-")
            shutil.copyfile(path, made / f"nbval-{'gpu' if run.on_gpu else 'cpu'}-{kind}.xml")
        table = [("kill_table.md", (tree / "docs/kill_table.md").read_bytes())]
        table += pack.files_in(tree / "docs/kill_table", "kill_table/")
        pack.zip_files(made / f"{NAME}-{version}-kill-table.zip", table, commit.seconds)
        shutil.copyfile(tree / "requirements.lock", made / "requirements.lock")
        results = pack.files_in(tree / "data/results", "results/")
        pack.zip_files(made / f"{NAME}-{version}-results.zip", results, commit.seconds)
        facts = (version, commit.hash, commit.date, labs, known, records(top, tree))
        (made / "VERIFIED.md").write_text(verified.page(*facts), encoding="utf-8")
        (made / pack.MANIFEST).write_text(pack.manifest(made), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def check(version: str, top: Path) -> Commit:
    """The commit that is checked out, if it can be released as `version`. Raises ReleaseError."""
    if not SEMVER.fullmatch(version):
        raise ReleaseError(f"{version[:40]} is no semantic version: give one like 1.4.0 or 2.0.0-rc.1")
    declared = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if declared != version:
        raise ReleaseError(f"pyproject.toml says version {declared}: write {version} there, or release {declared}")
    heading = re.search(rf"^## {re.escape(version)}(?:\s+(.*))?$", _text(top / "CHANGELOG.md"), flags=re.MULTILINE)
    if not heading:
        raise ReleaseError(f"CHANGELOG.md has no section `## {version}`: say there what is new")
    if "unreleased" in (heading[1] or ""):
        raise ReleaseError(f"CHANGELOG.md calls {version} unreleased: give the section its date")
    if changed := git(top, "status", "--porcelain", "--untracked-files=all").splitlines():
        names = ", ".join(line[3:] for line in changed[:3])
        raise ReleaseError(f"the tree has changes that no commit holds ({names}): commit or remove them")
    return head(top)


def head(top: Path) -> Commit:
    """The commit that is checked out. Raises ReleaseError."""
    hash, seconds = git(top, "log", "-1", "--format=%H %ct").split()
    day = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).date().isoformat()
    return Commit(hash, int(seconds), day)


def git(top: Path, *arguments: str) -> str:
    """What git says. Raises ReleaseError."""
    try:
        done = subprocess.run(["git", "-C", str(top), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ReleaseError("git is not installed: a release is made of a commit") from None
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]}: {done.stderr.strip()[:200] or 'failed'}")
    return done.stdout.strip("\n")


def export(top: Path, commit: Commit, tree: Path) -> None:
    """Write the commit's files to the folder `tree`, all dated as the commit."""
    with tempfile.TemporaryFile() as file:
        subprocess.run(["git", "-C", str(top), "archive", "--format=tar", commit.hash], stdout=file, check=True)
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(tree, filter="data")


def make_editions(tree: Path, out: Path) -> dict[str, Path]:
    """The editions of the notebooks in `tree`, each in a folder of `out`; the one place that asks for them."""
    from labkit.course.editions.build import PUBLISHED, build

    build(tree, out, PUBLISHED, say=lambda line: None)
    return {name: out / name for name in PUBLISHED}


def zip_edition(name: str, folder: Path, target: Path, commit: Commit) -> None:
    """An edition's folder."""
    pack.zip_files(target, pack.files_in(folder, f"{NAME}/{name}/"), commit.seconds)


def labs_of(folder: Path) -> list[str]:
    """The labs of an edition, by number."""
    return sorted(path.name[:2] for path in folder.glob("[0-9][0-9]_*.ipynb"))


def verify(top: Path, commit: Commit, target: Path, device: str = "") -> Path:
    """Run the executed editions of a commit under strict nbval on a device; write JUnit to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)  # first: the run takes minutes
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        export(top, commit, tree)
        editions = make_editions(tree, tree / "editions")
        before = os.environ.get("LABKIT_DEVICE")
        try:
            os.environ["LABKIT_DEVICE"] = device or before or "auto"
            where = runs.whereabouts(commit.hash)
            runs.run_notebooks(tree, [editions[name] for name in EXECUTED if name in editions], where, target)
        finally:
            os.environ.pop("LABKIT_DEVICE") if before is None else os.environ.update(LABKIT_DEVICE=before)
    return target


def check_verified(
    tree: Path, commit: Commit, labs: dict[str, list[str]], junit: Sequence[Path], *, gpu: bool
) -> list[Run]:
    """The runs, if all are of this commit and passed, and cover what they must. Raises ReleaseError."""
    known = [runs.read(path) for path in junit]
    verified.check_runs(known, commit.hash)
    ran = {lab for run in known if not run.on_gpu for lab in run.cells}
    wanted = [(edition, number) for edition, numbers in labs.items() for number in numbers]
    if missing := [f"{edition}/{number}" for edition, number in wanted if (edition, number) not in ran]:
        raise ReleaseError(f"not run on a CPU: {', '.join(missing)}. Run `labkit verify` for all")
    if gpu:
        held = [(json.loads(_text(path)), "") for path in sorted((tree / "data/results").glob("*.json"))]
        verified.check_gpu(labs, known, held, gpu_benchmarks(tree), commit.date)
    return known


def gpu_benchmarks(tree: Path) -> list[str]:
    """The benchmarks that `make gpu` runs, as their records name them: read off its source, which imports torch."""
    assigned = {
        target.id: node.value
        for node in ast.parse(_text(tree / "benchmarks/on_gpu.py")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    scripts = ast.literal_eval(assigned["BENCHMARKS"])
    named = [re.search(r'finish\(\s*"(\w+)"', _text(tree / f"benchmarks/{script}.py")) for script in scripts]
    return [found[1] for found in named if found]


def records(top: Path, tree: Path) -> list[tuple[dict[str, Any], str]]:
    """Each record of `data/results`, and the commit that brought it in, shortened."""
    found = []
    for path in sorted((tree / "data/results").glob("*.json")):
        came = git(top, "log", "-1", "--format=%H", "--", f"data/results/{path.name}")[:10]
        found.append((json.loads(_text(path)), came))
    return found


def build_package(tree: Path, made: Path, commit: Commit) -> None:
    """The sdist, and the wheel that is built from it. Raises ReleaseError."""
    run(tree, commit, sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(tree))
    for sdist in made.glob("*.tar.gz"):
        pack.settle_sdist(sdist, commit.seconds)
    for wheel in made.glob("*.whl"):
        pack.settle_wheel(wheel, commit.seconds)


def run(tree: Path, commit: Commit, *command: str) -> None:
    """Run a command in `tree`, with the commit's time for its clock where tools ask for one. Raises ReleaseError."""
    own = {"SOURCE_DATE_EPOCH": str(commit.seconds), "PYTHONHASHSEED": "0", "PYTHONPATH": str(tree), "TZ": "UTC"}
    done = subprocess.run(command, cwd=tree, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-400:]
        raise ReleaseError(f"{' '.join(command[:3])} failed with exit code {done.returncode}: {said}")


def pack_pages(editions: dict[str, Path]) -> list[tuple[str, bytes]]:
    """The executed notebooks as HTML with the outputs that they store, and what they link to: names and contents."""
    from nbconvert import HTMLExporter

    from labkit.course.editions.build import read
    from labkit.course.editions.html import for_browsers, linked_pages
    from labkit.course.linked import FOLDER, texts

    exporter, pages = HTMLExporter(), []
    for name in (name for name in EXECUTED if name in editions):
        for path in sorted(editions[name].glob("*.ipynb")):
            notebook = read(path)
            for cell in texts(notebook):
                cell["source"] = for_browsers(cell["source"])
            page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
            pages.append((f"{NAME}/{name}/{path.stem}.html", page.encode()))
        linked = dict(pack.files_in(editions[name] / FOLDER, f"{FOLDER}/"))
        pages += [(f"{NAME}/{name}/{place}", content) for place, content in linked_pages(linked).items()]
    return pages


def make_site(tree: Path, commit: Commit) -> Path | None:
    """The site, where the tree knows how to make one. Raises ReleaseError."""
    if not re.search(r"^site:", _text(tree / "Makefile"), flags=re.MULTILINE):
        return None
    run(tree, commit, "make", "site", f"PY={sys.executable}")
    if not (tree / SITE / "index.html").is_file():
        raise ReleaseError(f"make site left no page in {SITE}")
    return tree / SITE


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
