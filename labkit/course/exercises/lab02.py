"""Lab 02, the cache from scratch: references, checks, predictions and questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import causal_mask
from labkit.attention import fused_attention as attention
from labkit.cache import Cache
from labkit.course.exercise import Exercise, LabContents, Prediction, Quiz
from labkit.course.plug import AttentionLayer
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.specs import ModelSpec

BATCH, HEADS, HEAD_DIM = 2, 3, 4  # of the small tensors that the caches are tried with
TIGHT = 1e-9  # bounded: float64 sums of fewer than 100 terms of order 1 differ by less than 1e-13 between orders
LOOSE = 1e-5  # bounded: float32 sums of fewer than 100 terms of order 1


# References


class GrowingCache:
    """K and V of one layer, longer with every append. `seq_len`: tokens held, 0 at first."""

    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put new tokens behind those held; k and v are [batch, num_kv_heads, new_tokens, head_dim]."""
        if self.seq_len == 0:
            self.k, self.v = k, v
        else:
            self.k = torch.cat((self.k, k), dim=2)
            self.v = torch.cat((self.v, v), dim=2)
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """k and v of every token held, both [batch, num_kv_heads, seq_len, head_dim]."""
        return self.k, self.v


def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    """The attention output of one new token, [batch, 1, hidden_size].

    x: the new token's hidden state, [batch, 1, hidden_size]. cache: what the layer holds of the tokens before it.
    layer.project(x): q [batch, num_heads, 1, head_dim] and k, v [batch, num_kv_heads, 1, head_dim], not yet rotated.
    layer.rotate(t, position): q or k, turned to the position it stands at. layer.merge(out): heads to hidden state.
    """
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return layer.merge(attention(layer.rotate(q, position), keys, values))


def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    """The likeliest next tokens, one after the other: int [batch, max_new_tokens].

    tokens: int [batch, prompt_tokens], at least one. They follow whatever `cache` holds already.
    model(tokens, cache, last_only=True): logits [batch, 1, vocab_size] of the last token; appends to the cache.
    """
    new: list[Tensor] = []
    fed = tokens
    for _ in range(max_new_tokens):
        logits = model(fed, cache, last_only=True)
        fed = logits[:, -1:].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


class PreallocatedCache:
    """K and V of one layer, in memory that is allocated once. `seq_len`: tokens held, 0 at first.

    capacity: room, in tokens. The first append tells batch, heads, head_dim, dtype and device: allocate then.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write new tokens in place; ValueError, and nothing changed, when they do not fit."""
        batch, num_kv_heads, new_tokens, head_dim = k.shape
        end = self.seq_len + new_tokens
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache made for {self.capacity}")
        if self.seq_len == 0:
            self.k = k.new_empty(batch, num_kv_heads, self.capacity, head_dim)
            self.v = torch.empty_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        """k and v of the tokens held, both [batch, num_kv_heads, seq_len, head_dim], without a copy."""
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    """How many tokens of `wanted` need not be run, because the cache holds their K and V.

    held: the tokens in the cache, in order; it may be empty. wanted: the next prompt, whole; at least one token.
    The last token of `wanted` is always run: the next token's logits come from it.
    """
    same = 0
    for old, new in zip(held, wanted, strict=False):
        if old != new:
            break
        same += 1
    return min(same, len(wanted) - 1)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    """Bytes of a model's K and V: all layers, `tokens` tokens in each of `batch` rows.

    spec: num_layers, num_heads, num_kv_heads, head_dim, hidden_size, ... of the model.
    bytes_per_element: 4 for float32, 2 for float16 and bfloat16.
    """
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element
    return per_token * tokens * batch


def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the newest tokens over everything held, themselves included.

    q: [batch, num_heads, new_tokens, head_dim]. k, v: [batch, num_kv_heads, kv_len, head_dim], kv_len >= new_tokens.
    Returns [batch, num_heads, new_tokens, head_dim].
    """
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# What the checks try answers with


def new_tokens(count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random K and V of `count` tokens."""
    shape = (BATCH, HEADS, count, HEAD_DIM)
    return torch.randn(shape).to(dtype).to(device), torch.randn(shape).to(dtype).to(device)


def tiny_model() -> Llama:
    """A float64 model of two layers whose attention is sharp enough that a wrong position shows."""
    spec = ModelSpec(
        name="tiny", num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, hidden_size=48, intermediate_size=64,
        vocab_size=97, max_seq_len=128,
    )  # fmt: skip
    model = Llama(spec).double()
    for block in model.blocks:
        block.attention.qkv.weight.mul_(3)
    return model


def read_pair(exercise: type[Exercise], cache: Any) -> tuple[Tensor, Tensor]:
    """What `cache.read()` gives, when it is a pair of tensors of one shape."""
    both = exercise.run(cache.read)
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(x, Tensor) for x in both):
        kind = type(both).__name__
        exercise.fail(
            "not-a-pair",
            seen=f"read() returned {'nothing' if both is None else f'a {kind}'}",
            cause="no return, or only one of the two",
            look="the last line of read(): return k, v",
        )
    return both[0], both[1]


def check_isolation(exercise: type[Exercise], filled: Any, fresh: Any) -> None:
    """Fail when appending to one cache shows in another."""
    seen = getattr(fresh, "seq_len", None)
    shared = {x.data_ptr() for x in tensors(filled)} & {x.data_ptr() for x in tensors(fresh)}
    if seen not in (None, 0) or shared:
        exercise.fail(
            "shared-between-caches",
            seen="tokens appended to one cache turned up in another one",
            cause="they are kept on the class (or in a default argument or a global), not on the instance",
            look="__init__: everything a cache keeps belongs on self",
        )


def tensors(cache: Any) -> list[Tensor]:
    """The tensors among a cache's attributes and those of its class, also inside lists."""
    values = [getattr(cache, name, None) for name in {*vars(type(cache)), *vars(cache)} if not name.startswith("__")]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


def check_seq_len(exercise: type[Exercise], cache: Any, want: int, when: str) -> None:
    """Fail unless `cache.seq_len` is `want`."""
    got = getattr(cache, "seq_len", None)
    if callable(got) or got != want:
        seen = "there is no seq_len" if got is None else f"seq_len is {'a method' if callable(got) else got}"
        exercise.fail(
            "seq-len",
            seen=f"{when}, {seen}; it should be {want}",
            cause="the count of tokens is not kept, or counts appends instead of tokens",
            look="the end of append: seq_len grows by k.shape[2]",
        )


# 02.1


class Growing(Exercise):
    """The cache that concatenates."""

    id, title, minutes, difficulty = "02.1", "A cache that grows", 5, 1
    reference = GrowingCache
    hints = (
        "Which of the four dimensions counts tokens? Nothing else may grow.",
        "The first append has nothing to join: keep k and v. Every later one joins old and new, old first.",
        "if self.seq_len == 0:\n    self.k, self.v = k, v\nelse:\n    self.k = torch.cat((self.k, k), dim=2)  # v too",
    )
    hints_for: ClassVar = {
        "wrong-dimension": "Shapes are [batch, num_kv_heads, tokens, head_dim]. Count to the tokens, from 0.",
        "shared-between-caches": "A name assigned in the class body is one for all instances. Assign in __init__.",
        "newest-only": "append must keep what was there: join it with what comes.",
        "new-before-old": "The order of the tensors in torch.cat is the order of the tokens.",
    }

    def examine(self, answer: Callable) -> None:
        """Appends of several lengths, read back exactly; then a second cache, then another dtype."""
        cache, fresh = self.run(answer), self.run(answer)
        check_seq_len(type(self), cache, 0, "before the first append")
        parts = [new_tokens(count) for count in (5, 5, 1, 2)]
        for index, (k, v) in enumerate(parts):
            self.append(cache, k, v)
            self.check_content(cache, parts[: index + 1])
            tokens = sum(k.shape[2] for k, _ in parts[: index + 1])
            check_seq_len(type(self), cache, tokens, f"after append {index + 1}")
        check_isolation(type(self), cache, fresh)
        for dtype in (torch.bfloat16, torch.float64):
            cache, (k, v) = self.run(answer), new_tokens(3, dtype=dtype)
            self.append(cache, k, v)
            self.append(cache, k, v)
            got = read_pair(type(self), cache)
            self.same(got[0], torch.cat((k, k), dim=2), what=f"K of a {dtype} cache")

    def append(self, cache: Any, k: Tensor, v: Tensor) -> None:
        """One append, whose arguments must come back unchanged."""
        kept = k.clone(), v.clone()
        self.run(lambda: cache.append(k, v))
        if not (torch.equal(k, kept[0]) and torch.equal(v, kept[1])):
            self.fail(
                "arguments-changed",
                seen="append changed the tensors it was given",
                cause="an in-place operation on k or v",
                look="every line that writes into k or v",
            )

    def check_content(self, cache: Any, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Fail unless read() gives all parts in order."""
        k, v = read_pair(type(self), cache)
        want_k, want_v = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
        self.check_shape(k, v, want_k, parts)
        if torch.equal(k, want_v) and torch.equal(v, want_k):
            self.fail(
                "k-and-v-swapped",
                seen="what read() gives first is V",
                cause="k and v change places on the way in or out",
                look="the order in append's parameters and in read's return: k, v",
            )
        if len(parts) > 1 and torch.equal(k, torch.cat([part[0] for part in reversed(parts)], dim=2)):
            self.fail(
                "new-before-old",
                seen="the newest token comes first",
                cause="torch.cat got the new tensor before the old one",
                look="torch.cat((old, new)): position in the cache is position in the sequence",
            )
        self.same(k, want_k, what="K")
        self.same(v, want_v, what="V")

    def check_shape(self, k: Tensor, v: Tensor, want: Tensor, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Say which dimension grew in place of the tokens'."""
        for name, x in (("K", k), ("V", v)):
            if len(parts) > 1 and x.shape == parts[-1][0].shape:
                self.fail(
                    "newest-only",
                    seen=f"after {len(parts)} appends {name} holds the last one only",
                    cause="append replaces what was held",
                    look="the second branch of append: join old and new",
                )
            for dim, label in ((0, "batch"), (1, "heads"), (3, "head_dim")):
                if x.dim() == 4 and x.shape[dim] > want.shape[dim]:
                    self.fail(
                        "wrong-dimension",
                        seen=f"{name} is {list(x.shape)}: {label} grew from {want.shape[dim]} to {x.shape[dim]}",
                        cause=f"the tensors were joined along dimension {dim}",
                        look="the dim of torch.cat: tokens are dimension 2",
                    )


# 02.2


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
        cache = Recorder()
        q, k, v = layer.project(x)
        rotated = layer.rotate(q, 0), layer.rotate(k, 0), v
        want = layer.merge(attention(*rotated))
        for index in range(x.shape[1]):
            new = x[:, index : index + 1].clone()
            with ledger([(layer.attention.qkv.weight, 1.0)]) as work:
                got = self.run(partial(answer, new, layer, cache))
            self.check_work(work.kv_projections, index)
            self.check_appended(cache, layer, index)
            self.check_keys(cache, layer, k, v, second=second)
            self.check_output(got, layer, rotated, want, index)

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
        if (got_k - layer.rotate(k, index)).abs().max() > TIGHT:
            self.explain_keys(got_k, layer, k, index, second=second)
        if (got_v - v).abs().max() > TIGHT:
            self.fail(
                "v-changed",
                seen="the cached V is not the token's V",
                cause="V was rotated too" if index and close(got_v, layer.rotate(v, index)) else "V was changed",
                look="what is appended: rotary positions belong to q and k only",
            )

    def explain_keys(self, got: Tensor, layer: AttentionLayer, k: Tensor, index: int, *, second: bool) -> None:
        """Say at which position a wrong key stands."""
        found = next((p for p in range(128) if p != index and close(got, layer.rotate(k, p))), None)
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
        if got is None:
            self.fail("returned-none", seen="decode_step returned None", cause="no return", look="the last line")
        want = want[:, index : index + 1]
        self.like(got, want, what="the output")
        if close(got, want):
            return
        q, k, v = rotated
        q, k, v = q[:, :, index : index + 1], k[:, :, : index + 1], v[:, :, : index + 1]
        if index and close(got, layer.merge(attention(q, k[:, :, :-1], v[:, :, :-1]))):
            self.fail(
                "newest-left-out",
                seen="the output does not depend on the new token's own K and V",
                cause="the cache was read before the append",
                look="the order: append, then read",
            )
        if index and close(got, layer.merge(attention(q, k[:, :, -1:], v[:, :, -1:]))):
            self.fail(
                "cache-unread",
                seen="the output depends on the new token alone",
                cause="attention got the new k and v, not what the cache holds",
                look="the arguments of attention: keys, values = cache.read()",
            )
        self.fail(
            "query-position" if index else "values",
            seen=f"K and V are right, the output of token {index} is not",
            cause="q was not rotated, or not to the new token's position" if index else "the arithmetic of attention",
            look="layer.rotate(q, position): the same position as k's",
        )


def close(got: Tensor, want: Tensor) -> bool:
    """Whether two float64 tensors of one shape agree within `TIGHT`."""
    return bool((got - want).abs().max() <= TIGHT)


# 02.3


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
        got = self.run(lambda: answer(watched, prompt.clone(), count, cache))
        want = self.expected(torch.cat((history, prompt), dim=1), count)
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
        self.check_calls(watched.calls, prompt, count, cache, history.shape[1])
        if got is None:
            self.fail("returned-none", seen="None came back", cause="no return", look="the last line")
        self.like(got, want, what="the result")
        if not torch.equal(got, want):
            self.fail(
                "tokens",
                seen=f"the new tokens are {got[0].tolist()}; without a cache they are {want[0].tolist()}",
                cause="the logits of another row than the last were used, or not the likeliest token",
                look="logits[:, -1:].argmax(dim=-1)",
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
                look="model(fed, cache, last_only=True)",
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
        if decode and decode[0] >= prompt.shape[1] and (calls[1][0][:, : prompt.shape[1]] == prompt).all():
            self.fail(
                "re-fed",
                seen=f"step 2 ran {decode[0]} tokens; one is new",
                cause="the whole sequence is fed again, though the cache holds all but the last token",
                look="what the second call gets: the newest token, [batch, 1]",
            )
        if decode and max(decode) > 1:
            self.fail(
                "several-fed",
                seen=f"a decode step ran {max(decode)} tokens; one is new",
                cause="the likeliest token of every row was taken, not of the last row alone",
                look="the shape of what is fed: logits[:, -1:].argmax(dim=-1) is [batch, 1]",
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


# 02.4


class Preallocated(Exercise):
    """The cache that is allocated once."""

    id, title, minutes, difficulty = "02.4", "A cache that is allocated once", 7, 3
    needs = ("02.1",)
    reference = PreallocatedCache
    hints = (
        "What is known when the cache is made, and what only at the first append?",
        "Allocate [batch, num_kv_heads, capacity, head_dim] like k. Each append fills the next rows; read() slices.",
        "end = self.seq_len + k.shape[2]\nif end > self.capacity: raise ValueError(...)\n"
        "if self.seq_len == 0: self.k = k.new_empty(batch, num_kv_heads, self.capacity, head_dim)  # v alike\n"
        "self.k[:, :, self.seq_len : end] = k\nself.seq_len = end",
    )
    hints_for: ClassVar = {
        "wrong-dtype": "k.new_empty(...) takes dtype and device from k. torch.zeros(...) takes neither.",
        "capacity-off-by-one": "A cache of capacity 8 holds 8 tokens. Try it on paper with capacity 1.",
        "grew-again": "torch.cat makes a new tensor. self.k[:, :, a:b] = k writes into the one that is there.",
        "reads-slack": "Behind seq_len the memory holds whatever was there before. Slice it off.",
    }
    capacity = 8

    def examine(self, answer: Callable) -> None:
        """Content, then room, then memory: in place, no copy, dtype and device of what comes in."""
        make = partial(self.run, partial(answer, self.capacity))
        cache, fresh = make(), make()
        check_seq_len(type(self), cache, 0, "before the first append")
        self.check_dtype(make())
        self.check_content(cache)
        check_isolation(type(self), cache, fresh)
        self.check_room(make())
        self.check_memory(make())
        self.check_device(make())

    def check_dtype(self, cache: Any) -> None:
        """A bfloat16 model must get bfloat16 back."""
        k, v = new_tokens(2, dtype=torch.bfloat16)
        self.run(lambda: cache.append(k, v))
        got = read_pair(type(self), cache)
        for name, x in (("K", got[0]), ("V", got[1])):
            if x.dtype != torch.bfloat16:
                self.fail(
                    "wrong-dtype",
                    seen=f"bfloat16 went in, {str(x.dtype).removeprefix('torch.')} came out ({name})",
                    cause="the memory was allocated in torch's default dtype",
                    look="where the memory is allocated: dtype=k.dtype, device=k.device, or k.new_empty",
                )

    def check_content(self, cache: Any) -> None:
        """What is read is what was appended, and no more."""
        parts = [new_tokens(count) for count in (3, 1, 2)]
        for index, (k, v) in enumerate(parts):
            self.run(partial(cache.append, k, v))
            got = read_pair(type(self), cache)
            want = [torch.cat([part[i] for part in parts[: index + 1]], dim=2) for i in (0, 1)]
            for name, x, w in zip("KV", got, want, strict=True):
                if x.dim() == 4 and x.shape[2] == self.capacity:
                    self.fail(
                        "reads-slack",
                        seen=f"read() gives {name} of {self.capacity} tokens; {w.shape[2]} were appended",
                        cause="all of the memory is returned, the unwritten part with it",
                        look="read(): a slice up to seq_len",
                    )
                if index and x.shape == w.shape and not torch.equal(x[:, :, :1], w[:, :, :1]):
                    self.fail(
                        "overwritten",
                        seen=f"after append {index + 1} the first token's {name} is gone",
                        cause="every append writes at the same place",
                        look="where the write starts: seq_len, as it was before this append",
                    )
                self.same(x, w, what=f"{name} after append {index + 1}")
            check_seq_len(type(self), cache, want[0].shape[2], f"after append {index + 1}")

    def check_room(self, cache: Any) -> None:
        """It fills to the last token, and refuses one more without changing."""
        k, v = new_tokens(self.capacity)
        try:
            cache.append(k, v)
        except NotImplementedError:
            raise
        except Exception as error:
            self.fail(
                "capacity-off-by-one",
                seen=f"{self.capacity} tokens do not go into a cache of capacity {self.capacity}: {error}",
                cause="the comparison refuses the last place, or too little memory was allocated",
                look="the test before the write: end > capacity is too much, end == capacity is full",
            )
        try:
            cache.append(*new_tokens(1))
        except NotImplementedError:
            raise
        except ValueError:
            pass
        except Exception as error:
            self.fail(
                "overflow",
                seen=f"one token too many raises {type(error).__name__}, not ValueError",
                cause="the write itself failed; nobody tested for room",
                look="the start of append: compare with the capacity before anything changes",
            )
        else:
            self.fail(
                "overflow",
                seen=f"a cache of capacity {self.capacity} took {self.capacity + 1} tokens without a word",
                cause="no test for room: the new token was dropped, or wrote over an old one, or more memory was taken",
                look="the start of append: raise ValueError when the tokens do not fit",
            )
        got = read_pair(type(self), cache)
        if getattr(cache, "seq_len", None) != self.capacity or not torch.equal(got[0], k):
            self.fail(
                "half-done",
                seen="the refused append changed the cache",
                cause="seq_len or the memory was changed before the test for room",
                look="the order in append: test first, then write",
            )

    def check_memory(self, cache: Any) -> None:
        """One allocation each for K and V; later appends move only what is new; read() copies nothing."""
        k, v = new_tokens(1)
        self.run(lambda: cache.append(k, v))
        with ledger() as work:
            self.run(lambda: cache.append(k, v))
        new = k.nbytes + v.nbytes
        if work.bytes_copied > new or work.allocations:
            self.fail(
                "grew-again",
                seen=f"the second append moved {work.bytes_copied} bytes and made {work.allocations} new tensors; "
                f"{new} bytes are new and no tensor is needed",
                cause="the memory is made again at every append: torch.cat, or an allocation outside the first append",
                look="append: allocate once, then write into a slice",
            )
        with ledger() as work:
            read_pair(type(self), cache)
        if work.bytes_copied:
            self.fail(
                "read-copies",
                seen=f"read() moved {work.bytes_copied} bytes",
                cause="clone(), contiguous() or indexing with a tensor makes a copy",
                look="read(): a slice is a view and costs nothing",
            )

    def check_device(self, cache: Any) -> None:
        """Tensors on the meta device stand for a GPU."""
        k, v = new_tokens(1, device="meta")
        try:
            cache.append(k, v)
            device = cache.read()[0].device.type
        except Exception:
            device = "cpu"
        if device != "meta":
            self.fail(
                "wrong-device",
                seen="tensors on another device went in; the memory was allocated on the CPU",
                cause="the memory was allocated without device=k.device",
                look="where the memory is allocated: k.new_empty takes dtype and device from k",
            )


# 02.5


class ReusablePrefix(Exercise):
    """What a kept cache is worth for the next prompt."""

    id, title, minutes, difficulty = "02.5", "How much of the cache may stay", 4, 2
    reference = staticmethod(reusable_prefix)
    hints = (
        "If token 3 is another one, are the K and V of token 4 still right in the layers above the first?",
        "Count equal tokens from the start and stop at the first difference. Then think of wanted == held.",
        "same = 0\nfor old, new in zip(held, wanted):\n    if old != new: break\n    same += 1\n"
        "return min(same, len(wanted) - 1)",
    )
    hints_for: ClassVar = {
        "nothing-left-to-run": "A cache holds K and V, no logits. To get logits, at least one token must run.",
        "matches-anywhere": "K and V depend on every token before. After the first difference nothing counts.",
    }

    def examine(self, answer: Callable) -> None:
        """Cases from the plainest to the one that everybody forgets."""
        self.case(answer, [1, 2, 3], [1, 2, 3, 4, 5], 3)
        self.case(answer, [1, 2, 3], [9, 2, 3, 4, 5], 0)
        self.case(answer, [1, 2, 3, 4], [1, 2, 9, 4, 5], 2)
        self.case(answer, [1, 2, 3, 4, 5, 6], [1, 2, 7], 2)
        self.case(answer, [], [1, 2], 0)
        self.case(answer, [1, 2, 3], [1, 2, 3], 2)
        self.case(answer, [1, 2, 3, 4, 5, 6], [1, 2, 3], 2)
        self.case(answer, [4], [4], 0)
        self.case(answer, [1, 1, 1, 1], [1, 1, 1, 1, 1, 1], 4)

    def case(self, answer: Callable, held: list[int], wanted: list[int], want: int) -> None:
        """One pair of token lists."""
        got = self.call(answer, held, wanted)
        if isinstance(got, bool) or not isinstance(got, int):
            self.fail(
                "not-a-number",
                seen=f"a {type(got).__name__} came back",
                cause="the tokens themselves were returned, or a tensor",
                look="the docstring: how many, an int",
            )
        if got == want:
            return
        seen = f"held {held}, wanted {wanted}: you reuse {got}; {want} is right"
        same = sum(old == new for old, new in zip(held, wanted, strict=False))
        if got >= len(wanted):
            self.fail(
                "nothing-left-to-run",
                seen=seen,
                cause="every token of the prompt is taken from the cache, so no token is run and there are no logits",
                look="the return: at most len(wanted) - 1",
            )
        if got == len(held):
            self.fail(
                "assumes-same-beginning",
                seen=seen,
                cause="everything held is reused, whatever it is",
                look="compare the tokens, one by one",
            )
        if got in (same, len(set(held) & set(wanted))) and got > want:
            self.fail(
                "matches-anywhere",
                seen=seen,
                cause="equal tokens behind the first difference were counted",
                look="the loop: stop at the first token that differs",
            )
        if got == want - 1:
            self.fail(
                "one-too-few",
                seen=seen,
                cause="one token is held back even when another is left to run",
                look="the last token to run is a token of `wanted`, not always one of `held`",
            )
        self.fail("count", seen=seen, cause="the count is off for this pair", look="this pair, by hand")


# 02.6


class CacheBytes(Exercise):
    """Bytes from shapes."""

    id, title, minutes, difficulty = "02.6", "Bytes of a cache", 2, 1
    reference = staticmethod(cache_bytes)
    hints = (
        "Write down the shape of one layer's K for one token. How many numbers is that, and how often does it occur?",
        "K and V, in each layer, per KV head, head_dim numbers, for each token of each row.",
        "2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element, times tokens, times batch",
    )
    hints_for: ClassVar = {
        "query-heads": "The cache holds K and V. How many heads of those does the model have?",
        "k-only": "A key without its value answers nothing.",
    }
    spec = ModelSpec(
        name="odd", num_layers=5, num_heads=21, num_kv_heads=3, head_dim=22, hidden_size=221, intermediate_size=13,
        vocab_size=17, max_seq_len=19,
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """A spec whose sizes share no factor, so that a wrong factor can be read off the ratio."""
        spec, tokens, batch, size = self.spec, 31, 37, 2
        got = self.call(answer, spec, tokens, batch, size)
        if isinstance(got, (bool, Tensor)) or not isinstance(got, (int, float)):
            self.fail(
                "not-a-number",
                seen=f"a {type(got).__name__} came back",
                cause="something other than a count of bytes was returned",
                look="the return: one int",
            )
        want = cache_bytes(spec, tokens, batch, size)
        if got != want:
            self.explain(got / want)
        one = self.call(answer, spec, 1, 1, 4)
        self.same(torch.tensor(one), torch.tensor(cache_bytes(spec, 1, 1, 4)), what="bytes of one token")

    def explain(self, ratio: float) -> None:
        """Name the factor that is missing or wrong."""
        spec = self.spec
        known = {
            "k-only": (1 / 2, "half the bytes", "K was counted and V was not"),
            "query-heads": (spec.num_heads / spec.num_kv_heads, "too many", "query heads were counted, not KV heads"),
            "group-size": (spec.num_heads // spec.num_kv_heads / spec.num_kv_heads, "too many",
                           "num_heads // num_kv_heads was taken for the number of KV heads"),
            "hidden-size": (spec.hidden_size / (spec.num_kv_heads * spec.head_dim), "too many",
                            "hidden_size was taken for num_kv_heads * head_dim, which holds only without GQA"),
            "one-layer": (1 / spec.num_layers, "too few", "one layer was counted"),
            "one-row": (1 / 37, "too few", "the batch was left out"),
            "bits": (8, "eight times too many", "bits were counted"),
        }  # fmt: skip
        for diagnosis, (factor, amount, cause) in known.items():
            if abs(ratio - factor) < 1e-9:
                self.fail(diagnosis, seen=f"{ratio:.3g} times the bytes: {amount}", cause=cause, look="the factors")
        self.fail(
            "factors",
            seen=f"{ratio:.3g} times the right number of bytes",
            cause="a factor is missing, doubled, or the result was scaled to kB or GiB",
            look="2, layers, KV heads, head_dim, tokens, batch, bytes per element: seven factors",
        )


# 02.7


class AttendChunk(Exercise):
    """The mask that forgets what is cached."""

    id, title, minutes, difficulty = "02.7", "Debug: an answer that depends on the chunk size", 5, 3
    reference = staticmethod(attend_chunk)
    hints = (
        "Draw the mask for 2 new tokens after 3 cached ones: 2 rows, 5 columns. Which cells should be True?",
        "Row i is the i-th new token. It stands at position kv_len - new_tokens + i, not at i.",
        "tril(d) keeps d more diagonals above the main one. How many columns do the cached tokens add?",
    )
    hints_for: ClassVar = {
        "mask-offset": "The triangle is right; it starts in the wrong column. The mask has kv_len - new_tokens columns "
        "that every row may see.",
        "sees-the-future": "Check row 0: its last True must be the column of the first new token itself.",
    }

    def examine(self, answer: Callable) -> None:
        """Chunks after a cache: each wrong mask gives an output of its own."""
        torch.manual_seed(7)
        for new, held, batch in ((3, 4, 1), (1, 6, 1), (5, 0, 2), (2, 7, 2)):
            q = torch.randn(batch, 6, new, 8)
            k, v = torch.randn(batch, 2, new + held, 8), torch.randn(batch, 2, new + held, 8)
            got = self.call(answer, q, k, v)
            want = attention(q, k, v)
            self.like(got, want, what="the output")
            if not torch.allclose(got, want, rtol=0, atol=LOOSE):
                self.explain(got, q, k, v, new, held)

    def explain(self, got: Tensor, q: Tensor, k: Tensor, v: Tensor, new: int, held: int) -> None:
        """Find the mask that gives what was seen."""

        def close_to(mask: Tensor) -> bool:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return torch.allclose(got, out.nan_to_num(0.0), rtol=0, atol=LOOSE)

        where = f"{new} new tokens after {held} cached"
        every = torch.ones(new, new + held, dtype=torch.bool)
        right = causal_mask(new, new + held)
        if held and close_to(every.tril()):
            self.fail(
                "mask-offset",
                seen=f"{where}: the first new token sees 1 key; it should see {held + 1}",
                cause="row i of the mask was taken for position i, as if nothing were cached",
                look="tril(): its diagonal starts at column 0. Where does the first new token stand?",
            )
        if close_to(every):
            self.fail(
                "sees-everything",
                seen=f"{where}: the first new token sees the ones behind it",
                cause="no mask at all",
                look="the mask: new tokens must not see each other's future",
            )
        if close_to(every.tril(held + 1)):
            self.fail(
                "sees-the-future",
                seen=f"{where}: every token sees one token too many",
                cause="the offset is one too large",
                look="the offset for held = 0: it must be 0",
            )
        if close_to(every.tril(held - 1)):
            self.fail(
                "blind-to-itself",
                seen=f"{where}: no token sees itself",
                cause="the offset is one too small, or `<` stands for `<=`",
                look="the offset for held = 0: it must be 0",
            )
        if close_to(~right):
            self.fail(
                "mask-inverted",
                seen=f"{where}: tokens see what they should not, and nothing else",
                cause="True was taken for hidden; for PyTorch's attn_mask True means may see",
                look="the sense of the mask",
            )
        own = right.clone()
        own[:, :held] = False
        if held and close_to(own):
            self.fail(
                "cache-hidden",
                seen=f"{where}: the new tokens see each other and nothing that is cached",
                cause="the mask's columns for cached tokens are False",
                look="the first kv_len - new_tokens columns: True in every row",
            )
        self.fail(
            "mask",
            seen=f"{where}: the output fits no mask that this check knows",
            cause="a mask that is right for another case",
            look="the rule for row i, in words, before code",
        )


PREDICTIONS = (
    Prediction("02.p1", "Tokens whose K and V a layer computes in 16 passes without a cache", "tokens", 1.05),
    Prediction("02.p2", "Bytes that one token adds to the cache of the whole model", "bytes", 1.1),
    Prediction("02.p3", "How much faster 200 new tokens are with the cache", "times", 1.3),
    Prediction("02.p4", "What a growing cache of the whole model moves to take 200 tokens", "MB", 1.3),
    Prediction("02.p5", "Prefill's tokens per second over decode's", "times", 1.5),
    Prediction("02.p6", "Tokens that a stateless server runs for each one that a stateful server runs", "times", 1.2),
    Prediction("02.p7", "Layers whose keys change when the first token changes", "layers", 1.0),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "02.q1",
        "Why are K and V of old tokens cached, and their queries not?",
        {"a": "Queries are too large.", "b": "An old token's query is never used again.",
         "c": "Queries change at every step.", "d": "Queries are the same for all tokens."},
        {"a": "A query head is as large as a key head. Size is not the reason.",
         "b": "A query asks once, when its token is new. Keys and values are read by every later token.",
         "c": "An old token's query would be the same if it were computed again, as its key is. Nobody asks for it.",
         "d": "Each token has its own, from its own hidden state and position."},
        "b",
    ),
    Quiz(
        "02.q2",
        "A prompt of 1,000 tokens, 500 generated with a cache. How many tokens' K and V does each layer compute?",
        {"a": "500", "b": "1,000", "c": "1,499", "d": "1,500"},
        {"a": "The prompt needs K and V too: prefill computes them.",
         "b": "The new tokens need K and V too, all but the last.",
         "c": "1,000 in prefill, which gives the first new token, and 499 in decode. The last token is never run.",
         "d": "Close. The last new token is returned but never run, so its K and V are never computed."},
        "c",
    ),
    Quiz(
        "02.q3",
        "With a cache, the total of attention's reads over a generation of N tokens grows as",
        {"a": "N: that is what the cache is for", "b": "N squared: each step reads all that is held",
         "c": "N cubed", "d": "constant"},
        {"a": "That is the projections. Step i still reads i keys and i values, and 1 + 2 + ... + N is quadratic.",
         "b": "Step i reads i tokens. The cache saves computing them, not reading them.",
         "c": "That is attention without a cache: step i has i rows of i scores.",
         "d": "Each step reads more than the one before."},
        "b",
    ),
    Quiz(
        "02.q4",
        "A cache of 40 tokens is kept. The next prompt is exactly those 40 tokens. How many must be run?",
        {"a": "0", "b": "1", "c": "40", "d": "41"},
        {"a": "Then there are no logits: the cache holds K and V, not the model's answer to them.",
         "b": "The last one, to get its logits. 39 are reused.",
         "c": "39 of them have their K and V in the cache already.",
         "d": "There is no 41st token yet. It is what the run will tell."},
        "b",
    ),
    Quiz(
        "02.q5",
        "The first word of a kept system prompt changes. In which layers are the other tokens' keys still right?",
        {"a": "All", "b": "The first", "c": "None", "d": "The last"},
        {"a": "Above the first layer a token's hidden state has read the changed token.",
         "b": "A first-layer key comes from its own token and position. Above, hidden states have read others.",
         "c": "In the first layer a key depends on its own token and position only.",
         "d": "The last layer is the furthest from the embeddings: the change has passed through all layers below."},
        "b",
    ),
    Quiz(
        "02.q6",
        "A growing cache and a preallocated one hold the same 500 tokens. Which statement is true?",
        {"a": "The preallocated one always takes less memory.", "b": "The growing one reads less in attention.",
         "c": "The growing one moves all it holds at each append; the other takes its capacity from the start.",
         "d": "They give different tokens."},
        {"a": "It takes its capacity, however few tokens it holds. That is the price.",
         "b": "Both hand attention the same 500 tokens.",
         "c": "Time against memory: quadratic copying against slack. Lab 06 removes both.",
         "d": "They hold the same numbers."},
        "c",
    ),
    Quiz(
        "02.q7",
        "Temperature goes from 0 to 1. What changes in the cache after 20 tokens?",
        {"a": "Its size", "b": "The work to fill it", "c": "Only which tokens it holds, if others were drawn",
         "d": "Its dtype"},
        {"a": "Size comes from shapes and the number of tokens.",
         "b": "One token a step is run either way.",
         "c": "Temperature acts on logits, after all K and V of the step are stored.",
         "d": "dtype comes from the model's K and V."},
        "c",
    ),
)  # fmt: skip

CONTENTS = LabContents(
    "02",
    "The cache from scratch",
    exercises=(
        Growing(), DecodeStep(), GenerateWithCache(), Preallocated(), ReusablePrefix(), CacheBytes(), AttendChunk(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
