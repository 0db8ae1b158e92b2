"""Recall of a planted number through every cache: the part of `benchmarks.eviction` that asks most.

One pass over a text serves all caches (`Reading`), a policy scores once for all its budgets (`Scored`), and all caches
are asked in one batch of the model, each row through its own layers (`SideBySide`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.eviction_caches import SHARES, policies, progress, quest
from benchmarks.report import bar
from labkit.cache import Cache
from labkit.llama import Llama
from labkit.quality.reading import Reading, read
from labkit.quality.recall import NUMBER, PLACES, QUESTION, planted, wilson
from labkit.quality.scored import scored_once
from labkit.quality.side_by_side import logits_beside

TEXT_TOKENS = 300
SEED = 2026  # of the trials: "SnapKV for a question" was tuned on others, of the same template and texts
QUARTER = 0.25
Cell = tuple[str, float, bool, str]
"""Cache, share of the text's tokens, whether the question was known before eviction, place of the number."""


def recalled(model: Llama, caches: Sequence[Cache], asked: list[int], answer: list[int]) -> list[bool]:
    """By cache, whether every token of the answer is the likeliest behind what it holds and what is still `asked`.

    The caches have seen equally many tokens, and evict no more; they are of no use afterwards.
    """
    tokens = torch.tensor([asked + answer[:-1]]).expand(len(caches), -1)
    logits = logits_beside(model, caches, tokens, last=len(answer))
    return (logits.argmax(dim=-1) == torch.tensor(answer)).all(dim=1).tolist()


def asked_caches(model: Llama, tokens: int, seed: int) -> dict[tuple[str, float], Callable[[], Cache]]:
    """Every cache that is asked for a number, for a text of so many tokens, by its name and share."""
    makers: dict[tuple[str, float], Callable[[], Cache]] = {("full", 1.0): model.cache}
    for name, policy in policies(model, seed).items():
        if "window of 64" in name:
            continue  # more than a budget of 12%
        once = scored_once(policy)
        for share in SHARES[1:]:  # all of it is the full cache, whoever chooses
            makers[name, share] = lambda policy=once, share=share: Cache.evicting(
                model.spec.num_layers, policy, share, during="prompt"
            )
    return makers | {("Quest", share): lambda share=share: quest(model, int(share * tokens)) for share in SHARES[1:]}


def measure_recall(
    model: Llama, encode: Callable[[str], list[int]], texts: dict[str, Tensor], trials: int
) -> dict[Cell, list[bool]]:
    """Hit or miss of each trial, in one order for all caches."""
    chance, found = random.Random(SEED), {}
    proses = [tokens[0].tolist() for tokens in texts.values()]
    question = encode(QUESTION)
    for at, (place, share_of_text) in enumerate(PLACES.items()):
        for trial in range(trials):
            number = str(chance.randint(1000, 9999))
            start = chance.randrange(0, 1500)
            fact = encode(NUMBER.format(number))
            text = planted(proses[trial % len(proses)][start:], {share_of_text: fact}, TEXT_TOKENS)
            # Of a known question all but the last token is read with the text: eviction lies before the answer.
            reading = read(model, torch.tensor([text + question[:-1]]))
            for known, first in ((True, len(text) + len(question) - 1), (False, len(text))):
                asked = (text + question)[first:]
                seed = at * trials + trial
                hits = one_trial(model, reading.first(first), asked, encode(f" {number}"), seed)
                for (name, share), hit in hits.items():
                    found.setdefault((name, share, known, place), []).append(hit)
            progress(f"recall, {place}: trial {trial + 1} of {trials}")
    return found


def one_trial(
    model: Llama, reading: Reading, asked: list[int], answer: list[int], seed: int
) -> dict[tuple[str, float], bool]:
    """Whether each cache, given a reading, answers what is asked. seed: of this trial's random policy."""
    makers = asked_caches(model, reading.tokens.shape[1], seed)
    caches = {which: reading.given(make()) for which, make in makers.items()}
    return dict(zip(caches, recalled(model, list(caches.values()), asked, answer), strict=True))


def recall_figures(found: dict[Cell, list[bool]], texts: int = 1) -> tuple[dict[str, float], list[dict]]:
    """Shares and their intervals by cell, and the bar on the best policy at a quarter. texts: that trials go round."""
    figures: dict[str, float] = {}
    for (name, share, known, place), hits in found.items():
        low, high = wilson(sum(hits), len(hits))
        cell = f"recall, {name} at {share:.0%}, {told_known(known)}, {place}"
        figures |= {
            cell: round(sum(hits) / len(hits), 4),
            f"{cell}, low": round(low, 4),
            f"{cell}, high": round(high, 4),
        }
    print_recall(found)
    bars = []
    for known in dict.fromkeys(known for _, _, known, _ in found):
        if (judged := best_at_quarter(found, known, texts)) is None:
            continue
        best, value = judged
        asked = f"question {told_known(known)}"
        print(f"  {asked}: {best} is best at 25% on half of the trials; {value:.2f} of the full cache's on the others")
        name = f"recall at 25%, {asked}, of the policy that is best on half of the trials, over full on the other half"
        figures[name] = round(value, 4)
        if known:
            bars.append(bar(name, value, ">=", 0.9))
    return figures, [*bars, bar("fewest trials in a cell of recall", min(map(len, found.values())), ">=", 40)]


def best_at_quarter(found: dict[Cell, list[bool]], known: bool, texts: int = 1) -> tuple[str, float] | None:
    """The policy that recalls most at a quarter in half of the trials; its recall over the full cache's in the rest.

    Trials go round the texts: of every two rounds one chooses and one judges, so that both have all texts. Quest is no
    policy, since it evicts nothing. None where there is nothing to choose, or nothing left to judge by.
    """
    chosen_by: dict[str, int] = {}
    judged_by: dict[str, int] = {}
    for (name, share, asked, _), hits in found.items():
        if asked == known and name != "Quest" and share == (1.0 if name == "full" else QUARTER):
            if len(hits) <= texts:
                return None
            for trial, hit in enumerate(hits):
                half = judged_by if trial // texts % 2 else chosen_by
                half[name] = half.get(name, 0) + hit
    policies_asked = [name for name in chosen_by if name != "full"]
    if not policies_asked or "full" not in judged_by:
        return None
    best = max(policies_asked, key=lambda name: chosen_by[name])
    return best, judged_by[best] / max(judged_by["full"], 1e-9)


def print_recall(found: dict[Cell, list[bool]]) -> None:
    """A line for each cache, share and kind of question: all places together, and each."""
    lines: dict[tuple[str, float, bool], dict[str, list[bool]]] = {}
    for (name, share, known, place), hits in found.items():
        lines.setdefault((name, share, known), {})[place] = hits
    for (name, share, known), by_place in lines.items():
        every = [hit for hits in by_place.values() for hit in hits]
        places = ", ".join(f"{place} {told(hits)}" for place, hits in by_place.items())
        print(f"  {name:<22} {share:4.0%} {told_known(known):<9} {told(every)}, {len(every)} trials; {places}")


def told_known(known: bool) -> str:
    """In words."""
    return "known" if known else "not known"


def told(hits: Sequence[bool]) -> str:
    """A share and its interval."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.2f} ({max(low, 0):.2f} to {min(high, 1):.2f})"
