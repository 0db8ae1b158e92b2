"""`labkit status`: how far one learner is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "status", help="how far you are: done, open, guesses, questions, minutes, latest diagnoses"
    )
    command.add_argument("file", nargs="?", metavar="FILE", help="a progress file; default: yours")
    command.add_argument("--html", metavar="PAGE", help="write a page with plots, too")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print it; one line where the file cannot be used."""
    from labkit.course.standing import UnusableFile, read_progress, standing, told
    from labkit.files import user_path, write_whole
    from labkit.printable import printable

    path = user_path(options.file) if options.file else own_file()
    try:
        learner = standing(read_progress(path))
    except UnusableFile as error:
        print(printable(f"labkit: {path}: {error}"), file=sys.stderr)
        return 1
    print("\n".join(printable(line) for line in told(learner)))
    if options.html:
        from labkit.course.pages import learner_page

        write_whole(user_path(options.html), learner_page(learner).encode())
        print(printable(f"written: {options.html}"))
    return 0


def own_file() -> Path:
    """The learner's file: where the labs keep it, or in `work/`, where `make lab` opens them."""
    from labkit.course.progress import default_path
    from labkit.places import checkout

    path, top = default_path(), checkout()
    work = top / "work" / "progress.json" if top else path
    return work if not path.exists() and work.exists() else path
