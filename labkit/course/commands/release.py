"""`labkit release` and `labkit verify`: a version's files, and the runs of the notebooks that vouch for them."""

from __future__ import annotations

import argparse
from typing import Any

RELEASE = """Make dist/VERSION of the commit that is checked out: wheel, sdist, the editions, executed
pages, the site, what was verified, checksums. Refused on a tree with changes, and for a
version that pyproject.toml and CHANGELOG.md do not name. Twice gives the same bytes."""
VERIFY = """Run every notebook of the editions at the commit that is checked out, under strict nbval,
on the device that LABKIT_DEVICE names; write JUnit that says where, when and of which commit."""


def add(commands: Any) -> None:
    """Add both commands."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "release", help="make a version's files (authors)", description=RELEASE, formatter_class=plain
    )
    parser.add_argument("version", metavar="VERSION", help="as in 1.4.0")
    parser.add_argument("--junit", nargs="+", metavar="FILE", default=[], help="runs by `labkit verify`")
    parser.add_argument("--gpu", action="store_true", help="refuse where runs or records of a GPU are missing or stale")
    parser.set_defaults(run=run_release)
    verifier = commands.add_parser(
        "verify", help="run the notebooks of the editions (authors)", description=VERIFY, formatter_class=plain
    )
    verifier.add_argument("junit", metavar="FILE", help="where the JUnit goes")
    verifier.set_defaults(run=run_verify)


def run_release(options: argparse.Namespace) -> int:
    """Make the release; prints its folder."""
    from labkit.course.release.make import release
    from labkit.files import user_path

    print(release(options.version, _top(), [user_path(path) for path in options.junit], gpu=options.gpu))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Run the notebooks; status 1 where a cell failed."""
    from labkit.course.release import make, runs
    from labkit.files import user_path

    target = user_path(options.junit)
    run = runs.read(make.verify(_top(), make.head(_top()), target))
    failed = f"; failed: {', '.join(run.failed)}" if run.failed else ""
    print(f"{len(run.cells)} notebooks on {run.where['device']}, in {target}{failed}")
    return 1 if run.failed else 0


def _top() -> Any:
    from labkit.course.release.runs import ReleaseError
    from labkit.places import checkout

    if (top := checkout()) is None:
        raise ReleaseError("a release is made in a checkout, not from an installed wheel")
    return top
