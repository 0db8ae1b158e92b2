"""A real vLLM server beside the learner's engine: started, asked, measured, ended; a recorded run where there is none.

    with vllm.serving(block_size=32, num_blocks=64) as server:
        run = server.run(requests)
    run.answers["a"].tokens, run.metrics["vllm:num_preemptions"]

    run = vllm.run(requests, block_size=32, num_blocks=64)      # the same; or, with a line on why, the recorded run

`make vllm` makes the environment that the server runs in. A request is what the engine takes: `id`, `tokens`,
`max_new_tokens`, and if it has them `temperature`, `seed`, `stop`, `salt`. `vllm_record.py` made the recorded run.
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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from labkit import limits, models, quality, results
from labkit.course import waiting
from labkit.labs.lab06 import vllm_guard
from labkit.labs.lab06.vllm_environment import FOLDER, STAMP, VERSION
from labkit.labs.lab06.vllm_metrics import counters_in, labels_of, numbers_in

__all__ = ["Answer", "Prompt", "Run", "Server", "VllmError", "recorded", "requests", "run", "serving", "state"]

ENVIRONMENT = Path(__file__).resolve().parents[3] / FOLDER
HOST = "127.0.0.1"
MODEL = "smol"
BYTES_BESIDE_KV = 3.0e9  # main memory of the server's processes with the lab model, its K and V not counted
LAST_LINES = 400  # of the server's log, in which the reason of its end is looked for
EVERY = 0.1  # seconds between two looks at a server
NOT_FOR_VLLM = re.compile(r"PYTHON(PATH|HOME|STARTUP)|VIRTUAL_ENV|TRITON_INTERPRET|VLLM_.*|LABKIT_.*|MPLBACKEND|MAKE.*")
ERROR_LINE = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Interrupt)\b: *\S")
LOG_HEAD = re.compile(r"^(?:\([^)]*pid=\d+\) *)?(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^]]*\] *)?)?")


class VllmError(RuntimeError):
    """There is no vLLM here, or it did not start, did not answer, or ended; the message says which, and what to do."""


class Asks(Protocol):
    """A request: `tokens` are ids of at least one token, `max_new_tokens` how many the answer has at most."""

    @property
    def id(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def max_new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Prompt:
    """The least that a request is."""

    id: str
    tokens: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """New tokens, and seconds after the request was sent: of the first token, of the last."""

    tokens: list[int]
    first: float
    last: float

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.first

    @property
    def tpot(self) -> float:
        """Time per output token after the first, in seconds; 0.0 for one token."""
        return (self.last - self.first) / max(len(self.tokens) - 1, 1)


@dataclass(frozen=True)
class Run:
    """What came of some requests that were sent at once.

    answers: by the request's id. seconds: from the first request to the last token. metrics: as `Server.metrics` names
    them; counters say what this run added, gauges their peak. cache_config: what vLLM says of its blocks. recorded:
    device, version and date of a recorded run; empty where it ran just now.
    """

    answers: dict[str, Answer]
    seconds: float
    metrics: dict[str, float]
    cache_config: dict[str, str]
    recorded: str = ""

    def figures(self) -> dict[str, float]:
        """What lab 06 sets beside the learner's engine, by name."""
        answers = list(self.answers.values())
        new_tokens = sum(len(answer.tokens) for answer in answers)
        several = [answer.tpot for answer in answers if len(answer.tokens) > 1]
        return {
            "new tokens": new_tokens,
            "tokens per second": round(new_tokens / self.seconds, 1),
            "median TTFT ms": round(1e3 * statistics.median(answer.ttft for answer in answers), 1),
            "median TPOT ms": round(1e3 * statistics.median(several), 1) if several else 0.0,
            "peak of vllm:kv_cache_usage_perc": round(self.metrics.get("vllm:kv_cache_usage_perc", 0.0), 4),
            "vllm:prefix_cache_queries": self.metrics.get("vllm:prefix_cache_queries", 0.0),
            "vllm:prefix_cache_hits": self.metrics.get("vllm:prefix_cache_hits", 0.0),
            "vllm:num_preemptions": self.metrics.get("vllm:num_preemptions", 0.0),
        }


def requests() -> list[Prompt]:
    """Eight ragged requests for the lab model: prompts of 9 to 200 tokens of our own texts, 32 to 64 new tokens each.

    Two of them, c and g, begin with the same 96 tokens.
    """
    tokenizer = models.tokenizer()
    text = {
        name: tokenizer(quality.load_text(name)).input_ids for name in ("lighthouse", "clock", "bread", "detective")
    }
    shared = text["lighthouse"][:96]
    return [
        Prompt("a", text["clock"][:9], 64),
        Prompt("b", text["bread"][:57], 40),
        Prompt("c", shared + text["clock"][40:71], 48),
        Prompt("d", text["detective"][:200], 32),
        Prompt("e", text["clock"][100:117], 56),
        Prompt("f", text["bread"][200:364], 36),
        Prompt("g", shared + text["bread"][90:102], 64),
        Prompt("h", text["detective"][300:333], 48),
    ]


def state(environment: Path = ENVIRONMENT) -> str:
    """Why no server can be started from an environment, as a sentence; empty when one can."""
    makes = f"`make vllm` makes {FOLDER}, an environment of its own for vLLM {VERSION} (Linux, 3.4 GB, some minutes)"
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

    block_size: tokens, a multiple of 32 (a CPU's blocks are). num_blocks: of K and V, one of which vLLM keeps for
    itself. max_len: tokens of the longest prompt and answer together. arguments: more of `vllm serve`'s. port: a free
    one by default. model: a folder; by default the model in use. Raises VllmError, from inside the block too when the
    server ends too early, and ValueError for sizes that no server could have.
    """
    check_sizes(block_size, num_blocks, max_len)
    if problem := state(environment):
        raise VllmError(problem)
    kv = num_blocks * block_size * kv_bytes_per_token(dtype)
    require_memory(BYTES_BESIDE_KV + kv)
    port = free_port(port)
    server = Server(port, secrets.token_urlsafe(24), environment)
    command = [
        str(environment / "bin" / "python"), "-P", "-m", "vllm.entrypoints.cli.main", "serve",
        str(model or models.folder()), "--served-model-name", MODEL, "--host", HOST, "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(max_len), "--enforce-eager", "--block-size", str(block_size),
        "--num-gpu-blocks-override", str(num_blocks), *arguments,
    ]  # fmt: skip
    try:
        server.start(command, start_seconds)
        yield server
    finally:
        server.end()


def check_sizes(block_size: int, num_blocks: int, max_len: int) -> None:
    """ValueError for sizes that vLLM would refuse half a minute later."""
    if block_size < 32 or block_size % 32:
        raise ValueError(f"block_size={block_size}: vLLM's blocks on a CPU hold 32 tokens, or a multiple of it")
    if num_blocks * block_size < max_len:
        raise ValueError(
            f"num_blocks={num_blocks} of {block_size} tokens cannot hold one request of max_len={max_len} tokens: "
            "take more blocks, or a shorter max_len"
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


class Server:
    """A server that is up. Made by `serving`."""

    def __init__(self, port: int, token: str, environment: Path) -> None:
        self.port, self.token, self.environment = port, token, environment
        self._folder = tempfile.TemporaryDirectory(prefix="labkit-vllm-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        self._guard: subprocess.Popen | None = None
        self._open: set[socket.socket] = set()

    def start(self, command: Sequence[str], seconds: float) -> None:
        """Start the server and wait until it answers, `seconds` at most."""
        guarded = [sys.executable, "-P", vllm_guard.__file__, *command]
        with self._log.open("wb") as log:
            self._guard = subprocess.Popen(
                guarded, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=self._surroundings()
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
        finally:
            self._hang_up()  # after an error or an interrupt nobody waits for the others
            pool.shutdown(cancel_futures=True)
        return {id: future.result() for id, future in futures.items()}

    def run(self, requests: Sequence[Asks], timeout: float = 300.0) -> Run:
        """Send all requests at once, and say what the server's metrics made of it."""
        before, peaks, over = self.metrics(), {}, threading.Event()

        def watch() -> None:
            while not over.wait(EVERY):
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

    def _surroundings(self) -> dict[str, str]:
        """The environment variables of the server: nothing of the notebook's Python, and nobody is called."""
        kept = {name: value for name, value in os.environ.items() if not NOT_FOR_VLLM.fullmatch(name)}
        threads = os.environ.get("LABKIT_THREADS", "").strip() or str(limits.usable_cores())
        return kept | {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": HOST,
            "VLLM_API_KEY": self.token, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def _is_up(self) -> bool:
        try:
            return MODEL in self._get("/v1/models", seconds=5)
        except VllmError:
            return False

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
            guard.wait(1.0)
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


def body_of(request: Asks) -> dict[str, Any]:
    """A request as vLLM's completions API takes it."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": [int(token) for token in request.tokens],
        "max_tokens": request.max_new_tokens,
        "temperature": getattr(request, "temperature", 0.0),
        "stop_token_ids": [int(token) for token in getattr(request, "stop", ())],
        "ignore_eos": True,  # as the engine does: what ends an answer is said in the request
        "return_token_ids": True,
        "stream": True,
    }
    if (seed := getattr(request, "seed", None)) is not None:
        body["seed"] = seed
    if salt := getattr(request, "salt", ""):
        body["cache_salt"] = salt
    return body


def left(deadline: float) -> float:
    """Seconds until a deadline, for a socket's timeout. TimeoutError when it has passed."""
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def events(response: http.client.HTTPResponse, id: str, before_each: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """The events of a stream. VllmError where the server refuses the request, ConnectionError where it stops."""
    if response.status != 200:
        raise VllmError(f"vLLM refuses request {id}: {refusal(response.read())}")
    while True:
        before_each()
        line = response.readline()
        if not line:
            raise ConnectionError("the stream stopped in the middle")
        said = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if said == b"[DONE]":
            return
        if said:
            event = json.loads(said)
            if "error" in event:
                raise VllmError(f"vLLM gave request {id} up: {refusal(said)}")
            yield event


def refusal(body: bytes) -> str:
    """vLLM's own words on what it refuses."""
    try:
        found = json.loads(body)
        return str(found.get("error", found)["message"]).strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        return body.decode("utf-8", "replace").strip()[:300] or "it says nothing"


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

    Says in one line why it is the recorded one, and on what machine that was.
    """
    try:
        with serving(**settings) as server:
            return server.run(requests)
    except VllmError as error:
        kept = recorded(record)
        print(f"{error}\nIn its place, a recorded run: {kept.recorded}.")
        return kept


def recorded(record: str = "eight requests", folder: Path = results.DATA / "results") -> Run:
    """A run of `requests()` that was recorded: "eight requests", or "few blocks", where some had to be preempted."""
    for kept in results.records("vllm", folder):
        if found := kept.get("runs", {}).get(record):
            said = kept["versions"]
            where = f"{kept['device']}, vLLM {said['vllm']}, {said['date']}"
            answers = {id: Answer(**answer) for id, answer in found["answers"].items()}
            return Run(answers, found["seconds"], found["metrics"], found["cache_config"], where)
    raise VllmError(f"no run called {record!r} was recorded")
