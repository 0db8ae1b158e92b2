"""Thirty submissions of lab 01's exercises 01.1, 01.2 and 01.6, as learners hand them in, some of bad will.

Each has what becomes of it: the points of the three exercises, and the diagnosis of those that are not right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

WEIGHTS = """def attention_weights(q, k):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
"""
MASK = """def causal_mask(new_tokens, past):
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(past)
"""
ATTEND = """def attend(q, k, v):
    hidden = ~causal_mask(q.shape[-2], 0).to(q.device)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v
"""
SHORT = {"1": "answer-01-1", "2": "answer-01-2", "6": "answer-01-6"}
ALL, NO_MASK, NONE = (3.0, 3.0, 3.0), (3.0, 0.0, 3.0), (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Submission:
    """answers: the text of the answers' cells, by the exercise's last digit; those left out are right.

    change: what else is done to the notebook. points: expected. diagnoses: expected, of those without all points.
    said: what an output of the executed notebook must hold.
    """

    answers: dict[str, str] = field(default_factory=dict)
    points: tuple[float, float, float] = ALL
    diagnoses: tuple[str, ...] = ()
    change: Callable[[NotebookNode], Any] = lambda notebook: None
    said: str = ""


def made(submission: Submission, handed_out: NotebookNode) -> NotebookNode:
    """The notebook that comes back."""
    notebook = copy.deepcopy(handed_out)
    texts = {"1": WEIGHTS, "2": MASK, "6": ATTEND} | submission.answers
    for digit, text in texts.items():
        cell(notebook, SHORT[digit]).source = text
    submission.change(notebook)
    return notebook


def cell(notebook: NotebookNode, grade_id: str) -> NotebookNode:
    """The cell of that mark."""
    return next(each for each in notebook.cells if each.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def first(text: str) -> Callable[[NotebookNode], None]:
    """Another cell before the first answer."""

    def change(notebook: NotebookNode) -> None:
        place = notebook.cells.index(cell(notebook, SHORT["1"]))
        notebook.cells.insert(place, new_code_cell(text))

    return change


def emptied(notebook: NotebookNode) -> None:
    """No cell is left."""
    notebook.cells = []


def blank(notebook: NotebookNode, handed_out: NotebookNode) -> None:
    """The answers as they were handed out."""
    for grade_id in SHORT.values():
        cell(notebook, grade_id).source = cell(handed_out, grade_id).source


def tests_answer_themselves(notebook: NotebookNode) -> None:
    """The test cells say that all points are earned."""
    for each in notebook.cells:
        if each.metadata.get("nbgrader", {}).get("grade"):
            each.source = "3.0"


def marks_changed(notebook: NotebookNode) -> None:
    """Tests that are skipped, are text, are worth more, or are not graded at all."""
    tests = [each for each in notebook.cells if each.metadata.get("nbgrader", {}).get("grade")]
    tests[0].metadata["tags"] = ["skip-execution"]
    tests[0].metadata.nbgrader.points = 1000.0
    tests[1].metadata.nbgrader.update(grade=False, locked=False, solution=True)
    tests[2].cell_type = "markdown"
    del tests[2]["outputs"], tests[2]["execution_count"]
    cell(notebook, SHORT["1"]).metadata.nbgrader.update(grade=True, points=50.0)


def tests_removed(notebook: NotebookNode) -> None:
    """The test cells are gone, and an answer stands there twice."""
    notebook.cells = [each for each in notebook.cells if not each.metadata.get("nbgrader", {}).get("grade")]
    twice = copy.deepcopy(cell(notebook, SHORT["2"]))
    twice.id = "twice"
    notebook.cells.append(twice)


NO_SCALE = "def attention_weights(q, k):\n    return torch.softmax(q @ k.mT, dim=-1)\n"
NO_OFFSET = (
    "def causal_mask(new_tokens, past):\n"
    "    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril()\n"
)
PATCHES = """import labkit.course.examine, labkit.course.grading.judge
labkit.course.examine.examine = labkit.course.grading.judge.examine = (
    lambda *args, **options: labkit.course.examine.Verdict("pass"))"""
CODE = """from labkit.course.checks import tensors
def always(got, want, tolerance=0.0, *, nan=False):
    return True
tensors.agree.__code__ = always.__code__"""
OUTPUTS = 'get_ipython().display_formatter.format = lambda value, *rest, **options: ({"text/plain": "3.0"}, {})'
PEEK = """import glob, os
wanted = [{folder!r} + "/gradebook.db", "/etc/shadow", *glob.glob({folder!r} + "/**/*", recursive=True)]
for path in wanted:
    try:
        open(path, "rb").read(1)
        print("FILE SEEN", path)
    except OSError:
        pass
commands = [open(f"/proc/{{name}}/cmdline", "rb").read() for name in os.listdir("/proc") if name.isdigit()]
others = [command for command in commands if b"course.cli" in command]
print("looked at", len(wanted), "files;", len(others), "PROCESS SEEN: the grader's" if others else "")"""
SPRAY = """import os
for folder in ({folder!r}, {outside!r}, "/tmp", "/var/tmp", "/dev/shm", {package!r}, os.path.expanduser("~root")):
    for path in (folder, folder + "/submitted/right/lab01"):
        try:
            open(path + "/labkit-sprayed.txt", "w").write("x")
        except OSError:
            pass
try:
    open({outside!r} + "/precious.txt", "a").write("spoilt")
except OSError:
    pass
print("sprayed")"""
CALL = """import socket
for address in (("127.0.0.1", {port}), ("1.1.1.1", 80)):
    try:
        socket.create_connection(address, timeout=2).sendall(b"hello")
        print("REACHED", address)
    except OSError as error:
        print("not reached:", error)"""
FORK = """import os, time
children = 0
try:
    while children < 5000:
        if os.fork() == 0:
            time.sleep(10_000)
        children += 1
finally:
    print("forked", children)
"""
BORROWED = """from labkit.labs.lab01 import references

def causal_mask(new_tokens, past):
    return references.causal_mask(new_tokens, past)
"""
DISK = """import time
for number in range(40):
    open(f"file{number}", "wb").write(bytes(40_000_000))
time.sleep(4)
"""
AWAY = """import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(54321)"], start_new_session=True)
for process in (1, os.getppid(), -1):
    try:
        os.kill(process, 9)
    except OSError as error:
        print(error)"""


def submissions(
    handed_out: NotebookNode, *, folder: str, outside: str, package: str, port: int
) -> dict[str, Submission]:
    """All of them, by the learner's name.

    folder: the class's. outside: one that nobody may change. package: the course's. port: where somebody listens.
    """
    places = {"folder": folder, "outside": outside, "package": package, "port": port}
    return {
        # Right, in one way or another.
        "right": Submission(),
        "right_tests_removed": Submission(change=tests_removed),
        # Partly right, and wrong.
        "some_sizes": Submission(
            {"2": MASK.replace("tril(past)", "tril(past or 1)")},
            (3.0, 0.4, 3.0), ("values",),
        ),
        "no_bfloat16": Submission(
            {"1": WEIGHTS.replace("    ret", "    if q.dtype == torch.bfloat16:\n        raise TypeError\n    ret")},
            (1.9, 3.0, 3.0), ("raised",),
        ),
        "no_scale": Submission({"1": NO_SCALE}, (0.0, 3.0, 3.0), ("no-scale",)),
        "no_offset": Submission({"2": NO_OFFSET}, NO_MASK, ("mask-offset",)),
        "all_wrong": Submission(
            {"1": NO_SCALE, "2": NO_OFFSET, "6": "def attend(q, k, v):\n    return v\n"}, NONE,
            ("no-scale", "mask-offset", "new-tokens-unseen"),
        ),
        "untouched": Submission(
            points=NONE, diagnoses=("pending", "pending", "mask-after"), change=lambda n: blank(n, handed_out)
        ),
        "empty": Submission(points=NONE, diagnoses=("missing",) * 3, change=emptied),
        # Accidents.
        "syntax_error": Submission({"2": "def causal_mask(new_tokens, past)\n    return 1\n"}, NO_MASK, ("missing",)),
        "crashes": Submission(
            {"2": "import ctypes\nctypes.string_at(0)\n" + MASK}, NO_MASK, ("missing",), said="segmentation fault"
        ),
        "crashes_when_called": Submission(
            {"2": "import ctypes\ndef causal_mask(new_tokens, past):\n    return ctypes.string_at(0)\n"}, NO_MASK,
            ("ProcessEnded",), said="segmentation fault",
        ),
        "hangs": Submission({"2": "while True:\n    pass\n"}, NO_MASK, ("missing",), said="KeyboardInterrupt"),
        "hangs_when_called": Submission(
            {"2": "def causal_mask(new_tokens, past):\n    while True:\n        pass\n"}, NO_MASK, ("too-slow",)
        ),
        "sleeps_and_is_deaf": Submission(
            {"2": "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(10**6)\n"}, NO_MASK,
            ("missing",), said="could not be stopped",
        ),
        "prints_for_ever": Submission({"2": 'while True:\n    print("x" * 10_000)\n'}, NO_MASK, ("missing",)),
        "takes_all_memory": Submission(
            {"2": "hoard = [bytearray(10**8) for _ in range(10_000)]\n" + MASK}, NO_MASK, ("missing",),
            said="MemoryError",
        ),
        # Bad will.
        "tests_answer_themselves": Submission(
            {"1": NO_SCALE, "2": NO_OFFSET}, (0.0, 0.0, 3.0), ("no-scale", "mask-offset"), tests_answer_themselves
        ),
        "marks_changed": Submission(
            {"1": NO_SCALE, "2": NO_OFFSET, "6": "def attend(q, k, v):\n    return v\n"}, NONE,
            ("no-scale", "mask-offset", "new-tokens-unseen"), marks_changed,
        ),
        "patches_the_check": Submission({"1": NO_SCALE}, NONE, ("tampered",) * 3, first(PATCHES)),
        "rewrites_code": Submission({"1": NO_SCALE}, NONE, ("tampered",) * 3, first(CODE)),
        "forges_outputs": Submission({"1": NO_SCALE}, NONE, ("NotGraded",) * 3, first(OUTPUTS)),
        "imports_the_reference": Submission(
            {"2": "from labkit.labs.lab01.references import causal_mask\n"}, NO_MASK, ("the-courses-own",)
        ),
        "calls_the_reference": Submission(
            {"2": BORROWED},
            NO_MASK, ("the-courses-own",),
        ),
        "peeks": Submission({"1": NO_SCALE}, (0.0, 3.0, 3.0), ("no-scale",), first(PEEK.format(**places)), "looked at"),
        "sprays_files": Submission(change=first(SPRAY.format(**places)), said="sprayed"),
        "calls_out": Submission(change=first(CALL.format(**places)), said="not reached"),
        "forks": Submission(  # its children leave no room for a thread, which the check of the last exercise needs
            {"2": FORK + MASK}, (3.0, 0.0, 0.0), ("missing", "RuntimeError"), said="Resource temporarily unavailable"
        ),
        "kills_and_leaves_one": Submission(change=first(AWAY), said="not permitted"),
        "fills_the_disk": Submission(
            {"2": DISK + MASK},
            NO_MASK, ("missing",), said="MB to files",
        ),
    }  # fmt: skip
