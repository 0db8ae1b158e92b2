"""Every link to a file leads somewhere: in this repository, and in the folder that a learner opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.course.workspace import refresh
from tests.links import dead_links, local_links

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *NOTEBOOKS])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_to_a_file(page: Path) -> None:
    assert [target for target in local_links(page) if not (page.parent / target).exists()] == []


def test_pages_are_found() -> None:
    assert {"README.md", "design.md", "lab01.md", "01_attention_basics.ipynb"} <= {page.name for page in PAGES}


def test_every_link_in_the_folder_that_a_learner_opens_leads_to_a_file_in_it(tmp_path: Path) -> None:
    """JupyterLab shows nothing that lies above."""
    refresh(ROOT / "notebooks", tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.ipynb"))) == len(NOTEBOOKS)
    assert dead_links(tmp_path / "work") == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_leads_to_the_glossary_before_its_first_code(notebook: Path, tmp_path: Path) -> None:
    refresh(ROOT / "notebooks", tmp_path)
    first = json.loads((tmp_path / notebook.name).read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "](reading/docs/glossary.md)" in "".join(first["source"])
    assert (tmp_path / "reading/docs/glossary.md").read_bytes() == (ROOT / "docs/glossary.md").read_bytes()
