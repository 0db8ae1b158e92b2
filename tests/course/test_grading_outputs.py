"""What a submission puts out reaches the grader within bounds, and a kernel that does not start blames nobody."""

from __future__ import annotations

import asyncio
import resource
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("nbgrader")

from labkit.course.grading import nbgrader_parts
from labkit.course.grading.nbgrader_parts import (
    LEFT_OUT,
    MESSAGE,
    SILENCE,
    ConfinedExecute,
    ConfinedKernelManager,
    shortened,
)
from labkit.course.grading.room import RoomError
from labkit.course.grading.usage import LINUX, family


def executed(*sources: str, **limits) -> nbformat.NotebookNode:
    """A notebook of these cells below a text, after it was run as a submission; it is valid."""
    notebook = new_notebook(cells=[new_markdown_cell("a text"), *map(new_code_cell, sources)])
    executor = ConfinedExecute(limits={"seconds": 300, "cell_seconds": 60.0, **limits})
    executor.preprocess(notebook, {"metadata": {}})
    nbformat.validate(notebook)
    return notebook


def text(cell: nbformat.NotebookNode) -> str:
    return str([output.get("text") or output.get("evalue") or output.get("data") for output in cell.outputs])


def test_a_result_and_a_line_of_hundreds_of_megabytes_do_not_reach_the_grader() -> None:
    before = psutil.Process().memory_info().rss
    notebook = executed("'x' * 300_000_000", "print('y' * 300_000_000)", "print('and on')", memory=3 * 10**9)
    _, result, line, after = notebook.cells
    for cell in (result, line):
        assert f"it put out more than {MESSAGE / 1e6:g} MB at once" in text(cell)
    assert "and on" in text(after)
    assert psutil.Process().memory_info().rss - before < 200_000_000


@pytest.mark.skipif(not LINUX, reason="nothing else bounds the memory of a process")
def test_a_message_of_many_parts_does_not_reach_the_grader_either(monkeypatch) -> None:
    """Each part may be as large as a part may be, and no number of them is too many for ZeroMQ."""
    monkeypatch.setattr(nbgrader_parts, "GRADER", 200_000_000)
    many = f"""kernel = get_ipython().kernel
parts = [memoryview(bytes({MESSAGE - 1000}))] * 150
kernel.session.send(kernel.iopub_socket, "display_data", {{}}, parent=kernel.get_parent(), buffers=parts)"""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    notebook = executed(many, "print('and on')")
    assert f"it put out more than {MESSAGE / 1e6:g} MB at once" in text(notebook.cells[1])
    assert "and on" in text(notebook.cells[2])
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_memory_that_runs_out_when_a_message_is_taken_up_costs_that_cell_alone(monkeypatch) -> None:
    process = ConfinedExecute.process_message

    def too_large(self, msg, cell, index):
        if msg["msg_type"] == "stream" and "all of it" in str(msg["content"]):
            raise MemoryError
        return process(self, msg, cell, index)

    monkeypatch.setattr(ConfinedExecute, "process_message", too_large)
    notebook = executed("print('all of it')", "print('and on')")
    assert f"it put out more than {MESSAGE / 1e6:g} MB at once" in text(notebook.cells[1])
    assert "and on" in text(notebook.cells[2])


def test_a_crash_is_told_as_one_however_late_it_is_seen(monkeypatch) -> None:
    """Who dies is cut off, too: on a slow machine for longer than a kernel that put out too much is waited for."""
    seen = ConfinedExecute._async_poll_kernel_alive

    async def seen_late(self) -> None:
        await asyncio.sleep(3 * SILENCE)
        await seen(self)

    monkeypatch.setattr(ConfinedExecute, "_async_poll_kernel_alive", seen_late)
    notebook = executed("import ctypes\nctypes.string_at(0)", "print('and on')")
    assert "segmentation fault" in text(notebook.cells[1])
    assert "and on" in text(notebook.cells[2])


def test_what_is_too_long_is_left_out_with_a_line_and_the_cell_goes_on() -> None:
    notebook = executed(
        "for _ in range(40):\n    print('z' * 10_000, flush=True)\n'the result'",
        "'w' * 1_000_000",
        "raise ValueError('v' * 1_000_000)",
        "for _ in range(500): display({'text/plain': 'u' * 10_000}, raw=True)",
        "print('short')",
    )
    _, lines, result, error, shows, short = notebook.cells
    for cell in (lines, result, shows):
        assert LEFT_OUT in [each.get("text") for each in cell.outputs]
    assert "the result" in text(lines)
    assert error.outputs[0].ename == "ValueError"
    assert error.outputs[0].evalue.startswith("vvv")
    assert all(len(str(cell.outputs)) < 500_000 for cell in notebook.cells[1:])
    assert text(short) == str(["short\n"])


def test_a_notebook_has_an_end_on_the_wall_whatever_its_cells_do() -> None:
    began, before = time.monotonic(), family(psutil.Process().pid)  # those of earlier tests, such as multiprocessing's
    notebook = executed("import time\nprint(1)", "while True: time.sleep(1e-4)", "print(2)", wall_seconds=20.0)
    assert time.monotonic() - began < 150
    slow = "not run" in text(notebook.cells[2])  # a busy machine takes that long to start
    assert slow or "it ran for more than" in text(notebook.cells[2])
    assert "not run: the notebook had run for 20 seconds" in text(notebook.cells[3])
    assert [process for process in family(psutil.Process().pid) if process not in before] == []


def test_a_kernel_that_does_not_start_is_not_the_submissions_fault(monkeypatch) -> None:
    notebook = new_notebook(cells=[new_markdown_cell("a text"), new_code_cell("1")])
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(ConfinedKernelManager, "format_kernel_cmd", lambda self, **_: self.room.command(silent))
    executor = ConfinedExecute(limits={}, startup_seconds=2.0)
    with pytest.raises(RoomError, match="no kernel could be started"):
        executor.preprocess(notebook, {"metadata": {}})
    nbformat.validate(notebook)


def test_an_error_is_shortened_and_stays_one() -> None:
    error = shortened({"ename": "E" * 10**6, "evalue": ["x"], "traceback": None})
    assert len(str(error)) < 20_000
    nbformat.v4.new_output("error", **error)
