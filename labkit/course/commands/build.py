"""`labkit build`: the editions of the course."""

from __future__ import annotations

import argparse
from typing import Any

ABOUT = """Write editions of the labs from notebooks/, each into a folder of its own; all but the last if none is named.
  self-paced   the notebooks as they stand
  instructor   references in the blanks, teaching notes around them
  slides       reveal.js, without solutions; opens without a network (reveal.js itself
               is fetched from npm's registry the first time, then kept)
  nbgrader     a class's folder with nbgrader's source of every lab: points, hidden cases
               with new seeds each time, so it is refused where a class lies already;
               labkit grade setup hands one out (docs/classes.md)"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "build",
        help="write the editions: self-paced, instructor, slides, nbgrader",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="DIR", default="dist/editions", help="where to (default: dist/editions)")
    parser.add_argument("--lab", nargs="+", metavar="NN", default=[], help="these labs only, as in --lab 01 02")
    parser.add_argument(
        "--edition", nargs="+", metavar="NAME", default=[], help="these editions (default: all but nbgrader)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build; a line for each edition."""
    from labkit.course.editions.build import PUBLISHED, build
    from labkit.files import user_path
    from labkit.places import course_folder

    root = course_folder("notebooks").parent
    build(root, user_path(options.out), options.edition or PUBLISHED, options.lab)
    return 0
