"""02.2: one decode step through one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import fused_attention as attention
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import agree
from labkit.course.exercise import Exercise
from labkit.course.plug import AttentionLayer
from labkit.labs.lab02.material import BATCH, tiny_model
from labkit.labs.lab02.references import decode_step
from labkit.ledger import ledger


class Recorder:
    """A cache that remembers what was appended, and allows any attribute to be hung on it."""

    def __init__(self) -> None:
        self.seq_len = 0
        self.appended: list[tuple[Tensor, Tensor]] = []

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep k and v."""
        self.appended.append((k, v))
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """Everything appended so far."""
        if not self.appended:
            raise ValueError("the cache is empty: append the new token before you read")
        return torch.cat([k for k, _ in self.appended], dim=2), torch.cat([v for _, v in self.appended], dim=2)


class DecodeStep(Exercise):
    """One attention layer, one new token."""

    id, title, minutes, difficulty = "02.2", "A decode step through the cache", 6, 3
    needs = ("02.1",)
    reference = staticmethod(decode_step)
    why = (
        "The position is the number of tokens held before the append: read it first. Keys are rotated before they are "
        "kept, once; the query is rotated and forgotten, since nobody asks it again."
    )
    hints = (
        "Only the new token is projected. With n tokens in the cache, at which position does it stand?",
        "Its position is cache.seq_len before the append. Rotate q and k there, not v. Append, then read.",
        "q, k, v = layer.project(x)\nposition = cache.seq_len\ncache.append(layer.rotate(k, position), v)\n"
        "keys, values = cache.read()\nreturn layer.merge(attention(layer.rotate(q, position), keys, values))",
    )
    hints_for: ClassVar = {
        "recomputed": "The cache is there so that old tokens are never projected again. Project x, nothing else.",
        "position-off-by-one": "Positions count from 0: the first token stands at 0, when the cache holds 0 tokens.",
        "state-kept": "Everything that belongs to one prompt lives in its cache. Ask the cache for the position.",
        "causal-square": "The mask for one new token is one row. Which of the cached tokens does it have to hide?",
        "repeated-heads": "attention() lets several query heads read one KV head. Nothing needs repeating.",
    }

    def examine(self, answer: Callable) -> None:
        """Two prompts token by token, each compared with one pass over the whole: work, then K and V, then output."""
        self.model = tiny_model()
        layer = AttentionLayer(self.model, self.model.blocks[0].attention)
        for turn in range(2):
            x = torch.randn(BATCH, 6, self.model.spec.hidden_size, dtype=torch.float64)
            self.check_prompt(answer, layer, x, second=turn == 1)

    def check_prompt(self, answer: Callable, layer: AttentionLayer, x: Tensor, *, second: bool) -> None:
        """Run one prompt token by token."""
        cache, outputs = Recorder(), []
        q, k, v = layer.project(x)
        rotated = layer.rotate(q, 0), layer.rotate(k, 0), v
        want = layer.merge(attention(*rotated))
        for index in range(x.shape[1]):
            new = x[:, index : index + 1].clone()
            with ledger([(layer.attention.qkv.weight, 1.0)]) as work:
                got = self.run(partial(answer, new, layer, cache))
            self.check_unchanged(x[:, index : index + 1], new)
            self.check_work(work.kv_projections, index)
            self.check_appended(cache, layer, index)
            self.check_keys(cache, layer, k, v, second=second)
            self.check_returned(got)
            self.like(got, want[:, index : index + 1], what="the output")
            outputs.append(got)
        for index in (*range(2, x.shape[1]), 1, 0):  # the second token's past is one key: it tells too little apart
            self.check_output(outputs[index], layer, rotated, want[:, index : index + 1], index)

    def check_work(self, projections: float, index: int) -> None:
        """One projection per row and step."""
        if projections > BATCH:
            self.fail(
                "recomputed",
                seen=f"step {index + 1} projected {projections / BATCH:g} tokens; one is new",
                cause="the inputs of old tokens are kept and their K and V computed again",
                look="what layer.project gets: the new token's x alone",
            )

    def check_appended(self, cache: Recorder, layer: AttentionLayer, index: int) -> None:
        """One token appended, with as many heads as there are KV heads."""
        if cache.seq_len != index + 1:
            grew = cache.seq_len - index
            self.fail(
                "not-appended" if grew == 0 else "appended-too-much",
                seen=f"the cache grew by {grew} tokens in one step",
                cause="append was not called" if grew == 0 else "more than the new token's K and V were appended",
                look="cache.append(k, v): once per step, one token",
            )
        k, v = cache.appended[-1]
        if layer.num_heads in (k.shape[1], v.shape[1]):
            self.fail(
                "repeated-heads",
                seen=f"the cache got {k.shape[1]} heads; the layer has {layer.num_kv_heads} KV heads",
                cause="K and V were repeated to all query heads before they were cached",
                look=f"what is appended: this cache is {layer.num_heads // layer.num_kv_heads} times too large",
            )

    def check_keys(self, cache: Recorder, layer: AttentionLayer, k: Tensor, v: Tensor, *, second: bool) -> None:
        """The last key and value appended, told apart by what their position was."""
        index = cache.seq_len - 1
        got_k, got_v = cache.appended[-1]
        k, v = k[:, :, index : index + 1], v[:, :, index : index + 1]
        self.like(got_k, k, what="the appended K")
        self.like(got_v, v, what="the appended V")
        if not agree(got_k, layer.rotate(k, index)):
            if agree(got_k, v) or agree(got_k, layer.rotate(v, index)):
                self.fail(
                    "k-and-v-swapped",
                    seen="what was appended as K is the token's V",
                    cause="k and v changed places before the append",
                    look="the order in `q, k, v = layer.project(x)` and in cache.append(k, v)",
                )
            self.explain_keys(got_k, layer, k, index, second=second)
        if not agree(got_v, v):
            self.fail(
                "v-changed",
                seen="the cached V is not the token's V",
                cause="V was rotated too" if index and agree(got_v, layer.rotate(v, index)) else "V was changed",
                look="what is appended: rotary positions belong to q and k only",
            )

    def explain_keys(self, got: Tensor, layer: AttentionLayer, k: Tensor, index: int, *, second: bool) -> None:
        """Say at which position a wrong key stands."""
        found = next((p for p in range(128) if p != index and agree(got, layer.rotate(k, p))), None)
        if second:
            self.fail(
                "state-kept",
                seen="the first prompt was right, the second is not: its first key stands at "
                f"position {'unknown' if found is None else found}",
                cause="a position counter outlives the prompt (a global, or an attribute of the function)",
                look="where the position comes from: cache.seq_len, and nothing else",
            )
        if found == 0 or found is None:
            self.fail(
                "position-missing",
                seen=f"the key of token {index} stands at position {0 if found == 0 else 'unknown'}",
                cause="k was cached without its rotation, or always rotated to one position",
                look="layer.rotate(k, position), before the append",
            )
        self.fail(
            "position-off-by-one" if found in (index - 1, index + 1) else "position",
            seen=f"the key of token {index} stands at position {found}",
            cause="the position was taken after the append, or counted from 1",
            look="position = cache.seq_len, before append",
        )

    def check_output(
        self, got: Any, layer: AttentionLayer, rotated: tuple[Tensor, Tensor, Tensor], want: Tensor, index: int
    ) -> None:
        """The output of one step, told apart by which keys it saw."""
        if agree(got, want):
            return
        q, k, v = rotated
        q, k, v = q[:, :, index : index + 1], k[:, :, : index + 1], v[:, :, : index + 1]
        accuse(type(self), [
            Suspect("newest-left-out", [(q, k[:, :, :-1], v[:, :, :-1])] if index else [],
                    "the cache was read before the append", "the order: append, then read",
                    "the output does not depend on the new token's own K and V"),
            Suspect("cache-unread", [(q, k[:, :, -1:], v[:, :, -1:])] if index else [],
                    "attention got the new k and v, not what the cache holds",
                    "the arguments of attention: keys, values = cache.read()",
                    "the output depends on the new token alone"),
            Suspect("causal-square", [(q, k[:, :, :1], v[:, :, :1])] if index > 1 else [],
                    "a causal triangle that starts in the top left corner, such as is_causal=True: its only row sees "
                    "key 0", "the mask: everything in the cache is past, so one new token needs none",
                    f"the output of token {index} depends on the first token's K and V alone"),
            Suspect("k-and-v-swapped", [(q, v, k)], "keys and values changed places between read and attention",
                    "the order in `keys, values = cache.read()` and in attention(q, keys, values)",
                    "the query met the values, and the keys were blended"),
        ], fits=lambda operands: agree(got, layer.merge(attention(*operands))))  # fmt: skip
        self.fail(
            "query-position" if index else "values",
            seen=f"K and V are right, the output of token {index} is not",
            cause="q was not rotated, or not to the new token's position" if index else "the arithmetic of attention",
            look="layer.rotate(q, position): the same position as k's",
        )
