"""`labkit size`: what a model's weights and KV cache take, and what fits on a GPU. No torch for a model with a spec."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from labkit import sizing, specs
from labkit.sizing import Dense, Evicting, Format, Paged, PagedQuantized, Quantized, SizeError
from labkit.sizing.links import link_between
from labkit.sizing.listing import listing
from labkit.sizing.memory import on_one_rank
from labkit.sizing.tables import cache_table, capacity_table, describe, header, number, widest_window
from labkit.sizing.units import LIMIT, check_count, check_share, dtype_name, shown
from labkit.specs import ModelSpec, SpecError

CONTEXTS = [1024 * 2**power for power in range(1, 8)]  # 2K to 128K
NUMBER = re.compile(r"(\d{1,4000}|\d{1,3}(?:,\d{3}){1,999})([KM]?)", re.ASCII | re.IGNORECASE)  # more int() refuses
FACTORS = {"": 1, "K": 1024, "M": 1024**2}
PARAMETERS = 10**15
QUANTIZED = {"group_size": 1, "residual_length": 0, "sink_length": 0}  # and the least that each can be
ARGUMENT = re.compile(r"(?<![\w-])(parameters|group_size|residual_length|sink_length|block_size|budget)\b(?:=(\w*))?")


def run(options: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status. What cannot be is one line on stderr."""
    problems: list[str] = []
    try:
        if options.list is not None:
            alone(options)
            answer, text, problems = listing(options.list)
        else:
            answer, text = sizes(options)
    except SizeError as error:
        said = str(error) if options.block_size is None else str(error).replace("group_size", "block_size")
        answer, text, problems = {}, "", [in_flags(said)]  # a block in few bits is a group
    except SpecError as error:
        answer, text, problems = {}, "", [str(error)]
    if answer:
        print(json.dumps(answer, indent=2) if options.json else text, flush=True)
    for problem in problems:
        print(f"labkit: {problem}", file=sys.stderr)
    return 1 if problems else 0


def in_flags(message: str) -> str:
    """What is said of Python's arguments, said of what was typed: "group_size=32" becomes "--group-size 32"."""
    return ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')} {found[2] or ''}".rstrip(), message)


def alone(options: argparse.Namespace) -> None:
    """SizeError if something is asked beside --list that a list does not answer."""
    given = {flag: value for flag, value in vars(options).items() if flag not in ("list", "json", "run")}
    if extra := next((name for name, value in given.items() if value is not None), None):
        said = repr(options.model) if extra == "model" else f"--{extra.replace('_', '-')}"
        raise SizeError(f"--list only lists: leave out {said}, or leave out --list")


def sizes(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A model's sizes, and what fits where a GPU is named: for JSON, and as text."""
    context, users = tokens("--context", options.context, 8192), count("--users", options.users, 1)
    kept, weight = kv_format(options), dtype("--weight-dtype", options.weight_dtype, "bfloat16")
    model = read_model(options.model, options.parameters)
    contexts = sorted({*CONTEXTS, context} if options.context else CONTEXTS)
    about = {**describe(model), **memory_of(model, kept, weight), "users": users, "context": context}
    if options.gpu is None:
        if given := [name for name in ("ranks", "link", "reserve") if getattr(options, name) is not None]:
            raise SizeError(f"--{given[0]} needs a device: name one with --gpu")
        about["cache"] = [
            {
                "context": length,
                "bytes": sizing.cache_bytes(model, length, users, kept),
                "peak": sizing.peak_bytes(model, length, users, kept),
            }
            for length in contexts
        ]
        return about, "\n".join([*header(model, about), "", *cache_table(about)])
    return about, fit(options, model, kept, about, contexts)


def fit(
    options: argparse.Namespace, model: ModelSpec, kept: Format, about: dict[str, Any], contexts: Sequence[int]
) -> str:
    """Add the plan for a GPU and the capacity by context to `about`; returns them as text."""
    gpu, ranks = specs.gpu(options.gpu), count("--ranks", options.ranks, 1)
    if options.link is not None and ranks == 1:
        raise SizeError("--link connects several GPUs: say with --ranks how many")
    link = link_between(gpu, ranks, options.link)
    reserve = sizing.RESERVE if options.reserve is None else share("--reserve", options.reserve)
    speed: dict[str, Any] = {"dtype": kept, "weight_dtype": about["weight_dtype"], "ranks": ranks}
    how = {**speed, "reserve": reserve}
    plan = sizing.plan(model, gpu, context=about["context"], users=about["users"], link=link, **how)
    capacity = []
    for length, users in sizing.max_batch_context_frontier(model, gpu, contexts, **how):
        one = sizing.peak_bytes(on_one_rank(model, ranks), length, 1, kept)
        step = (
            sizing.decode_floor(model, gpu, length, users, link=link, **speed).seconds if 0 < users <= LIMIT else None
        )
        capacity.append({"context": length, "users": users, "bytes_per_user": one, "step": step})
    about |= {"link": link and link.name, "reserve_share": reserve, "plan": plan.as_dict(), "capacity": capacity}
    over = f"; {ranks} GPUs over {link.title}, {link.gb_s:g} GB/s each way" if link and ranks > 1 else ""
    notes = f"Weights in {about['weight_dtype']}, reserve {100 * reserve:g}% of what they leave{over}."
    found = [f"Shape: {about['found']}."] if about["found"] else []
    return "\n".join([sizing.table(plan), "", notes, *found, "", *capacity_table(about)])


def read_model(given: str | None, parameters: str | None) -> ModelSpec:
    """The model that a name, a config file or a folder with one says, with as many weights as --parameters says."""
    weights = None if parameters is None else count("--parameters", parameters, most=PARAMETERS)
    if not given:
        raise SizeError("name a model, or a config.json: `labkit size --list models` lists those that have a name")
    path = os.path.expanduser(given)  # as `exists`, it raises nothing: whoever reads the file says what is wrong
    names_a_file = given.endswith(".json") or given.startswith((".", "/", "~"))
    named = {file.stem for file in (specs.DATA / "models").glob("*.json")}
    is_config = names_a_file or (os.path.exists(path) and given not in named)
    model = None if is_config else specs.model(given)
    try:
        return with_weights(model, weights) if model else specs.from_hf_config(path, parameters=weights)
    except SpecError as error:
        raise SizeError(str(error)) from None  # so that `run` says it in flags


def with_weights(model: ModelSpec, weights: int | None) -> ModelSpec:
    """The model, with so many weights in all where they are given; of a mixture, a token still leaves out as many."""
    if weights is None:
        return model
    if model.active_parameters is None:
        return replace(model, parameters=weights)
    unmet = model.num_parameters - model.active_parameters
    if weights <= unmet:
        raise SizeError(
            f"--parameters {weights:,} are fewer than the {unmet:,} that one token of {model.name} does not meet: "
            f"give all weights, of which {model.num_parameters:,} are published"
        )
    return replace(model, parameters=weights, active_parameters=weights - unmet)


def kv_format(options: argparse.Namespace) -> Format:
    """How K and V are kept, as --kv-dtype and the flags that belong to it say."""
    name = dtype("--kv-dtype", options.kv_dtype, "float16")
    given: dict[str, Any] = {
        field: count(f"--{field.replace('_', '-')}", text, least=least)
        for field, least in {**QUANTIZED, "block_size": 1, "budget": 1}.items()
        if (text := getattr(options, field)) is not None
    }
    block, budget = given.pop("block_size", None), given.pop("budget", None)
    if block is not None and budget is not None:
        raise SizeError("--budget keeps tokens that need not lie side by side: leave --block-size out")
    few = int(name.removeprefix("int")) if name.startswith("int") else None
    if given and (few is None or block is not None):
        flag = f"--{next(iter(given)).replace('_', '-')}"
        if few is None:
            raise SizeError(f"{flag} is for K and V in few bits, as with --kv-dtype int4; --kv-dtype is {name}")
        raise SizeError(f"a block of K and V in few bits is a group, and the newest waits: leave {flag} out")
    if block is not None:
        return Paged(block, name) if few is None else PagedQuantized(few, block)
    kept = None if few is None else Quantized(few, **given)
    if budget is not None:
        return Evicting(budget, name) if kept is None else Evicting(budget, victims=0, packing=kept)
    return kept or Dense(name)


def memory_of(model: ModelSpec, kept: Format, weight_dtype: str) -> dict[str, Any]:
    """Bytes of the weights and of one token, for JSON."""
    latent = next((layer for layer in model.layer_counts if layer.kind == "latent"), None)
    late = sizing.bytes_per_token(model, kept, position=widest_window(model) or 0)
    return {
        "weight_dtype": weight_dtype,
        "weights": sizing.weight_bytes(model, weight_dtype),
        "kv_dtype": kept.name,
        "kv_format": {"kind": type(kept).__name__.lower(), **asdict(cast(Any, kept))},
        "bits_per_element": float(kept.bits_per_element),
        "bits_per_element_of_latents": latent and float(8 * kept.token_bytes(latent, 0) / latent.elements_per_token),
        "bytes_per_token": number(sizing.bytes_per_token(model, kept)),
        "bytes_per_token_windows_full": number(late),
        "mha_bytes_per_token": number(sizing.mha_bytes_per_token(model, kept)),
    }


def tokens(option: str, text: str | None, default: int) -> int:
    """A number of tokens: 8192, 8,192, 8K; K is 1,024 and M 1,048,576. SizeError for anything else."""
    if text is None:
        return default
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        raise SizeError(f"{option} counts tokens: 8192, or 128K for 131,072; got {shown(text)}")
    return check_count(option, int(match[1].replace(",", "")) * FACTORS[match[2].upper()])


def count(option: str, text: str | None, default: int = 1, *, least: int = 1, most: int = LIMIT) -> int:
    """A plain whole number from `least` to `most`. SizeError for anything else, a unit included."""
    if text is None:
        return default
    match = NUMBER.fullmatch(text.strip())
    value = -1 if match is None or match[2] else int(match[1].replace(",", ""))
    if value < least:
        raise SizeError(f"{option} is a whole number without a unit, at least {least}; got {shown(text)}")
    return check_count(option, value, least, most)


def share(option: str, text: str) -> float:
    """A share from 0 to below 1. SizeError for anything else."""
    try:
        return check_share(option, float(text), zero=True)
    except ValueError:
        raise SizeError(f"{option} is a share between 0 and 1: 15% is 0.15; got {shown(text)}") from None


def dtype(option: str, text: str | None, default: str) -> str:
    """A dtype's name. SizeError, with the flag, for what is none."""
    try:
        return dtype_name(default if text is None else text)
    except SizeError as error:
        raise SizeError(f"{option}: {error}") from None
