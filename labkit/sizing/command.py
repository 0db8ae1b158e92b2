"""`labkit size`: what a model's weights and KV cache take, and what fits on a GPU. No torch for a model with a spec."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from labkit import sizing, specs
from labkit.sizing import GB, GIB, SizeError
from labkit.sizing.memory import on_one_rank
from labkit.sizing.report import count_users
from labkit.sizing.units import check_count
from labkit.specs import Layer, ModelSpec, SpecError

CONTEXTS = [1024 * 2**power for power in range(1, 8)]  # 2K to 128K
NUMBER = re.compile(r"(\d{1,15}|\d{1,3}(?:,\d{3}){1,4})([KM]?)", re.ASCII | re.IGNORECASE)
FACTORS = {"": 1, "K": 1024, "M": 1024**2}


def run(options: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status. What cannot be is one line on stderr."""
    try:
        if options.list:
            answer, text = listing(options.list)
        else:
            answer, text = sizes(options)
    except (SizeError, SpecError) as error:
        print(f"labkit: {error}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(answer, indent=2) if options.json else text, flush=True)
    except BrokenPipeError:  # as in `labkit size --list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def sizes(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A model's sizes, and what fits where a GPU is named: for JSON, and as text."""
    context, users = tokens("--context", options.context, 8192), count("--users", options.users, 1)
    model = read_model(options.model, options.parameters)
    contexts = sorted({*CONTEXTS, context} if options.context else CONTEXTS)
    kv, weight = options.kv_dtype, options.weight_dtype
    about = {**describe(model), **memory_of(model, kv, weight), "users": users}
    if options.gpu is None:
        if given := [name for name in ("ranks", "link", "reserve") if getattr(options, name) is not None]:
            raise SizeError(f"--{given[0]} needs a device: name one with --gpu")
        about["cache"] = [
            {"context": length, "bytes": sizing.cache_bytes(model, length, users, kv)} for length in contexts
        ]
        return about, "\n".join([*header(model, about), "", *cache_table(about)])
    text = fit(options, model, about, contexts, context)
    return about, text


def fit(
    options: argparse.Namespace, model: ModelSpec, about: dict[str, Any], contexts: Sequence[int], context: int
) -> str:
    """Add the plan for a GPU and the capacity by context to `about`; returns them as text."""
    gpu, ranks = specs.gpu(options.gpu), count("--ranks", options.ranks, 1)
    link = link_for(gpu, ranks, options.link)
    reserve = sizing.RESERVE if options.reserve is None else share("--reserve", options.reserve)
    speed = {"dtype": options.kv_dtype, "weight_dtype": options.weight_dtype, "ranks": ranks}
    how = {**speed, "reserve": reserve}
    plan = sizing.plan(model, gpu, context=context, users=about["users"], link=link, **how)
    capacity = []
    for length, users in sizing.max_batch_context_frontier(model, gpu, contexts, **how):
        one = sizing.cache_bytes(on_one_rank(model, ranks), length, 1, options.kv_dtype)
        step = sizing.decode_floor(model, gpu, length, users, link=link, **speed).seconds if users else None
        capacity.append({"context": length, "users": users, "bytes_per_user": one, "step": step})
    about |= {"link": link and link.name, "reserve_share": reserve, "plan": plan.as_dict(), "capacity": capacity}
    over = f"; {ranks} GPUs over {link.title}, {link.gb_s:g} GB/s each way" if link and ranks > 1 else ""
    notes = f"Weights in {options.weight_dtype}, reserve {reserve:.0%} of what they leave{over}."
    return "\n".join([sizing.table(plan), "", notes, "", *capacity_table(about)])


def read_model(given: str | None, parameters: str | None) -> ModelSpec:
    """The model that a name, a config file or a folder with one says."""
    if not given:
        raise SizeError("name a model, or a config.json: `labkit size --list models` lists those that have a name")
    path = Path(given).expanduser()
    names_a_file = path.suffix == ".json" or given.startswith((".", "/", "~"))
    if names_a_file or (path.exists() and given not in specs.models()):
        return specs.from_hf_config(path, parameters=None if parameters is None else count("--parameters", parameters))
    if parameters is not None:
        raise SizeError("--parameters is for a config file: a spec says itself how many weights there are")
    return specs.model(given)


def link_for(gpu: specs.GpuSpec, ranks: int, name: str | None) -> specs.LinkSpec | None:
    """The link that is named, or else the fastest of the GPU; None for one device."""
    if name is not None:
        return specs.link(name)
    return specs.links().get(gpu.links[0]) if ranks > 1 and gpu.links else None


def describe(model: ModelSpec) -> dict[str, Any]:
    """The shape, for JSON."""
    return {
        "model": model.name,
        "title": model.title,
        "num_layers": model.num_layers,
        "layers": layer_kinds(model),
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "trained_context": model.max_seq_len,
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
    }


def memory_of(model: ModelSpec, kv_dtype: str, weight_dtype: str) -> dict[str, Any]:
    """Bytes of the weights and of one token, for JSON."""
    return {
        "weight_dtype": weight_dtype,
        "weights": sizing.weight_bytes(model, weight_dtype),
        "kv_dtype": kv_dtype,
        "bits_per_element": float(sizing.kv_format(kv_dtype).bits_per_element),
        "bytes_per_token": number(sizing.bytes_per_token(model, kv_dtype)),
        "bytes_per_token_windows_full": number(
            sizing.bytes_per_token(model, kv_dtype, position=widest_window(model) or 0)
        ),
        "mha_bytes_per_token": number(sizing.mha_bytes_per_token(model, kv_dtype)),
    }


def number(value: Any) -> int | float:
    """A whole number as int, a fraction as float."""
    return value if isinstance(value, int) else float(value)


def widest_window(model: ModelSpec) -> int | None:
    """The largest window of any layer, in tokens."""
    return max((layer.window for layer in model.layer_counts if layer.window), default=None)


def layer_kinds(model: ModelSpec) -> list[str]:
    """Each sort of layer with its number and what it keeps."""
    return [f"{many} {layer_words(layer)}" for layer, many in model.layer_counts.items()]


def layer_words(layer: Layer) -> str:
    """What a layer keeps, in a few words."""
    if layer.kind == "latent":
        return f"latent ({layer.latent_dim} numbers per token)"
    if layer.kind == "state":
        return f"state ({layer.state_bytes:,} bytes per user)"
    if layer.kind == "shared":
        return "shared (reads an earlier layer's)"
    dims = f"{layer.k_dim}" if layer.k_dim == layer.v_dim else f"{layer.k_dim} and {layer.v_dim}"
    window = f", {layer.window:,} tokens" if layer.window else ""
    return f"{layer.kind} ({layer.num_kv_heads} KV heads of {dims}{window})"


def header(model: ModelSpec, about: dict[str, Any]) -> list[str]:
    """A model's shape, weights and bytes per token as text."""
    weights = f"{about['weights'] / GB:,.2f} GB, {about['weights'] / GIB:,.2f} GiB in {about['weight_dtype']}"
    active = f"; a token meets {about['active_parameters']:,}" if model.num_experts else ""
    one, late, mha = (about[key] for key in ("bytes_per_token", "bytes_per_token_windows_full", "mha_bytes_per_token"))
    rows = [
        ("layers", ", ".join(about["layers"])),
        ("weights", f"{about['parameters']:,}: {weights}{active}"),
        ("K and V", f"in {about['kv_dtype']}, {about['bits_per_element']:g} bits per element"),
        ("bytes per token", f"{one:,.0f}"),
    ]
    if late != one:
        rows.append(("windows full", f"{late:,.0f} bytes per token, once {widest_window(model) or 0:,} are held"))
    said = f"{mha:,.0f} bytes per token, {mha / one:.3g} times as many" if one else f"{mha:,.0f} bytes per token"
    each = f"{said}: K and V for each of {model.num_heads} heads"
    rows.append(("if it were MHA", each if mha != one else "the same: each head has its own K and V"))
    title = f"{model.name}: {model.title}" if model.title else model.name
    return [f"{title}, trained for {model.max_seq_len:,} tokens", "", *(f"  {name:<18}{said}" for name, said in rows)]


def cache_table(about: dict[str, Any]) -> list[str]:
    """Bytes of the cache by context, as text."""
    lines = [f"  {'tokens':>11}  cache of {count_users(about['users'])}"]
    for row in about["cache"]:
        nbytes, mark = row["bytes"], beyond(row["context"], about)
        lines.append(f"  {row['context']:>11,}{mark} {nbytes / GB:>12,.3f} GB {nbytes / GIB:>12,.3f} GiB")
    return [*lines, *footnote(about, about["cache"])]


def capacity_table(about: dict[str, Any]) -> list[str]:
    """Users that fit by context, and how fast they can be served at best, as text."""
    cache = "cache of one user" if about["plan"]["ranks"] == 1 else "of one user, on each GPU"
    lines = [f"  {'tokens':>11}  {'users that fit':>14}  {cache:>24}  {'decode step of all, floor':>30}"]
    for row in about["capacity"]:
        nbytes, mark = row["bytes_per_user"], beyond(row["context"], about)
        step = f"{row['step'] * 1e3:,.2f} ms, {row['users'] / row['step']:,.0f} tokens/s" if row["users"] else "-"
        size = f"{nbytes / GB:,.2f} GB {nbytes / GIB:>8,.2f} GiB"
        lines.append(f"  {row['context']:>11,}{mark} {row['users']:>14,}  {size:>24}  {step:>30}")
    return [*lines, *footnote(about, about["capacity"])]


def beyond(context: int, about: dict[str, Any]) -> str:
    """A mark at contexts that the model was not trained for."""
    return "*" if context > about["trained_context"] else " "


def footnote(about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> list[str]:
    """What the mark means, if there is one."""
    marked = any(row["context"] > about["trained_context"] for row in rows)
    return [f"  * longer than the {about['trained_context']:,} tokens that it was trained for"] if marked else []


def listing(what: str) -> tuple[dict[str, Any], str]:
    """What has a name, with its main numbers: for JSON, and as text."""
    tables = {"models": list_models, "gpus": list_gpus, "links": list_links}
    if what != "all" and what not in tables:
        raise SizeError(f"--list knows {', '.join(tables)}; got {what!r}")
    parts = {name: tables[name]() for name in tables if what in ("all", name)}
    return {name: rows for name, (rows, _) in parts.items()}, "\n\n".join(
        "\n".join(lines) for _, lines in parts.values()
    )


def list_models() -> tuple[dict[str, Any], list[str]]:
    """Every model: weights, layers, heads, bytes per token, context."""
    rows, lines = {}, [f"{'model':<24}{'weights':>10}  layers  heads / KV  bytes per token  trained for"]
    for name, model in specs.models().items():
        per_token = number(sizing.bytes_per_token(model))
        rows[name] = describe(model) | {"bytes_per_token": per_token}
        lines.append(
            f"{name:<24}{model.num_parameters / 1e9:>8,.2f} B  {model.num_layers:>6}  {model.num_heads:>5} / "
            f"{model.num_kv_heads:<3}  {per_token:>15,.0f}  {model.max_seq_len:>11,}"
        )
    return rows, [*lines, "B: 10^9 weights. Bytes per token: K and V in float16, before any window is full."]


def list_gpus() -> tuple[dict[str, Any], list[str]]:
    """Every GPU: memory, bandwidth, peak rate, links."""
    rows, lines = {}, [f"{'GPU':<24}{'memory':>12}{'bandwidth':>14}{'peak in bfloat16':>20}  links"]
    for name, gpu in specs.gpus().items():
        peak = gpu.flop_per_s("bfloat16")
        rows[name] = {
            "title": gpu.title, "memory": gpu.memory_bytes, "bytes_per_s": gpu.bytes_per_s, "bfloat16_flop_per_s": peak,
            "links": gpu.links,
        }  # fmt: skip
        lines.append(
            f"{name:<24}{gpu.memory_gib:>8,.1f} GiB{gpu.bandwidth_gb_s:>9,.0f} GB/s{peak / 1e12:>12,.1f} TFLOP/s"
            f"  {', '.join(gpu.links)}".rstrip()
        )
    return rows, lines


def list_links() -> tuple[dict[str, Any], list[str]]:
    """Every link: bandwidth in one direction."""
    known = specs.links().values()
    lines = [f"{link.name:<24}{link.gb_s:>8,.1f} GB/s each way  {link.title}" for link in known]
    return {link.name: {"title": link.title, "bytes_per_s": link.gb_s * 1e9} for link in known}, ["link", *lines]


def tokens(option: str, text: str | None, default: int) -> int:
    """A number of tokens: 8192, 8,192, 8K; K is 1,024 and M 1,048,576. SizeError for anything else."""
    if text is None:
        return default
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        raise SizeError(f"{option} counts tokens: 8192, or 128K for 131,072; got {text!r}")
    return check_count(option, int(match[1].replace(",", "")) * FACTORS[match[2].upper()])


def count(option: str, text: str | None, default: int = 1) -> int:
    """A plain whole number from 1. SizeError for anything else, a unit included."""
    if text is None:
        return default
    match = NUMBER.fullmatch(text.strip())
    value = 0 if match is None or match[2] else int(match[1].replace(",", ""))
    if value < 1:
        raise SizeError(f"{option} is a whole number without a unit, at least 1; got {text!r}")
    return value


def share(option: str, text: str) -> float:
    """A share between 0 and 1. SizeError for anything else."""
    try:
        return float(text)
    except ValueError:
        raise SizeError(f"{option} is a share between 0 and 1: 15% is 0.15; got {text!r}") from None
