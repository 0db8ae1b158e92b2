"""A lab session: what the first cell of a notebook makes, and every later cell asks.

lab = Lab("02")
lab.predict("02.p1", guess=...)
decode_step = lab.check("02.2", decode_step)
lab.hint("02.2")
lab.reveal("02.p1", 4.2)
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, TypeVar

from labkit import measure
from labkit.course import cards, waiting
from labkit.course.catalogue import contents
from labkit.course.contents import Mistyped
from labkit.course.examine import Verdict, examine
from labkit.course.exercise import Exercise
from labkit.course.hints import for_failure
from labkit.course.progress import Progress
from labkit.ledger import Work, ledger

Answer = TypeVar("Answer", bound=Callable)


class Lab:
    """One lab's session. Prints its card; loads the lab model when it is first asked for."""

    def __init__(self, number: str, *, progress: Progress | None = None) -> None:
        from labkit.course import doctor

        self.contents = contents(number)
        self.number = self.contents.number
        self.exercises = {exercise.id: exercise for exercise in self.contents.exercises}
        self.predictions = {prediction.id: prediction for prediction in self.contents.predictions}
        self.quizzes = {quiz.id: quiz for quiz in self.contents.quizzes}
        self.progress = progress or Progress()
        self.verdicts: dict[str, Verdict] = {}
        print(f"Lab {self.number} · {self.contents.title}")
        print(doctor.card())

    # What the lab runs on.

    @cached_property
    def model(self):
        """The lab model, a `labkit.llama.Llama` in float32 on this session's device."""
        from labkit import models

        model = models.load(device=self.device)
        if model.spec.window is not None:
            raise Mistyped(
                f"{models.source()} attends over a window of {model.spec.window:,} tokens, and the caches of these "
                f"labs keep everything: set LABKIT_MODEL to a model without a sliding window, or unset it"
            )
        return model

    @cached_property
    def tokenizer(self):
        """The lab model's tokenizer (Hugging Face's)."""
        from labkit import models

        return models.tokenizer()

    @cached_property
    def device(self):
        """Where the lab runs: `torch.device("cpu")` or `torch.device("cuda")`."""
        from labkit.device import pick_device

        return pick_device().torch_device

    @property
    def profile(self) -> str:
        """ "quick", or "full" for larger sizes."""
        from labkit.device import profile

        return profile()

    def ledger(self, watch: Any = None) -> AbstractContextManager[Work]:
        """Count the work of a block; K/V projections of the lab model unless `watch` names other weights."""
        return ledger(self.model if watch is None else watch)

    def time(self, runs: Mapping[str, Callable[[], Any]], *, repeats: int = 7) -> dict[str, measure.Timing]:
        """Time several things in alternation on this session's device, with a bar when somebody looks on."""
        watch = partial(waiting.bar, what=f"timing {len(runs)} things, rounds")
        return measure.alternate(runs, repeats=repeats, device=self.device, watch=watch)

    def compile_loops(self) -> None:
        """Compile the loops that read packed K and V on a CPU, and say so meanwhile: it takes seconds."""
        if self.device.type != "cpu":
            print("nothing to compile here: a GPU has a kernel of its own")
            return
        from labkit.kernels.packed_attention_cpu import warm_up

        print("compiling the loops that read packed K and V ...", flush=True)
        start = time.perf_counter()
        warm_up()
        print(f"compiled in {time.perf_counter() - start:.0f} s; nothing waits for it again in this session")

    # Blanks.

    def check(self, id: str, answer: Answer) -> Answer:
        """Say pass, pending or not yet; return `answer` when it passes and the reference otherwise."""
        exercise = self.find(self.exercises, id, "exercise")
        if answer is exercise.reference:
            print(cards.is_reference(exercise))
            return answer
        verdict = examine(exercise, answer)
        self.verdicts[id] = verdict
        self.remember(exercise, verdict)
        print(cards.verdict(exercise, verdict))
        return answer if verdict.status == "pass" else exercise.reference  # type: ignore[return-value]

    def remember(self, exercise: Exercise, verdict: Verdict) -> None:
        """Write a verdict down. A pass, once earned, stays."""
        if verdict.status == "pending":
            return
        # By diagnosis as well: what a class stumbles over stays known when it has passed.
        met = [f"attempts {verdict.finding.diagnosis}"] if verdict.finding else []
        self.progress.count("exercises", exercise.id, "attempts", *met)
        if verdict.status == "pass":
            failed = self.progress.get("exercises", exercise.id).keys() & {"last_diagnosis", "last_look"}
            self.progress.record("exercises", exercise.id, passed=True, **dict.fromkeys(failed, ""))
        elif verdict.finding:
            found = verdict.finding
            self.progress.record("exercises", exercise.id, last_diagnosis=found.diagnosis, last_look=found.look)

    def hint(self, id: str) -> None:
        """The next of three hints; after a failed check, first what speaks to that failure."""
        exercise = self.find(self.exercises, id, "exercise")
        diagnosis, look = self.failure(id)
        counts = self.progress.get("exercises", id)
        given = counts.get("hints", 0) - sum(many for name, many in counts.items() if name.startswith("hints "))
        steps, counters = list(exercise.hints), ["hints"]
        if special := for_failure(exercise, diagnosis, look):
            steps, counters = [special, *steps], ["hints", f"hints {diagnosis}"]
            given = counts.get(counters[1], 0)
        self.progress.count("exercises", id, *counters)
        print(cards.hint(exercise, steps, max(given, 0)))

    def failure(self, id: str) -> tuple[str, str]:
        """What the latest check of an exercise found wrong and where it said to look, in this session or before; empty
        when nothing."""
        if verdict := self.verdicts.get(id):
            return (verdict.finding.diagnosis, verdict.finding.look) if verdict.finding else ("", "")
        known = self.progress.get("exercises", id)
        return str(known.get("last_diagnosis", "")), str(known.get("last_look", ""))

    def solution(self, id: str) -> None:
        """Show the reference, and why it is so."""
        exercise = self.find(self.exercises, id, "exercise")
        self.progress.count("exercises", id, "solutions")
        print(cards.solution(exercise))

    # Guesses and questions.

    def predict(self, id: str, guess: Any = ...) -> None:
        """Keep a guess until `reveal`. `...` stands for none, or for the one that the progress file has."""
        prediction = self.find(self.predictions, id, "prediction")
        if guess is ... or guess is None:
            earlier = self.guess(id)
            print(cards.no_guess(prediction) if earlier is None else cards.kept(prediction, earlier))
            return
        number = as_number(guess)
        if number is None:
            raise Mistyped(f"{id}: a guess is one number, such as guess=10; got {str(guess)[:40]!r}")
        first = self.progress.get("predictions", id).get("first_guess", number)
        self.progress.record("predictions", id, guess=number, first_guess=first)
        print(cards.kept(prediction, number))

    def reveal(self, id: str, value: float) -> None:
        """Set the guess beside the figure."""
        prediction = self.find(self.predictions, id, "prediction")
        if (figure := as_number(value)) is None:
            raise Mistyped(f"{id}: a figure to reveal is one finite number; got {str(value)[:40]!r}")
        self.progress.record("predictions", id, value=figure)
        print(cards.reveal(prediction, self.guess(id), value))

    def guess(self, id: str) -> float | None:
        """The guess that was made, in this session or before; None when there is none."""
        return as_number(self.progress.get("predictions", id).get("guess"))

    def quiz(self, id: str, answer: str = ...) -> None:  # type: ignore[assignment]
        """Answer a question with the letter of an option; every option has its own reply."""
        quiz = self.find(self.quizzes, id, "question")
        if answer is ... or answer is None:
            print(cards.unanswered(quiz))
            return
        letter = str(answer).strip().lower()
        if letter not in quiz.options:
            raise Mistyped(f"{id}: the options are {', '.join(quiz.options)}; got {answer!r}")
        first = self.progress.get("quizzes", id).get("first_answer", letter)  # trying the others is part of it
        self.progress.record("quizzes", id, first_answer=first, right_at_first=first == quiz.right)
        print(cards.quiz(quiz, letter))

    def summary(self) -> None:
        """How far one got: blanks in this session; guesses and questions in this one and before."""
        print(cards.summary(self.contents, self.verdicts, self.progress))

    def find(self, known: Mapping[str, Any], id: str, kind: str) -> Any:
        """The entry called `id`; Mistyped offers the nearest ids when there is none."""
        if id in known:
            return known[id]
        near = difflib.get_close_matches(str(id), known, n=3, cutoff=0.5) or list(known)[:3]
        raise Mistyped(f"lab {self.number} has no {kind} {id!r}; nearest: {', '.join(near) or 'none'}")


def as_number(guess: Any) -> float | None:
    """A guess as a float (a number of Python's, NumPy's or torch's); None for anything else, NaN and infinity."""
    if isinstance(guess, (bool, str, bytes)):
        return None
    try:
        number = float(guess)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
