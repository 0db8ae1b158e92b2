import hashlib
import itertools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from labkit.course import workspace
from labkit.course.workspace import FOLDER, MANIFEST, WorkspaceError, refresh, work_folder

NAMES = ("01_a.ipynb", "02_b.ipynb")


@pytest.fixture
def folders(tmp_path):
    notebooks, work = tmp_path / "notebooks", tmp_path / "work"
    notebooks.mkdir()
    (notebooks / NAMES[0]).write_text("one")
    return notebooks, work


def test_new_notebooks_are_copied_and_only_notebooks(folders):
    notebooks, work = folders
    (notebooks / "notes.txt").write_text("x")
    assert refresh(notebooks, work) == ["01_a.ipynb: copied"]
    assert sorted(path.name for path in work.iterdir()) == [MANIFEST, f"{MANIFEST}.lock", NAMES[0]]


def test_a_second_refresh_says_and_writes_nothing(folders):
    notebooks, work = folders
    refresh(notebooks, work)
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert refresh(notebooks, work) == []
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_an_untouched_notebook_is_brought_up_to_date(folders):
    notebooks, work = folders
    refresh(notebooks, work)
    (notebooks / NAMES[0]).write_text("two")
    assert refresh(notebooks, work) == ["01_a.ipynb: brought up to date"]
    assert (work / NAMES[0]).read_text() == "two"


@pytest.fixture
def linked(folders):
    """A notebook that links to a page, which links to another page, to a file and back."""
    notebooks, work = folders
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["[a](../docs/a.md#here), [b](02_b.ipynb)\n", "and"]},
        {"cell_type": "code", "metadata": {}, "source": ["print('[a](../docs/a.md)')"], "outputs": []},
    ]
    (notebooks / NAMES[0]).write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    (notebooks.parent / "docs/more").mkdir(parents=True)
    (notebooks.parent / "docs/a.md").write_text("[c](more/c.md) [lab](../notebooks/01_a.ipynb#x) [web](https://a.org)")
    (notebooks.parent / "docs/more/c.md").write_text("[a](../a.md) [data](../../data.json) [gone](gone.md)")
    (notebooks.parent / "data.json").write_text("1")
    return notebooks, work


def test_what_a_notebook_links_to_and_that_in_turn_is_put_beside_it(linked):
    notebooks, work = linked
    assert refresh(notebooks, work) == ["01_a.ipynb: copied"]
    text, code = json.loads((work / NAMES[0]).read_text())["cells"]
    assert text["source"] == ["[a](reading/docs/a.md#here), b\n", "and"]  # 02_b.ipynb is not there
    assert code["source"] == ["print('[a](../docs/a.md)')"]  # no link: nothing but text is changed
    made = {str(path.relative_to(work)) for path in (work / "reading").rglob("*") if path.is_file()}
    assert made == {"reading/docs/a.md", "reading/docs/more/c.md", "reading/data.json"}
    assert (work / "reading/docs/a.md").read_text() == "[c](more/c.md) [lab](../../01_a.ipynb#x) [web](https://a.org)"
    assert refresh(notebooks, work) == []


def test_a_page_at_the_top_of_the_tree_leads_on_and_a_link_to_nothing_is_plain_words(linked):
    notebooks, work = linked
    text = "[read](../READ.md) [me](../docs/gone.md#x) [own](../docs/design.md)"
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text}]
    (notebooks / NAMES[0]).write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    (notebooks.parent / "READ.md").write_text(f"[a](docs/a.md) [lab](notebooks/01_a.ipynb) [root]({Path(__file__)})")
    refresh(notebooks, work)
    (text_cell,) = json.loads((work / NAMES[0]).read_text())["cells"]
    assert text_cell["source"] == "[read](reading/READ.md) me [own](reading/docs/design.md)"
    assert (work / "reading/READ.md").read_text().startswith("[a](docs/a.md) [lab](../01_a.ipynb)")
    made = {str(path.relative_to(work)) for path in (work / "reading").rglob("*") if path.is_file()}
    assert made >= {"reading/READ.md", "reading/docs/a.md", "reading/docs/more/c.md"}
    # What lies not beside the notebooks, as beside a teacher's own, is the course's.
    assert (work / "reading/docs/design.md").is_file()
    assert not list(work.rglob(Path(__file__).name))


def test_a_notebook_that_was_copied_before_pages_came_along_is_brought_up_to_date(linked):
    notebooks, work = linked
    work.mkdir()
    content = (notebooks / NAMES[0]).read_bytes()
    (work / NAMES[0]).write_bytes(content)
    (work / MANIFEST).write_text(json.dumps({NAMES[0]: [hashlib.sha256(content).hexdigest()]}))
    assert refresh(notebooks, work) == ["01_a.ipynb: brought up to date"]
    assert (work / "reading/docs/a.md").is_file()


def test_a_page_that_the_learner_changed_is_kept_and_named_as_a_notebook_is(linked):
    notebooks, work = linked
    refresh(notebooks, work)
    (work / "reading/docs/a.md").write_text("mine")
    assert refresh(notebooks, work) == []
    (notebooks.parent / "docs/a.md").write_text("newer")
    (line,) = refresh(notebooks, work)
    assert line.startswith("reading/docs/a.md: yours is kept")
    assert (work / "reading/docs/a.md").read_text() == "mine"


def test_a_file_where_the_folder_of_pages_should_be_is_one_clear_error(linked):
    notebooks, work = linked
    work.mkdir()
    (work / "reading").write_text("mine")
    with pytest.raises(WorkspaceError, match="reading"):
        refresh(notebooks, work)
    assert (work / "reading").read_text() == "mine"
    assert (work / NAMES[0]).is_file()  # the labs are there all the same


def test_a_changed_notebook_is_kept_and_named_only_when_a_newer_version_exists(folders):
    notebooks, work = folders
    refresh(notebooks, work)
    (work / NAMES[0]).write_text("mine")
    assert refresh(notebooks, work) == []
    (notebooks / NAMES[0]).write_text("two")
    (line,) = refresh(notebooks, work)
    assert "yours is kept" in line
    assert "rename" in line
    assert (work / NAMES[0]).read_text() == "mine"
    (work / NAMES[0]).rename(work / "mine.ipynb")  # as the line says
    assert refresh(notebooks, work) == ["01_a.ipynb: copied"]
    assert (work / NAMES[0]).read_text() == "two"
    assert (work / "mine.ipynb").read_text() == "mine"


@pytest.mark.parametrize("damage", [None, "", "{", "[]", '{"01_a.ipynb": 3}'])
def test_with_its_manifest_lost_or_damaged_nothing_is_overwritten(folders, damage):
    notebooks, work = folders
    refresh(notebooks, work)
    (work / MANIFEST).unlink() if damage is None else (work / MANIFEST).write_text(damage)
    (notebooks / NAMES[0]).write_text("two")
    refresh(notebooks, work)
    assert (work / NAMES[0]).read_text() == "one"


def test_a_run_killed_between_manifest_and_copy_is_taken_up_again(folders, monkeypatch):
    notebooks, work = folders
    refresh(notebooks, work)
    (notebooks / NAMES[0]).write_text("two")
    write = workspace.write_whole

    def killed(path, content, mode):
        if path.name != MANIFEST:
            raise KeyboardInterrupt
        write(path, content, mode)

    monkeypatch.setattr(workspace, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        refresh(notebooks, work)
    assert (work / NAMES[0]).read_text() == "one"
    monkeypatch.undo()
    assert refresh(notebooks, work) == ["01_a.ipynb: brought up to date"]


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_leftover(folders, monkeypatch):
    notebooks, work = folders
    refresh(notebooks, work)
    monkeypatch.setattr(workspace.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (notebooks / NAMES[0]).write_text("two")
    with pytest.raises(WorkspaceError, match="No space left on device"):
        refresh(notebooks, work)
    assert (work / NAMES[0]).read_text() == "one"
    assert sorted(path.name for path in work.iterdir()) == [MANIFEST, f"{MANIFEST}.lock", NAMES[0]]


def test_a_disk_that_fills_up_on_the_way_tells_what_was_done_so_far(folders, monkeypatch):
    notebooks, work = folders
    (notebooks / NAMES[1]).write_text("two")
    write = workspace.write_whole

    def full(path, content, mode):
        if path.name == NAMES[1]:
            raise OSError(28, "No space left on device")
        write(path, content, mode)

    monkeypatch.setattr(workspace, "write_whole", full)
    with pytest.raises(WorkspaceError, match=r"done so far: 01_a\.ipynb: copied; the rest is as it was"):
        refresh(notebooks, work)
    assert (work / NAMES[0]).read_text() == "one"
    assert not (work / NAMES[1]).exists()
    (work / NAMES[0]).unlink()
    (notebooks / NAMES[0]).unlink()
    with pytest.raises(WorkspaceError, match="no notebook in it was changed"):
        refresh(notebooks, work)


def test_several_at_once_all_end_well_with_every_notebook_there_once(folders):
    notebooks, work = folders
    for number in range(20):
        (notebooks / f"{number:02}_x.ipynb").write_text(f"{number}")
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: refresh(notebooks, work), range(4)))
    assert sum(map(len, said)) == 21  # each was copied by one of them
    assert len(list(work.glob("*.ipynb"))) == 21
    assert refresh(notebooks, work) == []


@pytest.mark.parametrize("odd", ["pipe", "folder", "dangling link", "loop"])
def test_what_is_no_notebook_is_kept_as_the_learners(folders, odd):
    notebooks, work = folders
    work.mkdir()
    target = work / NAMES[0]
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: os.symlink("no", path)}
    make.get(odd, lambda path: os.symlink(path.name, path))(target)
    before = target.lstat()
    (line,) = refresh(notebooks, work)
    assert "yours is kept" in line
    assert target.lstat() == before


@pytest.mark.parametrize("place", ["dangling link", "pipe"])
def test_a_work_folder_that_is_none_is_one_clear_error(folders, place):
    notebooks, work = folders
    work.symlink_to("nowhere") if place == "dangling link" else os.mkfifo(work)
    with pytest.raises(WorkspaceError, match=r"leads nowhere|no folder"):
        refresh(notebooks, work)


def test_a_file_where_the_folder_should_be_is_one_clear_error(folders):
    notebooks, work = folders
    work.write_text("not a folder")
    with pytest.raises(WorkspaceError, match="cannot be used"):
        refresh(notebooks, work)
    assert work.read_text() == "not a folder"


def test_in_a_checkout_the_copies_lie_in_work_and_anywhere_where_one_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert work_folder(None, tmp_path / "top") == tmp_path / "top" / "work"
    assert work_folder("labs", tmp_path / "top") == tmp_path / "labs"
    assert work_folder("labs") == tmp_path / "labs"


def test_an_installed_wheel_takes_an_empty_folder_and_makes_one_where_other_things_lie(folders, monkeypatch):
    notebooks, work = folders
    work.mkdir()
    (work / ".venv").mkdir()  # hidden: nobody's work
    monkeypatch.chdir(work)
    assert work_folder() == work
    refresh(notebooks, work_folder())
    assert work_folder() == work  # as before, though it is not empty any more
    monkeypatch.chdir(notebooks)
    assert work_folder() == notebooks / FOLDER


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for asked in (None, "~nobody-of-this-name/labs"):
        with pytest.raises(WorkspaceError, match="cannot be used"):
            work_folder(asked)


class LearnerAndUpdates(RuleBasedStateMachine):
    """Releases, refreshes and a learner's edits in any order: no byte that the learner wrote is ever lost."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.notebooks, self.work = self.root / "notebooks", self.root / "work"
        self.notebooks.mkdir()
        self.versions = itertools.count()
        self.mine: dict[str, str] = {}  # what the learner wrote, and has not removed

    def teardown(self):
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(NAMES))
    def release(self, name):
        (self.notebooks / name).write_text(f"release {next(self.versions)}")

    @rule()
    def refresh(self):
        refresh(self.notebooks, self.work)
        for source in self.notebooks.iterdir():
            if self.mine.get(source.name) == source.read_text():
                del self.mine[source.name]  # byte for byte what is released: nobody's own
            if source.name not in self.mine:
                assert (self.work / source.name).read_text() == source.read_text()

    @rule(name=st.sampled_from(NAMES))
    def edit(self, name):
        if self.work.exists():
            self.mine[name] = f"learner {next(self.versions)}"
            (self.work / name).write_text(self.mine[name])

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        (self.work / name).unlink(missing_ok=True)
        self.mine.pop(name, None)

    @rule()
    def lose_manifest(self):
        (self.work / MANIFEST).unlink(missing_ok=True)
        # What we cannot prove to be ours counts as the learner's from now on.
        for path in self.work.glob("*.ipynb"):
            self.mine.setdefault(path.name, path.read_text())

    @invariant()
    def the_learners_bytes_are_there(self):
        for name, text in self.mine.items():
            assert (self.work / name).read_text() == text

    @invariant()
    def the_manifest_is_whole(self):
        if (self.work / MANIFEST).exists():
            json.loads((self.work / MANIFEST).read_text())


TestLearnerAndUpdates = LearnerAndUpdates.TestCase
TestLearnerAndUpdates.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
