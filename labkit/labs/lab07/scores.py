"""Policies by budgets by tasks: what of an answer is still found in what a cache has kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from labkit.cache import Cache
from labkit.cache.evicting import Policy, Random
from labkit.course import waiting
from labkit.labs.lab07.tasks import Task, tasks
from labkit.llama import Llama
from labkit.quality.reading import Reading, read
from labkit.quality.recall import wilson
from labkit.quality.scored import scored_once
from labkit.quality.side_by_side import logits_beside

Kept = tuple[str, float]
"""A policy's name, and which share of the prompt it keeps."""
FULL: Kept = ("full", 1.0)
Result = tuple[list[bool], float]
"""Of each token of an answer whether it was the likeliest, and the sum of their log-probabilities."""


@dataclass(frozen=True)
class Score:
    """hits: answers whose every token was the likeliest, of `trials`; share: of the answers' tokens. perplexity: of the
    answers' tokens, over what the full cache gave."""

    hits: int
    trials: int
    share: float
    perplexity: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share of whole answers that such texts would give: Wilson's, at 95%."""
        return wilson(self.hits, self.trials)


def drawn_anew(policy: Policy, seed: int) -> Policy:
    """The policy for one more text: one that goes by chance draws anew, lest all texts keep the same positions."""
    return replace(policy, seed=seed) if isinstance(policy, Random) else policy


def caches_of(
    model: Llama, reading: Reading, policies: Mapping[str, Policy], budgets: Sequence[float]
) -> dict[Kept, Cache]:
    """The full cache, and for every policy and budget one that has read the text and evicted at its end."""
    made = {FULL: reading.given(model.cache())}
    for name, policy in policies.items():
        looked = scored_once(policy)
        for budget in budgets:
            cache = Cache.evicting(model.spec.num_layers, looked, budget, during="prompt")
            made[name, budget] = reading.given(cache)
    return made


@torch.inference_mode()
def answered(model: Llama, caches: Sequence[Cache], task: Task) -> list[Result]:
    """What each cache, which has read the task's text, makes of its answer; all go through the model together.

    Where nothing is asked the answer's first token serves as the question: what the text's last token says of it was
    said before anything was evicted.
    """
    asked, answer = (task.asked, task.answer) if task.asked else (task.answer[:1], task.answer[1:])
    tokens = torch.tensor([[*asked, *answer[:-1]]], device=model.device)
    logits = logits_beside(model, caches, tokens.expand(len(caches), -1), last=len(answer))
    want = torch.tensor(answer, device=model.device)
    results = []
    for row in logits:
        logs = row.double().log_softmax(dim=-1)
        results.append(((logs.argmax(dim=-1) == want).tolist(), logs.gather(1, want[:, None]).sum().item()))
    return results


def table(
    model: Llama,
    tokenizer: Any,
    policies: Mapping[str, Policy],
    budgets: Sequence[float],
    trials: int,
    text_tokens: int = 300,
) -> dict[str, dict[Kept, Score]]:
    """Scores by task, and by policy and budget; `FULL`, the ceiling, among them.

    Each text is read once, and each policy looks at it once, for all budgets. Policies by chance draw anew for each.
    """
    found: dict[str, dict[Kept, list[Result]]] = {}
    texts = [task for trial in range(trials) for task in tasks(tokenizer, trial, text_tokens)]
    for number, task in enumerate(waiting.bar(texts, "texts")):
        reading = read(model, torch.tensor([task.text], device=model.device))
        drawn = {name: drawn_anew(policy, number) for name, policy in policies.items()}
        caches = caches_of(model, reading, drawn, budgets)
        for kept, result in zip(caches, answered(model, list(caches.values()), task), strict=True):
            found.setdefault(task.name, {}).setdefault(kept, []).append(result)
    return {task: scores(by_cache) for task, by_cache in found.items()}


def scores(by_cache: Mapping[Kept, Sequence[Result]]) -> dict[Kept, Score]:
    """One task's results as scores, beside the full cache's."""
    full = sum(logs for _, logs in by_cache[FULL])
    made = {}
    for kept, results in by_cache.items():
        tokens = sum(len(hits) for hits, _ in results)
        ratio = torch.tensor((full - sum(logs for _, logs in results)) / tokens).exp().item()
        hits = [all(one) for one, _ in results]
        made[kept] = Score(sum(hits), len(hits), sum(sum(one) for one, _ in results) / tokens, ratio)
    return made


def pooled(found: Mapping[str, Mapping[Kept, Score]], names: Iterable[str]) -> dict[Kept, tuple[int, int]]:
    """Whole answers and texts of several tasks together, by policy and budget."""
    rows = [found[name] for name in names]
    return {kept: (sum(row[kept].hits for row in rows), sum(row[kept].trials for row in rows)) for kept in rows[0]}
