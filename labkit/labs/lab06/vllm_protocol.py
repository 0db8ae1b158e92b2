"""One request to vLLM's completions API, and the events of its answer."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from labkit.labs.lab06.vllm_run import Asks

MODEL = "smol"  # the name by which the server knows its model


class VllmError(RuntimeError):
    """There is no vLLM here, or it did not start, did not answer, or ended; the message says which, and what to do."""


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
