"""`labkit cohort`: what a class stumbles over, from its progress files."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("cohort", help="what a class stumbles over most, from progress files, without names")
    command.add_argument("files", nargs="+", metavar="FILE", help="progress files, one a learner")
    command.add_argument("--html", metavar="PAGE", help="write a page with plots, too")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print it; a line for each file that cannot be used; status 1 if any could not."""
    from labkit.course.standing import Cohort, UnusableFile, read_progress, standing, told_of
    from labkit.files import user_path, write_whole
    from labkit.printable import printable

    cohort, bad, seen = Cohort(), 0, set()
    for name in options.files:
        try:
            path = user_path(name)
            if (real := path.resolve()) in seen:
                raise UnusableFile("it was named before, and is counted once")
            seen.add(real)
            cohort.add(standing(read_progress(path)))
        except (OSError, UnusableFile) as error:
            bad += 1
            print(printable(f"labkit: {name}: {getattr(error, 'strerror', None) or error}"), file=sys.stderr)
    print("\n".join(printable(line) for line in told_of(cohort)))
    if options.html:
        from labkit.course.pages import cohort_page

        write_whole(user_path(options.html), cohort_page(cohort).encode())
        print(printable(f"written: {options.html}"))
    return 1 if bad else 0
