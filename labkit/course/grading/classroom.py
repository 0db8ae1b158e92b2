"""A class in a folder: assignments made and handed out, submissions collected, graded, and told about.

    folder/source, release, submitted, autograded, feedback, gradebook.db    nbgrader's own
    folder/nbgrader_config.py    names the parts that the course replaces, and the limits of a submission
    folder/grades.csv, reasons.csv    what a run leaves: totals, and a row for each exercise with the reason

nbgrader's own commands work in the folder as well.
"""

from __future__ import annotations

import json
import logging
import os
import pprint
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from labkit.course.grading import export
from labkit.course.grading.confined import PDEATHSIG, libc
from labkit.course.grading.room import Limits, as_dict
from labkit.course.grading.usage import LINUX
from labkit.files import make_folder, read_file, write_whole
from labkit.printable import printable

LARGEST = 20 * 10**6  # bytes of a submitted notebook
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
PROBLEMS = "problems.json"  # by assignment, by step, by student: why there are no points
STEPS = ("collect", "run")
CONFIGURATION = '''"""nbgrader's configuration for this class, written by `labkit grade setup`. Yours to change."""

from pathlib import Path

from nbgrader.preprocessors import (
    AssignLatePenalties, CheckCellMetadata, ClearHiddenTests, ClearMarkScheme, ClearOutput, ComputeChecksums,
    IgnorePattern, IncludeHeaderFooter, LimitOutput, LockCells, OverwriteCells, OverwriteKernelspec, SaveAutoGrades,
    SaveCells,
)

from labkit.course.grading.nbgrader_parts import Blanks, ConfinedExecute, Restore

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "kv-cache-labs"
c.GenerateAssignment.preprocessors = [
    IncludeHeaderFooter, LockCells, Blanks, ClearOutput, CheckCellMetadata, ComputeChecksums, SaveCells,
    ClearHiddenTests, ClearMarkScheme, ComputeChecksums, CheckCellMetadata,
]
c.Autograde.sanitize_preprocessors = [Restore, ClearOutput, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
c.Autograde.autograde_preprocessors = [
    ConfinedExecute, IgnorePattern, LimitOutput, SaveAutoGrades, AssignLatePenalties, CheckCellMetadata,
]
c.HTMLExporter.sanitize_html = True

# What a submission may use: seconds of computing in all, of a cell, on the wall for the notebook; bytes, threads.
c.ConfinedExecute.limits = {limits}
# What it must not see: this folder, and what you add.
c.ConfinedExecute.hide = [str(Path(__file__).resolve().parent)]
'''


class ClassError(RuntimeError):
    """A class's folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Graded:
    """One submission after a run: its points of how many, or the problem that left it without."""

    student: str
    points: float
    most: float
    problem: str = ""


def set_up(
    folder: Path,
    notebook: Path,
    *,
    ids: Sequence[str] = (),
    limits: Mapping[str, Any] | None = None,
    check_seconds: float = 20.0,
) -> list[str]:
    """Make `folder` a class's (nobody else may look into it), with `notebook` as an assignment, and hand it out.

    ids: of the exercises, where not all of the notebook's. limits: fields of `Limits` that are not the usual
    ones; a class has one set of limits, and others than it has are refused. An assignment that is there is made anew,
    with other seeds, as long as nothing was collected for it. Returns lines for the teacher. Raises ClassError.
    """
    from labkit.course.catalogue import contents
    from labkit.course.editions.leaks import leaks
    from labkit.course.grading import source

    number = notebook.name[:2]
    assignment = f"lab{number}"
    refuse_other_limits(folder, limits or {})
    if handed_in := {*students(folder, assignment), *export.students(folder, assignment)}:
        are = "submission is" if len(handed_in) == 1 else "submissions are"
        raise ClassError(
            f"{assignment} was handed out, and {len(handed_in)} {are} in: made anew it would have other hidden cases, "
            f"and grades would be of both. Nothing was changed. To begin again, set up another folder"
        )
    try:
        edition, files = source.assignment(notebook, ids=ids, limit=check_seconds)
    except (OSError, ValueError) as error:
        raise ClassError(f"{notebook.name}: {error}") from None
    make_folder(folder)
    folder.chmod(0o700)
    if not (folder / "nbgrader_config.py").exists():
        write_whole(folder / "nbgrader_config.py", configured(Limits(**(limits or {}))))
    for place, content in files.items():
        make_folder((folder / "source" / assignment / place).parent)
        write_whole(folder / "source" / assignment / place, content)
    result = api(folder).generate_assignment(assignment, force=True, create=True)
    if not result["success"]:
        raise ClassError(f"nbgrader could not make the assignment: {last_line(result)}")
    release = folder / "release" / assignment / notebook.name
    handed_out = nbformat.read(release, as_version=4)
    if leaked := leaks(handed_out, {exercise.id: exercise.reference for exercise in contents(number).exercises}):
        release.unlink()
        raise ClassError(f"the notebook to hand out would hold the solution of {', '.join(leaked)}: it was removed")
    graded = [cell for cell in edition.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    total = sum(cell.metadata.nbgrader.points for cell in graded)
    return [
        f"{assignment}: {len(graded)} exercises, {total:g} points, hidden cases with new seeds",
        f"hand out  {release}",
    ]


def configured(limits: Limits) -> bytes:
    """The content of a class's nbgrader_config.py."""
    return CONFIGURATION.replace("{limits}", pprint.pformat(as_dict(limits), sort_dicts=False)).encode()


def refuse_other_limits(folder: Path, limits: Mapping[str, float]) -> None:
    """Raise ClassError where a class that is there has other limits than the ones asked for."""
    file = folder / "nbgrader_config.py"
    if not file.exists():
        return
    now = as_dict(limits_of(folder))
    if others := [f"{name} is {now[name]:g}, not {value:g}" for name, value in limits.items() if now[name] != value]:
        raise ClassError(
            f"this class has other limits: {'; '.join(others)}. Nothing was changed. To change them for all its "
            f"assignments, edit c.ConfinedExecute.limits in {file}"
        )


def collect(folder: Path, submissions: Path, assignment: str = "") -> list[str]:
    """Copy submitted notebooks into the class's folder: NAME.ipynb, or NAME/ with the notebook in it.

    Nothing but the notebook is taken. What cannot be used gets a line, and the others go on. Whoever is not in this
    folder keeps what was collected, and said, before. Raises ClassError.
    """
    assignment, notebook = the_assignment(folder, assignment)
    if not submissions.is_dir():
        raise ClassError(f"{submissions} is no folder: name the one that the submissions are in")
    before = noted(folder, assignment)
    lines, problems, taken = [], {}, set()
    for entry in sorted(submissions.iterdir()):
        if entry.name.startswith("."):
            continue
        student = entry.stem if entry.suffix == ".ipynb" else entry.name
        try:
            if not NAME.fullmatch(student):
                raise ValueError("its name is not one: letters, digits, and . _ @ - only")
            file = found_in(entry, notebook)
            content = nbformat.writes(readable(file)).encode()
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            problems[student] = printable(problem.splitlines()[0][:200] if problem else type(error).__name__)
            lines.append(printable(f"{entry.name}: not collected, {problems[student]}"))
            continue
        target = folder / "submitted" / student / assignment / notebook
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
        taken.add(student)
    (folder / "submitted").mkdir(exist_ok=True)
    kept = {step: {name: why for name, why in said.items() if name not in taken} for step, said in before.items()}
    note(folder, assignment, kept | {"collect": kept["collect"] | problems})
    count = len(students(folder, assignment))
    return [*lines, f"{assignment}: {count} submissions collected" + (f", {len(problems)} not" if problems else "")]


def found_in(entry: Path, notebook: str) -> Path:
    """The notebook of one submission. Raises ValueError."""
    if entry.is_symlink():
        raise ValueError("it is a link")
    if entry.is_file():
        if entry.suffix != ".ipynb":
            raise ValueError("it is no notebook (.ipynb)")
        return entry
    files = [path for path in sorted(entry.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    named = [path for path in files if path.name == notebook] or files
    if len(named) != 1:
        raise ValueError(f"it holds {len(named) or 'no'} notebooks; it should hold one, {notebook}")
    if named[0].is_symlink():
        raise ValueError("its notebook is a link")
    return named[0]


def readable(file: Path) -> NotebookNode:
    """A submitted notebook, in today's format. Raises OSError, ValueError."""
    try:
        notebook = nbformat.reads(read_file(file, LARGEST).decode("utf-8-sig"), as_version=4)
        nbformat.validate(notebook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (OSError, UnicodeDecodeError):
        raise
    except Exception as error:
        raise ValueError(f"it is no notebook that Jupyter can read ({type(error).__name__})") from None
    return notebook


def grade(folder: Path, assignment: str = "", *, workers: int = 1, names: Sequence[str] = ()) -> Iterator[Graded]:
    """Run nbgrader's autograde and feedback for each submission, `workers` at a time; then write the two CSV files.

    names: of the students, where not all. Raises ClassError.
    """
    assignment, _ = the_assignment(folder, assignment)
    known = students(folder, assignment)
    if unknown := [name for name in names if name not in known]:
        raise ClassError(f"no submission of {', '.join(unknown)} was collected")
    wanted = [name for name in known if not names or name in names]
    if not wanted:
        raise ClassError("nothing was collected yet: labkit grade collect FOLDER SUBMISSIONS")
    before = noted(folder, assignment)["run"]
    problems = {name: problem for name, problem in before.items() if name not in wanted}
    with Graders() as graders, ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(graders.grade, folder, assignment, name): name for name in wanted}
        for job in as_completed(jobs):
            name = jobs[job]
            try:
                problem = job.result()
            except BrokenProcessPool:
                problem = "its grader was ended by the system, as where what it put out needs more memory than there is"
            except Exception as error:
                problem = f"the grader ended: {type(error).__name__}"
            if problem:
                problems[name] = problem
            points, most = export.total(folder, assignment, name)
            yield Graded(name, points, most, problem)
    note(folder, assignment, {"run": problems})
    export.write(folder, {name: without_points(folder, name) for name in assignments(folder)})


def noted(folder: Path, assignment: str) -> dict[str, dict[str, str]]:
    """Why students have no points for an assignment, by the step that found it."""
    file = folder / PROBLEMS
    found = json.loads(file.read_text()).get(assignment, {}) if file.exists() else {}
    return {step: dict(found.get(step, {})) for step in STEPS}


def note(folder: Path, assignment: str, problems: Mapping[str, Mapping[str, str]]) -> None:
    """Keep the problems of some steps, in the place of those that an assignment had in them."""
    file = folder / PROBLEMS
    kept = json.loads(file.read_text()) if file.exists() else {}
    write_whole(file, json.dumps(kept | {assignment: {**noted(folder, assignment), **problems}}, indent=1).encode())


def without_points(folder: Path, assignment: str) -> dict[str, str]:
    """Why what students handed in last has no points; what is wrong with their file goes first."""
    found = noted(folder, assignment)
    return found["run"] | found["collect"]


def end_with_parent() -> None:
    """Let a worker end when the command is killed, and what it runs with it; elsewhere than on Linux it goes on."""
    if LINUX:
        libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Graders:
    """A process for each thread that grades: where a submission brings its grader to an end, it costs no other, and the
    next one gets a new grader."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.made: list[ProcessPoolExecutor] = []

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.made:
            one.shutdown()

    def grade(self, folder: Path, assignment: str, student: str) -> str:
        """`grade_one` in this thread's process. BrokenProcessPool when that has ended."""
        if getattr(self.own, "grader", None) is None:
            self.own.grader = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
            self.made.append(self.own.grader)
        try:
            return self.own.grader.submit(grade_one, folder, assignment, student).result()
        except BrokenProcessPool:
            self.own.grader = None
            raise


def grade_one(folder: Path, assignment: str, student: str) -> str:
    """Grade one submission and write its feedback; returns what went wrong, if anything did."""
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")  # of SQLAlchemy's, on what nbgrader does
    nbgrader = api(folder)
    for step in (nbgrader.autograde, nbgrader.generate_feedback):
        result = step(assignment, student, force=True)
        if not result["success"]:
            return f"nbgrader could not grade it: {last_line(result)}"
    return ""


def configuration(folder: Path) -> Any:
    """What the folder's nbgrader_config.py says."""
    from traitlets.config import Config
    from traitlets.config.loader import PyFileConfigLoader

    if not (folder / "nbgrader_config.py").is_file():
        raise ClassError(f"{folder} is not a class's folder: labkit grade setup {folder} --lab 01 makes it one")
    config = Config(PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config())
    config.CourseDirectory.root = str(folder.resolve())
    # Wherever the folder lay when it was made: its grades and seeds are out of a submission's sight where it lies now.
    config.ConfinedExecute.hide = [*config.ConfinedExecute.get("hide", []), str(folder.resolve())]
    return config


def limits_of(folder: Path) -> Limits:
    """What a submission of this class may use."""
    return Limits(**configuration(folder).ConfinedExecute.limits)


def api(folder: Path) -> Any:
    """nbgrader, with the folder's own configuration."""
    from nbgrader.apps.api import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    config = configuration(folder)
    beside = str(Path(sys.executable).parent)  # nbgrader calls alembic by its name
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def last_line(result: dict[str, Any]) -> str:
    """The line of nbgrader's log that says what went wrong."""
    lines = [line.strip() for line in f"{result.get('log') or ''}\n{result.get('error') or ''}".splitlines()]
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "NbGraderE" not in line]
    telling = telling or list(filter(None, lines))
    return printable(telling[-1][:200]) if telling else "it did not say why"


def the_assignment(folder: Path, assignment: str) -> tuple[str, str]:
    """The assignment that is meant, and its notebook's file name. Raises ClassError."""
    there = assignments(folder)
    if not there:
        raise ClassError(f"{folder} is not a class's folder: labkit grade setup {folder} --lab 01 makes it one")
    if not assignment and len(there) > 1:
        raise ClassError(f"which lab? --lab with one of {', '.join(name[3:] for name in there)}")
    wanted = assignment or there[0]
    if wanted not in there:
        raise ClassError(f"{wanted} was not set up here; there are {', '.join(there)}")
    return wanted, next((folder / "source" / wanted).glob("*.ipynb")).name


def assignments(folder: Path) -> list[str]:
    """What was set up in a class."""
    return sorted(path.name for path in (folder / "source").glob("lab*") if path.is_dir())


def students(folder: Path, assignment: str) -> list[str]:
    """Who has a submission of this assignment."""
    return sorted(path.parents[0].name for path in (folder / "submitted").glob(f"*/{assignment}") if path.is_dir())


def summary(graded: Iterable[Graded], folder: Path) -> str:
    """The last line of a run."""
    done = list(graded)
    bad = [each for each in done if each.problem]
    return (
        f"{len(done) - len(bad)} graded" + (f", {len(bad)} not" if bad else "") + f"; {folder / 'grades.csv'}, "
        f"{folder / 'reasons.csv'}, {folder / 'feedback'}{os.sep}"
    )
