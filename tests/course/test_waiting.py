"""A bar is for whoever looks on, and is never stored."""

from __future__ import annotations

import nbformat
from jupyter_client.manager import start_new_kernel
from nbconvert.preprocessors import ExecutePreprocessor

from labkit.course import waiting

CODE = """
import time
from labkit.course import waiting
print([i for i in waiting.bar(range(3), "looking") if time.sleep(0.6) is None], waiting.watched())
"""


def test_a_program_that_runs_a_notebook_stores_no_bar() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    ExecutePreprocessor(timeout=60, kernel_name="python3").preprocess(notebook, {})
    (output,) = notebook.cells[0].outputs
    assert (output.name, output.text) == ("stdout", "[0, 1, 2] False\n")


def test_whoever_may_be_asked_for_input_sees_a_bar_whose_place_the_next_line_takes() -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    seen = {"stdout": "", "stderr": ""}

    def look(message: dict) -> None:
        if message["msg_type"] == "stream":
            seen[message["content"]["name"]] += message["content"]["text"]

    try:
        client.execute_interactive(CODE, allow_stdin=True, timeout=60, output_hook=look)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    bar, line = seen["stdout"].rsplit("\r", 1)
    assert line == "[0, 1, 2] True\n"
    assert "looking" in bar
    assert "\n" not in bar
    assert seen["stderr"] == ""


def test_outside_of_a_notebook_there_is_no_bar(capsys) -> None:
    assert list(waiting.bar(range(2), "looking")) == [0, 1]
    assert capsys.readouterr() == ("", "")
