"""05.8: a small model that keeps a list of its passes, a cache that loses something, and what can be made of both."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import shifted

PART, FIRST = 32, 64  # tokens a pass; the first position that is scored


class LossyCache:
    """Holds one row for each token; what it holds comes back rounded. What is just being appended does not."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Let all tokens go, as a new cache has none."""
        self.rows = torch.zeros(0, Passes.WIDTH, dtype=torch.float64)

    @property
    def seq_len(self) -> int:
        """How many tokens the cache holds."""
        return len(self.rows)

    def append(self, new: Tensor) -> Tensor:
        """All rows: those held already rounded, `new` as it came."""
        held = (self.rows / 3).round() * 3
        self.rows = torch.cat((self.rows, new))
        return torch.cat((held, new))


class Pass(NamedTuple):
    """One call of the model: its tokens, its cache, and how many tokens that held."""

    tokens: list[int]
    cache: Any
    held: int


class Passes:
    """model(part, cache): logits that depend on each token and on the mean of what the cache gives of all up to it."""

    VOCABULARY: ClassVar[int] = 4_200  # ids that neither a byte nor a 16-bit float holds
    WIDTH: ClassVar[int] = 13

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(shifted(2))
        self.dtype = dtype
        self.table, self.head = torch.randn(2, self.VOCABULARY, self.WIDTH, generator=random, dtype=torch.float64)
        self.head *= 0.6
        self.passes: list[Pass] = []

    def __call__(self, part: Tensor, cache: LossyCache | None = None) -> Tensor:
        """Logits, [1, part, vocabulary]."""
        if part.dim() != 2 or part.shape[0] != 1 or part.shape[1] == 0:
            raise ValueError(f"the model was given tokens of shape {list(part.shape)}; it takes [1, at least one]")
        rows = self.table[part[0]]
        held = cache.seq_len if cache is not None else 0
        self.passes.append(Pass(part[0].tolist(), cache, held))
        seen = cache.append(rows) if cache is not None else rows
        means = seen.cumsum(0) / torch.arange(1, len(seen) + 1, dtype=torch.float64)[:, None]
        return ((rows + 4 * means[held:]) @ self.head.mT)[None].to(self.dtype)


def some_tokens(count: int) -> Tensor:
    """Tokens that the model would say itself, int [1, count], with ids among them that fewer bits would change."""
    random, model = torch.Generator().manual_seed(shifted(count)), Passes()
    words = torch.randperm(Passes.VOCABULARY, generator=random)[:200]
    noise = -(-torch.rand(count, len(words), generator=random, dtype=torch.float64).log()).log()
    tokens, total = [1], model.table[1].clone()
    for place in range(1, count):
        logits = model.head[words] @ (model.table[tokens[-1]] + 4 * total / place)
        tokens.append(int(words[(logits + noise[place]).argmax()]))
        total += model.table[tokens[-1]]
    for place, token in ((3, 0), (64, 257), (65, 4097)):
        tokens[place] = token
    return torch.tensor([tokens])


def all_rows(tokens: Tensor) -> Tensor:
    """Logits of every token, float64 [tokens, vocabulary], from parts of 32."""
    model, cache = Passes(), LossyCache()
    return torch.cat([model(part, cache)[0] for part in tokens.split(PART, dim=1)])


def surprise(rows: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, in nats."""
    return -rows.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def suspects(rows: Tensor, targets: Tensor, surprises: Tensor) -> list[Suspect]:
    """What mistakes make of the same passes."""
    scored = surprises[FIRST - 1 :]
    mean = scored.mean().item()
    about = torch.arange(1, len(targets))  # the token that each surprise is about
    inside = surprises[about % PART != 0]
    means = [[part.mean() for part in kind if len(part)] for kind in (
        [surprises[start : start + PART] for start in range(0, len(surprises), PART)],
        [surprises[max(start, FIRST - 1) : start + PART] for start in range(0, len(surprises), PART)],
        [scored[start : start + PART] for start in range(0, len(scored), PART)],
        [surprises[start : start + PART] for start in range(FIRST, len(surprises), PART)],
        [surprises[start : start + PART] for start in range(PART, len(surprises), PART)],
        [surprises[start : start + PART - 1] for start in range(0, len(surprises), PART)],
        [surprises[start : start + PART - 1] for start in range(FIRST, len(surprises), PART)],
    )]  # fmt: skip
    logp = rows.log_softmax(-1)[FIRST - 1 : -1].gather(1, targets[FIRST:, None])[:, 0]
    two_on, last = surprise(rows[:-2], targets[2:]), (len(targets) - 2) // PART * PART
    wrapped = torch.cat((scored, surprise(rows[-1:], targets[:1])))
    return [
        Suspect("perplexity", [math.exp(mean)], "exp was applied: that is perplexity", "the return: the mean itself"),
        Suspect("bits", [mean / math.log(2)], "a logarithm to base 2 was taken",
                "the docstring: nats, the natural logarithm"),
        Suspect("negative", [-mean], "the sign: log p instead of -log p", "the sign of the logarithm"),
        Suspect("sum-not-mean", [scored.sum().item()], "surprises were added up",
                "mean(), or a division by their number"),
        Suspect("scored-from-the-start", [surprises.mean().item()],
                "the first 64 tokens are scored too; they have little context, and no cache is read for the first 32",
                "the slice before the mean: positions from 64 on"),
        Suspect("starts-beside-64",
                [surprises[start:].mean().item() for start in (FIRST - 2, FIRST, PART - 1, PART) if start <
                 len(surprises)],
                "the first token scored is not that at position 64: logits at position 63 predict it",
                "the slice before the mean: [63:], when surprise 0 is about token 1"),
        Suspect("predicts-itself", [surprise(rows, targets)[start:].mean().item() for start in (FIRST - 1, FIRST)],
                "logits at a position were compared with the token at that position, which the model was given",
                "the targets: from start + 1 to start + 32"),
        Suspect("boundary-skipped",
                [kind.mean().item() for kind in
                 (surprises[(about >= FIRST) & (about % PART != 0)], inside, inside[FIRST - 2 :], inside[FIRST - 1 :])],
                "logits[:-1] against targets[1:] within a part: the first token of every part is predicted by nobody",
                "the targets: tokens[0, start + 1 : start + 33], one beyond the part"),
        Suspect("mean-of-means", [torch.stack(kind).mean().item() for kind in means if kind],
                "a mean was taken in each part, and of these another, as if all parts were of one length",
                "join all surprises, then one mean"),
        Suspect("wraps-round", [wrapped.mean().item()],
                "the last logits were scored against the first token, as torch.roll does",
                "the last part: it has one target fewer than logits"),
        Suspect("two-apart", [two_on[start:].mean().item() for start in range(FIRST - 3, FIRST + 1) if start <
                              len(two_on)],
                "logits at a position were compared with the token two positions on",
                "the pairs: logits at position i and token i + 1"),
        Suspect("no-softmax", [-rows[FIRST - 1 : -1].gather(1, targets[FIRST:, None]).mean().item()],
                "logits were taken for logarithms of probabilities", "log_softmax, or cross_entropy"),
        Suspect("probability", [logp.exp().mean().item(), -logp.exp().mean().log().item()],
                "probabilities were averaged", "the mean of -log p, not the logarithm of a mean"),
        Suspect("epsilon", [-guarded.log().mean().item() for eps in (10.0**-n for n in range(1, 16)) for guarded in
                            (logp.exp() + eps, logp.exp().clamp(min=eps))],
                "a small number was added to the probability, or is its least: unlikely tokens look likelier",
                "log_softmax, or cross_entropy: they need no guard against log(0)"),
        Suspect("softmax-twice", [surprise(rows.softmax(-1)[FIRST - 1 : -1], targets[FIRST:]).mean().item()],
                "cross_entropy got probabilities, and applied softmax once more", "what cross_entropy takes: logits"),
        Suspect("axis",
                [-rows[start:-1].log_softmax(0)[FIRST - 1 - start :].gather(1, targets[FIRST:, None]).mean().item()
                 for start in (0, FIRST - 1)],
                "softmax ran along the tokens", "log_softmax(-1): over the vocabulary"),
        Suspect("last-skipped", [scored[:-1].mean().item()] if len(scored) > 1 else [],
                "the last token was not scored", "the slices: logits [63:-1] and tokens [64:]"),
        Suspect("median", [scored.median().item()], "the median was taken", "mean()"),
        Suspect("divided-by-others",
                [scored.sum().item() / count for count in range(len(targets) - 66, len(targets) + 1)
                 if 0 < count != len(scored)],
                "the sum was divided by another number than that of the tokens scored",
                "mean(), or a division by their number"),
        Suspect("last-part-only", [surprises[last:].mean().item()], "only the last part was scored",
                "what the loop keeps: a list that every part is added to"),
        Suspect("rounded", [round(mean, digits) for digits in range(9)], "the mean was rounded", "the return"),
    ]  # fmt: skip
