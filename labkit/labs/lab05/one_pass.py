"""05.8: the surprise of a quantized cache measured in one pass, to mend."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.numbers import check_number
from labkit.course.checks.suspects import accuse
from labkit.course.checks.tensors import TIGHT, budget, told_apart
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.passes import FIRST, PART, LossyCache, Passes, all_rows, some_tokens, surprise, suspects
from labkit.labs.lab05.references import mean_surprise


class MeanSurprise(Exercise):
    """A measurement that never meets what it measures."""

    id, title, minutes, difficulty = "05.8", "Debug: a quantized cache as good as none", 5, 3
    reference = staticmethod(mean_surprise)
    why = (
        "With parts of 32 all but the newest tokens are read back from the cache, as in decoding. The last logits"
        " of a part belong to the next one's first token, and one mean over all tokens weighs each alike."
    )
    hints = (
        "During the first pass the cache is empty. Which keys does attention see then: restored ones, or those just "
        "computed?",
        "Pass 32 tokens at a time with the same cache. The last logits of a part predict the first token of the next "
        "part; only the last logits of all predict nothing.",
        "for start in range(0, tokens.shape[1], 32):\n    logits = model(tokens[:, start : start + 32], cache)[0]\n"
        "    targets = tokens[0, start + 1 : start + 33]\n"
        "    surprises.append(F.cross_entropy(logits[: len(targets)], targets, reduction='none'))\n"
        "return torch.cat(surprises)[63:].mean().item()",
    )
    hints_for: ClassVar = {
        "one-pass": "How many tokens does the cache hold when the one pass begins?",
        "boundary-skipped": "The last logits of a part predict a token too: where is it?",
        "tokens-fed-twice": "The target of a part's last logits need not be in the part: take it from `tokens`.",
        "mean-of-means": "Parts of 32 and of 5 tokens should not count alike. Join first, then take the mean.",
        "two-apart": "Write down, for a part of three tokens, which logits say what.",
        "part-length": "The docstring says how many tokens go through the model at a time.",
        "predicts-itself": "Logits at position i say what token i + 1 is.",
        "new-cache": "A cache made for each part is empty each time.",
        "epsilon": "What does log_softmax give for a token whose probability is tiny?",
        "starts-beside-64": "Surprise j of the joined list is about token j + 1.",
    }

    def examine(self, answer: Callable) -> None:
        """Which passes were made and with what; then the number."""
        for count in (150, 128, 161, 66, 129, 97):
            tokens = some_tokens(count)
            model, cache, kept = Passes(), LossyCache(), tokens.clone()
            got = self.run(partial(answer, model, tokens, cache))
            self.check_unchanged(kept, tokens)
            self.check_cache(model, cache, got, tokens)
            self.check_tokens(model, tokens[0].tolist())
            self.check_parts([len(part) for part, *_ in model.passes], count)
            self.check_number(got, tokens)
        other = some_tokens(150).flip(1)  # as many, others, and logits in the dtype of the lab's model
        self.check_number(self.run(partial(answer, Passes(torch.float32), other, LossyCache())), other, 1e-5)
        self.check_layout(answer, other)

    def check_layout(self, answer: Callable, tokens: Tensor) -> None:
        """Tokens that do not lie side by side in memory."""
        apart = torch.stack((tokens.flip(1), tokens), dim=-1).flatten(1)[:, 1::2]
        try:
            self.check_number(self.run(partial(answer, Passes(), apart, LossyCache())), tokens)
        except NotYet as not_yet:
            self.fail("layout", seen=f"every other number of a larger tensor: {not_yet.finding.seen}. Side by side in "
                      "memory, the tokens were taken", cause="the code counts on the order in memory: view, or a "
                      "reshape that assumes it", look="slices, and reshape instead of view")  # fmt: skip

    def check_cache(self, model: Passes, cache: LossyCache, got: Any, tokens: Tensor) -> None:
        """More than one pass, all with the cache that was given, which goes on filling."""
        count = tokens.shape[1]
        if not model.passes:
            self.fail("model-not-run", seen="the model was never called", cause="a return before the loop, or an empty "
                      "range", look="the loop over range(0, tokens.shape[1], 32)")  # fmt: skip
        if len(model.passes) == 1 and len(model.passes[0].tokens) >= count - 1:
            figure = f": {got:.4f}; a user of this cache gets {mean_surprise(Passes(), tokens, LossyCache()):.4f}"
            self.fail(
                "one-pass",
                seen=f"one pass over {count} tokens{figure if isinstance(got, float) else ''}",
                cause="the K and V that attention saw in this pass are not those that a user's next tokens meet",
                look="what attention reads during the pass, and where that comes from; then the docstring",
            )
        if any(each.cache is not cache for each in model.passes):
            self.fail(
                "new-cache",
                seen="a pass was made with another cache than the one given, or with none",
                cause="the cache was copied or made anew for a part, or left out of the call",
                look="the call: model(part, cache), the same cache each time",
            )
        held = 0
        for each in model.passes:
            if each.held != held:
                self.fail("cache-emptied", seen=f"a pass began with {each.held} tokens in the cache; {held} had gone "
                          "through the model", cause="the cache was reset between parts",
                          look="the loop: the cache is left alone")  # fmt: skip
            held += len(each.tokens)

    def check_tokens(self, model: Passes, tokens: list[int]) -> None:
        """Each token goes through the model once, in order. The last one predicts nothing and may be left out."""
        fed = [token for each in model.passes for token in each.tokens]
        if fed in (tokens, tokens[:-1]):
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(fed, tokens, strict=False)) if a != b), min(len(fed), len(tokens))
        )
        part, begins = next(((n, sum(len(each.tokens) for each in model.passes[:n])) for n in range(len(model.passes))
                             if sum(len(each.tokens) for each in model.passes[: n + 1]) > place),
                            (len(model.passes), len(fed)))  # fmt: skip
        where = f"; the first token that is not the next one is number {place - begins} of part {part}, both from 0"
        if place >= len(fed):
            where = f"; the text's tokens from {place} on never did"
        if len(fed) == len(tokens) and sorted(fed) != sorted(tokens):
            place = next(i for i, pair in enumerate(zip(fed, tokens, strict=True)) if pair[0] != pair[1])
            self.fail("other-tokens", seen=f"token {place} of the text is {tokens[place]}; the model got {fed[place]}",
                      cause="ids were converted to fewer bits, or changed on the way",
                      look="what the model is called with: a slice of tokens")  # fmt: skip
        if len(fed) > len(tokens):
            self.fail(
                "tokens-fed-twice",
                seen=f"{len(fed)} tokens went through the model, of {len(tokens)}{where}",
                cause="parts overlap, by one token or by all before; the cache then holds tokens twice",
                look="the slice: tokens[:, start : start + 32]",
            )
        self.fail(
            "tokens-skipped",
            seen=f"{len(fed)} tokens went through the model, of {len(tokens)}{where}",
            cause="the first tokens, the last part or one token of each part were left out, or the order changed; "
            "tokens that are not scored are still context",
            look="the range and the slice: every token once",
        )

    def check_parts(self, parts: list[int], count: int) -> None:
        """All parts but the last have 32 tokens."""
        if all(part == PART for part in parts[:-1]) and parts[-1] <= PART:
            return
        if parts[0] > PART and all(part <= PART for part in parts[1:]):
            self.fail(
                "first-part-longer",
                seen=f"{count} tokens: {differs(parts)}",
                cause="the tokens that are not scored went through in one pass and saw each other unquantized",
                look="the loop: it starts at 0, with parts of 32",
            )
        self.fail(
            "part-length",
            seen=f"{count} tokens: {differs(parts)}",
            cause="another part length measures something too: the shorter the parts, the more is read from the cache; "
            "figures compare only when the lengths agree",
            look="the step of the range and the end of the slice: 32",
        )

    def check_number(self, got: Any, tokens: Tensor, tolerance: float = TIGHT) -> None:
        """The mean, told apart by what was averaged."""
        got = check_number(type(self), got, "a mean")
        rows, targets = all_rows(tokens), tokens[0]
        surprises = surprise(rows[:-1], targets[1:])  # number j is about token j + 1
        want = surprises[FIRST - 1 :].mean().item()
        single = surprise(rows.float()[:-1], targets[1:])[FIRST - 1 :].mean()
        # a log_softmax in float32 is right as well, and loses what float32 loses
        tolerance = max(tolerance, budget(single, torch.tensor(want, dtype=torch.float64)))
        seen = "{} tokens: {}; the mean is {}".format(len(targets), *told_apart(float(got), want))
        cut_off = abs(got - want) > TIGHT and any(got == round(float(got), digits) for digits in range(9))
        if abs(got - want) <= tolerance and cut_off:
            self.fail("rounded", seen=seen, cause="the mean was rounded", look="the return")
        if abs(got - want) <= tolerance:
            return
        if math.isnan(got):
            self.fail(
                "not-finite",
                seen=f"{len(targets)} tokens: NaN",
                cause="a mean over no tokens: the last part may hold a token and no target",
                look="join all surprises first, then one mean",
            )

        def fits(value: float) -> bool:
            return abs(got - value) <= TIGHT or abs(got - value) <= tolerance < abs(want - value)

        accuse(type(self), suspects(rows, targets, surprises), seen, fits=fits)
        self.fail("values", seen=seen, cause="the passes are right; what is made of the logits is not: "
                  "-log p, its target, or the average",
                  look="one token by hand: its logits, log_softmax, the entry of its target")  # fmt: skip


def differs(parts: list[int]) -> str:
    """The first part that has another length than it should, in words."""
    part = next((n for n, size in enumerate(parts[:-1]) if size != PART), len(parts) - 1)
    return f"part {part} of {len(parts)}, from 0, has {parts[part]} tokens; {PART} it should be, fewer only in the last"
