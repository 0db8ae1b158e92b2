"""How many tokens a layer may keep: a number, a fraction of the prompt, and a pyramid of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from labkit.attention import is_count
from labkit.cache.evicting.policy import Policy
from labkit.cache.step import Step

Budget = int | float
T = TypeVar("T")


def check_budget(budget: Budget) -> None:
    """ValueError unless this is a number of tokens or a fraction."""
    if is_count(budget):
        if budget < 1:
            raise ValueError(f"a budget of {budget} tokens leaves nothing to attend to: take at least 1")
    elif not isinstance(budget, float) or not 0 < budget <= 1:
        raise ValueError(
            f"a budget is a whole number of tokens, or as a float a fraction of the prompt, above 0 and at most 1; got "
            f"{budget!r}"
        )


def tokens_of(budget: Budget, step: Step) -> int:
    """The budget in tokens. A fraction is one of the tokens, padding aside, of the longest row of the first step."""
    if is_count(budget):
        return int(budget)
    longest = max(after - skip for after, skip in zip(step.after, step.skipped, strict=True))
    return max(1, int(budget * longest + 1e-9))  # 0.29 * 100 is a little less than 29


def check_protected(policy: Policy, tokens: int) -> None:
    """ValueError when what the policy always keeps is more than the budget. The token that attends is always held."""
    sinks, recent = policy.sinks, max(1, policy.recent_of(tokens))
    if sinks + recent > tokens:
        raise ValueError(
            f"a budget of {tokens} tokens cannot hold what {type(policy).__name__} always keeps, {sinks} sinks and the "
            f"newest {recent}: take a budget of at least {sinks + recent}, or keep fewer of these"
        )


def each_layer(what: str, said: T | Sequence[T] | Callable[[int], T], num_layers: int) -> list[T]:
    """One for each layer, of one for all, a list of them, or a function of the layer's index."""
    if callable(said):
        return [said(layer) for layer in range(num_layers)]
    if not isinstance(said, Sequence):
        return [said] * num_layers
    if len(said) != num_layers:
        raise ValueError(f"{what} is given for {len(said)} layers, and there are {num_layers}")
    return list(said)


def pyramid(budget: Budget, num_layers: int, *, steepness: float = 20.0) -> list[Budget]:
    """A budget for each layer, `budget` on average: less from layer to layer (PyramidKV, arXiv:2406.02069).

    The last layer gets `budget / steepness` (the paper's beta), the first so much more than `budget` as the last gets
    less; in between the steps are even. No layer gets less than one token, or more than the whole prompt. Whole tokens
    add up to exactly `num_layers * budget`. The paper's lower bound, the observation window, is not built in: a policy
    that always keeps more than a layer's budget says so.
    """
    check_budget(budget)
    if not is_count(num_layers) or num_layers < 1 or steepness < 1:
        raise ValueError(f"a pyramid has layers and a steepness of at least 1; got {num_layers} and {steepness}")
    whole = is_count(budget)
    low = max(1.0, budget / steepness) if whole else max(2 * budget - 1, budget / steepness)
    drop = 2 * (budget - low) / max(1, num_layers - 1)
    exact = [budget + drop * ((num_layers - 1) / 2 - layer) for layer in range(num_layers)]
    if not whole:
        return [min(1.0, part) for part in exact]  # but for rounding, none is more
    ends = [math.floor(sum(exact[:layer]) + 0.5) for layer in range(num_layers + 1)]
    return [end - begin for begin, end in pairwise(ends)]
