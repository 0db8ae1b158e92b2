"""02.3: generation with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.course.exercise import Exercise
from labkit.labs.lab02.material import BATCH, tiny_model
from labkit.labs.lab02.references import generate_with_cache
from labkit.llama import Llama


class Watched:
    """A model that notes every call: the tokens it ran, whether with the cache, and how many that held before."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.calls: list[tuple[Tensor, Any, int]] = []

    def __call__(self, tokens: Tensor, cache: Any = None, **options: Any) -> Tensor:
        """Note the call and pass it on."""
        self.calls.append((tokens, cache, 0 if cache is None else cache.seq_len))
        return self.model(tokens, cache, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class GenerateWithCache(Exercise):
    """Prefill, then one token a step."""

    id, title, minutes, difficulty = "02.3", "Generate with a cache", 6, 3
    needs = ("02.2",)
    reference = staticmethod(generate_with_cache)
    why = (
        "Feeding the prompt once and then only what was just chosen is all that a cache changes. The newest token has "
        "to be fed to get the next one, and its K and V are appended by the model on the way."
    )
    hints = (
        "The model remembers through the cache. After the prompt, which tokens has it not seen yet?",
        "First call: the whole prompt, which already gives the first new token. Later calls: the newest token alone.",
        "fed = tokens\nfor each new token:\n    logits = model(fed, cache, last_only=True)\n"
        "    fed = logits[:, -1:].argmax(dim=-1)   # [batch, 1]\n    keep fed",
    )
    hints_for: ClassVar = {
        "no-cache": "The answer is right but every step ran the whole sequence. Pass the cache, and feed less.",
        "re-fed": "What the cache holds must not be fed again: it would stand there twice, at later positions.",
        "last-token-fed-twice": "The prefill's logits already name the first new token. Start decoding from that one.",
        "cache-not-empty": "`tokens` is new, all of it, also when the cache holds an earlier turn. Feed it whole.",
        "prefill-unused": "After prefill you know one new token already. Keep it, then feed it.",
        "one-step-too-many": "The last new token is only returned. Nobody asks what follows it.",
    }
    prompt_tokens, count = 7, 6

    def examine(self, answer: Callable) -> None:
        """Two prompts, then one token only, then a cache that holds something already."""
        self.model = tiny_model()
        for _ in range(2):
            prompt = torch.randint(0, 97, (BATCH, self.prompt_tokens))
            self.check_run(answer, prompt, self.count, Cache.growing(2), torch.empty(BATCH, 0, dtype=torch.long))
        self.check_run(answer, prompt, 1, Cache.growing(2), torch.empty(BATCH, 0, dtype=torch.long))
        cache, history = Cache.growing(2), torch.randint(0, 97, (BATCH, 5))
        self.model(history, cache)
        self.check_run(answer, prompt, 3, cache, history)

    def expected(self, sequence: Tensor, count: int) -> Tensor:
        """Greedy tokens by running everything again at each step."""
        start = sequence.shape[1]
        for _ in range(count):
            sequence = torch.cat((sequence, self.model(sequence)[:, -1:].argmax(dim=-1)), dim=1)
        return sequence[:, start:]

    def check_run(self, answer: Callable, prompt: Tensor, count: int, cache: Cache, history: Tensor) -> None:
        """One generation: what it returns, then the calls it made, then the tokens."""
        watched = Watched(self.model)
        given = prompt.clone()
        got = self.run(lambda: answer(watched, given, count, cache))
        self.check_unchanged(prompt, given)
        longer = self.expected(torch.cat((history, prompt), dim=1), count + 1)
        want = longer[:, :count]
        if isinstance(got, Tensor) and got.shape[-1] == prompt.shape[1] + count:
            self.fail(
                "prompt-returned",
                seen=f"{got.shape[-1]} tokens came back; {count} are new",
                cause="the prompt was returned with them",
                look="the docstring's first line: the new tokens only",
            )
        if isinstance(got, Tensor) and got.shape[-1] == count - 1:
            self.fail(
                "one-short",
                seen=f"{got.shape[-1]} tokens came back; {count} were asked for",
                cause="the token that prefill gives was not kept, or the last one was not appended",
                look="the first and the last turn of your loop",
            )
        if isinstance(got, Tensor) and torch.equal(got, longer[:, 1:]) and not torch.equal(got, want):
            self.fail(
                "prefill-unused",
                seen=f"the tokens come one late: the first that came back is new token 2, {got[0, 0].item()}",
                cause="prefill's logits name the first new token; it was fed, and not kept",
                look="what you keep before the first decode step",
            )
        self.check_calls(watched.calls, prompt, count, cache, history.shape[1])
        self.check_returned(got)
        self.like(got, want, what="the result")
        if not torch.equal(got, want):
            self.fail(
                "tokens",
                seen=f"the new tokens are {got[0].tolist()}; without a cache they are {want[0].tolist()}",
                cause="the logits of another row than the last were used, or not the likeliest token",
                look="the line that picks a token: which row of the logits speaks of what comes next?",
            )

    def check_calls(self, calls: list, prompt: Tensor, count: int, cache: Cache, history: int) -> None:
        """Which tokens were run, and through which cache."""
        ran = [tokens.shape[1] for tokens, _, _ in calls]
        decode = ran[1:]
        if calls and all(used is None for _, used, _ in calls):
            self.fail(
                "no-cache",
                seen=f"the model ran {sum(ran)} tokens; with the cache {prompt.shape[1] + count - 1} are enough",
                cause="model(...) was called without the cache, so every step computes every K and V again",
                look="the arguments of model(...): the docstring shows all three",
            )
        if any(used is not None and used is not cache for _, used, _ in calls):
            self.fail(
                "other-cache",
                seen="the model ran through a cache that was made inside the function",
                cause="the `cache` argument was not used",
                look="the caller chooses the kind of cache, and keeps it for the next turn",
            )
        if history and calls[0][2] != history:
            self.fail(
                "cache-emptied",
                seen=f"the cache held {history} tokens before the call and {calls[0][2]} when the prompt ran",
                cause="the cache was reset",
                look="the docstring: the tokens follow whatever the cache holds",
            )
        if history and not torch.equal(calls[0][0], prompt) and torch.equal(calls[0][0], prompt[:, history:]):
            self.fail(
                "cache-not-empty",
                seen=f"with {history} tokens in the cache already, the first call ran {ran[0]} of the prompt's "
                f"{prompt.shape[1]} tokens; with an empty cache all was right",
                cause="`tokens` was sliced by the cache's length, as if the cache held a part of it",
                look="the docstring: `tokens` follow whatever the cache holds, so all of them are new",
            )
        if decode and decode[0] >= prompt.shape[1] and (calls[1][0][:, : prompt.shape[1]] == prompt).all():
            self.fail(
                "re-fed",
                seen=f"step 2 ran {decode[0]} tokens; one is new",
                cause="the whole sequence is fed again, though the cache holds all but the last token",
                look="what the second call gets: the newest token, [batch, 1]",
            )
        if (
            decode
            and 1 < decode[0] <= prompt.shape[1]
            and torch.equal(calls[1][0][:, :-1], prompt[:, prompt.shape[1] - decode[0] + 1 :])
        ):
            self.fail(
                "held-fed-again",
                seen=f"step 2 ran {decode[0]} tokens; one is new",
                cause="the newest token was fed together with a token that the cache holds already",
                look="what the second call gets: the newest token alone, [batch, 1]",
            )
        if decode and max(decode) > 1:
            self.fail(
                "several-fed",
                seen=f"a decode step ran {max(decode)} tokens; one is new",
                cause="the likeliest token of every row was taken, not of the last row alone",
                look="the shape of what is fed after prefill: [batch, 1]",
            )
        if ran[0] < prompt.shape[1] and len(calls) > count and prompt.shape[1] > 1:
            self.fail(
                "prefill-in-steps",
                seen=f"{len(calls)} calls of the model for {count} new tokens",
                cause="the prompt was fed token by token: right, but each call reads every weight again",
                look="the first call: the whole prompt at once",
            )
        self.check_steps(calls, prompt, count)

    def check_steps(self, calls: list, prompt: Tensor, count: int) -> None:
        """The decode calls: how many, and whether one of them feeds a token that the cache holds."""
        if len(calls) > 1 and count > 1 and torch.equal(calls[1][0], prompt[:, -1:]):
            self.fail(
                "last-token-fed-twice",
                seen="the second call ran the prompt's last token again",
                cause="the first new token was taken from a second pass, though prefill's logits give it",
                look="the logits of the first call: their last row names the first new token",
            )
        if len(calls) > count:
            self.fail(
                "one-step-too-many",
                seen=f"{len(calls)} calls of the model for {count} new tokens",
                cause="the last new token was run too, and its logits thrown away",
                look="the end of the loop: prefill gives one token, so count - 1 decode steps follow",
            )
