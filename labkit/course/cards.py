"""What a lab prints, as plain text, so that a page without a kernel shows it and nbval can compare it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping, Sequence

from labkit.course.contents import LabContents, Prediction, Quiz
from labkit.course.examine import Verdict
from labkit.course.exercise import Exercise, Finding
from labkit.course.progress import Progress

WIDTH = 100


def labelled(label: str, text: str) -> str:
    """A line `label   text`, wrapped under itself."""
    lead = f"     {label:<9}"
    return textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)


def verdict(exercise: Exercise, verdict: Verdict) -> str:
    """The card of a check."""
    head = f"{exercise.id} · {verdict.status} · {exercise.title}"
    if verdict.status == "pass":
        return head + ". Yours is used from here on." + printed(verdict)
    if verdict.status == "pending":
        return (
            f"{head} ({exercise.minutes} min)\n     The reference is used below until yours passes. "
            f'Stuck? lab.hint("{exercise.id}")'
        )
    assert verdict.finding
    return "\n".join(
        [
            head,
            *finding(verdict.finding),
            f'     The reference is used below until yours passes. Next: lab.hint("{exercise.id}")' + printed(verdict),
        ]
    )


def finding(found: Finding) -> list[str]:
    """Observed, likely cause, where to look."""
    return [labelled("seen", found.seen), labelled("likely", found.cause), labelled("look at", found.look)]


def printed(verdict: Verdict) -> str:
    """A line on what the answer printed while it was checked."""
    lines = verdict.printed.splitlines()
    if not lines:
        return ""
    count = f"{len(lines)} line{'s' * (len(lines) > 1)}"
    return f"\n     (Your code printed {count} during the check, first: {lines[0][:60]!r})"


def is_reference(exercise: Exercise) -> str:
    """The card when the reference itself is handed in, as happens when only the check is run again."""
    return (
        f"{exercise.id} · pending · {exercise.title}\n     This is the reference that stands in for yours: run the "
        f"cell that defines your own again, with the check in it."
    )


def hint(exercise: Exercise, steps: Sequence[str], given: int) -> str:
    """One hint of several, or where to go when all were given."""
    if given >= len(steps):
        return f'{exercise.id} · no hints left. See how it can be done: lab.solution("{exercise.id}")'
    lead = f"{exercise.id} · hint {given + 1} of {len(steps)} · "
    body = steps[given]
    if "\n" in body:
        return f"{lead}\n{textwrap.indent(body, '     ')}"
    return textwrap.fill(lead + body, WIDTH, subsequent_indent="     ", break_on_hyphens=False)


def number(value: float) -> str:
    """A figure as a person writes it."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def with_unit(prediction: Prediction, value: float) -> str:
    """A figure and its unit."""
    return f"{number(value)} {prediction.unit}".rstrip()


def no_guess(prediction: Prediction) -> str:
    """The card of a prediction that nobody made."""
    return f"{prediction.id} · your guess? Put a number in place of the three dots and run the cell."


def kept(prediction: Prediction, guess: float) -> str:
    """The card of a guess."""
    return f"{prediction.id} · kept: {with_unit(prediction, guess)}. You will see how close it is."


def reveal(prediction: Prediction, guess: float | None, value: float) -> str:
    """A guess beside the figure."""
    lead = f"{prediction.id} · it is {with_unit(prediction, value)}. "
    if guess is None:
        return lead + "You had not guessed."
    said = f"You said {with_unit(prediction, guess)}"
    if number(guess) == number(value):
        return f"{lead}{said}: exactly."
    side = "high" if guess > value else "low"
    apart = number(float(f"{abs(guess - value):.2g}"))
    points = f"{lead}{said}: {apart} {'point' if apart == '1' else 'points'} too {side}."
    if guess <= 0 or value <= 0:  # no ratio says how far apart they are
        amount = f"{apart} {prediction.unit}".rstrip()
        return points if prediction.unit == "%" else f"{lead}{said}: {amount} too {side}."
    ratio = max(guess / value, value / guess)
    if ratio <= prediction.within:
        return f"{lead}{said}: close."
    if prediction.unit == "%" and ratio < 2:  # a percentage of a percentage could be either
        return points
    if ratio < 2:
        return f"{lead}{said}: {abs(guess - value) / value:.0%} too {side}."
    return f"{lead}{said}: {number(float(f'{ratio:.2g}'))} times too {side}."


def unanswered(quiz: Quiz) -> str:
    """The card of an open question."""
    return f"{quiz.id} · your answer? Put one of {', '.join(quiz.options)} in quotes in place of the three dots."


def quiz(quiz: Quiz, letter: str) -> str:
    """The reply to one option."""
    lead = f"{quiz.id} · {letter} · {'right' if letter == quiz.right else 'no'}. "
    return textwrap.fill(lead + quiz.answers[letter], WIDTH, subsequent_indent="     ", break_on_hyphens=False)


def solution(exercise: Exercise) -> str:
    """Why the reference is as it is, in two lines, and its source."""
    why = textwrap.fill(exercise.why, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    return "\n".join(filter(None, [why, textwrap.dedent(inspect.getsource(exercise.reference)).rstrip()]))


def summary(contents: LabContents, verdicts: Mapping[str, Verdict], progress: Progress) -> str:
    """One line per exercise and a count; then the guesses that were compared, and how the questions went."""
    status = {
        exercise.id: verdicts[exercise.id].status if exercise.id in verdicts else "not run"
        for exercise in contents.exercises
    }
    wide = max((len(id) for id in status), default=0)
    lines = [f"{exercise.id:<{wide}}  {status[exercise.id]:<8}  {exercise.title}" for exercise in contents.exercises]
    passed = sum(state == "pass" for state in status.values())
    return "\n".join([
        *lines, f"{passed} of {len(lines)} passed in this session.",
        *guesses(contents.predictions, progress), *questions(contents.quizzes, progress),
    ])  # fmt: skip


def guesses(predictions: Sequence[Prediction], progress: Progress) -> list[str]:
    """How many guesses were made, and each that was compared beside its figure."""
    if not predictions:
        return []
    known = {prediction.id: progress.get("predictions", prediction.id) for prediction in predictions}
    made = [prediction for prediction in predictions if "first_guess" in known[prediction.id]]
    lines = [f"Guesses: {len(made)} of {len(predictions)} made{'.' if not made else ' (the first of each counts):'}"]
    for prediction in made:
        first, value = known[prediction.id]["first_guess"], known[prediction.id].get("value")
        what = "not compared yet" if value is None else f"it is {with_unit(prediction, value)}"
        lines.append(f"{prediction.id}  you said {with_unit(prediction, first)}, {what}")
    return lines


def questions(quizzes: Sequence[Quiz], progress: Progress) -> list[str]:
    """How many questions were right at the first answer, and which are open."""
    if not quizzes:
        return []
    known = {quiz.id: progress.get("quizzes", quiz.id) for quiz in quizzes}
    right = sum(bool(entry.get("right_at_first")) for entry in known.values())
    unsure = [id for id, entry in known.items() if "first_answer" in entry and not entry.get("right_at_first")]
    still = [id for id, entry in known.items() if "first_answer" not in entry]
    said = [f"{right} of {len(quizzes)} right at the first answer"]
    said += [f"not at the first: {', '.join(unsure)}"] if unsure else []
    said += ["none answered" if len(still) == len(quizzes) else f"open: {', '.join(still)}"] if still else []
    return [f"Questions: {'; '.join(said)}."]
