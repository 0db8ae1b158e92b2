"""kvpress' answer to the question of `benchmarks.eviction`: perplexity behind a prompt that a press has compressed.

    theirs = kvpress_side.measure(passages)                    # {"SnapKV": 21.8, ...}, by the names of `PRESSES`
    asked = kvpress_side.ask(passages)                         # the same with every token's surprise, and versions

kvpress runs in an environment of its own (`kvpress_environment`), made the first time it is asked for, with the same
weights: `kvpress_inside.py` says what it does there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kvpress_environment, kvpress_inside
from benchmarks.kvpress_environment import TRANSFORMERS, VERSION
from labkit import models

NOT_FOR_KVPRESS = re.compile(r"PYTHON.*|VIRTUAL_ENV|TRITON_.*|LABKIT_.*|MPLBACKEND|TRANSFORMERS_.*")


class KvpressError(RuntimeError):
    """kvpress has given no answer; the message says why."""


@dataclass(frozen=True)
class Press:
    """One of kvpress' presses. kind: its class, "" for none, the full cache. draws: how often it is asked."""

    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    draws: int = 1


# By the names that the same policies of ours have in `eviction.policies`, and with their parameters. RandomPress gets
# no seed of its own: with one it would draw the same for every layer. From draw to draw perplexity moves by a quarter
# and more.
PRESSES = {
    "full": Press(""),
    "SnapKV": Press("SnapKVPress", {"window_size": 32, "kernel_size": 5}),
    "SnapKV, window of 64": Press("SnapKVPress", {"window_size": 64, "kernel_size": 5}),
    "H2O, mean": Press("ObservedAttentionPress"),
    "KeyDiff": Press("KeyDiffPress"),
    "expected attention": Press(
        "ExpectedAttentionPress",
        {"n_future_positions": 512, "n_sink": 4, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0},
    ),
    "TOVA": Press("TOVAPress"),
    "sinks and window": Press("StreamingLLMPress", {"n_sink": 4}),
    "key norm": Press("KnormPress"),
    "random": Press("RandomPress", draws=3),
}


@dataclass(frozen=True, eq=False)
class Answer:
    """What kvpress has measured. surprises: -log p in nats by press, float64 `[draws, passages, scored]`.

    versions: of kvpress, transformers and torch.
    """

    surprises: dict[str, Tensor]
    versions: dict[str, str]

    @property
    def perplexities(self) -> dict[str, float]:
        """exp of the mean surprise, by press, draws pooled."""
        return {name: found.mean().exp().item() for name, found in self.surprises.items()}


def measure(passages: Sequence[Sequence[int]], **options: Any) -> dict[str, float]:
    """Perplexity by press, on passages of token ids; options and errors as for `ask`."""
    return ask(passages, **options).perplexities


def ask(
    passages: Sequence[Sequence[int]],
    *,
    prompt: int = 256,
    kept: int = 128,
    chunk: int = 16,
    presses: Mapping[str, Press] = PRESSES,
    seed: int = 0,
    environment: Path = kvpress_environment.FOLDER,
    pip_arguments: Sequence[str] = (),
    seconds: float = 1800.0,
) -> Answer:
    """Let kvpress read passages of one length with the model in use, in float32 on a CPU.

    The first `prompt` tokens go through the model at once and every layer keeps `kept` of them; the others but the last
    go through what is left, `chunk` at a time, at their positions in the text, and each predicts the next. Scored are
    `len(passage) - prompt - 1` predictions. seed: of the first draw; each further one has the next. pip_arguments: for
    making the environment. seconds: the longest that an answer may take, the environment's making aside.

    Raises ValueError for passages or sizes that cannot be, NotMade where there is no environment and none can be made,
    KvpressError where there is no answer, and ModelError.
    """
    check(passages, prompt, kept, chunk)
    python = kvpress_environment.ready(pip_arguments, environment)
    request = {
        "model": str(models.folder()), "passages": [list(map(int, ids)) for ids in passages], "prompt": prompt,
        "kept": kept, "chunk": chunk, "seed": seed,
        "presses": {name: (press.kind, dict(press.parameters), press.draws) for name, press in presses.items()},
    }  # fmt: skip
    told = answer_of(python, json.dumps(request), seconds)
    require_versions(told["versions"], environment)
    shape = len(passages), len(passages[0]) - prompt - 1
    found = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in told["surprises"].items()}
    for name, press in presses.items():
        if name not in found or found[name].shape != (press.draws, *shape):
            raise KvpressError(f"kvpress' answer for {name!r} is not of {press.draws} draws of {shape} tokens")
        if not found[name].isfinite().all():
            raise KvpressError(f"kvpress' surprises under {name!r} are not finite")
    return Answer(found, told["versions"])


def check(passages: Sequence[Sequence[int]], prompt: int, kept: int, chunk: int) -> None:
    """ValueError for passages or sizes that cannot be."""
    lengths = {len(ids) for ids in passages}
    if len(lengths) != 1:
        raise ValueError(f"passages are of one length, and there is at least one; got lengths {sorted(lengths)}")
    if not 1 <= kept < prompt:
        raise ValueError(f"a press keeps some of the prompt's tokens, not all; got {kept} of {prompt}")
    if min(lengths) < prompt + 2:
        raise ValueError(
            f"a passage of {min(lengths)} tokens leaves nothing to predict behind a prompt of {prompt}: take at least "
            f"{prompt + 2}"
        )
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens per pass, at least 1; got {chunk}")


def answer_of(python: Path, request: str, seconds: float) -> dict[str, Any]:
    """What `kvpress_inside.py` says to a request. Raises KvpressError."""
    command = [str(python), "-P", kvpress_inside.__file__]
    try:
        result = subprocess.run(
            command, input=request, env=surroundings(), timeout=seconds, capture_output=True, text=True,
            errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise KvpressError(f"kvpress has not answered within {seconds:g} s") from None
    except OSError as error:
        raise KvpressError(f"kvpress' Python cannot be started: {error.strerror}") from error
    if result.returncode:
        raise KvpressError(f"kvpress ended without an answer: {last_words(result.returncode, result.stderr)}")
    for line in result.stdout.splitlines():
        if line.startswith(kvpress_inside.MARK):
            return json.loads(line.removeprefix(kvpress_inside.MARK))
    raise KvpressError("kvpress ended well and gave no answer")


def surroundings() -> dict[str, str]:
    """The environment variables of kvpress' process: nothing of this Python, nobody is called, as many threads."""
    kept = {name: value for name, value in os.environ.items() if not NOT_FOR_KVPRESS.fullmatch(name)}
    return kept | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip


def last_words(returncode: int, said: str) -> str:
    """Why a process ended: the signal that ended it, or the last line that it said."""
    if returncode < 0:
        name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else str(-returncode)
        return f"{name} ended it" + (", probably because memory ran out" if name == "SIGKILL" else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit {returncode}"


def require_versions(found: Mapping[str, str], environment: Path) -> None:
    """KvpressError where the environment holds other releases than it was made with: figures would be another's."""
    meant = {"kvpress": VERSION, "transformers": TRANSFORMERS}
    if any(found.get(name) != version for name, version in meant.items()):
        there = ", ".join(f"{name} {found.get(name)}" for name in meant)
        raise KvpressError(
            f"{environment.name} holds {there}, where kvpress {VERSION} and transformers {TRANSFORMERS} are meant: "
            "remove that folder, and it is made anew"
        )
