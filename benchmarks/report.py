"""What benchmarks share: a look whether the machine is quiet, the bytes of a decode step, bars, one JSON object."""

from __future__ import annotations

import json
import operator
import sys
from typing import Any

import torch

from labkit import sizing
from labkit.measure import BusyError, provenance, quiet
from labkit.specs import ModelSpec

SEEN: dict[str, str] = {}  # by `begin`
COMPARE = {">=": operator.ge, "<=": operator.le}


def busy() -> str:
    """Look whether the machine is quiet: empty when it is, and the object will say what was seen; else the reason."""
    try:
        SEEN.update(quiet())
    except BusyError as error:
        return str(error)
    return ""


def begin() -> None:
    """Look whether the machine is quiet, and end the process when it is not."""
    if reason := busy():
        sys.exit(reason)


def step_bytes(spec: ModelSpec, context: int, batch: int = 1, *, dtype: str) -> int:
    """Bytes that a decode step must read: all that its tokens meet of a dense model's weights, and all K and V."""
    weights = sizing.weights_met(spec, batch) * getattr(torch, dtype).itemsize
    return weights + sizing.step_bytes(spec, context, batch, dtype)


def bar(name: str, value: float, comparison: str, limit: float) -> dict[str, Any]:
    """One bar and whether it holds."""
    return {
        "name": name,
        "value": round(value, 6),
        "bar": f"{comparison} {limit:g}",
        "holds": COMPARE[comparison](value, limit),
    }


def finish(benchmark: str, figures: dict[str, float], bars: list[dict[str, Any]], device: Any, command: str) -> int:
    """Print the object; 0 when every bar holds, else 1."""
    said = provenance(device, command) | SEEN
    print(
        json.dumps(
            {"benchmark": benchmark, "device": said.pop("device"), "versions": said, "figures": figures, "bars": bars}
        )
    )
    return 0 if all(entry["holds"] for entry in bars) else 1
