"""`labkit grade`: a class in a folder, with nbgrader. What each step does: docs/classes.md."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

ABOUT = """A class in a folder: hand out a lab as an assignment, collect what comes back, grade it with nbgrader in a
confined process, and tell each learner what was right, what was not, and why."""
EXAMPLES = """examples:
  labkit grade setup ~/class --lab 01
  labkit grade collect ~/class ~/Downloads/submissions
  labkit grade run ~/class --workers 2
  labkit grade limits ~/class"""


LIMITS = {  # option: its unit, its meaning, its field, its factor
    "cell-seconds": ("S", "computing or doing nothing, for a cell", "cell_seconds", 1.0),
    "seconds": ("S", "computing, for a notebook", "seconds", 1),
    "wall-seconds": ("S", "on the wall, for a notebook", "wall_seconds", 1.0),
    "memory": ("GB", "for all of a notebook's processes", "memory", 10**9),
}


def add(commands: Any) -> None:
    """Add the command and its steps."""
    command = commands.add_parser(
        "grade", help="hand out, collect and grade a lab in a class (needs nbgrader)", description=ABOUT,
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run)
    steps = command.add_subparsers(dest="step", required=True, metavar="STEP")
    setup = steps.add_parser("setup", help="make the folder, the assignment and the notebook to hand out")
    collect = steps.add_parser("collect", help="copy NAME.ipynb or NAME/ of a folder into the class's folder")
    grade = steps.add_parser("run", help="grade what was collected; feedback and CSV files")
    limits = steps.add_parser("limits", help="say what this system enforces, and what it does not")
    for step in (setup, collect, grade, limits):
        step.add_argument("folder", metavar="FOLDER", help="the class's folder")
        step.add_argument("--lab", default="", metavar="NN", help="01, 02, ...")
    setup.add_argument("--exercises", metavar="IDS", default="", help="of these only: 01.1,01.2; default: all")
    setup.add_argument("--notebooks", metavar="FOLDER", help="where the notebooks are; default: the course's own")
    setup.add_argument("--check-seconds", type=positive, default=20.0, metavar="S", help="computing, for a check")
    for name, (unit, means, _, _) in LIMITS.items():
        setup.add_argument(f"--{name}", type=positive, metavar=unit, help=f"{means}, in the whole class")
    collect.add_argument("submissions", metavar="SUBMISSIONS", help="the folder with what learners handed in")
    grade.add_argument("--workers", type=int, choices=range(1, 65), default=1, metavar="N", help="at a time")
    grade.add_argument("--student", action="append", default=[], metavar="NAME", help="only this one; may be repeated")


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below a million")
    return number


def run(options: argparse.Namespace) -> int:
    """One step; what a person can mend is said in one line."""
    if importlib.util.find_spec("nbgrader") is None:
        print(
            "labkit: classes need nbgrader, which the wheel's extra [classes] brings: see docs/classes.md",
            file=sys.stderr,
        )
        return 1
    from labkit.course.grading.classroom import ClassError
    from labkit.course.grading.room import RoomError
    from labkit.printable import printable

    try:
        return {"setup": setup, "collect": collect, "run": grade, "limits": limits}[options.step](options)
    except (ClassError, RoomError) as error:
        print(f"labkit: {printable(str(error))}", file=sys.stderr)
        return 1


def setup(options: argparse.Namespace) -> int:
    """Make the folder and the assignment."""
    from labkit.course.grading.classroom import ClassError, set_up
    from labkit.files import user_path
    from labkit.places import course_folder

    notebooks = user_path(options.notebooks) if options.notebooks else course_folder("notebooks")
    found = sorted(notebooks.glob(f"{options.lab or '??'}_*.ipynb"))
    if not options.lab or len(found) != 1:
        known = ", ".join(path.name[:2] for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")))
        raise ClassError(f"which lab? --lab with one of {known}" if known else f"there are no notebooks in {notebooks}")
    given = {name: getattr(options, name.replace("-", "_")) for name in LIMITS}
    limits = {
        field: type(factor)(given[name] * factor)
        for name, (_, _, field, factor) in LIMITS.items()
        if given[name] is not None
    }
    ids = [id.strip() for id in options.exercises.split(",") if id.strip()]
    for line in set_up(
        user_path(options.folder), found[0], ids=ids, limits=limits, check_seconds=options.check_seconds
    ):
        print(line)
    return 0


def collect(options: argparse.Namespace) -> int:
    """Copy submissions; status 1 if any could not be used."""
    from labkit.course.grading.classroom import collect
    from labkit.files import user_path

    assignment = f"lab{options.lab}" if options.lab else ""
    lines = collect(user_path(options.folder), user_path(options.submissions), assignment)
    print("\n".join(lines))
    return 0 if len(lines) == 1 else 1


def grade(options: argparse.Namespace) -> int:
    """Grade; a line per submission; status 1 if any could not be graded."""
    from labkit.course.grading.classroom import grade, summary
    from labkit.files import user_path

    folder, graded = user_path(options.folder), []
    limits(options)
    assignment = f"lab{options.lab}" if options.lab else ""
    for each in grade(folder, assignment, workers=options.workers, names=options.student):
        graded.append(each)
        said = each.problem or f"{each.points:g} of {each.most:g}"
        print(f"{each.student}: {said}", flush=True)
    print(summary(graded, folder))
    return 1 if any(each.problem for each in graded) else 0


def limits(options: argparse.Namespace) -> int:
    """Say what holds a submission here."""
    from labkit.course.grading.classroom import limits_of
    from labkit.course.grading.room import enforced, told
    from labkit.files import user_path

    folder = user_path(options.folder)
    print("\n".join(told(enforced((str(folder),)), limits_of(folder))), flush=True)
    return 0
