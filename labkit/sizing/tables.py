"""What `labkit size` prints about a model: its shape, its cache by context, what fits by context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from labkit.sizing.report import count_users
from labkit.sizing.units import GB, GIB
from labkit.specs import Layer, ModelSpec


def describe(model: ModelSpec) -> dict[str, Any]:
    """The shape, for JSON."""
    return {
        "model": model.name,
        "title": model.title,
        "found": getattr(model, "found", "") or "",  # how: measured, or read from which names
        "source": model.source,
        "date": model.date,
        "num_layers": model.num_layers,
        "layers": layer_kinds(model),
        "layer_counts": [{"count": many, **asdict(layer)} for layer, many in model.layer_counts.items()],
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "trained_context": model.max_seq_len,
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
    }


def number(value: int | Fraction) -> int | float:
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
    dims = f"{layer.k_dim}" if layer.k_dim == layer.v_dim else f"{layer.k_dim} and {layer.v_dim}"
    parts = {
        "reads an earlier layer's": layer.kind == "shared",
        "keeps nothing of the text": layer.kind == "none",
        f"{layer.num_kv_heads} KV heads of {dims}": layer.num_kv_heads,
        f"{layer.latent_dim} numbers per token": layer.latent_dim,
        f"{layer.index_dim} more to choose tokens by": layer.index_dim,
        f"{layer.window or 0:,} tokens": layer.window,
        f"{layer.state_bytes:,} bytes per user": layer.state_bytes,
    }
    return f"{layer.kind} ({', '.join(said for said, there in parts.items() if there)})"


def header(model: ModelSpec, about: dict[str, Any]) -> list[str]:
    """A model's shape, weights and bytes per token as text."""
    weights = f"{about['weights'] / GB:,.2f} GB, {about['weights'] / GIB:,.2f} GiB in {about['weight_dtype']}"
    active = f"; a token meets {about['active_parameters']:,}" if model.num_experts else ""
    one, late, mha = (about[key] for key in ("bytes_per_token", "bytes_per_token_windows_full", "mha_bytes_per_token"))
    latent = about["bits_per_element_of_latents"]
    whole = f"; latents stay in {latent:g}" if latent not in (None, about["bits_per_element"]) else ""
    rows = [("found", about["found"])] if about["found"] else []
    rows += [
        ("layers", ", ".join(about["layers"])),
        ("weights", f"{about['parameters']:,}: {weights}{active}"),
        ("K and V", f"in {about['kv_dtype']}, {about['bits_per_element']:g} bits per element{whole}"),
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
    """Bytes of the cache by context, as text; and the most on the way there, where that is more."""
    rows = about["cache"]
    dips = any(row["peak"] > row["bytes"] for row in rows)
    most = f"{'at most, on the way':>25}" if dips else ""
    cache = f"cache of {count_users(about['users'])}"
    lines = [f"  {'tokens':>11}  {cache:<33}{most}".rstrip()]
    for row in rows:
        nbytes, mark = row["bytes"], beyond(row["context"], about)
        peak = f" {row['peak'] / GB:>12,.3f} GB" if dips else ""
        lines.append(f"  {row['context']:>11,}{mark} {nbytes / GB:>12,.3f} GB {nbytes / GIB:>12,.3f} GiB{peak}")
    return [*lines, *footnote(about, rows)]


def capacity_table(about: dict[str, Any]) -> list[str]:
    """Users that fit by context, and how fast they can be served at best, as text."""
    cache = "cache of one user" if about["plan"]["ranks"] == 1 else "of one user, on each GPU"
    lines = [f"  {'tokens':>11}  {'users that fit':>14}  {cache:>24}  {'decode step of all, floor':>30}"]
    for row in about["capacity"]:
        nbytes, mark = row["bytes_per_user"], beyond(row["context"], about)
        step = f"{row['step'] * 1e3:,.2f} ms, {row['users'] / row['step']:,.0f} tokens/s" if row["step"] else "-"
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
