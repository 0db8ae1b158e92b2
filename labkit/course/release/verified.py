"""`VERIFIED.md`: lab × edition × CPU and GPU, with date, commit and versions; and the benchmarks' own records.

It is made from the JUnit files and records that lie beside it, and from nothing else: what did not run is said as such.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.course.release.runs import ReleaseError, Run

VERSIONS = ("python", "torch", "transformers", "cuda")
STALE_DAYS = 30  # between a benchmark on a GPU and the commit that is released
RUNS = """# What was verified of release {version}

Commit `{commit}`, of {date}. A row tells of one lab, run from top to bottom under strict nbval at
this commit: every cell whose output is not measured must print what the notebook stores. What is said to be not run was
not run.

| lab | edition | on | cells | result | date | commit | versions |
|---|---|---|---|---|---|---|---|
"""
RECORDS = """
## Benchmarks

What `data/results/` holds. A record says where and when it was measured, and not at which commit: the commit given is
the one that brought it in. A bar is a limit that the script sets itself.

| benchmark | device | date | came with | bars held | machine | versions |
|---|---|---|---|---|---|---|
"""


def page(
    version: str, commit: str, date: str, labs: Mapping[str, Sequence[str]], runs: Sequence[Run], records: Sequence[Any]
) -> str:
    """The page. labs: of each edition that is executed; records: (what a file holds, the commit it came with)."""
    rows = []
    for edition, numbers in labs.items():
        for number in numbers:
            for kind, gpu in (("CPU", False), ("GPU", True)):
                of_it = [run for run in runs if run.on_gpu == gpu and (edition, number) in run.cells]
                rows += [_row(number, edition, run) for run in of_it]
                if not of_it:
                    rows.append(f"| {number} | {edition} | {kind} | | **not run** | | | |")
    text = RUNS.format(version=version, commit=commit, date=date) + "\n".join(rows) + "\n"
    if not any(run.on_gpu for run in runs):
        text += "\nNo lab was run on a GPU at this commit.\n"
    return text + RECORDS + "\n".join(_record(record, came) for record, came in records) + "\n"


def _row(number: str, edition: str, run: Run) -> str:
    ran, failed = run.cells[edition, number]
    result = "passed" if not failed else f"**{failed} failed**"
    where = run.where
    cells = [
        number,
        edition,
        where["device"],
        ran,
        result,
        where["date"],
        f"`{where['commit'][:10]}`",
        _versions(where),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _record(record: Mapping[str, Any], came: str) -> str:
    bars, said = record.get("bars", []), record["versions"]
    held = f"{sum(bar['holds'] for bar in bars)} of {len(bars)}" if bars else "none set"
    machine = "busy" if "busy" in said else "quiet" if "quiet" in said else "not looked at"
    cells = [record["benchmark"], record["device"], said["date"], f"`{came}`", held, machine, _versions(said)]
    return "| " + " | ".join(cells) + " |"


def _versions(said: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {said[name]}" for name in VERSIONS if name in said)


def check_runs(runs: Sequence[Run], commit: str) -> None:
    """Raises ReleaseError for a run of another commit, and for one in which a cell failed."""
    for run in runs:
        if run.where["commit"] != commit:
            raise ReleaseError(
                f"a run on {run.where['device']} is of commit {run.where['commit'][:10]}, "
                f"the release of {commit[:10]}: run the notebooks again with `labkit verify`"
            )
        if run.failed:
            raise ReleaseError(f"cells failed on {run.where['device']}: {', '.join(run.failed)}. Mend them first")


def check_gpu(
    labs: Mapping[str, Sequence[str]], runs: Sequence[Run], records: Sequence[Any], wanted: Sequence[str], date: str
) -> None:
    """Raises ReleaseError where a GPU row is missing or stale.

    wanted: the benchmarks of which there must be a record of a GPU; stale: measured more than 30 days before `date`.
    """
    ran = {lab for run in runs if run.on_gpu for lab in run.cells}
    if missing := [
        f"{edition}/{number}" for edition, numbers in labs.items() for number in numbers if (edition, number) not in ran
    ]:
        raise ReleaseError(f"not run on a GPU at this commit: {', '.join(missing)}. Run `make verify` on one")
    newest: dict[str, str] = {}
    for record, _ in records:
        if "cuda" in record["versions"]:
            name = record["benchmark"]
            newest[name] = max(newest.get(name, ""), record["versions"]["date"])
    if missing := [name for name in wanted if name not in newest]:
        raise ReleaseError(f"data/results has no record of a GPU for {', '.join(missing)}: run `make gpu` on one")
    oldest = datetime.date.fromisoformat(date) - datetime.timedelta(days=STALE_DAYS)
    if stale := [f"{name} ({newest[name]})" for name in wanted if datetime.date.fromisoformat(newest[name]) < oldest]:
        raise ReleaseError(
            f"measured on a GPU more than {STALE_DAYS} days ago: {', '.join(stale)}: run `make gpu` on one"
        )
