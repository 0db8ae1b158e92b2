"""The three parts of nbgrader that the course replaces, named in an assignment folder's configuration.

`Blanks` puts a blank back where a solution stood; `Restore` puts back what a submission changed about its cells;
`ConfinedExecute` runs a submission in a `Room`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import zmq
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient.client import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbclient.util import ensure_async, run_sync
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.preprocessors import ClearSolutions, Execute, NbGraderPreprocessor
from traitlets import Dict, Float, List, Unicode

from labkit.course.grading.marks import BLANK, KIND, marks
from labkit.course.grading.room import Limits, Room, RoomError
from labkit.course.grading.usage import LINUX, computed, family, running
from labkit.printable import printable

DEATHS = 3  # kernels that one notebook may lose
GRACE = 5.0  # seconds for a cell to end after it was interrupted
OUTPUT = 200_000  # characters of one cell's outputs
OUTPUTS = 50 * OUTPUT  # of all of a notebook's
MESSAGE = 4 * 10**6  # bytes of one part of a message: a larger one is refused before it is in the grader's memory
QUEUE = 64  # messages that wait
GRADER = 10**9  # bytes that the grader may take for what one notebook puts out: a message has any number of parts
SILENCE = 2.0  # seconds that a kernel may be alive, but cut off
SHORT = 2000  # characters of a part of an error that is too long
LEFT_OUT = f"[The rest is left out: a cell's outputs may have {OUTPUT:,} characters.]\n"
LOOK = 0.4  # seconds between two looks at a cell that runs
STEP = 1.0  # seconds that one look at the clock counts at most: a machine that was asleep has not computed


class Blanks(ClearSolutions):
    """nbgrader's ClearSolutions, with each exercise's own blank in the place of one stub for all."""

    def preprocess_cell(self, cell: NotebookNode, resources: Any, cell_index: int) -> tuple[NotebookNode, Any]:
        """Put the blank back, and take it out of the metadata."""
        blank = cell.metadata.pop(BLANK, None)
        if blank is None or not utils.is_solution(cell):
            return super().preprocess_cell(cell, resources, cell_index)
        cell.source = blank
        return cell, resources


class Restore(NbGraderPreprocessor):
    """Make the cells that count what they were when they were handed out, but for the answers' own text.

    nbgrader puts back the text of a locked cell; not its kind, its tags or its being graded, and it gives up on a
    notebook whose cells are missing.
    """

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """Each known cell once, with its own metadata; graded ones that are missing at the end; nothing else marked."""
        marked = resources["nbgrader"]
        with Gradebook(marked["db_url"]) as gradebook:
            source = gradebook.find_notebook(marked["notebook"], marked["assignment"])
            graded = {cell.name: cell.max_score for cell in source.grade_cells}
            solutions = {cell.name for cell in source.solution_cells}
            known = {cell.name: (cell.source, cell.cell_type, cell.checksum) for cell in source.source_cells}
        seen: set[str] = set()
        for cell in nb.cells:
            marks_found = cell.metadata.get("nbgrader") if isinstance(cell.metadata, dict) else None
            name = str(marks_found.get("grade_id")) if isinstance(marks_found, dict) else ""
            cell.metadata = NotebookNode()
            if name in known and name not in seen:
                seen.add(name)
                self.restore(cell, name, known[name], graded.get(name), name in solutions)
        for name, points in graded.items():
            if name not in seen:
                cell = new_code_cell()
                self.restore(cell, name, known[name], points, False)
                nb.cells.append(cell)
        nb.metadata = NotebookNode({"kernelspec": nb.metadata.get("kernelspec", {})})
        return nb, resources

    @staticmethod
    def restore(cell: NotebookNode, name: str, known: tuple, points: float | None, solution: bool) -> None:
        """Give a cell the metadata, the kind and, where it is locked, the text of the one that was handed out."""
        source, kind, checksum = known
        if cell.cell_type != kind:
            cell.cell_type = kind
            cell.pop("attachments", None)
            if kind == "code":
                cell.outputs, cell.execution_count = [], None
        if not solution:
            cell.source = source
        own = marks(name, solution=solution, points=points)
        cell.metadata = NotebookNode(nbgrader=own | {"checksum": checksum, "cell_type": kind})


class ConfinedKernelManager(AsyncKernelManager):
    """A kernel in a room of its own, spoken to through files, since it has no network."""

    limits = Dict()
    hide = List(Unicode())

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.room = Room(Limits(**self.limits), [Path(path) for path in self.hide])
        self.transport = "ipc"
        self.connection_file = str(self.room.run / "kernel.json")
        self.ip = str(self.room.run / "k")

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """Jupyter's command, confined."""
        return self.room.command(super().format_kernel_cmd(extra_arguments))

    def write_connection_file(self, **options: Any) -> None:
        """Write it, for the room's user to read."""
        super().write_connection_file(**options)
        self.room.give_file(Path(self.connection_file))

    def client(self, **options: Any) -> AsyncKernelClient:  # type: ignore[override]
        """A client that takes no part of a message without measure, nor any number of messages: the kernel is the
        submission's. The number of parts ZeroMQ does not bound: `at_most` does."""
        client = super().client(**options)
        client.context.setsockopt(zmq.MAXMSGSIZE, MESSAGE)
        client.context.setsockopt(zmq.RCVHWM, QUEUE)
        return client

    def close(self) -> None:
        """Leave nothing behind."""
        self.room.close()


class Cuts:
    """Whether a connection to a kernel was cut, as ZeroMQ does where a message is too large."""

    def __init__(self, client: Any) -> None:
        channels = (client.iopub_channel, client.shell_channel)
        self.sockets: list[Any] = [channel.socket for channel in channels]
        self.monitors = [socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for socket in self.sockets]

    async def seen(self) -> bool:
        """Whether one was cut since the kernel started."""
        return any([await monitor.poll(0) for monitor in self.monitors])

    def close(self) -> None:
        """Look no more."""
        for socket in self.sockets:
            if not socket.closed:
                socket.disable_monitor()


@contextlib.contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let this process hold so many bytes more than now, on Linux; elsewhere nothing bounds it.

    ZeroMQ cuts the connection where it has no memory for a part of a message, as where a part is too large.
    """
    if not LINUX:
        yield
        return
    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [psutil.Process().memory_info().data + more, *(each for each in before if each != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def lives(launcher: int) -> bool:
    """Whether a kernel runs below its launcher: one that died is cut off as well, and nothing that it put out did that.

    The launcher's own children only wait for it.
    """
    for process in family(launcher):
        with contextlib.suppress(psutil.Error):
            if process.ppid() != launcher and running(process):
                return True
    return False


class ConfinedExecute(Execute):
    """nbgrader's Execute in a confined kernel; a cell that ends the kernel costs that cell, not the notebook."""

    limits = Dict(help="what a submission may use: the fields of labkit.course.grading.room.Limits").tag(config=True)
    hide = List(Unicode(), help="folders that a submission must not see").tag(config=True)
    startup_seconds = Float(300.0, help="seconds that a kernel may take to start").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: Any = None, km: Any = None) -> tuple[NotebookNode, Any]:
        """Run all cells, then let each graded one say either points of the judge's or why there are none."""
        with at_most(GRADER):
            return self.run_all(nb, resources)

    def run_all(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """`preprocess`, in whatever memory there is."""
        NotebookClient.__init__(self, nb)
        self.reset_execution_trackers()
        self._check_assign_resources(resources)
        self.timeout, self.iopub_timeout, self.startup_timeout = None, 60, int(self.startup_seconds)
        self.record_timing = self.store_widget_state = False
        allowed = Limits(**self.limits)
        self.cell_seconds, self.ends = allowed.cell_seconds, time.monotonic() + allowed.wall_seconds
        self.written_in_all = 0
        self.lost: list[int] = []
        if not nb.cells:
            return nb, self.resources
        start = 0
        while start < len(nb.cells) and len(self.lost) < DEATHS and time.monotonic() < self.ends:
            start = self.run_from(start)
        why = f"{DEATHS} cells before it ended the process"
        if len(self.lost) < DEATHS:
            why = f"the notebook had run for {allowed.wall_seconds:g} seconds"
        for cell in nb.cells[start:]:
            if cell.cell_type == "code":
                cell.outputs = [failure("NotRun", f"not run: {why}")]
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = settled(cell) if utils.is_grade(cell) else harmless(cell.outputs)
        return nb, self.resources

    def run_from(self, start: int) -> int:
        """Run the cells from `start` in a new kernel, after those before; returns where to go on when it dies.

        Raises RoomError where the kernel does not start: no submission is to blame for that.
        """
        numbers = [match for cell in self.nb.cells if utils.is_grade(cell) for match in [number_in(cell)] if match]
        seal = f"__import__('labkit.course.grading.judge', fromlist=['seal']).seal({(numbers or ['01'])[0]!r})"
        left = dict(self.limits) | {"wall_seconds": self.ends - time.monotonic()}
        manager = ConfinedKernelManager(kernel_name="python3", limits=left, hide=list(self.hide), config=self.config)
        self.km: Any = manager
        self.kc: Any = None
        self.owns_km = True
        index, started = start, False
        try:
            with self.setup_kernel(), contextlib.closing(Cuts(self.kc)) as self.cuts:
                self.run_aside(seal, self.startup_seconds)
                started = True
                for before, cell in enumerate(self.nb.cells[:start]):
                    if again := self.again(before, cell):
                        self.run_aside(again)
                for index in range(start, len(self.nb.cells)):
                    self.run_limited(self.nb.cells[index], index)
                return len(self.nb.cells)
        except (DeadKernelError, RuntimeError, TimeoutError) as error:
            why = str(error) if "stopped" in str(error) else manager.room.why or str(error)
            if not started and time.monotonic() < self.ends:
                raise RoomError(f"no kernel could be started: {printable(why)}") from None
            index = next(
                (at for at in range(index, len(self.nb.cells)) if self.nb.cells[at].cell_type == "code"), index
            )
            cell = self.nb.cells[index]
            if cell.cell_type != "code":  # nothing is left to run
                return len(self.nb.cells)
            cell.outputs = [*cell.get("outputs", []), failure("ProcessEnded", f"the process was ended: {why}")]
            self.lost.append(index)
            return index + 1
        finally:
            self.km = self.kc = None
            manager.close()

    def again(self, index: int, cell: NotebookNode) -> str:
        """What to run of a cell in another kernel; where an answer ended the last one, the reference stands in."""
        if cell.cell_type != "code":
            return ""
        if index not in self.lost:
            return cell.source
        name = cell.metadata.nbgrader.grade_id if utils.is_grade(cell) else ""
        id = name.removeprefix("points-").replace("-", ".")
        return f"__import__('labkit.course.grading.judge', fromlist=['f']).fall_back({id!r}, globals())" if id else ""

    def run_aside(self, source: str, seconds: float = 0) -> None:
        """Execute something that is no cell of the notebook's."""
        first = self.nb.cells[0]
        try:
            self.run_limited(new_code_cell(source), 0, seconds)
        finally:
            self.nb.cells[0] = first  # nbclient puts what it executed where it thinks that it belongs

    def run_limited(self, cell: NotebookNode, index: int, seconds: float = 0) -> None:
        """Execute one cell in limited time; interrupt it then, and end the kernel if that does not help."""
        if cell.cell_type == "code":
            self.written, self.left_out = 0, False
            run_sync(self.limited)(cell, index, seconds or self.cell_seconds)

    async def limited(self, cell: NotebookNode, index: int, seconds: float) -> None:
        """`run_limited`, where one may wait.

        What counts is the time that the cell computes, or that it does nothing: not that it waits for a processor.
        """
        task = asyncio.ensure_future(self.async_execute_cell(cell, index, store_history=True))
        provisioner: Any = self.km.provisioner
        launcher = provisioner.pid
        before, _ = computed(launcher)
        last, idle, stopped, grace, silence = time.monotonic(), 0.0, False, 0.0, 0.0
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK)
            now = time.monotonic()
            step, last = min(now - last, STEP), now
            used, busy = computed(launcher)
            idle += 0 if busy else step
            silence += step if await self.cuts.seen() and lives(launcher) else 0
            cut = silence > SILENCE or (silence and task.done() and not task.exception())
            # ZeroMQ may have had memory for a message, and Python none to take it up.
            if cut or (task.done() and isinstance(task.exception(), MemoryError)):
                await self.end(task, provisioner)
                raise DeadKernelError(f"it was stopped: it put out more than {MESSAGE / 1e6:g} MB at once")
            if not stopped and max(used - before, idle) > seconds:
                stopped = True
                await ensure_async(self.km.interrupt_kernel())
            elif stopped:
                grace += step
                if grace > GRACE:
                    await ensure_async(provisioner.kill())
                    grace = -1e9
        if self.left_out:
            cell.outputs.append(new_output("stream", name="stderr", text=LEFT_OUT))
        if not stopped:
            task.result()
        elif task.exception():
            raise DeadKernelError(f"the cell ran for more than {seconds:g} seconds and could not be stopped")
        else:
            cell.outputs.append(failure("TimeIsUp", f"the cell was stopped after {seconds:g} seconds"))

    @staticmethod
    async def end(task: asyncio.Future, provisioner: Any) -> None:
        """End the kernel, and leave its cell."""
        await ensure_async(provisioner.kill())
        await asyncio.wait({task}, timeout=GRACE)  # nbclient sees that it is dead, and ends its own looking
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Take what a cell puts out, up to a limit: an endless loop that prints must not fill the grader's memory.

        Results and errors have a limit of their own: what was printed before must not cost them.
        """
        kind = msg["msg_type"]
        if kind in ("status", "execute_input", "clear_output"):
            return super().process_message(msg, cell, cell_index)
        if kind == "error" and len(str(msg["content"])) > OUTPUT // 4:
            msg["content"] = shortened(msg["content"])
        size = len(str(msg["content"])) + sum(map(len, msg.get("buffers") or ()))
        most = 2 * OUTPUT if kind in ("execute_result", "error") and size <= OUTPUT else OUTPUT
        if self.written + size > most or self.written_in_all + size > OUTPUTS:
            self.left_out = True
            return None
        self.written += size
        self.written_in_all += size
        return super().process_message(msg, cell, cell_index)


def shortened(content: Mapping[str, Any]) -> dict[str, Any]:
    """An error whose parts are too long, with the beginning of each."""
    name, value = (str(content.get(part, ""))[:SHORT] for part in ("ename", "evalue"))
    return {"ename": name, "evalue": value, "traceback": [f"{name}: {value}", LEFT_OUT]}


def number_in(cell: NotebookNode) -> str:
    """The lab that a graded cell belongs to, by the id of its exercise: "points-01-2" is of lab 01."""
    parts = str(cell.metadata.nbgrader.get("grade_id", "")).split("-")
    return parts[1] if len(parts) > 2 and parts[1].isdigit() else ""


def failure(name: str, text: str) -> NotebookNode:
    """An error as a cell's output: nbgrader gives no points for it."""
    return new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def settled(cell: NotebookNode) -> list[NotebookNode]:
    """A graded cell's outputs: the judge's card and its points, or one error. Without any, nbgrader would give all."""
    results = [each for each in cell.outputs if each.output_type == "execute_result"]
    card = results[0].data.get(KIND) if len(results) == 1 else None
    if isinstance(card, Mapping):
        points, most = card.get("points"), cell.metadata.nbgrader.points
        ours = isinstance(points, (int, float)) and math.isfinite(points) and 0 <= points <= most == card.get("most")
        if (
            ours
            and str(card.get("exercise", "")).replace(".", "-") == cell.metadata.nbgrader.grade_id[len("points-") :]
        ):
            result = new_output("execute_result", data={"text/plain": f"{points:g}", KIND: dict(card)})
            result.execution_count = cell.execution_count
            return [new_output("stream", name="stdout", text=f"{card.get('text', '')}\n"), result]
    errors = [each for each in cell.outputs if each.output_type == "error"]
    return errors[:1] or [failure("NotGraded", "what this cell put out is not a result of the course's test")]


def harmless(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs without what a browser would run: teachers open these pages."""
    for output in outputs:
        if "data" in output:
            for kind in [kind for kind in output.data if "html" in kind or "javascript" in kind or "svg" in kind]:
                del output.data[kind]
    return outputs


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("grading needs Linux or macOS: use WSL on Windows")
