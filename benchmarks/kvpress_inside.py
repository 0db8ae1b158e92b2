"""kvpress' side of `benchmarks.eviction`: run by the Python of kvpress' own environment, it imports nothing of labkit.

    python -P kvpress_inside.py < request.json

The request is one JSON object: `model`, a folder of Hugging Face's layout; `passages`, token ids; `prompt`, how many of
them are read at once and then compressed; `kept`, how many every layer keeps; `chunk`, how many go through what is left
at once; `presses`, by name a list of a class of kvpress, its parameters, and how often it is drawn; `seed`. The answer
is one line that begins with `MARK`: `versions`, and by name, draw by draw, passage by passage, the surprise of each
token behind the prompt and the first after it, -log p in nats.

It goes the way of kvpress' own pipeline: the press is on while `model.model` reads the prompt, and off afterwards. What
follows is told its positions in the text, `prompt` and up, as `generate_answer` in kvpress/pipeline.py tells it; how
much lies in the cache, which transformers counts, says only who sees whom.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.metadata import version
from typing import Any

import torch

MARK = "labkit-answer "


def main() -> None:
    """Read the request, measure, answer."""
    asked = json.load(sys.stdin)
    import kvpress
    from transformers import AutoModelForCausalLM

    # Attention written out gives its weights, which ObservedAttentionPress needs; the others take them if they are
    # there, and compute the same themselves if not.
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()
    ratio = 1 - asked["kept"] / asked["prompt"]
    found: dict[str, list[list[list[float]]]] = {}
    for name, (kind, parameters, draws) in asked["presses"].items():
        press = getattr(kvpress, kind)(compression_ratio=ratio, **parameters) if kind else None
        kept = asked["kept"] if press else asked["prompt"]
        found[name] = []
        for draw in range(draws):
            torch.manual_seed(asked["seed"] + draw)
            found[name].append(
                [surprises(model, press, ids, asked["prompt"], kept, asked["chunk"]) for ids in asked["passages"]]
            )
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    print(MARK + json.dumps({"versions": versions, "surprises": found}), flush=True)


@torch.inference_mode()
def surprises(model: Any, press: Any, ids: list[int], prompt: int, kept: int, chunk: int) -> list[float]:
    """-log p of each token of a passage from the second behind its prompt on, the prompt cut to `kept` by the press.

    Raises RuntimeError when a layer holds another number of tokens.
    """
    from transformers import DynamicCache

    tokens, cache = torch.tensor([ids]), DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        model.model(input_ids=tokens[:, :prompt], past_key_values=cache)
    held = {layer.keys.shape[2] for layer in cache.layers}
    if held != {kept}:
        raise RuntimeError(f"{type(press).__name__} left {sorted(held)} of {prompt} tokens where {kept} were meant")
    found: list[float] = []
    for start in range(prompt, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        positions = torch.arange(start, stop)[None]
        logits = model(input_ids=tokens[:, start:stop], past_key_values=cache, position_ids=positions).logits[0]
        logs = logits.double().log_softmax(dim=-1)
        found += (-logs.gather(1, tokens[0, start + 1 : stop + 1, None])[:, 0]).tolist()
    return found


if __name__ == "__main__":
    main()
