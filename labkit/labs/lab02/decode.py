"""02.2: one decode step through one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import fused_attention as attention
from labkit.course.checks.attention import suspects as attention_suspects
from labkit.course.checks.copies import Making, check_copies
from labkit.course.checks.effort import Effort, Kernels, check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, budget
from labkit.course.exercise import Exercise, NotYet
from labkit.course.plug import AttentionLayer
from labkit.labs.lab02.material import tiny_model
from labkit.labs.lab02.references import decode_step

ROUNDING = 1e-6  # bounded: float64 numbers of order 1 that went through float32 on the way
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class Recorder:
    """A cache that remembers what was appended, and allows any attribute to be hung on it."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.seq_len = k, v, k.shape[2]
        self.appended: list[tuple[Tensor, Tensor]] = []

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep k and v."""
        self.appended.append((k, v))
        self.k, self.v = (torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)) if self.seq_len else (k, v)
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """Everything appended so far."""
        if not self.seq_len:
            raise ValueError("the cache is empty: append the new token before you read")
        return self.k, self.v


class Room(Recorder):
    """The same with room behind the last token, so that append copies nothing but what is new."""

    def __init__(self, k: Tensor, v: Tensor, spare: int) -> None:
        super().__init__(k, v)
        self.room = [torch.cat((x, torch.full_like(x[:, :, :spare], 9.0)), dim=2) for x in (k, v)]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write k and v behind what is held."""
        self.appended.append((k, v))
        for room, new in zip(self.room, (k, v), strict=True):
            room[:, :, self.seq_len : self.seq_len + new.shape[2]] = new
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """Everything appended so far, in place."""
        return self.room[0][:, :, : self.seq_len], self.room[1][:, :, : self.seq_len]


class Products(Kernels):
    """Counts multiplications in products of matrices, whatever the function that asked for them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            a, b = args[-2:] if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) else args[1:3]
            self.count += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


class Prompt:
    """Tokens that come one by one to one layer, what the layer holds before them, and what is right for each."""

    def __init__(self, layer: AttentionLayer, x: Tensor, held: int = 0) -> None:
        self.layer, self.x, self.start = layer, x, held
        past = torch.randn(2, x.shape[0], layer.num_kv_heads, held, layer.head_dim, dtype=torch.float64).to(x.dtype)
        self.raw = layer.project(x)
        self.k = torch.cat((past[0], layer.rotate(self.raw[1], held)), dim=2)
        self.v = torch.cat((past[1], self.raw[2]), dim=2)
        self.past = past
        self.start_again()

    def start_again(self) -> None:
        """Forget all steps."""
        self.cache = Recorder(*self.past)
        self.outputs: list[Tensor] = []
        self.products: list[int] = []

    def query(self, index: int, position: int) -> Tensor:
        """The query of one token, at any position."""
        return self.layer.rotate(self.raw[0][:, :, index : index + 1], position)

    def output(self, index: int, q: Tensor | None = None) -> Tensor:
        """What is right for one token, or for another query of it."""
        end = self.start + index + 1
        q = self.query(index, end - 1) if q is None else q
        return self.layer.merge(attention(q, self.k[:, :, :end], self.v[:, :, :end]))

    def told(self, index: int) -> str:
        """A step in words."""
        layer, held = self.layer, f", after {self.start:,} held before" if self.start else ""
        return (
            f"token {index}{held} (batch {self.x.shape[0]}, {layer.num_heads} heads, {layer.num_kv_heads} KV heads, "
            f"head_dim {layer.head_dim})"
        )


class DecodeStep(Exercise):
    """One attention layer, one new token."""

    id, title, minutes, difficulty = "02.2", "A decode step through the cache", 6, 3
    needs = ("02.1",)
    reference = staticmethod(decode_step)
    why = (
        "seq_len, read before the append, is the number of tokens before this one, which is its position. k is cached "
        "turned, once and for all; v has no position. No mask: all that is held is past."
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
        "position-missing": "layer.rotate(k, position) returns the turned key. That is what the cache should get.",
        "query-position": "The new query and the new key belong to one token: they stand at one position.",
        "state-kept": "Everything that belongs to one prompt lives in its cache. Ask the cache for the position.",
        "causal-square": "The mask for one new token is one row. Which of the cached tokens does it have to hide?",
        "repeated-heads": "attention() lets several query heads read one KV head. Nothing needs repeating.",
        "expanded": "Values are right. What is repeated is the whole cache, at every step; attention() needs none.",
        "copied-whole": "append has joined the new token to the old ones. Read after it, and nothing is left to join.",
    }

    def examine(self, answer: Callable) -> None:
        """Prompts one after the other, several in turn, late positions, other dtypes: what is appended, then output."""
        first, second, third = tiny_model(), tiny_model(4, 4, 12), tiny_model(5, 1, 10)
        layer = AttentionLayer(first, first.blocks[0].attention)
        for turn in range(2):
            prompt = Prompt(layer, hidden(first, 2, 6))
            self.run_in_turn(answer, [prompt])
            self.judge(prompt, again=turn == 1)
        layers = [AttentionLayer(model, block.attention) for model in (first, second, third) for block in model.blocks]
        prompts = [Prompt(each, hidden(each.model, 1 + place % 3, 4), place) for place, each in enumerate(layers)]
        self.run_in_turn(answer, prompts)
        for prompt in prompts:
            self.judge_among_others(answer, prompt)
        for held in (300, 66_000):
            prompt = Prompt(layer, hidden(first, 1, 2), held)
            self.run_in_turn(answer, [prompt])
            self.judge(prompt)
        for dtype in (torch.float32, torch.bfloat16):
            self.check_dtype(answer, dtype)
            self.check_copied(answer, dtype)

    def run_in_turn(self, answer: Callable, prompts: Sequence[Prompt]) -> None:
        """One step of each prompt, then the next of each."""
        for index in range(max(prompt.x.shape[1] for prompt in prompts)):
            for prompt in prompts:
                new = prompt.x[:, index : index + 1]
                if not prompt.start:
                    new = new.contiguous()
                kept, products = new.clone(), Products(Effort())
                effort = self.run(partial(measured, partial(answer, new, prompt.layer, prompt.cache), products))
                self.check_unchanged(kept, new)
                check_stays(type(self), effort)
                got = self.call(lambda effort=effort: effort.result)
                self.check_appended(prompt, index)
                self.like(got, prompt.output(index), what=f"the output of {prompt.told(index)}")
                prompt.outputs.append(got)
                prompt.products.append(products.count)

    def check_appended(self, prompt: Prompt, index: int) -> None:
        """One token appended, with as many heads as there are KV heads."""
        cache, layer = prompt.cache, prompt.layer
        if cache.seq_len != prompt.start + index + 1:
            grew = cache.seq_len - prompt.start - index
            self.fail(
                "not-appended" if grew == 0 else "appended-too-much",
                seen=f"the cache grew by {grew} tokens in one step",
                cause="append was not called" if grew == 0 else "more than the new token's K and V were appended",
                look="cache.append(k, v): once per step, one token",
            )
        k, v = cache.appended[-1]
        for name, x, want in (("K", k, prompt.raw[1]), ("V", v, prompt.raw[2])):
            if layer.num_heads > layer.num_kv_heads and x.dim() == 4 and x.shape[1] == layer.num_heads:
                self.fail(
                    "repeated-heads",
                    seen=f"the cache got {x.shape[1]} heads ({name}); the layer has {layer.num_kv_heads} KV heads",
                    cause="K and V were repeated to all query heads before they were cached",
                    look=f"what is appended: this cache is {layer.num_heads // layer.num_kv_heads} times too large",
                )
            self.like(x, want[:, :, :1], what=f"the appended {name}")

    def judge_among_others(self, answer: Callable, prompt: Prompt) -> None:
        """A prompt that ran in turn with others, told from what goes wrong in it alone."""
        try:
            self.judge(prompt)
        except NotYet as not_yet:
            prompt.start_again()
            self.run_in_turn(answer, [prompt])
            self.judge(prompt)
            self.fail(
                "state-kept",
                seen=f"{not_yet.finding.seen}. Alone, without other layers and prompts in between, it was right",
                cause="something outlives the step outside the cache: a global, an attribute of the function or layer",
                look="where the position, and everything old, comes from: the cache, and nothing else",
            )

    def judge(self, prompt: Prompt, *, again: bool = False, tolerance: Callable[[int], float] | None = None) -> None:
        """What was appended and what came out, in all steps. again: the same layer has served another prompt before."""
        count = len(prompt.outputs)
        close = tolerance or (lambda index: ROUNDING)
        self.check_kinds(prompt, count)
        self.check_positions(prompt, count, again=again)
        for index in range(count):
            place = prompt.start + index
            self.same(prompt.cache.appended[index][1], prompt.v[:, :, place : place + 1],
                      what=f"V of {prompt.told(index)}", tolerance=close(index))  # fmt: skip
        self.check_outputs(prompt, close)
        self.check_work(prompt)

    def check_outputs(self, prompt: Prompt, close: Callable[[int], float]) -> None:
        """What came out, in all steps. close: how far off it may be in a step."""
        wrong = [i for i, got in enumerate(prompt.outputs) if not agree(got, prompt.output(i), close(i))]
        if wrong:
            for suspect in mistakes(prompt):
                self.accuse(prompt, suspect, wrong)
            first = wrong[0]
            self.explain_values(prompt.outputs[first], prompt.output(first), tolerance=close(first),
                                what=f"K and V are right; the output of {prompt.told(first)}")  # fmt: skip

    def check_kinds(self, prompt: Prompt, count: int) -> None:
        """K and V may not change places, and V may not be turned."""
        for index in range(count):
            place, (k, v) = prompt.start + index, prompt.cache.appended[index]
            want = prompt.raw[2][:, :, index : index + 1]
            if agree(k, want, ROUNDING) or (place and agree(k, prompt.layer.rotate(want, place), ROUNDING)):
                self.fail(
                    "k-and-v-swapped",
                    seen="what was appended as K is the token's V",
                    cause="k and v changed places before the append",
                    look="the order in `q, k, v = layer.project(x)` and in cache.append(k, v)",
                )
            if place and agree(v, prompt.layer.rotate(want, place), ROUNDING):
                self.fail(
                    "v-changed",
                    seen="the cached V is not the token's V: it is turned to the token's position",
                    cause="V was rotated too",
                    look="what is appended: rotary positions belong to q and k only",
                )

    def check_positions(self, prompt: Prompt, count: int, *, again: bool) -> None:
        """The positions at which the appended keys stand."""
        right = list(range(prompt.start, prompt.start + count))
        found = [self.position(prompt, index) for index in range(count)]
        if found == right:
            return
        if None in found:
            index = found.index(None)
            place = prompt.start + index
            self.explain_values(prompt.cache.appended[index][0], prompt.k[:, :, place : place + 1], tolerance=ROUNDING,
                                what=f"the appended K of {prompt.told(index)}")  # fmt: skip
        off = {p - q for p, q in zip(found, right, strict=True) if p is not None}
        seen = f"{prompt.told(0)} and the ones behind it: their keys stand at positions {', '.join(map(str, found))}"
        if (again and found != right) or (prompt.start and found == list(range(count))):
            self.fail(
                "state-kept",
                seen=f"the first prompt was right, this one is not; {seen}; they should be at {right[0]}, ...",
                cause="positions are counted outside the cache: by a global, or an attribute of the function",
                look="where the position comes from: cache.seq_len, and nothing else",
            )
        if len(set(found)) == 1 and count > 1:
            self.fail(
                "position-missing",
                seen=seen,
                cause="k was cached without its rotation, or always rotated to one position",
                look="layer.rotate(k, position), before the append",
            )
        if off in ({1}, {-1}):
            self.fail(
                "position-off-by-one",
                seen=seen,
                cause="the position was taken after the append, or counted from 1"
                if off == {1}
                else "the position is that of the last token held, not the one behind it",
                look="position = cache.seq_len, before append",
            )
        self.fail(
            "position",
            seen=f"{seen}; they should be at {', '.join(map(str, right))}",
            cause="the position is not the number of tokens that the cache held before this one",
            look="position = cache.seq_len, before append",
        )

    def position(self, prompt: Prompt, index: int) -> int | None:
        """Where an appended key stands; None when nowhere near."""
        right, raw = prompt.start + index, prompt.raw[1][:, :, index : index + 1]
        near = [right, 0, *(right + step * sign for step in range(1, 40) for sign in (1, -1)), index]
        got, eps = prompt.cache.appended[index][0], torch.finfo(raw.dtype).eps
        close = max(ROUNDING, 16 * eps * raw.abs().max().item())
        return next((p for p in near if agree(got, prompt.layer.rotate(raw, p), close)), None)

    def accuse(self, prompt: Prompt, suspect: Suspect, wrong: list[int]) -> None:
        """Name a mistake that gives every output, and differs where one is wrong."""
        values = [suspect.gives(index) for index in range(len(prompt.outputs))]
        if all(
            value is not None and agree(got, value, 1e-5) for got, value in zip(prompt.outputs, values, strict=True)
        ):
            self.fail(suspect.diagnosis, seen=f"K and V are right, the output of {prompt.told(wrong[0])} is not: "
                      f"{suspect.seen}", cause=suspect.cause, look=suspect.look)  # fmt: skip

    def check_work(self, prompt: Prompt) -> None:
        """One projection of one token, one merge, and attention."""
        layer, rows = prompt.layer, prompt.x.shape[0]
        weight = layer.attention.qkv.weight
        once = weight.numel() + layer.num_heads * layer.head_dim * weight.shape[1]
        old = 2 * layer.num_kv_heads * layer.head_dim * weight.shape[1]  # K and V of one token
        for index, products in enumerate(prompt.products):
            attend = 2 * layer.num_heads * layer.head_dim * (prompt.start + index + 1)
            extra = products / rows - once
            if extra > 2 * attend + 0.4 * old:
                self.fail(
                    "recomputed" if index else "projected-twice",
                    seen=f"step {index + 1} multiplied {products / rows / (once + attend):.1f} times as much as "
                    "one token's projection, its attention and the merge take",
                    cause="the inputs of old tokens are kept and their K and V computed again"
                    if index
                    else "the new token was projected more than once",
                    look="what layer.project gets, and how often: the new token's x, once",
                )

    def check_dtype(self, answer: Callable, dtype: torch.dtype) -> None:
        """A model of fewer bits: its own rounding, and no more."""
        model = tiny_model().to(dtype)
        layer = AttentionLayer(model, model.blocks[1].attention)
        prompt = Prompt(layer, hidden(model, 2, 3), 9)
        self.run_in_turn(answer, [prompt])
        self.judge(prompt, tolerance=rounding(prompt, block=1))

    def check_copied(self, answer: Callable, dtype: torch.dtype) -> None:
        """A step behind many tokens gives what is right, and makes nothing as large as one head's K, but for a cast."""
        held, model = 300, tiny_model(6, 2, 64).to(dtype)  # so that one head's K is larger than all scores
        layer = AttentionLayer(model, model.blocks[0].attention)
        for spare in (1, 9):
            prompt = Prompt(layer, hidden(model, 2, 1), held)
            cache = Room(prompt.past[0], prompt.past[1], spare)
            when = f"behind {held} tokens, {str(dtype).removeprefix('torch.')}"
            with Making() as making:
                effort = effort_of(partial(self.run, partial(answer, prompt.x, layer, cache)))
            check_stays(type(self), effort)
            prompt.outputs.append(effort.result)
            self.like(effort.result, prompt.output(0), what=f"the output of {prompt.told(0)}")
            self.check_outputs(prompt, rounding(prompt, block=0))
            check_copies(type(self), making, *cache.read(), when,
                         look="what is done to what was read: nothing need be. attention() takes fewer KV heads than "
                         "query heads")  # fmt: skip


def measured(step: Callable[[], Any], products: Products) -> Effort:
    """What a step makes, and how much it multiplies."""
    with products:
        return effort_of(step)


def rounding(prompt: Prompt, *, block: int) -> Callable[[int], float]:
    """How far off a step's output may be, from the same step in float64. block: the layer's place in its model."""
    model = prompt.layer.model
    twin = tiny_model(model.spec.num_heads, model.spec.num_kv_heads, model.spec.head_dim)
    twin.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    exact = Prompt(AttentionLayer(twin, twin.blocks[block].attention), prompt.x.double(), prompt.start)
    exact.k, exact.v = prompt.k.double(), prompt.v.double()
    return lambda index: budget(prompt.output(index), exact.output(index))


def hidden(model: Any, batch: int, tokens: int) -> Tensor:
    """Random hidden states."""
    return torch.randn(batch, tokens, model.spec.hidden_size, dtype=torch.float64).to(model.dtype)


def mistakes(prompt: Prompt) -> Iterator[Suspect]:
    """What people give attention in place of the new query, all keys, all values; `gives` is a function of a step."""
    layer, start = prompt.layer, prompt.start

    def operands(index: int) -> tuple[Tensor, Tensor, Tensor]:
        end = start + index + 1
        return prompt.query(index, end - 1), prompt.k[:, :, :end], prompt.v[:, :, :end]

    def seeing(part: slice) -> Callable[[int], Tensor]:
        def output(index: int) -> Tensor:
            q, k, v = operands(index)
            k, v = (x[:, :, part] if x[:, :, part].shape[2] else x for x in (k, v))
            return layer.merge(attention(q, k, v))

        return output

    def turned(position: Callable[[int], int]) -> Callable[[int], Tensor]:
        return lambda index: prompt.output(index, prompt.query(index, position(start + index)))

    def swapped(index: int) -> Tensor:
        q, k, v = operands(index)
        return layer.merge(attention(q, v, k))

    def narrowed(dtype: torch.dtype, parts: str) -> Callable[[int], Tensor]:
        def output(index: int) -> Tensor:
            q, k, v = operands(index)
            if parts == "q, K and V":
                return layer.merge(attention(q.to(dtype), k.to(dtype), v.to(dtype)).to(q.dtype))
            k, v = (x.to(dtype).to(x.dtype) if name in parts else x for name, x in (("K", k), ("V", v)))
            return layer.merge(attention(q, k, v))

        return output

    yield Suspect("newest-left-out", seeing(slice(None, -1)), "the cache was read before the append",
                  "the order: append, then read", "it does not depend on the new token's own K and V")  # fmt: skip

    def unmerged(index: int) -> Tensor:
        return attention(*operands(index)).transpose(1, 2).flatten(2)

    def from_input(index: int) -> Tensor:
        return prompt.output(index) + prompt.x[:, index : index + 1]

    yield Suspect("not-merged", unmerged, "the heads were joined by hand: layer.merge also applies the output "
                  "projection", "the return: layer.merge(...)",
                  "it is attention's result, without the output projection")  # fmt: skip
    yield Suspect("residual-added", from_input, "x was added to what attention gives; the block around this layer does "
                  "that", "the return: layer.merge(...), and nothing else",
                  "it is the right output plus x")  # fmt: skip
    yield Suspect("cache-unread", seeing(slice(-1, None)), "attention got the new k and v, not what the cache holds",
                  "the arguments of attention: keys, values = cache.read()",
                  "it depends on the new token alone")  # fmt: skip
    yield Suspect("causal-square", seeing(slice(None, 1)), "a causal triangle that starts in the top left corner, such "
                  "as is_causal=True: its only row sees key 0",
                  "the mask: everything in the cache is past, so one new token needs none",
                  "it depends on the first token's K and V alone")  # fmt: skip
    yield Suspect("k-and-v-swapped", swapped, "keys and values changed places between read and attention",
                  "the order in `keys, values = cache.read()` and in attention(q, keys, values)",
                  "the query met the values, and the keys were blended")  # fmt: skip
    for position, words in ((lambda p: 0, "q was not rotated"), (lambda p: p + 1, "q was rotated after the append, or "
                            "by one position more"), (lambda p: p - 1, "q was rotated by one less")):  # fmt: skip
        yield Suspect("query-position", turned(position), words, "layer.rotate(q, position): the same position as k's",
                      "its query stands at another position than its key")  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16):
        for parts in ("K and V", "K", "V", "q, K and V"):
            name = str(dtype).removeprefix("torch.")
            yield Suspect("precision", narrowed(dtype, parts), f"after read, {parts} went through {name}: what that "
                          "rounds away is lost", "every dtype that is written down: attention takes what read() gives",
                          f"it is what {parts} rounded to {name} give{'s' * (len(parts) == 1)}")  # fmt: skip
    for place, suspect in enumerate(attention_suspects(*operands(0), causal=False)):

        def gives(index: int, place: int = place) -> Any:
            variants = attention_suspects(*operands(index), causal=False)[place].gives
            out = variants[0]() if variants else None
            if not isinstance(out, Tensor) or out.shape != operands(index)[0].shape:
                return None
            return layer.merge(out)

        if suspect.gives:
            yield Suspect(suspect.diagnosis, gives, suspect.cause, suspect.look, suspect.seen)
