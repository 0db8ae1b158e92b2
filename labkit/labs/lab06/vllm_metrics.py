"""vLLM's page `/metrics`, in Prometheus' text format, as numbers by name.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? +(\S+)(?: +\d+)?")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
SAME_FOR_ALL = ("engine", "model_name")  # labels that tell nothing where one engine serves one model


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each line of a Prometheus page that has them."""
    for line in text.splitlines():
        if not line.startswith("#") and (found := SAMPLE.fullmatch(line.strip())):
            with contextlib.suppress(ValueError):
                yield found[1], dict(LABEL.findall(found[2] or "")), float(found[3])


def counters_in(text: str) -> set[str]:
    """Names, as `numbers_in` gives them, of what only grows."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE))
    grows = set()
    for name, labels, _ in samples(text):
        bare = name.removesuffix("_sum").removesuffix("_count")
        if kinds.get(name) == "counter" or kinds.get(name.removesuffix("_total")) == "counter":
            grows.add(labelled(name, labels))
        elif kinds.get(bare) in ("histogram", "summary"):
            grows.add(labelled(name, labels))
    return grows


def numbers_in(text: str) -> dict[str, float]:
    """A Prometheus page as numbers by name. Numbers of one name are added up: vLLM has one row per engine."""
    found: dict[str, float] = {}
    for name, labels, value in samples(text):
        if not name.endswith(("_bucket", "_created", "_info")):
            key = labelled(name, labels)
            found[key] = found.get(key, 0.0) + value
    return found


def labelled(name: str, labels: Mapping[str, str]) -> str:
    """A metric's name: without `_total`, with those labels that tell something."""
    told = ",".join(f'{key}="{value}"' for key, value in labels.items() if key not in SAME_FOR_ALL)
    return name.removesuffix("_total") + (f"{{{told}}}" if told else "")


def labels_of(name: str, text: str) -> dict[str, str]:
    """The labels of the first sample called `name`; empty when there is none."""
    return next((labels for found, labels, _ in samples(text) if found == name), {})
