"""What every benchmark begins and ends with: a look whether the machine is quiet, and one JSON object."""

from __future__ import annotations

import json
import operator
import sys
from typing import Any

from labkit.measure import BusyError, provenance, quiet

SEEN: dict[str, str] = {}  # by `begin`
COMPARE = {">=": operator.ge, "<=": operator.le}


def begin() -> None:
    """Look whether the machine is quiet, and end the process when it is not; the object will say what was seen."""
    try:
        SEEN.update(quiet())
    except BusyError as error:
        sys.exit(str(error))


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
