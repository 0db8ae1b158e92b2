"""What a cache holds after each token of a text, and what the model answers from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from labkit.cache import Cache
from labkit.cache.evicting import Policy
from labkit.labs.lab07.material import kept_share
from labkit.llama import Llama


@dataclass(frozen=True)
class Timeline:
    """words: the text's tokens. held: after each of them, how many of the layers' KV heads hold each position, a share.
    answer: what the model wrote from what was left at the end.
    """

    policy: str
    budget: int
    words: tuple[str, ...]
    held: tuple[tuple[float, ...], ...]
    answer: str

    def dropped(self, moment: int) -> list[int]:
        """Positions that fewer hold after token `moment` than before it, those that lost most first."""
        if moment == 0:
            return []
        before, after = self.held[moment - 1], self.held[moment]
        lost = {place: before[place] - after[place] for place in range(moment)}
        return sorted((place for place in lost if lost[place] > 1e-6), key=lambda place: -lost[place])


@torch.inference_mode()
def timeline(
    model: Llama, tokenizer: Any, text: str, policy: Policy, name: str, budget: int, answer_tokens: int = 6
) -> Timeline:
    """The text, read token by token through a cache that keeps `budget` tokens by `policy`."""
    tokens = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    cache = Cache.evicting(model.spec.num_layers, policy, budget)
    held = []
    logits = torch.empty(0)
    for place in range(tokens.shape[1]):
        logits = model(tokens[:, place : place + 1], cache, last_only=True)
        held.append(tuple(kept_share(cache, tokens.shape[1])))
    answer = [int(logits[0, -1].argmax())]
    while len(answer) < answer_tokens:
        answer.append(int(model(torch.tensor([answer[-1:]], device=model.device), cache)[0, -1].argmax()))
    words = tuple(tokenizer.decode([token]) for token in tokens[0].tolist())
    return Timeline(name, budget, words, tuple(held), tokenizer.decode(answer))
