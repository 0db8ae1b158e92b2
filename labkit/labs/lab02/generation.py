"""02.3: generation with a cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit import generation
from labkit.cache import Cache
from labkit.course.exercise import Exercise
from labkit.labs.lab02.material import tiny_model
from labkit.labs.lab02.references import generate_with_cache
from labkit.llama import Llama

END_IDS = (2, 0, 1, 3, 4096, 257)  # what tokenizers use for "the text ends here" and "nothing", and two large ids


@dataclass(frozen=True)
class Call:
    """One call of the model: tokens run, the cache it was given, what that held before, logits, who called."""

    tokens: Tensor
    cache: Any
    held: int
    logits: Tensor
    by_library: bool


class Watched(Llama):
    """A model that notes its calls, and whose token ids may go by other numbers. names: int [vocab_size], the id here
    of each of the model's own."""

    def __init__(self, model: Llama, names: Tensor | None = None) -> None:
        object.__setattr__(self, "__dict__", dict(model.__dict__))
        self.calls: list[Call] = []
        self.names = names

    def forward(self, tokens: Any, cache: Any = None, **options: Any) -> Any:
        """Note the call and pass it on."""
        held, own = 0 if cache is None else cache.seq_len, None if self.names is None else self.names.argsort()
        logits = super().forward(tokens if own is None else own[tokens], cache, **options)
        logits = logits if own is None else logits[..., own]
        frame: FrameType | None = sys._getframe(1)
        by_library = False
        while frame is not None and frame.f_globals.get("__name__") != __name__:
            by_library |= frame.f_globals.get("__name__") == generation.__name__
            frame = frame.f_back
        self.calls.append(Call(tokens, cache, held, logits, by_library))
        return logits


class GenerateWithCache(Exercise):
    """Prefill, then one token a step."""

    id, title, minutes, difficulty = "02.3", "Generate with a cache", 6, 3
    needs = ("02.2",)
    reference = staticmethod(generate_with_cache)
    why = (
        "The prompt goes in whole, and each logits row names the next token, which is all that the next call gets. "
        "The last one is never fed: count tokens take count calls, the first of them prefill."
    )
    hints = (
        "The model remembers through the cache. After the prompt, which tokens has it not seen yet?",
        "First call: the whole prompt, which already gives the first new token. Later calls: the newest token alone.",
        "fed = tokens\nfor each new token:\n    logits = model(fed, cache, last_only=True)\n"
        "    fed = logits[:, -1:].argmax(dim=-1)   # [batch, 1]\n    keep fed",
    )
    hints_for: ClassVar = {
        "no-cache": "model(fed, cache, last_only=True): the second argument is where K and V are kept between calls.",
        "cache-in-some-calls": "Prefill fills the cache; decode reads it. Both calls need it as their second argument.",
        "re-fed": "What the cache holds must not be fed again: it would stand there twice, at later positions.",
        "last-token-fed-twice": "The prefill's logits already name the first new token. Start decoding from that one.",
        "cache-not-empty": "`tokens` is new, all of it, also when the cache holds an earlier turn. Feed it whole.",
        "prefill-unused": "After prefill you know one new token already. Keep it, then feed it.",
        "one-step-too-many": "The last new token is only returned. Nobody asks what follows it.",
        "prefill-in-steps": "One call takes any number of tokens. A prompt fed whole reads the weights once.",
        "stopped-early": "Whoever calls this asks for max_new_tokens tokens, and decides later where the answer ends.",
    }

    def examine(self, answer: Callable) -> None:
        """Prompts, counts and batches of several sizes; a cache that holds something; ids that end texts elsewhere."""
        large, small = tiny_model(vocab_size=5003), tiny_model(4, 1, 6)
        prompts = [torch.randint(0, 5003, (2, 7)) for _ in range(2)]
        prompts[1][:, 2], prompts[1][:, 4] = 0, 4801
        for prompt in prompts:
            first = self.check_run(answer, large, prompt, 6)
        self.check_run(answer, large, prompts[0], 1)
        self.check_run(answer, large, prompts[0], 3, history=torch.randint(0, 5003, (2, 5)))
        self.check_run(answer, large, torch.randint(0, 5003, (1, 1)), 2)
        self.check_run(answer, large, torch.randint(0, 5003, (3, 12))[:, 1::2], 2)
        self.check_run(answer, small, torch.randint(0, 97, (1, 300)), 2)
        self.check_run(answer, small, torch.randint(0, 97, (3, 2)), 7)
        self.check_run(answer, small, torch.randint(0, 97, (2, 4)), 3, cache=Cache.preallocated(2, 6))
        prompt = torch.randint(0, 5003, (1, 6))
        self.check_run(answer, large, prompt, 6, names=ending(large, prompt))
        self.check_run(answer, tiny_model(vocab_size=5003).float(), prompts[0], 2)
        self.check_last_only(first)

    def check_run(
        self,
        answer: Callable,
        model: Llama,
        prompt: Tensor,
        count: int,
        *,
        history: Tensor | None = None,
        cache: Cache | None = None,
        names: Tensor | None = None,
    ) -> Sequence[Call]:
        """One generation: the calls it made, then what it returned, then the cache. Returns the calls. names: see
        `Watched`."""
        cache, held = cache or Cache.growing(2), 0
        if history is not None:
            model(history, cache)
            held = history.shape[1]
        watched = Watched(model, names)
        got = self.call(lambda tokens: answer(watched, tokens, count, cache), prompt)
        calls = watched.calls
        want = likeliest(
            Watched(model, names), prompt if history is None else torch.cat((history, prompt), 1), count + 1
        )
        self.check_caches(calls, cache, prompt, count, held)
        self.check_fed(calls, prompt, held)
        self.check_kept(got, want, prompt, count, calls)
        self.like(got, want[:, :count], what=f"the result for {count} new tokens after {list(prompt.shape)}")
        self.check_steps(calls, got, count)
        self.check_values(got, want[:, :count], calls, prompt)
        if cache.seq_len != held + prompt.shape[1] + count - 1:
            self.fail(
                "cache-changed",
                seen=f"the tokens are right, and the cache holds {cache.seq_len} tokens afterwards; all but the last "
                f"new one, {held + prompt.shape[1] + count - 1}, should be there for the next turn",
                cause="the cache was reset, cut, or filled further after the last step",
                look="what happens to the cache outside of model(...): nothing",
            )
        return calls

    def check_caches(self, calls: Sequence[Call], cache: Cache, prompt: Tensor, count: int, held: int) -> None:
        """Every call runs through the cache that was given, as the call before left it."""
        if not calls or any(call.by_library for call in calls):
            self.fail(
                "from-labkit" if calls else "model-not-called",
                seen="labkit's own generate ran the loop" if calls else "the model was never called",
                cause="the blank asks for the loop itself"
                if calls
                else "the result was taken from somewhere else, such as an earlier call",
                look="the docstring: model(tokens, cache, last_only=True), once for the prompt, and once for each new "
                "token but the last",
            )
        ran = [call.tokens.shape[1] for call in calls]
        without = [place + 1 for place, call in enumerate(calls) if call.cache is None]
        if len(without) == len(calls):
            enough = prompt.shape[1] + count - 1
            again = sum(ran) > enough
            self.fail(
                "no-cache",
                seen=f"the model ran {sum(ran)} tokens; with the cache {enough} are enough"
                if again
                else "the cache holds nothing afterwards: no call of the model got it",
                cause="model(...) was called without the cache, so every step computes old K and V again"
                if again
                else "model(...) was called without the cache, so each step sees no more than the tokens it is given",
                look="the arguments of model(...): the docstring shows all three",
            )
        if without:
            self.fail(
                "cache-in-some-calls",
                seen=f"call {without[0]} of {len(calls)} ran without the cache, another one with it",
                cause="one model(...) in the code gets the cache, another does not",
                look="the arguments of every model(...): the docstring shows all three",
            )
        if any(call.cache is not cache for call in calls):
            self.fail(
                "other-cache",
                seen="the model ran through another cache than the one given",
                cause="the `cache` argument was not used: a new cache was made, or the name was given away",
                look="the caller chooses the kind of cache, and keeps it for the next turn",
            )
        for place, call in enumerate(calls):
            if call.held != held + sum(ran[:place]):
                self.fail(
                    "cache-emptied",
                    seen=f"the cache held {held + sum(ran[:place])} tokens before call {place + 1}, and {call.held} "
                    "when it ran",
                    cause="the cache was reset or cut",
                    look="the docstring: the tokens follow whatever the cache holds",
                )

    def check_fed(self, calls: Sequence[Call], prompt: Tensor, held: int) -> None:
        """The prompt whole in the first call, one token in every later one."""
        fed = [call.tokens for call in calls]
        self.check_not_sliced(fed[0], prompt, held)
        self.check_whole_prompt(fed, prompt)
        if len(fed) > 1 and fed[1].dim() == 2:
            self.check_one_token_each(fed, prompt, calls[0].logits)

    def check_not_sliced(self, first: Tensor, prompt: Tensor, held: int) -> None:
        """What the cache held before took nothing off the first call's tokens."""
        total = prompt.shape[1]
        if held and not same(first, prompt) and same(first, prompt[:, held:]):
            self.fail(
                "cache-not-empty",
                seen=f"with {held} tokens in the cache already, the first call ran {first.shape[1]} of the prompt's "
                f"{total} tokens; with an empty cache all was right",
                cause="`tokens` was sliced by the cache's length, as if the cache held a part of it",
                look="the docstring: `tokens` follow whatever the cache holds, so all of them are new",
            )
        if held and first.shape[1] < total and same(first, prompt[:, total - first.shape[1] :]):
            self.fail(
                "cache-not-empty",
                seen=f"with {held} tokens in the cache already, the first call ran the last {first.shape[1]} of the "
                f"prompt's {total} tokens; with an empty cache it ran all",
                cause="a cache that holds something was taken for one that holds this prompt, as if decoding had begun",
                look="what the first call gets: `tokens` are new, all of them, whatever cache.seq_len is",
            )

    def check_whole_prompt(self, fed: list[Tensor], prompt: Tensor) -> None:
        """The first call ran the prompt's tokens, all of them."""
        first, total = fed[0], prompt.shape[1]
        if first.shape == prompt.shape and not same(first, prompt):
            place = tuple((first != prompt).nonzero()[0].tolist())
            few = [
                str(dtype)
                for dtype in (torch.uint8, torch.float16, torch.bfloat16)
                if same(prompt.to(dtype).long(), first)
            ]
            self.fail(
                "tokens-changed",
                seen=f"the first call ran token {first[place].item()} where the prompt has {prompt[place].item()}",
                cause=f"the tokens went through {' or '.join(few)}, which cannot hold every id"
                if few
                else "other tokens than the prompt's were fed",
                look="what the first call gets: tokens, as they came",
            )
        parts = [place for place in range(2, len(fed) + 1) if same(torch.cat(fed[:place], dim=1), prompt)]
        if parts and first.shape[1] < total:
            self.fail(
                "prefill-in-steps",
                seen=f"the prompt of {total} tokens was fed in {parts[0]} calls; one is enough",
                cause="the prompt was fed token by token: right, but each call reads every weight again"
                if parts[0] == total
                else "the prompt was fed in parts: right, but each call reads every weight again",
                look="the first call: the whole prompt at once",
            )
        part = first.shape[1]
        if part < total and any(same(first, tokens) for tokens in (prompt[:, :part], prompt[:, total - part :])):
            self.fail(
                "prompt-cut",
                seen=f"the first call ran {part} of the prompt's {total} tokens, and no call ran the others",
                cause="the prompt was cut before it was fed, so the cache never gets the K and V of the rest",
                look="the first call: `tokens`, whole",
            )

    def check_one_token_each(self, fed: list[Tensor], prompt: Tensor, logits: Tensor) -> None:
        """Each call after the first ran one token, the second the one that prefill gave. logits: of the first call."""
        first, second, total, cause = fed[0], fed[1], prompt.shape[1], ""
        if same(second, prompt) and total > 1:
            diagnosis, cause = "re-fed", "the prompt is fed again, where the new token belongs"
        elif second.shape[1] > total and same(second[:, :total], prompt):
            diagnosis, cause = (
                "re-fed",
                "the whole sequence is fed again, though the cache holds all but the last token",
            )
        elif second.shape[1] > 1 and same(second[:, :-1], prompt[:, total - second.shape[1] + 1 :]):
            diagnosis, cause = "held-fed-again", "the newest token was fed together with what the cache holds already"
        elif second.shape[1] > 1 and same(second, logits.argmax(dim=-1)):
            diagnosis, cause = "several-fed", "the likeliest token of every row was taken, not of the last row alone"
        elif any(tokens.shape[1] > 1 for tokens in fed[1:]):
            diagnosis, cause = "several-fed", "more than the newest token is fed"
        if cause:
            many = max(tokens.shape[1] for tokens in fed[1:])
            self.fail(
                diagnosis,
                seen=f"step 2 ran {second.shape[1]} tokens; one is new"
                if second.shape[1] > 1
                else f"a decode step ran {many} tokens; one is new",
                cause=cause,
                look="what the calls after the first get: the newest token alone, [batch, 1]",
            )
        if total > 1 and same(first, prompt) and same(second, prompt[:, -1:]) and not same(
            second, logits[:, -1:].argmax(dim=-1)
        ):  # fmt: skip
            self.fail(
                "last-token-fed-twice",
                seen="the second call ran the prompt's last token again",
                cause="the first new token was taken from a second pass, though prefill's logits give it",
                look="the logits of the first call: their last row names the first new token",
            )

    def check_kept(self, got: Any, want: Tensor, prompt: Tensor, count: int, calls: Sequence[Call]) -> None:
        """As many tokens as were asked for, from the first one on. want: one token more than asked for."""
        if not isinstance(got, Tensor) or got.dim() != 2 or got.shape[0] != prompt.shape[0]:
            return
        many = got.shape[1]
        if many == prompt.shape[1] + count and same(got[:, : prompt.shape[1]], prompt):
            self.fail(
                "prompt-returned",
                seen=f"{many} tokens came back; {count} are new",
                cause="the prompt was returned with them",
                look="the docstring's first line: the new tokens only",
            )
        if many > count and same(got[:, : count + 1], want):
            self.fail(
                "too-many",
                seen=f"{many} tokens came back; {count} were asked for",
                cause="the loop makes a turn too many, or a token is kept that nobody asked for",
                look="the first and the last turn of your loop",
            )
        if many == count and same(got, want[:, 1:]) and not same(got, want[:, :count]):
            self.fail(
                "prefill-unused",
                seen=f"the tokens come one late: the first that came back is new token 2, {got[0, 0].item()}",
                cause="prefill's logits name the first new token; it was fed, and not kept",
                look="what you keep before the first decode step",
            )
        if many < count and same(got, want[:, :many]) and len(calls) < count:
            early = f"{many} of {count} tokens came back, and the model was called {len(calls)} times"
            last = f"; the last of row 0 is {got[0, -1].item()}" if many else ""
            self.fail(
                "one-short" if many == count - 1 == len(calls) and not self.ends(got) else "stopped-early",
                seen=early + last,
                cause="the loop makes one turn too few"
                if many == count - 1 and not self.ends(got)
                else "the loop ended before max_new_tokens, at a token that it takes for the end",
                look="what ends your loop: max_new_tokens, and nothing else",
            )
        if many == count - 1:
            first = same(got, want[:, :many])
            self.fail(
                "one-short",
                seen=f"{many} tokens came back; {count} were asked for",
                cause="the last new token was not kept"
                if first
                else "the token that prefill gives was not kept"
                if same(got, want[:, 1:count])
                else "one new token was not kept",
                look="the first and the last turn of your loop",
            )

    def ends(self, got: Tensor) -> bool:
        """Whether the last token that came back is an id that ends texts elsewhere."""
        return bool(got.shape[1]) and any(token in END_IDS for token in got[:, -1].tolist())

    def check_steps(self, calls: Sequence[Call], got: Tensor, count: int) -> None:
        """As many calls as new tokens: prefill gives the first."""
        if len(calls) > count:
            last = same(calls[-1].tokens, got[:, -1:])
            self.fail(
                "one-step-too-many",
                seen=f"{len(calls)} calls of the model for {count} new tokens",
                cause="the last new token was run too, and its logits thrown away"
                if last
                else "a call of the model gave no token that was kept",
                look="the end of the loop: prefill gives one token, so count - 1 decode steps follow",
            )

    def check_last_only(self, calls: Sequence[Call]) -> None:
        """One row of logits a call: the others would be made and thrown away."""
        rows = calls[0].logits.shape[1]
        if rows > 1:
            self.fail(
                "all-logits",
                seen=f"the tokens are right, and the first call made logits of all {rows} prompt tokens; one row is "
                "read",
                cause="the model was called without last_only=True: with a long prompt and a large vocabulary, logits "
                "take more memory than the cache",
                look="the docstring: model(tokens, cache, last_only=True)",
            )

    def check_values(self, got: Tensor, want: Tensor, calls: Sequence[Call], prompt: Tensor) -> None:
        """The likeliest tokens of the last row of each call."""
        if same(got, want):
            return
        shown = f"the new tokens are {short(got[0])}; without a cache they are {short(want[0])}"
        if got.shape[0] > 1 and same(got, want[:1].expand_as(want)):
            self.fail(
                "one-row",
                seen="every row of the batch got the tokens of row 0",
                cause="one token was picked for all rows: .item(), an index 0, or argmax over everything",
                look="the line that picks a token: one per row, [batch, 1]",
            )
        if got.shape[1] > 2 and same(got, want[:, -1:].expand_as(want)):
            self.fail(
                "one-buffer",
                seen=f"every column holds the last new token; {shown}",
                cause="one tensor was written anew at each step and kept each time: a list of it shows its last "
                "numbers in every place",
                look="what is kept at each step: a tensor of its own, or a clone of the one that is written again",
            )
        likeliest_of_all = [call.logits[:, -1].argmax() % call.logits.shape[-1] for call in calls]
        if got.shape[0] > 1 and got.shape[1] == len(calls) and same(got, torch.stack(likeliest_of_all).expand_as(got)):
            self.fail(
                "one-row",
                seen="every row of the batch got the same tokens: those of the row whose best logit is largest",
                cause="argmax ran over the batch and the vocabulary together",
                look="the line that picks a token: dim=-1, one per row",
            )
        right = torch.stack([call.logits[:, -1].argmax(-1) for call in calls], dim=1)
        if len(calls) < got.shape[1] and same(got[:, : len(calls)], right):
            self.fail(
                "one-short",
                seen=f"{len(calls)} calls of the model for {got.shape[1]} new tokens; {shown}",
                cause="the loop makes too few turns, and the last tokens are not the model's",
                look="the first and the last turn of your loop",
            )
        picks = {
            "the logits of the first row were used, not of the last": [call.logits[:, 0].argmax(-1) for call in calls],
            "the least likely token was picked": [call.logits[:, -1].argmin(-1) for call in calls],
            "the logits of the row before the last were used": [
                call.logits[:, max(call.logits.shape[1] - 2, 0)].argmax(-1) for call in calls
            ],
        }
        cause = next((words for words, each in picks.items() if same(got, torch.stack(each, dim=1))), "")
        if same(got, right):
            cause = "the likeliest tokens were kept, and other ones were fed"
        self.fail(
            "tokens",
            seen=shown,
            cause=cause or "another token than the likeliest one of the last row was picked",
            look="the line that picks a token: which row of the logits speaks of what comes next?",
        )


def same(a: Any, b: Tensor) -> bool:
    """Whether both are the same tokens, whatever their dtypes."""
    return isinstance(a, Tensor) and a.shape == b.shape and bool((a == b).all())


def short(tokens: Tensor) -> str:
    """A few tokens, in words."""
    shown = [str(token) for token in tokens.tolist()]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:8], "..."])


def likeliest(model: Llama, sequence: Tensor, count: int) -> Tensor:
    """Greedy tokens by running everything again at each step."""
    start = sequence.shape[1]
    for _ in range(count):
        sequence = torch.cat((sequence, model(sequence, last_only=True)[:, -1:].argmax(dim=-1)), dim=1)
    return sequence[:, start:]


def ending(model: Llama, prompt: Tensor) -> Tensor:
    """Names under which the tokens that follow this prompt are ids that end texts elsewhere."""
    names = torch.arange(model.spec.vocab_size)
    for token, name in zip(dict.fromkeys(likeliest(model, prompt, len(END_IDS))[0].tolist()), END_IDS, strict=False):
        other = int((names == name).nonzero())
        names[[token, other]] = names[[other, token]]
    return names
