"""How far a learner is, and what a class stumbles over, from progress files.

A `Standing` is one file against the labs of this version; a `Cohort` is many, without anybody's name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.course.cards import number
from labkit.course.catalogue import contents, numbers
from labkit.course.contents import LabContents
from labkit.course.exercise import Exercise
from labkit.course.progress import FORMAT, KINDS, well_formed
from labkit.files import read_text


class UnusableFile(ValueError):
    """A progress file that cannot be used; the message says why, in one clause."""


def read_progress(path: Path) -> dict[str, Any]:
    """What a progress file holds. Raises UnusableFile."""
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise UnusableFile((error.strerror or "it cannot be read").lower()) from None
    except UnicodeDecodeError:
        raise UnusableFile("it is no text") from None
    except RecursionError:
        raise UnusableFile("it is nested too deeply") from None
    except ValueError as error:
        raise UnusableFile(f"it is no JSON ({str(error)[:80]})") from None
    if not isinstance(data, dict) or not any(kind in data for kind in KINDS):
        raise UnusableFile("it is JSON, but no progress file of the course")
    if data.get("format") != FORMAT:
        raise UnusableFile(f"its format is {data.get('format')!r:.20}; this version reads {FORMAT}")
    if not well_formed(data):
        raise UnusableFile("it is a progress file, but an entry or a count in it is damaged")
    return data


@dataclass(frozen=True)
class LabStanding:
    """One lab of one learner. seconds: between entries, without breaks; 0 where the file has none."""

    lab: LabContents
    entries: dict[str, dict[str, Any]]
    guesses: dict[str, dict[str, Any]]
    answers: dict[str, dict[str, Any]]
    seconds: int = 0

    @property
    def done(self) -> list[Exercise]:
        """The exercises that were passed."""
        return [each for each in self.lab.exercises if self.entries.get(each.id, {}).get("passed") is True]

    @property
    def open(self) -> list[Exercise]:
        """Those that were not, tried or not."""
        done = {each.id for each in self.done}
        return [each for each in self.lab.exercises if each.id not in done]

    @property
    def begun(self) -> bool:
        """Whether there is any entry."""
        return bool(self.entries or self.guesses or self.answers)

    @property
    def guessed(self) -> list[tuple[str, float, float | None]]:
        """The first guess of each prediction that was guessed, and the figure where it is known."""
        found = []
        for each in self.lab.predictions:
            entry = self.guesses.get(each.id, {})
            if (first := finite(entry.get("first_guess"))) is not None:
                found.append((each.id, first, finite(entry.get("value"))))
        return found

    @property
    def right(self) -> int:
        """Questions that were right at the first answer."""
        return sum(self.answers.get(each.id, {}).get("right_at_first") is True for each in self.lab.quizzes)

    @property
    def answered(self) -> int:
        """Questions that were answered."""
        return sum("first_answer" in self.answers.get(each.id, {}) for each in self.lab.quizzes)

    def failing(self) -> Iterator[tuple[Exercise, dict[str, Any]]]:
        """The open exercises that were tried, each with its entry."""
        for each in self.open:
            if self.entries.get(each.id, {}).get("last_diagnosis"):
                yield each, self.entries[each.id]


@dataclass(frozen=True)
class Standing:
    """One learner. unknown: entries that no lab of this version has."""

    labs: list[LabStanding]
    unknown: int = 0


def standing(data: dict[str, Any]) -> Standing:
    """A progress file's content against the labs there are."""
    labs: list[LabStanding] = []
    known = 0
    seconds: Any = data.get("seconds")
    for one in numbers():
        lab = contents(one)
        exercises, guesses, answers = (
            {id: data[kind][id] for id in ids if id in data[kind]}
            for kind, ids in (
                ("exercises", [each.id for each in lab.exercises]),
                ("predictions", [each.id for each in lab.predictions]),
                ("quizzes", [each.id for each in lab.quizzes]),
            )
        )
        known += len(exercises) + len(guesses) + len(answers)
        taken = seconds.get(one, 0) if isinstance(seconds, dict) else 0
        labs.append(LabStanding(lab, exercises, guesses, answers, taken if type(taken) is int and taken > 0 else 0))
    return Standing(labs, sum(len(data[kind]) for kind in KINDS) - known)


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:
        return None


def minutes(exercises: Sequence[Exercise]) -> int:
    """What the cards of some exercises add up to."""
    return sum(each.minutes for each in exercises)


NAMES = {"attempts": "attempt", "hints": "hint", "solutions": "look at the solution"}


def some(count: float, name: str) -> str:
    """A count and its noun: "1 hint", "2 hints", "2 looks at the solution"."""
    noun, space, rest = name.partition(" ")
    many = "diagnoses" if noun == "diagnosis" else "entries" if noun == "entry" else f"{noun}s"
    return f"{number(count)} {noun if count == 1 else many}{space}{rest}"


def words(entry: dict[str, Any]) -> str:
    """How an exercise went, in words: attempts, hints, solutions."""
    return ", ".join(some(entry[name], noun) for name, noun in NAMES.items() if entry.get(name))


def told(learner: Standing) -> list[str]:
    """A learner's standing, line by line."""
    lines = []
    for one in learner.labs:
        lab = one.lab
        head = f"lab {lab.number} · {lab.title}"
        if not one.begun:
            lines.append(f"{head}: not begun, {minutes(lab.exercises)} min of exercises")
            continue
        worked = f"; {one.seconds / 60:.0f} min at work" if one.seconds >= 60 else ""
        lines.append(
            f"{head}: {len(one.done)} of {len(lab.exercises)} done, {len(one.open)} open; "
            f"{minutes(one.done)} of {minutes(lab.exercises)} min of exercises{worked}"
        )
        lines.append(
            f"     guesses {len(one.guessed)} of {len(lab.predictions)}; questions {one.right} of {len(lab.quizzes)} "
            f"right at the first answer, {len(lab.quizzes) - one.answered} open"
        )
        for exercise, entry in one.failing():
            went = words(entry)
            lines.append(f"     {exercise.id}  {entry['last_diagnosis']}  ({exercise.title}{'; ' * bool(went)}{went})")
            if entry.get("last_look"):
                lines.append(f"          look at  {entry['last_look']}")
        if untried := [each.id for each in one.open if not one.entries.get(each.id, {}).get("last_diagnosis")]:
            lines.append(f"     not tried: {', '.join(untried)}")
    if learner.unknown:
        lines.append(f"left out: {some(learner.unknown, 'entry')} of no exercise of this version")
    return lines


@dataclass
class Cohort:
    """A class: of how many learners, and per exercise how it went. Nobody can be told from it but by their number."""

    learners: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    failing: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in NAMES})
    met: Counter[tuple[str, str]] = field(default_factory=Counter)  # learners who met a diagnosis, once or more
    stuck: Counter[tuple[str, str]] = field(default_factory=Counter)  # learners whose latest answer has it
    seconds: dict[str, list[int]] = field(default_factory=dict)

    def add(self, learner: Standing) -> None:
        """Count one more."""
        self.learners += 1
        for one in learner.labs:
            if one.seconds:
                self.seconds.setdefault(one.lab.number, []).append(one.seconds)
            for exercise in one.lab.exercises:
                entry = one.entries.get(exercise.id, {})
                latest = str(entry.get("last_diagnosis") or "")[:60]
                self.passed[exercise.id] += entry.get("passed") is True
                self.failing[exercise.id] += bool(latest) and entry.get("passed") is not True
                for name, counts in self.counts.items():
                    counts[exercise.id] += entry.get(name, 0)
                met = {name.removeprefix("attempts ")[:60] for name in entry if name.startswith("attempts ")}
                for diagnosis in met | ({latest} if latest else set()):
                    self.met[exercise.id, diagnosis] += 1
                if latest:
                    self.stuck[exercise.id, latest] += 1

    def tried(self) -> list[Exercise]:
        """The exercises that anybody tried, in order."""
        every = [each for one in numbers() for each in contents(one).exercises]
        return [each for each in every if self.passed[each.id] + self.failing[each.id]]


def told_of(cohort: Cohort, most: int = 12) -> list[str]:
    """A class's standing, line by line: what fails most, then the exercises."""
    if not cohort.learners:
        return ["no progress file could be used"]
    lines = [some(cohort.learners, "learner")]
    titles = {each.id: each.title for one in numbers() for each in contents(one).exercises}
    ranked = sorted(cohort.met.items(), key=lambda pair: (-pair[1], -cohort.stuck[pair[0]], pair[0]))
    lines.append("met by most:" if ranked else "nothing failed yet")
    for (id, diagnosis), count in ranked[:most]:
        still = cohort.stuck[id, diagnosis]
        now = f"; now {still}" if still else ""
        lines.append(f"     {count} of {cohort.learners}  {id}  {diagnosis}  ({titles[id]}{now})")
    if len(ranked) > most:
        lines.append(f"     besides: {some(len(ranked) - most, 'diagnosis')}")
    lines.append("exercises:")
    for each in cohort.tried():
        passed, failing = cohort.passed[each.id], cohort.failing[each.id]
        went = [some(counts[each.id], NAMES[name]) for name, counts in cohort.counts.items()]
        lines.append(
            f"     {each.id}  {passed} passed, {failing} not yet, {cohort.learners - passed - failing} not tried; "
            + ", ".join(went)
        )
    return lines
