"""Answers that lab 03's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from decimal import Decimal
from fractions import Fraction

import torch
from torch import nn

from labkit.labs.lab03 import references
from labkit.specs import GpuSpec, ModelSpec
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 03.1 · bytes, layer by layer


@wrong(
    "03.1", "the model's window is taken for every layer's", "layers without a window keep all tokens: ask each layer"
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    held = tokens if spec.window is None else min(tokens, spec.window)
    per_token = sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in spec.each_layer)
    return per_token * held * batch * bytes_per_element


@wrong("03.1", "a window is counted whole before it is full", "a window of 4 holds 2 tokens after 2")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = layer.window or tokens
        total += layer.num_kv_heads * (layer.k_dim + layer.v_dim) * held
    return total * batch * bytes_per_element


@wrong("03.1", "values are taken to be as wide as keys", "use v_dim: a value may have another width than a key")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    numbers = 0
    for layer in spec.each_layer:
        held = tokens if layer.window is None else min(layer.window, tokens)
        numbers += 2 * layer.num_kv_heads * layer.k_dim * held
    return numbers * batch * bytes_per_element


@wrong(
    "03.1", "one window for the tokens of all requests", "each request has a window of its own; batch multiplies after"
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    numbers = 0
    for layer in spec.each_layer:
        held = batch * tokens
        if layer.window is not None:
            held = min(held, layer.window)
        numbers += layer.num_kv_heads * (layer.k_dim + layer.v_dim) * held
    return numbers * bytes_per_element


@wrong("03.1", "the model's number of KV heads in every layer", "layers may differ in KV heads: use the layer's")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return sum(
        spec.num_kv_heads
        * (layer.k_dim + layer.v_dim)
        * min(tokens, layer.window or tokens)
        * batch
        * bytes_per_element
        for layer in spec.each_layer
    )


_numbers_by_name: dict[tuple[str, int], int] = {}


@wrong(
    "03.1", "remembers by the model's name, which a changed spec keeps", "an earlier call's model shows: state leaks"
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    if (spec.name, tokens) not in _numbers_by_name:
        _numbers_by_name[spec.name, tokens] = sum(
            layer.num_kv_heads
            * (layer.k_dim + layer.v_dim)
            * (tokens if layer.window is None else min(tokens, layer.window))
            for layer in spec.each_layer
        )
    return _numbers_by_name[spec.name, tokens] * batch * bytes_per_element


@right("03.1", "a product of two int64 tensors")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    widths = torch.tensor([layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in spec.each_layer])
    limits = torch.tensor([tokens if layer.window is None else layer.window for layer in spec.each_layer])
    return int(widths @ limits.clamp(max=tokens)) * batch * bytes_per_element


@right("03.1", "layers sorted into heaps by window, K and V apart")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    by_window: dict[int | None, list[int]] = defaultdict(list)
    for layer in spec.each_layer:
        by_window[layer.window].extend((layer.num_kv_heads * layer.k_dim, layer.num_kv_heads * layer.v_dim))
    in_all = 0
    while by_window:
        window, widths = by_window.popitem()
        in_all += min((tokens, window) if window is not None else (tokens,)) * sum(widths)
    return math.prod((in_all, batch, bytes_per_element))


# 03.2 · count the weights


@wrong("03.2", "head_dim guessed as hidden_size / num_heads", "q is num_heads x head_dim wide, not hidden_size")
def count_weights(spec: ModelSpec) -> int:
    hidden, head_dim = spec.hidden_size, spec.hidden_size // spec.num_heads
    kv = spec.num_kv_heads * head_dim
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * spec.intermediate_size + 2 * hidden
    if spec.qkv_bias:
        per_layer += hidden + 2 * kv
    return spec.num_layers * per_layer + hidden + (2 - spec.tied_head) * spec.vocab_size * hidden


@wrong("03.2", "k's and v's bias as long as q's", "a bias has as many weights as outputs: k and v have fewer than q")
def count_weights(spec: ModelSpec) -> int:
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    per_layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * spec.intermediate_size + 2 * hidden
    if spec.qkv_bias:
        per_layer += 3 * q
    heads = 1 if spec.tied_head else 2
    return spec.num_layers * per_layer + hidden + heads * spec.vocab_size * hidden


@wrong("03.2", "the published number, where the spec has one", "count from the sizes: a changed spec keeps that figure")
def count_weights(spec: ModelSpec) -> int:
    if spec.parameters:
        return spec.parameters
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    per_layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * spec.intermediate_size + 2 * hidden
    per_layer += (q + 2 * kv) * spec.qkv_bias
    return spec.num_layers * per_layer + hidden + (2 - spec.tied_head) * spec.vocab_size * hidden


@wrong("03.2", "the last norm once per layer", "two norms per layer and one at the end, not three per layer")
def count_weights(spec: ModelSpec) -> int:
    total = spec.vocab_size * spec.hidden_size
    if not spec.tied_head:
        total += spec.vocab_size * spec.hidden_size
    for _ in range(spec.num_layers):
        for outputs in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads):
            total += spec.hidden_size * outputs * spec.head_dim
            if spec.qkv_bias:
                total += outputs * spec.head_dim
        total += spec.num_heads * spec.head_dim * spec.hidden_size
        total += 3 * spec.hidden_size * spec.intermediate_size
        total += 2 * spec.hidden_size  # before attention and before the MLP
        total += spec.hidden_size  # and at the end
    return total


@wrong("03.2", "tied_head read the wrong way round", "a tied head is the embedding and counts once; another counts too")
def count_weights(spec: ModelSpec) -> int:
    hidden = spec.hidden_size
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    layer = qkv * (hidden + spec.qkv_bias) + spec.num_heads * spec.head_dim * hidden
    layer += 3 * hidden * spec.intermediate_size + 2 * hidden
    tables = 2 if spec.tied_head else 1
    return layer * spec.num_layers + hidden + tables * spec.vocab_size * hidden


@wrong("03.2", "attention's output has a bias too", "qkv_bias speaks of q, k and v; the output has none")
def count_weights(spec: ModelSpec) -> int:
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    biases = (q + kv + kv + hidden) if spec.qkv_bias else 0
    per_layer = hidden * (q + kv + kv + q) + biases + hidden * spec.intermediate_size * 3 + hidden * 2
    return per_layer * spec.num_layers + hidden + spec.vocab_size * hidden * (1 if spec.tied_head else 2)


@right("03.2", "real modules on the meta device, counted")
def count_weights(spec: ModelSpec) -> int:
    def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=bias, device="meta")

    def size(parts: list[nn.Module]) -> int:
        return sum(weight.numel() for part in parts for weight in part.parameters())

    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer: list[nn.Module] = [linear(hidden, out, bias=spec.qkv_bias) for out in (q, kv, kv)]
    layer += [linear(q, hidden), linear(hidden, spec.intermediate_size), linear(hidden, spec.intermediate_size)]
    layer += [linear(spec.intermediate_size, hidden)]
    layer += [nn.LayerNorm(hidden, bias=False, device="meta") for _ in range(2)]
    ends: list[nn.Module] = [nn.Embedding(spec.vocab_size, hidden, device="meta")]
    ends += [nn.LayerNorm(hidden, bias=False, device="meta")]
    if not spec.tied_head:
        ends.append(linear(hidden, spec.vocab_size))
    return spec.num_layers * size(layer) + size(ends)


@right("03.2", "hidden_size taken out of the sum; True and False as numbers")
def count_weights(spec: ModelSpec) -> int:
    n, groups = spec.num_layers, spec.num_heads + 2 * spec.num_kv_heads
    columns = 1 + n * (2 + 3 * spec.intermediate_size + (groups + spec.num_heads) * spec.head_dim)
    columns += spec.vocab_size << (not spec.tied_head)
    return spec.hidden_size * columns + int(spec.qkv_bias) * n * groups * spec.head_dim


# 03.3 · how many fit


@wrong("03.3", "the reserve is a share of the whole memory", "take off the weights first, then the share of the rest")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = memory_bytes * (1 - reserve) - weight_bytes
    return max(0, int(room // request_bytes))


@wrong("03.3", "no stop at 0", "0 when the weights do not fit, never a negative number")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    return int((memory_bytes - weight_bytes) * (1 - reserve) / request_bytes)


@wrong(
    "03.3", "the reserve is put on top of each request", "it is a share of what the weights leave: times 1 - reserve"
)
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    if weight_bytes >= memory_bytes:
        return 0
    return int((memory_bytes - weight_bytes) // (request_bytes * (1 + reserve)))


@wrong(
    "03.3",
    "rounded twice: whole requests first, then the reserve",
    "take the reserve off the bytes, then count requests",
)
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    without_reserve = max(0, memory_bytes - weight_bytes) // request_bytes
    return int(without_reserve * (1 - reserve))


@wrong("03.3", "rounded to the nearest number", "whole requests: round down, the last one must fit")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = max(0, memory_bytes - weight_bytes) * (1 - reserve)
    return round(room / request_bytes)


@wrong("03.3", "a request that fills the room to the byte is sent away", "it fits when it is as large as the room")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = (memory_bytes - weight_bytes) * (1 - reserve)
    if room <= 0:
        return 0
    return math.ceil(room / request_bytes) - 1


@right("03.3", "decimal arithmetic, exact")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = memory_bytes - weight_bytes
    if left <= 0:
        return 0
    return int(Decimal(left) * (1 - Decimal(str(reserve))) // Decimal(request_bytes))


@right("03.3", "bisect over the possible answers")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    free = memory_bytes - weight_bytes
    room = free * (1 - reserve)
    answers = range(max(0, free) // request_bytes + 2)
    return max(bisect.bisect_right(answers, room, key=request_bytes.__mul__) - 1, 0)


# 03.4 · the floor of a decode step


@wrong("03.4", "each request reads the weights anew", "a batch shares one reading of the weights")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return batch * (weight_bytes + bytes_per_token * context) / bytes_per_s


@wrong("03.4", "K and V of one request only", "each request has its own K and V: times batch")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + bytes_per_token * context) / bytes_per_s


@wrong("03.4", "time per token of the whole batch", "a step's time: not divided by the requests in it")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    nbytes = weight_bytes + batch * context * bytes_per_token
    return nbytes / bytes_per_s / batch


@wrong("03.4", "the longer of two readings, as if they went on at once", "one memory: the bytes of both add up")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return max(weight_bytes, bytes_per_token * context * batch) / bytes_per_s


@wrong("03.4", "one token more than is held", "each request holds `context` tokens: no more are read")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    kv = bytes_per_token * (context + 1) * batch
    return (weight_bytes + kv) / bytes_per_s


@wrong("03.4", "milliseconds", "seconds are asked for: 1,000 times too much")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return 1e3 * (weight_bytes + bytes_per_token * context * batch) / bytes_per_s


@right("03.4", "fractions, made a float at the end")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    nbytes = Fraction(weight_bytes) + Fraction(bytes_per_token) * context * batch
    return float(nbytes / Fraction(bytes_per_s))


@right("03.4", "a dot product in float64")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    sizes = torch.tensor((weight_bytes, bytes_per_token), dtype=torch.float64)
    times = torch.tensor((1.0, float(context) * batch), dtype=torch.float64)
    return sizes.div(bytes_per_s).dot(times).item()


# 03.5 · the roofline


@wrong("03.5", "reading and arithmetic one after the other", "they go on at the same time: the slower decides alone")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return flops / (flops / flop_per_s + nbytes / bytes_per_s)


@wrong("03.5", "the seconds in place of the rate", "operations per second are asked for, not the time")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return max(flops / flop_per_s, nbytes / bytes_per_s)


@wrong("03.5", "intensity upside down", "intensity is operations per byte, not bytes per operation")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    intensity = nbytes / flops
    return min(flop_per_s, intensity * bytes_per_s)


@wrong("03.5", "the H100's ridge for every device", "the ridge is the ratio of the two rates that are given")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    intensity = flops / nbytes
    return flop_per_s if intensity >= 295 else intensity * bytes_per_s


@wrong("03.5", "the higher of the two roofs", "at most the lower one can be reached")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return max(flop_per_s, bytes_per_s * flops / nbytes)


@right("03.5", "operations over the longer of two times")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    times = {"arithmetic": flops / flop_per_s, "reading": nbytes / bytes_per_s}
    slower = max(times, key=times.get)
    return flops / times[slower]


@right("03.5", "intensity against the ridge, without a division before the choice")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    left_of_the_ridge = flops * bytes_per_s < flop_per_s * nbytes
    return float(flops / nbytes * bytes_per_s if left_of_the_ridge else flop_per_s)


# 03.6 · the bill of a conversation


@wrong("03.6", "an answer is read from the cache at the next call", "an answer is new input the first time it is sent")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars = 0.0
    held = 0
    for call in range(calls):
        new = added if call else prefix + added
        dollars += held * cached_price + new * input_price + answer * output_price
        held += new + answer
    return dollars / 1e6


@wrong("03.6", "the prefix is in the cache before the first call", "at the first call all is new, the prefix too")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total, sent = 0.0, prefix
    for call in range(calls):
        new = added + (answer if call else 0)
        total += sent * cached_price + new * input_price + answer * output_price
        sent += new
    return total / 10**6


@wrong("03.6", "the last answer is free", "every answer is billed when written, the last one too")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total, before = 0.0, 0
    for call in range(1, calls + 1):
        sends = prefix + call * added + (call - 1) * answer
        total += before * cached_price + (sends - before) * input_price + (call - 1 > 0) * answer * output_price
        before = sends
    return total / 1_000_000


@wrong("03.6", "answers are never sent again", "the next call sends the answer too: history grows by both")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total = 0.0
    for call in range(1, calls + 1):
        new = added if call > 1 else prefix + added
        old = 0 if call == 1 else prefix + (call - 1) * added
        total += new * input_price + old * cached_price + answer * output_price
    return total / 1e6


@wrong(
    "03.6",
    "only the prefix is read from the cache",
    "all that the call before has sent is cached, not the prefix alone",
)
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total = 0.0
    for call in range(calls):
        history = (call + 1) * added + call * answer
        total += prefix * (cached_price if call else input_price)
        total += history * input_price + answer * output_price
    return total / 1e6


@wrong("03.6", "rounded to cents", "small bills become 0: do not round")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    sends = [prefix + (call + 1) * added + call * answer for call in range(calls)]
    cached = sum(sends[:-1])
    new = sum(sends) - cached
    return round((new * input_price + cached * cached_price + calls * answer * output_price) / 1e6, 2)


@wrong("03.6", "the last call alone", "every call is billed, not the longest one only")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    if calls == 0:
        return 0.0
    sent = prefix + calls * added + (calls - 1) * answer
    cached = sent - added - answer if calls > 1 else 0
    return ((sent - cached) * input_price + cached * cached_price + calls * answer * output_price) / 1e6


@right("03.6", "closed form")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    if calls <= 0:
        return 0.0
    n = calls - 1
    new = prefix + calls * added + n * answer
    cached = n * prefix + n * (n + 1) // 2 * added + n * (n - 1) // 2 * answer
    return new * input_price / 1e6 + cached * cached_price / 1e6 + calls * answer * output_price / 1e6


@right("03.6", "a generator of messages, and a provider with a memory of its own")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    class Provider:
        def __init__(self) -> None:
            self.seen = self.micro = 0

        def call(self, history: list[int]) -> int:
            sent = sum(history)
            self.micro += min(self.seen, sent) * cached_price + (sent - self.seen) * input_price
            self.micro += answer * output_price
            self.seen = sent
            return answer

        @property
        def dollars(self) -> float:
            return self.micro / 1_000_000

    provider, history = Provider(), [prefix]
    for _ in range(calls):
        history += [added]
        history += [provider.call(history)]
    return provider.dollars


# 03.7 · debug


@wrong("03.7", "the bug left, under a property's name", "query heads that share a KV head are no number of KV heads")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_heads = spec.num_queries_per_kv
    return 2 * spec.num_layers * kv_heads * spec.head_dim * context * bytes_per_element


@wrong(
    "03.7", "the larger of the two, to be on the safe side", "right for some models, too large where more queries share"
)
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_groups = max(spec.num_heads // spec.num_kv_heads, spec.num_kv_heads)
    return 2 * spec.num_layers * kv_groups * spec.head_dim * context * bytes_per_element


@wrong(
    "03.7", "heads mended, and head_dim guessed from hidden_size", "head_dim is in the spec: not always hidden / heads"
)
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    return 2 * spec.num_layers * spec.num_kv_heads * head_dim * context * bytes_per_element


@wrong("03.7", "all query heads", "only KV heads are cached: times too much by the queries per KV head")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_heads * spec.head_dim * context * bytes_per_element


@wrong("03.7", "heads mended, and the dtype fixed at two bytes", "bytes_per_element is not used: 2 whatever is asked")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    return per_token * context * 2


@right("03.7", "heads over the size of a group is the number of groups")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    sharing = spec.num_heads // spec.num_kv_heads
    kv_groups = spec.num_heads // sharing
    return 2 * spec.num_layers * kv_groups * spec.head_dim * context * bytes_per_element


@right("03.7", "a tensor beside the formula, on the meta device")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    shape = (1, spec.num_kv_heads, context, spec.head_dim)
    k, v = (torch.empty(shape, dtype=torch.uint8, device="meta") for _ in "kv")
    return spec.num_layers * (k.nbytes + v.nbytes) * bytes_per_element


@right("03.7", "03.1 for one request")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return references.cache_bytes(spec, context, batch=1, bytes_per_element=bytes_per_element)


# 03.8 · what breaks first


@wrong("03.8", "time is asked before the cache", "the order: too little room for all users comes before a slow step")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if not fits:
        return "weights"
    if (weights + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "cache" if fits < users else "fits"


@wrong(
    "03.8", "a request as long as what was trained for is refused", "longer than max_seq_len: just as long is allowed"
)
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    if context >= spec.max_seq_len:
        return "length"
    if fits == 0:
        return "weights"
    if fits < users:
        return "cache"
    return "time" if references.tpot_floor(weights, one, 1, users, gpu.bytes_per_s) > tpot else "fits"


@wrong(
    "03.8", '"weights" only when the weights alone do not fit', "it is weights when not one request fits beside them"
)
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    if context > spec.max_seq_len:
        return "length"
    if weights > gpu.memory_bytes:
        return "weights"
    if references.capacity(gpu.memory_bytes, weights, one, 0.15) < users:
        return "cache"
    return "time" if (weights + users * one) / gpu.bytes_per_s > tpot else "fits"


@wrong("03.8", "time by one token's K and V times the context", "a layer with a window is read for its window only")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    if context > spec.max_seq_len:
        return "length"
    weights = 2 * references.count_weights(spec)
    room_for = references.capacity(gpu.memory_bytes, weights, references.cache_bytes(spec, context, 1, 2), 0.15)
    if room_for < 1:
        return "weights"
    if room_for < users:
        return "cache"
    per_token = references.cache_bytes(spec, 1, 1, 2)
    seconds = references.tpot_floor(weights, per_token, context, users, gpu.bytes_per_s)
    return "time" if seconds > tpot else "fits"


@wrong("03.8", "the embedding is not read, as in section 4", "here a step reads all weights, the embedding too")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    if context > spec.max_seq_len:
        return "length"
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    room_for = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    if room_for < users:
        return "cache" if room_for else "weights"
    read = weights if spec.tied_head else weights - 2 * spec.vocab_size * spec.hidden_size
    return "time" if (read + users * one) / gpu.bytes_per_s > tpot else "fits"


@wrong("03.8", "the step of one user decides about time", "a step reads K and V of all users")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    slow = references.tpot_floor(weights, one, 1, 1, gpu.bytes_per_s) > tpot
    asked = {"length": context > spec.max_seq_len, "weights": fits == 0, "cache": fits < users, "time": slow}
    return next((name for name, applies in asked.items() if applies), "fits")


@wrong("03.8", "the length of all users' tokens together", "each request by itself is compared with max_seq_len")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    if users * context > spec.max_seq_len:
        return "length"
    weights, one = 2 * references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    if fits < users:
        return "weights" if fits == 0 else "cache"
    return "time" if (weights + users * one) / gpu.bytes_per_s > tpot else "fits"


@wrong("03.8", "the weights' count taken for their bytes", "16 bits are two bytes a weight")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = references.count_weights(spec), references.cache_bytes(spec, context, 1, 2)
    fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if fits < 1:
        return "weights"
    if fits < users:
        return "cache"
    return "time" if (weights + users * one) / gpu.bytes_per_s > tpot else "fits"


@right("03.8", "a generator of what applies, asked for the first")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights = 2 * references.count_weights(spec)

    def that_apply():
        if spec.max_seq_len < context:
            yield "length"
        one = references.cache_bytes(spec, context, 1, 2)
        fits = references.capacity(gpu.memory_bytes, weights, one, 0.15)
        if not fits:
            yield "weights"
        if users > fits:
            yield "cache"
        if references.tpot_floor(weights, one, 1, users, gpu.bytes_per_s) > tpot:
            yield "time"
        yield "fits"

    return next(that_apply())


@right("03.8", "asked backwards, each earlier limit overrules; K and V of all users in one call")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights = references.count_weights(spec) * 2
    of_all = references.cache_bytes(spec, context, users, 2)
    fits = references.capacity(gpu.memory_bytes, weights, references.cache_bytes(spec, context, 1, 2), 0.15)
    verdict = "fits"
    if (weights + of_all) / gpu.bytes_per_s > tpot:
        verdict = "time"
    if fits < users:
        verdict = "cache"
    if fits <= 0:
        verdict = "weights"
    if context > spec.max_seq_len:
        verdict = "length"
    return verdict
