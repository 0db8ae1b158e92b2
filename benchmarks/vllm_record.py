"""Records what lab 06 shows where there is no vLLM: `data/results/*_vllm.json`.

    python -m benchmarks.vllm_record

Prints one JSON object, as the benchmarks do, with the runs themselves besides: answers, metrics, cache_config.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from labkit import measure
from labkit.labs.lab06.vllm import Prompt, eight_requests, serving

SETTINGS: dict[str, dict[str, Any]] = {
    "eight requests": {"block_size": 32, "num_blocks": 256, "max_len": 512},
    "few blocks": {"block_size": 32, "num_blocks": 24, "max_len": 512},
}
KEPT = re.compile(
    r"vllm:(kv_cache_usage_perc|prefix_cache_(queries|hits)|num_preemptions|num_requests_(running|waiting)|"
    r"prompt_tokens|generation_tokens|.*_seconds_(sum|count))"
)


def main() -> int:
    """Record each run of `SETTINGS` and print one JSON object. The first pass of a server is thrown away."""
    seen = measure.quiet()
    figures: dict[str, float] = {}
    runs: dict[str, Any] = {}
    version = ""
    for name, settings in SETTINGS.items():
        with serving(**settings) as server:
            server.answer([Prompt("warm up", range(1000, 1040), 8)])
            found, version = server.run(eight_requests()), server.version()
        figures |= {f"{name}: {what}": value for what, value in found.figures().items()}
        runs[name] = {
            "settings": settings,
            "seconds": round(found.seconds, 3),
            "answers": {id: rounded(asdict(answer)) for id, answer in found.answers.items()},
            "metrics": {key: round(value, 4) for key, value in found.metrics.items() if KEPT.fullmatch(key)},
            "cache_config": found.cache_config,
        }
    said = measure.provenance(command="python -m benchmarks.vllm_record") | {"vllm": version} | seen
    device = said.pop("device")
    print(
        json.dumps(
            {"benchmark": "vllm", "device": device, "versions": said, "figures": figures, "bars": [], "runs": runs}
        )
    )
    return 0


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the tenth of a millisecond."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    raise SystemExit(main())
