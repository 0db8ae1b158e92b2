"""What leads to the labs elsewhere names one repository, and what lends a machine sets up what the lock says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from packaging.requirements import Requirement

from docs import badges

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COLAB = {  # what Colab's own list of packages says, of 2026-08-19; docs/elsewhere.md tells what was run with it
    "accelerate": "1.14.0", "filelock": "3.32.3", "huggingface-hub": "1.27.0", "ipykernel": "6.17.1",
    "ipython": "7.34.0", "ipywidgets": "7.7.1", "jupyter-core": "5.9.1", "jupyter-server": "2.20.0",
    "llvmlite": "0.44.0", "matplotlib": "3.10.0", "nbconvert": "7.17.1", "nbformat": "5.11.1", "numba": "0.61.2",
    "numpy": "2.1.3", "platformdirs": "4.11.3", "psutil": "5.9.5", "pydantic": "2.13.4", "pyyaml": "6.0.3",
    "safetensors": "0.8.0", "torch": "2.11.0", "tqdm": "4.67.3", "traitlets": "5.7.1", "transformers": "5.15.0",
}  # fmt: skip
PLACES = re.compile(r"github\.com/|colab\.research|kaggle\.com|mybinder\.org|codespaces\.new|vscode\.dev")


def test_whatever_names_the_repository_is_as_make_docs_writes_it() -> None:
    assert [path.name for path, text in badges.pages().items() if path.read_text(encoding="utf-8") != text] == []


def test_every_lab_has_its_badges_and_each_leads_to_a_notebook() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = re.findall(r"\((https://\S+?notebooks\S+?\.ipynb)\)", readme)
    assert len(paths) == 3 * len(badges.notebooks())
    assert all((ROOT / "notebooks" / unquote(path).rpartition("/")[2]).is_file() for path in paths)


def test_no_page_leads_to_another_repository(tmp_path: Path) -> None:
    """Every address of these services has the one setting in it, also after it was set to something else."""
    for name in ("README.md", "docs/elsewhere.md", "CITATION.cff", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    text = (tmp_path / "pyproject.toml").read_text().replace(badges.repository(), "https://github.com/some-one/labs")
    (tmp_path / "pyproject.toml").write_text(text)
    made = badges.pages(tmp_path)
    notebooks = [text for path, text in made.items() if path.suffix == ".ipynb"]
    assert len(notebooks) == len(badges.notebooks())
    for page in notebooks:  # which link to other repositories, too
        assert page.count("some-one/labs") == page.count(badges.first_line("some-one/labs").partition("(")[0]) == 1
        assert "OWNER/" not in page
    for page in (text for path, text in made.items() if path.suffix != ".ipynb"):
        addresses = [found for found in re.findall(r"https://[^\s)\"]+", page) if PLACES.search(found)]
        assert addresses
        assert [address for address in addresses if "some-one/labs" not in address] == []
        assert "OWNER/" not in page
        assert "Not published yet" not in page


@pytest.mark.parametrize("notebook", badges.notebooks(), ids=lambda path: path.stem)
def test_a_notebook_that_is_opened_alone_has_the_first_line_to_copy_before_any_code(notebook: Path) -> None:
    first, second = json.loads(notebook.read_text(encoding="utf-8"))["cells"][:2]
    assert (first["cell_type"], second["cell_type"]) == ("markdown", "code")
    assert f"\n```text\n{badges.first_line(badges.repository())}\n```\n" in "".join(first["source"])


@pytest.mark.parametrize("there", [True, False])
def test_the_first_line_installs_labkit_only_where_it_is_not(there: bool, monkeypatch) -> None:
    line = badges.first_line("https://github.com/a/b")
    assert "\n" not in line
    if not there:
        line = line.replace('"labkit"', '"no_such_package"')
    run: list[str] = []
    exec(line, {"get_ipython": lambda: types.SimpleNamespace(system=run.append)})
    assert run == ([] if there else ["pip install -q --no-deps gguf https://github.com/a/b/archive/main.zip"])


def test_colab_s_torch_and_transformers_serve_and_what_does_not_is_told() -> None:
    """The first line installs labkit and gguf alone: the page must name what else Colab has older or not at all."""
    asked = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    assert [name for name in ("torch", "transformers") if not asked[name].contains(COLAB[name])] == []
    page = " ".join((ROOT / "docs/elsewhere.md").read_text(encoding="utf-8").split())
    assert [name for name in asked if name not in COLAB and name not in page] == []
    older = [name for name in asked if name in COLAB and not asked[name].contains(COLAB[name])]
    assert [name for name in older if f"{name} {COLAB[name]}" not in page] == []
    assert {"gguf", "jupyterlab", "nbval"} == asked.keys() - COLAB.keys()


def test_binder_gets_what_conda_gets_with_pytorch_for_cpus() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    binder = yaml.safe_load((ROOT / ".binder/environment.yml").read_text())
    *packages, pip = binder["dependencies"]
    assert {**binder, "dependencies": packages} == {**conda, "dependencies": conda["dependencies"][:-1]}
    index, *rest = pip["pip"]
    assert index == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert rest == [
        line.replace("requirements.lock", "../requirements.lock").replace("-e .", "-e ..")
        for line in conda["dependencies"][-1]["pip"]
    ]
    assert os.access(ROOT / ".binder/postBuild", os.X_OK)


def test_a_container_for_editors_is_set_up_by_make() -> None:
    made = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    python = made["image"].rpartition(":")[2]
    assert (3, 11) <= tuple(map(int, python.split("."))) <= (3, 13)
    assert made["postCreateCommand"].startswith("make setup ")
    planned = subprocess.run(
        ["make", "-n", "setup", "PY=python3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "labkit.course.cli open --no-server" in planned.stdout


def test_the_citation_has_what_the_format_asks_for_and_the_version_is_the_one() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert all(author.keys() & {"name", "family-names"} for author in cited["authors"])
    assert str(cited["version"]) == PROJECT["version"]
    assert " AND ".join(cited["license"]) == PROJECT["license"]
    assert cited["repository-code"] == badges.repository()


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml; CITATION.cff, which is no program, is held to it above."""
    named = subprocess.run(
        [sys.executable, "-c", "import labkit; print(hasattr(labkit, '__version__'))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert named.stdout == "False\n"
