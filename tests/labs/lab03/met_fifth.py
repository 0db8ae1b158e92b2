"""Answers that lab 03's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F405, F811 - written as learners write

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from functools import reduce

import torch

from labkit.labs.lab03 import references
from labkit.labs.lab03.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 03.1
@wrong(
    "03.1",
    "one window for the whole batch",
    "each request keeps its own window: the window was taken of batch x tokens",
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total_tokens = tokens * batch
    total = 0
    for layer in spec.each_layer:
        held = total_tokens if layer.window is None else min(total_tokens, layer.window)
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * bytes_per_element


@wrong("03.1", "the first layer stands for all", "layers differ; the first layer's bytes were taken num_layers times")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    layer = spec.each_layer[0]
    held = tokens if layer.window is None else min(tokens, layer.window)
    per_layer = held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return per_layer * spec.num_layers * batch * bytes_per_element


@wrong(
    "03.1", "`window or 0`: full layers hold nothing", "layers with window None keep every token; here they keep none"
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        window = layer.window or 0
        total += min(tokens, window) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


@right("03.1", "reduce over the layers, min with infinity left out by a filter")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    def held(layer) -> int:
        return min(n for n in (tokens, layer.window) if n is not None)

    def add(so_far: int, layer) -> int:
        return so_far + batch * held(layer) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)

    return bytes_per_element * reduce(add, spec.each_layer, 0)


# 03.2
@wrong("03.2", "k and v have biases as long as q's", "k and v have num_kv_heads * head_dim outputs, and so many biases")
def count_weights(spec: ModelSpec) -> int:
    q_out = spec.num_heads * spec.head_dim
    kv_out = spec.num_kv_heads * spec.head_dim
    h = spec.hidden_size
    layer = 2 * h * q_out + 2 * h * kv_out + 3 * h * spec.intermediate_size + 2 * h
    if spec.qkv_bias:
        layer += 3 * q_out
    total = spec.num_layers * layer + h + spec.vocab_size * h
    if not spec.tied_head:
        total += spec.vocab_size * h
    return total


@wrong("03.2", "bytes in 16 bits instead of a count", "twice as many: a count is asked, not bytes")
def count_weights(spec: ModelSpec) -> int:
    hidden = spec.hidden_size
    q = hidden * spec.num_heads * spec.head_dim
    kv = hidden * spec.num_kv_heads * spec.head_dim
    per_layer = 2 * q + 2 * kv + 3 * hidden * spec.intermediate_size + 2 * hidden
    if spec.qkv_bias:
        per_layer += (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    embedding = spec.vocab_size * hidden * (1 if spec.tied_head else 2)
    return 2 * (spec.num_layers * per_layer + hidden + embedding)


@wrong("03.2", "two norms in all and one at the end, not two per layer", "norms: two per layer, here two in all")
def count_weights(spec: ModelSpec) -> int:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    attention = 2 * hidden * spec.num_heads * head_dim + 2 * hidden * spec.num_kv_heads * head_dim
    bias = (spec.num_heads + 2 * spec.num_kv_heads) * head_dim if spec.qkv_bias else 0
    mlp = 3 * hidden * spec.intermediate_size
    norms = 3 * hidden
    embedding = spec.vocab_size * hidden
    head = 0 if spec.tied_head else embedding
    return spec.num_layers * (attention + bias + mlp) + norms + embedding + head


@right("03.2", "a table of shapes and of how often")
def count_weights(spec: ModelSpec) -> int:
    wide, narrow, hidden = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size
    table = [
        ((hidden, wide), 2 * spec.num_layers),
        ((hidden, narrow), 2 * spec.num_layers),
        ((wide + 2 * narrow,), spec.num_layers * bool(spec.qkv_bias)),
        ((hidden, spec.intermediate_size), 3 * spec.num_layers),
        ((hidden,), 2 * spec.num_layers + 1),
        ((spec.vocab_size, hidden), 1 + (not spec.tied_head)),
    ]
    return sum(math.prod(shape) * often for shape, often in table)


# 03.3
@wrong(
    "03.3",
    "every request is made larger by the reserve",
    "reserve is a share of what the weights leave, not an addition to each request",
)
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = memory_bytes - weight_bytes
    if room <= 0:
        return 0
    padded_request = request_bytes * (1 + reserve)
    return int(room // padded_request)


@wrong("03.3", "reserve taken for percent", "reserve is a share such as 0.15, not percent")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = max(0, memory_bytes - weight_bytes)
    usable = left * (1 - reserve / 100)
    return int(usable / request_bytes)


@wrong("03.3", "an error where the weights do not fit", "0, not an error, when the weights do not fit")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = memory_bytes - weight_bytes
    if left < 0:
        raise ValueError(f"weights of {weight_bytes} bytes do not fit into {memory_bytes}")
    return int(left * (1 - reserve) // request_bytes)


@right("03.3", "bisection for the first number that does not fit")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = memory_bytes - weight_bytes
    if left <= 0:
        return 0
    usable = left - left * reserve
    return bisect.bisect_right(range(1, left // request_bytes + 2), usable, key=lambda n: n * request_bytes)


@right("03.3", "exact fractions")
def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    kept = 1 - Fraction(str(reserve))
    return math.floor(max(Fraction(0), (memory_bytes - weight_bytes) * kept / request_bytes))


# 03.4
@wrong(
    "03.4",
    "the larger of weights and cache instead of both",
    "weights and K and V come over the same bus: their bytes add up",
)
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    weights_s = weight_bytes / bytes_per_s
    cache_s = bytes_per_token * context * batch / bytes_per_s
    return max(weights_s, cache_s)


@wrong("03.4", "time per token of the batch, not per step", "the time of a step was divided by the batch")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    step = (weight_bytes + batch * context * bytes_per_token) / bytes_per_s
    return step / batch


@wrong("03.4", "milliseconds", "seconds are asked: 1,000 times too many")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    kv = bytes_per_token * context * batch
    seconds = (weight_bytes + kv) / bytes_per_s
    return 1000 * seconds


@right("03.4", "sum over the readings, request by request")
def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    readings = [weight_bytes] + [context * bytes_per_token] * batch
    return math.fsum(reading / bytes_per_s for reading in readings)


# 03.5
@wrong(
    "03.5", "share of the peak, not operations per second", "operations per second are asked, not a share of the peak"
)
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    intensity = flops / nbytes
    ridge = flop_per_s / bytes_per_s
    return min(1.0, intensity / ridge)


@wrong(
    "03.5",
    "left of the ridge returns bytes per second",
    "left of the ridge: intensity times bandwidth, not bandwidth alone",
)
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    if flops / nbytes < flop_per_s / bytes_per_s:
        return bytes_per_s  # memory is the limit
    return flop_per_s


@wrong("03.5", "the time it takes instead of the rate", "seconds returned: operations over this time are asked")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    compute_time = flops / flop_per_s
    memory_time = nbytes / bytes_per_s
    return max(compute_time, memory_time)


@right("03.5", "operations over the longer of the two times")
def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    times = sorted((flops / flop_per_s, nbytes / bytes_per_s))
    return flops / times[-1]


# 03.6
@wrong(
    "03.6",
    "only the prefix is read from the cache; older turns pay the full price",
    "messages and answers that the call before sent are cached too, not the prefix alone",
)
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    cost = 0.0
    for call in range(calls):
        history = call * (added + answer) + added
        if call == 0:
            cost += (prefix + history) * input_price
        else:
            cost += prefix * cached_price + history * input_price
        cost += answer * output_price
    return cost / 1e6


@wrong(
    "03.6",
    "the prefix is cached at the first call already",
    "at the first call nothing is cached: the prefix costs input_price once",
)
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars = 0.0
    cached = prefix
    for call in range(calls):
        new = added if call == 0 else added + answer
        dollars += cached * cached_price + new * input_price + answer * output_price
        cached += new
    return dollars / 1_000_000


@wrong("03.6", "the last answer is not billed", "each call's answer is billed, the last one too")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total_new = prefix + calls * added + (calls - 1) * answer
    total_cached = sum(prefix + call * added + (call - 1) * answer for call in range(1, calls))
    total_out = (calls - 1) * answer
    return (total_new * input_price + total_cached * cached_price + total_out * output_price) / 1e6


@right("03.6", "closed form with sums of 1 to n")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    again = max(calls - 1, 0)
    new = (prefix + added if calls else 0) + again * (added + answer)
    cached = again * (prefix + added) + (added + answer) * again * (again - 1) // 2
    return (new * input_price + cached * cached_price + calls * answer * output_price) * 1e-6


@right("03.6", "a transcript that is sent again and compared with what was sent before")
def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    transcript, known, bill = [prefix], 0, []
    for _ in range(calls):
        transcript.append(added)
        sent = sum(transcript)
        bill += [(known, cached_price), (sent - known, input_price), (answer, output_price)]
        known = sent
        transcript.append(answer)
    return math.fsum(tokens * price / 10**6 for tokens, price in bill)


# 03.7
@wrong("03.7", "8 KV heads written down, as both Llamas have", "the KV heads are those of the spec: Qwen2.5-7B has 4")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_heads = 8
    return 2 * spec.num_layers * kv_heads * spec.head_dim * context * bytes_per_element


@wrong(
    "03.7",
    "the larger of group size and KV heads",
    "the size of a group is no number of heads in the cache: num_kv_heads, not the larger",
)
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_groups = max(spec.num_heads // spec.num_kv_heads, spec.num_kv_heads)  # never plan too little
    return 2 * spec.num_layers * kv_groups * spec.head_dim * context * bytes_per_element


@wrong("03.7", "KV heads right, but the 2 for K and V dropped", "half: K and V are two")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_heads = spec.num_kv_heads  # "KV" heads: K and V
    return spec.num_layers * kv_heads * spec.head_dim * context * bytes_per_element


@right("03.7", "bytes of tensors without memory, layer by layer")
def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kept = torch.empty(spec.num_kv_heads, context, spec.head_dim, device="meta", dtype=torch.uint8)
    return sum(2 * bytes_per_element * kept.numel() for _ in range(spec.num_layers))


# 03.8
@wrong(
    "03.8",
    "'weights' asks only whether the weights fit, not whether a request does beside them",
    "'weights' is also when not one request fits beside them",
)
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights = 2 * count_weights(spec)
    request = cache_bytes(spec, context, 1, 2)
    if context > spec.max_seq_len:
        return "length"
    if weights > gpu.memory_bytes:
        return "weights"
    if capacity(gpu.memory_bytes, weights, request, 0.15) < users:
        return "cache"
    if (weights + users * request) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


@wrong(
    "03.8",
    "the step's time reads every token in every layer, windows too",
    "a layer with a window reads its window, not the whole context",
)
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    if context > spec.max_seq_len:
        return "length"
    weights = 2 * count_weights(spec)
    fits = capacity(gpu.memory_bytes, weights, cache_bytes(spec, context, 1, 2), 0.15)
    if fits == 0:
        return "weights"
    if fits < users:
        return "cache"
    per_token = cache_bytes(spec, 1, 1, 2)
    if tpot_floor(weights, per_token, context, users, gpu.bytes_per_s) > tpot:
        return "time"
    return "fits"


@wrong("03.8", "the embedding is left out of what a step reads", "here a step reads all weights, the embedding too")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    if context > spec.max_seq_len:
        return "length"
    weights = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    requests = capacity(gpu.memory_bytes, weights, one, 0.15)
    if requests < 1:
        return "weights"
    if requests < users:
        return "cache"
    read = weights - 2 * spec.vocab_size * spec.hidden_size  # one row of it is read
    seconds = tpot_floor(read, one, 1, users, gpu.bytes_per_s)
    return "time" if seconds > tpot else "fits"


@right("03.8", "questions in a table, the first that is answered yes")
def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights, one = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    room = capacity(gpu.memory_bytes, weights, one, 0.15)
    asked = {
        "length": lambda: spec.max_seq_len < context,
        "weights": lambda: not room,
        "cache": lambda: room < users,
        "time": lambda: weights + cache_bytes(spec, context, users, 2) > tpot * gpu.bytes_per_s,
    }
    return next((name for name, applies in asked.items() if applies()), "fits")
