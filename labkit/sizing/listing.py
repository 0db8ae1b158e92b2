"""What `labkit size --list` shows: every model, GPU and link that has a name, and the files that do not read."""

from __future__ import annotations

from typing import Any

from labkit import sizing, specs
from labkit.sizing.tables import describe, number
from labkit.sizing.units import SizeError, shown
from labkit.specs import GpuSpec, LinkSpec, ModelSpec, SpecError

Rows = dict[str, Any]


def listing(what: str) -> tuple[Rows, str, list[str]]:
    """What has a name, with its main numbers, for JSON and as text; and a line for each file that does not read."""
    if what not in ("all", "models", "gpus", "links"):
        raise SizeError(f"--list knows models, gpus, links; got {shown(what)}")
    tables = {
        "models": lambda: list_models(specs.models()),
        "gpus": lambda: list_gpus(specs.gpus()),
        "links": lambda: list_links(specs.links()),
    }
    made = {name: table() for name, table in tables.items() if what in ("all", name)}
    text = "\n\n".join("\n".join(lines) for _, lines in made.values())
    return {name: rows for name, (rows, _) in made.items()}, text, specs.problems()


def list_models(models: dict[str, ModelSpec]) -> tuple[Rows, list[str]]:
    """Every model: weights, layers, heads, bytes per token, context."""
    rows, lines = {}, [f"{'model':<24}{'weights':>10}  layers  heads / KV  bytes per token  trained for"]
    for name, model in models.items():
        per_token = number(sizing.bytes_per_token(model))
        rows[name] = describe(model) | {"bytes_per_token": per_token}
        lines.append(
            f"{name:<24}{model.num_parameters / 1e9:>8,.2f} B  {model.num_layers:>6}  {model.num_heads:>5} / "
            f"{model.num_kv_heads:<3}  {per_token:>15,.0f}  {model.max_seq_len:>11,}"
        )
    return rows, [*lines, "B: 10^9 weights. Bytes per token: K and V in float16, before any window is full."]


def list_gpus(gpus: dict[str, GpuSpec]) -> tuple[Rows, list[str]]:
    """Every GPU: memory, bandwidth, peak rate, links."""
    rows, lines = {}, [f"{'GPU':<24}{'memory':>12}{'bandwidth':>14}{'peak in bfloat16':>20}  links"]
    for name, gpu in gpus.items():
        try:
            peak = gpu.flop_per_s("bfloat16")
        except SpecError:  # it has rates of narrower dtypes only
            peak = None
        rate = f"{peak / 1e12:>12,.1f} TFLOP/s" if peak else f"{'-':>20}"
        rows[name] = {
            "title": gpu.title, "memory": gpu.memory_bytes, "bytes_per_s": gpu.bytes_per_s, "bfloat16_flop_per_s": peak,
            "links": gpu.links,
        }  # fmt: skip
        sizes = f"{gpu.memory_gib:>8,.1f} GiB{gpu.bandwidth_gb_s:>9,.0f} GB/s{rate}"
        lines.append(f"{name:<24}{sizes}  {', '.join(gpu.links)}".rstrip())
    return rows, lines


def list_links(links: dict[str, LinkSpec]) -> tuple[Rows, list[str]]:
    """Every link: bandwidth in one direction."""
    lines = [f"{link.name:<24}{link.gb_s:>8,.1f} GB/s each way  {link.title}" for link in links.values()]
    rows = {link.name: {"title": link.title, "bytes_per_s": link.gb_s * 1e9} for link in links.values()}
    return rows, ["link", *lines]
