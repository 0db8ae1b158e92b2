"""Answers that lab 03's checks had not seen when they first met: their author knew the notebook, not the checks."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from labkit.labs.lab03 import references
from labkit.labs.lab03.references import cache_bytes as earlier_cache_bytes
from labkit.specs import GpuSpec, ModelSpec

WRONG = []  # (exercise id, the mistake in words, what a fitting message would have to say in one line, function)
RIGHT = []  # (exercise id, the style in words, function)

# ---------------------------------------------------------------------------------------------------- 03.1 wrong


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = tokens if layer.window is None else min(tokens, layer.window)
        total += 2 * held * layer.num_kv_heads * layer.k_dim
    return total * batch * bytes_per_element


WRONG.append(("03.1", "V taken to be as wide as K (2 * k_dim)", "values have a width of their own, v_dim", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    per_token = sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in spec.each_layer)
    return per_token * tokens * batch * bytes_per_element


WRONG.append(("03.1", "windows ignored", "a layer with a window keeps no more than its window", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    held = sum(tokens if layer.window is None else min(tokens, layer.window) for layer in spec.each_layer)
    return 2 * held * spec.num_kv_heads * spec.head_dim * batch * bytes_per_element


WRONG.append(
    (
        "03.1",
        "the model's heads and head_dim in place of the layer's",
        "heads and widths are each layer's own",
        cache_bytes,
    )
)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    layer = spec.each_layer[0]
    held = tokens if layer.window is None else min(tokens, layer.window)
    return spec.num_layers * held * layer.num_kv_heads * (layer.k_dim + layer.v_dim) * batch * bytes_per_element


WRONG.append(("03.1", "the first layer taken for all", "layers differ: each must be asked", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = tokens * batch
        if layer.window is not None:
            held = min(held, layer.window)
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * bytes_per_element


WRONG.append(
    ("03.1", "the window limits the tokens of the whole batch", "every request has the window for itself", cache_bytes)
)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = tokens if layer.window is None else min(tokens, layer.window - 1)
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


WRONG.append(("03.1", "a full window holds one token less", "a window of 4 keeps 4 tokens, not 3", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = layer.window or tokens
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


WRONG.append(
    (
        "03.1",
        "a window counts whole before it is full",
        "with fewer tokens than the window a layer holds just those",
        cache_bytes,
    )
)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    layers = spec.each_layer
    per_token = np.array([x.num_kv_heads * (x.k_dim + x.v_dim) for x in layers], dtype=np.int32)
    held = np.array([tokens if x.window is None else min(tokens, x.window) for x in layers], dtype=np.int32)
    return int(np.dot(per_token, held)) * batch * bytes_per_element


WRONG.append(
    (
        "03.1",
        "summed in 32-bit integers, which wrap above 2**31",
        "long contexts of large models have more than 2**31 numbers: Python's ints do not wrap",
        cache_bytes,
    )
)

_seen: dict = {}


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    if spec.name not in _seen:
        _seen[spec.name] = list(spec.each_layer)
    total = 0
    for layer in _seen[spec.name]:
        held = tokens if layer.window is None else min(tokens, layer.window)
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


WRONG.append(
    (
        "03.1",
        "layers remembered by the spec's name; replace(spec, ...) keeps the name",
        "an answer must not depend on specs seen before",
        cache_bytes,
    )
)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = tokens if layer.window is None else min(tokens, layer.window)
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * 2


WRONG.append(("03.1", "two bytes a number written down", "bytes_per_element is not used", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    total = 0
    for layer in spec.each_layer:
        held = tokens
        if layer.window is not None and tokens > layer.window:
            held = tokens % layer.window or layer.window
        total += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


WRONG.append(
    (
        "03.1",
        "after the window is full only tokens since the last wrap are counted",
        "a full window stays full",
        cache_bytes,
    )
)

# ---------------------------------------------------------------------------------------------------- 03.1 right


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return (
        bytes_per_element
        * batch
        * sum(
            min(filter(None.__ne__, (tokens, layer.window))) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
            for layer in spec.each_layer
        )
    )


RIGHT.append(("03.1", "one generator expression, filter and min", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    layers = np.array(
        [(x.num_kv_heads, x.k_dim + x.v_dim, tokens if x.window is None else x.window) for x in spec.each_layer],
        dtype=np.int64,
    )
    held = np.minimum(layers[:, 2], tokens)
    return np.sum(layers[:, 0] * layers[:, 1] * held) * batch * bytes_per_element


RIGHT.append(("03.1", "numpy, returns a numpy int64", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    def kept(layer) -> int:
        keys = layer.num_kv_heads * layer.k_dim
        values = layer.num_kv_heads * layer.v_dim
        oldest = 0
        if layer.window is not None:
            oldest = max(0, tokens - layer.window)
        return (keys + values) * len(range(oldest, tokens))

    return functools.reduce(operator.add, map(kept, spec.each_layer), 0) * (batch * bytes_per_element)


RIGHT.append(("03.1", "closure, reduce, tokens counted from the oldest kept", cache_bytes))


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    inf = math.inf
    rows = [
        torch.empty(0, h, int(min(tokens, inf if w is None else w)), kd + vd)
        for h, kd, vd, w in ((x.num_kv_heads, x.k_dim, x.v_dim, x.window) for x in spec.each_layer)
    ]
    return sum(math.prod(t.shape[1:]) for t in rows) * batch * bytes_per_element


RIGHT.append(("03.1", "shapes of empty tensors, math.inf for no window", cache_bytes))

# ---------------------------------------------------------------------------------------------------- 03.2 wrong


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2)


WRONG.append(("03.2", "the last norm is left out", "one norm more stands at the end of the model", count_weights))


def count_weights(spec: ModelSpec) -> int:
    kv_out = spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size**2 + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += spec.hidden_size + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(
    ("03.2", "q and the output taken as hidden x hidden", "num_heads * head_dim need not be hidden_size", count_weights)
)


def count_weights(spec: ModelSpec) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    q_out, kv_out = spec.hidden_size, spec.num_kv_heads * head_dim
    layer = 2 * spec.hidden_size * spec.num_heads * spec.head_dim + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += spec.num_heads * spec.head_dim + 2 * spec.num_kv_heads * spec.head_dim
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(
    (
        "03.2",
        "k and v with head_dim = hidden_size // num_heads",
        "head_dim is in the spec; k and v are num_kv_heads * head_dim wide",
        count_weights,
    )
)


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (2 if spec.tied_head else 1) + spec.hidden_size


WRONG.append(("03.2", "tied_head the wrong way round", "a tied head is no table of its own", count_weights))


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out + spec.hidden_size
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(("03.2", "a bias for attention's output as well", "only q, k and v have a bias", count_weights))


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 2 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(("03.2", "MLP of two matrices (no gate)", "gate, up and down are three", count_weights))


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    biases = q_out + 2 * kv_out if spec.qkv_bias else 0
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + biases + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(("03.2", "biases counted once, not per layer", "every layer has its biases", count_weights))


def count_weights(spec: ModelSpec) -> int:
    if spec.parameters is not None:
        return spec.parameters
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(
    (
        "03.2",
        "the published number where there is one, though sizes were changed",
        "count from the sizes in the spec",
        count_weights,
    )
)


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return 2 * (spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size)


WRONG.append(("03.2", "bytes in 16 bits in place of a count", "a count is asked, not bytes", count_weights))


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + spec.hidden_size
    if spec.qkv_bias:
        layer += q_out + 2 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(("03.2", "one norm per layer", "a layer has two norms", count_weights))


def count_weights(spec: ModelSpec) -> int:
    q_out, kv_out = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = 2 * spec.hidden_size * q_out + 2 * spec.hidden_size * kv_out
    layer += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    if spec.qkv_bias:
        layer += 3 * kv_out
    embedding = spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer + embedding * (1 if spec.tied_head else 2) + spec.hidden_size


WRONG.append(("03.2", "q's bias as long as k's", "q's bias has as many numbers as q has outputs", count_weights))

# ---------------------------------------------------------------------------------------------------- 03.2 right


def count_weights(spec: ModelSpec) -> int:
    def linear(n_in: int, n_out: int, bias: bool = False) -> int:
        return n_in * n_out + bias * n_out

    h, d = spec.hidden_size, spec.head_dim
    block = (
        linear(h, spec.num_heads * d, spec.qkv_bias)
        + 2 * linear(h, spec.num_kv_heads * d, spec.qkv_bias)
        + linear(spec.num_heads * d, h)
        + sum(itertools.starmap(linear, [(h, spec.intermediate_size)] * 2 + [(spec.intermediate_size, h)]))
        + h * 2
    )
    tables = [linear(spec.vocab_size, h)] * (2 - bool(spec.tied_head))
    return sum([block] * spec.num_layers, h) + sum(tables)


RIGHT.append(("03.2", "helper closure, booleans as numbers, starmap", count_weights))


def count_weights(spec: ModelSpec) -> int:
    with torch.device("meta"):
        from torch import nn

        h, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        layer = nn.ModuleList(
            [nn.Linear(h, n, bias=spec.qkv_bias) for n in (q, kv, kv)]
            + [nn.Linear(q, h, bias=False)]
            + [nn.Linear(h, spec.intermediate_size, bias=False) for _ in range(3)]
            + [nn.LayerNorm(h, bias=False) for _ in range(2)]
        )
        ends = [nn.Embedding(spec.vocab_size, h), nn.LayerNorm(h, bias=False)]
        if not spec.tied_head:
            ends.append(nn.Linear(h, spec.vocab_size, bias=False))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return count(layer) * spec.num_layers + sum(map(count, ends))


RIGHT.append(("03.2", "modules on the meta device, numel of their parameters", count_weights))


def count_weights(spec: ModelSpec) -> int:
    h = np.int64(spec.hidden_size)
    heads = np.int64(2 * (spec.num_heads + spec.num_kv_heads))
    per_layer = h * (heads * spec.head_dim + 3 * spec.intermediate_size + 2)
    if spec.qkv_bias:
        per_layer += (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    head = 0 if spec.tied_head else spec.vocab_size
    return (spec.vocab_size + head + 1) * h + spec.num_layers * per_layer


RIGHT.append(("03.2", "factored formula in numpy int64", count_weights))

# ---------------------------------------------------------------------------------------------------- 03.3 wrong


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = memory_bytes * (1 - reserve) - weight_bytes
    return max(0, int(room // request_bytes))


WRONG.append(("03.3", "reserve taken of the whole memory", "reserve is a share of what the weights leave", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    return int((memory_bytes - weight_bytes) * (1 - reserve) // request_bytes)


WRONG.append(("03.3", "negative when the weights do not fit", "0 when the weights do not fit", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = (memory_bytes - weight_bytes) * (1 - reserve)
    return max(0, round(room / request_bytes))


WRONG.append(("03.3", "rounded to the nearest", "a request that fits only in part does not count", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = (memory_bytes - weight_bytes) * reserve
    return max(0, int(room // request_bytes))


WRONG.append(
    ("03.3", "fills the reserve in place of the rest", "reserve is kept free, 1 - reserve is filled", capacity)
)


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    return max(0, int((memory_bytes - weight_bytes) * 0.85 // request_bytes))


WRONG.append(("03.3", "15% written down", "reserve is not used", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room = (memory_bytes - weight_bytes) * (1 - reserve)
    count = 0
    while (count + 1) * request_bytes < room:
        count += 1
    return count


WRONG.append(("03.3", "a request that fills the room exactly is refused (<)", "what fits exactly fits", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    if weight_bytes > memory_bytes:
        return 0
    return (memory_bytes - weight_bytes) * (1 - reserve) // request_bytes


WRONG.append(("03.3", "a float comes back, since // of a float is one", "whole requests: an int", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    slots = memory_bytes // request_bytes - weight_bytes // request_bytes
    return max(0, int(slots * (1 - reserve)))


WRONG.append(
    ("03.3", "memory and weights are cut to whole requests first", "subtract bytes first, then divide once", capacity)
)


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    fits = max(0, (memory_bytes - weight_bytes) // request_bytes)
    return int(fits * (1 - reserve))


WRONG.append(
    (
        "03.3",
        "whole requests counted before the reserve is taken off",
        "the reserve is a share of bytes; count whole requests last",
        capacity,
    )
)


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    if weight_bytes >= memory_bytes:
        raise ValueError("the weights do not fit")
    return int((memory_bytes - weight_bytes) * (1 - reserve) // request_bytes)


WRONG.append(("03.3", "raises when the weights do not fit", "0 when the weights do not fit", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    if weight_bytes >= memory_bytes:
        return 0
    return max(1, int((memory_bytes - weight_bytes) * (1 - reserve) // request_bytes))


WRONG.append(("03.3", "at least one request whenever the weights fit", "0 where not even one request fits", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room_gib = (memory_bytes - weight_bytes) * (1 - reserve) // 2**30
    return max(0, int(room_gib * 2**30 // request_bytes))


WRONG.append(("03.3", "room cut to whole GiB first", "only whole requests are cut off, not whole GiB", capacity))

# ---------------------------------------------------------------------------------------------------- 03.3 right


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = Fraction(int(memory_bytes) - int(weight_bytes))
    room = left * (1 - Fraction(str(float(reserve))))
    return math.floor(room / request_bytes) if room > 0 else 0


RIGHT.append(("03.3", "Fraction of the decimal number", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    room, fit = (memory_bytes - weight_bytes) * (1 - reserve), 0
    step = 1
    while step * request_bytes <= room:
        step *= 2
    while step:
        if (fit + step) * request_bytes <= room:
            fit += step
        step //= 2
    return fit


RIGHT.append(("03.3", "binary search with comparisons only", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = np.float64(memory_bytes - weight_bytes)
    return int(np.floor_divide(np.maximum(left, 0) * (1 - reserve), request_bytes))


RIGHT.append(("03.3", "numpy floats inside, clipped before", capacity))


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    left = memory_bytes - weight_bytes
    if left <= 0:
        return 0
    return int((left - reserve * left) / request_bytes)


RIGHT.append(("03.3", "the reserve subtracted, truncated true division", capacity))

# ---------------------------------------------------------------------------------------------------- 03.4 wrong


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + context * bytes_per_token) / bytes_per_s


WRONG.append(("03.4", "batch left out", "every request's K and V are read", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return batch * (weight_bytes + context * bytes_per_token) / bytes_per_s


WRONG.append(("03.4", "the weights read once per request", "the batch shares one reading of the weights", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return max(weight_bytes, batch * context * bytes_per_token) / bytes_per_s


WRONG.append(
    (
        "03.4",
        "the larger of weights and cache, as if read at once",
        "both come over the same memory: add them",
        tpot_floor,
    )
)


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + batch * context * bytes_per_token) / bytes_per_s * 1e3


WRONG.append(("03.4", "milliseconds", "seconds are asked", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + batch * context * bytes_per_token) / bytes_per_s / batch


WRONG.append(
    (
        "03.4",
        "divided by the batch: seconds per token of all",
        "the time of one step, not of its share per request",
        tpot_floor,
    )
)


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + 2 * batch * context * bytes_per_token) / bytes_per_s


WRONG.append(("03.4", "K and V doubled once more", "bytes_per_token has K and V in it already", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + batch * (context + 1) * bytes_per_token) / bytes_per_s


WRONG.append(("03.4", "one token more than is held", "`context` tokens are held, the new one among them", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + batch * context * bytes_per_token) // bytes_per_s


WRONG.append(("03.4", "integer division", "a fraction of a second, not whole ones", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return round((weight_bytes + batch * context * bytes_per_token) / bytes_per_s, 4)


WRONG.append(("03.4", "rounded to a tenth of a millisecond", "do not round: small models take less", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return weight_bytes / bytes_per_s + bytes_per_token * context / (batch * bytes_per_s)


WRONG.append(
    (
        "03.4",
        "K and V shared by the batch, as the weights are",
        "K and V are read for one request each; they multiply with batch",
        tpot_floor,
    )
)


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    return (weight_bytes + batch * context * bytes_per_token) / (bytes_per_s * 1e9)


WRONG.append(("03.4", "bandwidth taken to be GB/s", "bytes_per_s is in bytes already", tpot_floor))

# ---------------------------------------------------------------------------------------------------- 03.4 right


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    rate = 1.0 / bytes_per_s
    return math.fsum([weight_bytes * rate, *(context * bytes_per_token * rate for _ in range(batch))])


RIGHT.append(("03.4", "fsum over the requests, inverse bandwidth", tpot_floor))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    read = torch.tensor([weight_bytes, batch * context * bytes_per_token], dtype=torch.float64)
    return read.div(other=bytes_per_s).sum().item()


RIGHT.append(("03.4", "torch float64", tpot_floor))


class _Floor:
    __slots__ = ()

    def __call__(self, weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
        return operator.truediv(weight_bytes + math.prod((bytes_per_token, context, batch)), bytes_per_s)


RIGHT.append(("03.4", "a callable object with __slots__", _Floor()))

tpot_floor = lambda weight_bytes, bytes_per_token, context, batch, bytes_per_s: (  # noqa: E731
    weight_bytes / bytes_per_s + context / bytes_per_s * (bytes_per_token * batch)
)
RIGHT.append(("03.4", "a lambda, two quotients added", tpot_floor))

# ---------------------------------------------------------------------------------------------------- 03.5 wrong


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return max(flop_per_s, flops / nbytes * bytes_per_s)


WRONG.append(("03.5", "max in place of min", "the lower roof decides: never above flop_per_s", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return min(flop_per_s, nbytes / flops * bytes_per_s)


WRONG.append(("03.5", "intensity upside down", "operations per byte, not bytes per operation", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return max(flops / flop_per_s, nbytes / bytes_per_s)


WRONG.append(("03.5", "seconds in place of a rate", "operations per second are asked, not seconds", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return flops / (flops / flop_per_s + nbytes / bytes_per_s)


WRONG.append(
    ("03.5", "times added", "reading and arithmetic go on at the same time: the longer one counts", attainable)
)


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return flops / nbytes * bytes_per_s


WRONG.append(("03.5", "the flat roof left out", "no work exceeds flop_per_s", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return min(flop_per_s, flops // nbytes * bytes_per_s)


WRONG.append(("03.5", "intensity cut to a whole number", "intensity is a fraction, often below 1", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return min(1.0, flops / nbytes * bytes_per_s / flop_per_s)


WRONG.append(("03.5", "the share of the peak", "operations per second, not a share of the peak", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    ridge = 295
    return flop_per_s if flops / nbytes >= ridge else flops / nbytes * bytes_per_s


WRONG.append(
    ("03.5", "the H100's ridge written down", "the ridge is flop_per_s / bytes_per_s of the device given", attainable)
)


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return min(flops, flop_per_s, flops / nbytes * bytes_per_s)


WRONG.append(
    (
        "03.5",
        "the rate limited by the operations themselves",
        "a small piece of work can still reach a high rate",
        attainable,
    )
)


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return min(flop_per_s, 2 * flops / nbytes * bytes_per_s)


WRONG.append(("03.5", "two operations for each of flops", "flops counts operations already", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return flop_per_s if flops > nbytes else flops / nbytes * bytes_per_s


WRONG.append(
    (
        "03.5",
        "arithmetic decides as soon as there are more operations than bytes",
        "compare with the ridge, not with 1",
        attainable,
    )
)

# ---------------------------------------------------------------------------------------------------- 03.5 right


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return flops / max(flops / flop_per_s, nbytes / bytes_per_s)


RIGHT.append(("03.5", "operations over the longer time", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    intensity, ridge = flops / nbytes, flop_per_s / bytes_per_s
    if intensity >= ridge:
        return flop_per_s
    return flop_per_s * intensity / ridge


RIGHT.append(("03.5", "a branch at the ridge, share of the peak", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    return sorted((bytes_per_s / nbytes * flops, flop_per_s))[0]


RIGHT.append(("03.5", "sorted, how often per second the bytes can be moved", attainable))


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    rates = np.array([flop_per_s, np.float64(flops) / np.float64(nbytes) * bytes_per_s])
    return rates.min()


RIGHT.append(("03.5", "numpy, returns a numpy float64", attainable))

# ---------------------------------------------------------------------------------------------------- 03.6 wrong


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    total = 0.0
    history = prefix
    for call in range(calls):
        if call == 0:
            total += (prefix + added) * input_price
        else:
            total += history * cached_price + added * input_price
        total += answer * output_price
        history += added + answer
    return total / 1e6


WRONG.append(
    (
        "03.6",
        "the last answer is read as cached input at the next call",
        "an answer is new input the first time that it is sent",
        conversation_cost,
    )
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, prefix
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(
    (
        "03.6",
        "the prefix is cached at the first call already",
        "the first call sends all for the first time",
        conversation_cost,
    )
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(("03.6", "answers are not sent again", "the next call sends the answer too", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e3


WRONG.append(("03.6", "prices per thousand tokens", "prices are per million", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars = 0.0
    for call in range(1, calls + 1):
        rest = call * added + (call - 1) * answer
        dollars += prefix * (input_price if call == 1 else cached_price) + rest * input_price + answer * output_price
    return dollars / 1e6


WRONG.append(
    (
        "03.6",
        "only the prefix is read from the cache",
        "all that the call before has sent is cached, messages and answers too",
        conversation_cost,
    )
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += before * (cached_price or input_price) + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(("03.6", "a cached price of 0 read as 'no caching'", "cached input may be free", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(calls):
        sent = prefix + call * (added + answer)
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(
    ("03.6", "the first call sends only the prefix", "each call adds its tokens, the first too", conversation_cost)
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * (added + answer)
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(
    ("03.6", "a call's own answer is sent with it", "call 1 sends no answer: its own comes after", conversation_cost)
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += before * cached_price + (sent - before) * input_price
        before = sent
    return (dollars + answer * output_price) / 1e6


WRONG.append(
    ("03.6", "only the last answer is billed as output", "every call's answer is billed as output", conversation_cost)
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += sent * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(
    ("03.6", "new input billed twice, as new and as cached", "new input has the full price only", conversation_cost)
)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        step = before * cached_price + (sent - before) * input_price + answer * output_price
        dollars += round(step / 1e6, 2)
        before = sent
    return dollars


WRONG.append(("03.6", "each call rounded to cents", "do not round: fractions of cents add up", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        new = sent - before
        repeated = answer if call > 1 else 0
        dollars += before * cached_price + (new - repeated) * input_price + repeated * output_price
        dollars += answer * output_price
        before = sent
    return dollars / 1e6


WRONG.append(
    ("03.6", "a resent answer is billed at the price of output", "resent, an answer is input", conversation_cost)
)

# ---------------------------------------------------------------------------------------------------- 03.6 right


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    if calls < 1:
        return 0.0
    new = prefix + calls * added + (calls - 1) * answer
    pairs, triangle = calls - 1, calls * (calls - 1) // 2
    cached = pairs * prefix + triangle * added + (calls - 1) * (calls - 2) // 2 * answer
    return (new * input_price + cached * cached_price + calls * answer * output_price) * 1e-6


RIGHT.append(("03.6", "closed form", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    sent = np.arange(1, calls + 1) * added + np.arange(calls) * answer + prefix
    cached = np.concatenate(([0], sent[:-1])) if calls else sent
    return float((cached * cached_price + (sent - cached) * input_price).sum() + calls * answer * output_price) / 1e6


RIGHT.append(("03.6", "numpy, sent shifted by one call", conversation_cost))


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    # every piece of the text: full price once, cached at each later call
    def piece(tokens: int, first: int) -> Decimal:
        later = max(0, calls - first)
        return Decimal(tokens) * (Decimal(str(input_price)) + later * Decimal(str(cached_price)))

    total = piece(prefix, 1) if calls else Decimal(0)
    for call in range(1, calls + 1):
        total += piece(added, call) + Decimal(answer) * Decimal(str(output_price))
        if call > 1:
            total += piece(answer, call)
    return float(total / 10**6)


RIGHT.append(("03.6", "piece by piece of the text, in Decimal", conversation_cost))

# ---------------------------------------------------------------------------------------------------- 03.7 wrong


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_heads * spec.head_dim * context * bytes_per_element


WRONG.append(("03.7", "all query heads", "the cache keeps KV heads, which are fewer", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return spec.num_layers * spec.num_kv_heads * spec.head_dim * context * bytes_per_element


WRONG.append(("03.7", "mended, and the 2 for K and V lost", "K and V: two of each", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_groups = spec.num_heads // spec.num_kv_heads
    return 2 * spec.num_layers * (spec.hidden_size // kv_groups) * context * bytes_per_element


WRONG.append(
    (
        "03.7",
        "hidden_size // kv_groups for the width of K",
        "num_heads * head_dim need not be hidden_size",
        request_bytes,
    )
)


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return (
        2
        * spec.num_layers
        * max(spec.num_heads // spec.num_kv_heads, spec.num_kv_heads)
        * spec.head_dim
        * context
        * bytes_per_element
    )


WRONG.append(
    (
        "03.7",
        "the larger of group size and KV heads (right for the report's 8B, not for Qwen)",
        "num_kv_heads are kept, also where a group is larger",
        request_bytes,
    )
)


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_heads = {"llama-3-70b": 8, "llama-3-8b": 8, "qwen2.5-7b": 4}.get(spec.name, spec.num_heads // spec.num_kv_heads)
    return 2 * spec.num_layers * kv_heads * spec.head_dim * context * bytes_per_element


WRONG.append(("03.7", "the report's three models by name", "any shape, not three names", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    blocks = -(-context // 16)
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * blocks * 16 * bytes_per_element


WRONG.append(
    ("03.7", "context rounded up to blocks of 16 tokens", "the bytes of exactly `context` tokens", request_bytes)
)


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * 2


WRONG.append(("03.7", "two bytes written down", "bytes_per_element is not used", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_groups = spec.num_heads / spec.num_kv_heads
    return 2 * spec.num_layers * kv_groups * spec.head_dim * context * bytes_per_element


WRONG.append(
    (
        "03.7",
        "only the rounding of the group size removed",
        "a group's size is not the number of KV heads",
        request_bytes,
    )
)


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    return 2 * spec.num_layers * spec.num_kv_heads * head_dim * context * bytes_per_element


WRONG.append(("03.7", "head_dim = hidden_size // num_heads", "head_dim is in the spec and may be wider", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (context - 1) * bytes_per_element


WRONG.append(("03.7", "the newest token left out", "all `context` tokens are kept", request_bytes))

# ---------------------------------------------------------------------------------------------------- 03.7 right


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    return earlier_cache_bytes(spec, tokens=context, batch=1, bytes_per_element=bytes_per_element)


RIGHT.append(("03.7", "the earlier blank", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    kv_groups = spec.num_heads // spec.num_kv_heads
    return 2 * spec.num_layers * (spec.num_heads // kv_groups) * spec.head_dim * context * bytes_per_element


RIGHT.append(("03.7", "the number of groups from their size", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    shape = (spec.num_layers, spec.num_kv_heads, context, spec.head_dim)
    k = torch.empty(shape, dtype=torch.int8, device="meta")
    return sum(x.numel() for x in (k, k)) * bytes_per_element


RIGHT.append(("03.7", "a meta tensor beside the formula", request_bytes))


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    sizes = operator.attrgetter("num_layers", "num_kv_heads", "head_dim")(spec)
    return math.prod([*sizes, context, bytes_per_element]) << 1


RIGHT.append(("03.7", "attrgetter, prod and a shift", request_bytes))

# ---------------------------------------------------------------------------------------------------- 03.8 wrong

# What a notebook has by then: the answers before.
cache_bytes, count_weights, capacity = references.cache_bytes, references.count_weights, references.capacity
tpot_floor, request_bytes = references.tpot_floor, references.request_bytes


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if tpot_floor(w, cache_bytes(spec, 1, 1, 2), context, users, gpu.bytes_per_s) > tpot:
        return "time"
    return "fits"


WRONG.append(
    (
        "03.8",
        "K and V of every token read, windows or not",
        "a layer with a window reads what it holds, not every token",
        first_limit,
    )
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = context * cache_bytes(spec, 1, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    (
        "03.8",
        "the bytes of one token times the context, windows or not",
        "a layer with a window keeps no more than its window",
        first_limit,
    )
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "the number of weights for their bytes", "16 bits are two bytes per weight", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context > spec.max_seq_len:
        return "length"
    if w > gpu.memory_bytes:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    (
        "03.8",
        "weights compared with the memory alone",
        "not one request fitting is what counts, reserve kept",
        first_limit,
    )
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context * users > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "tokens of all users for one request's length", "a request is one user's", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context >= spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "max_seq_len itself refused", "exactly the trained length is not longer", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n <= users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "as many as fit taken for too few", "exactly as many as users is enough", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "nothing kept free", "0.15 of what the weights leave stays free", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    room = 0.85 * gpu.memory_bytes - w
    one = cache_bytes(spec, context, 1, 2)
    if context > spec.max_seq_len:
        return "length"
    if room < one:
        return "weights"
    if room < one * users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    ("03.8", "the reserve off the whole memory", "the reserve is a share of what the weights leave", first_limit)
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.85)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "0.85 for the reserve", "capacity takes the share that stays free", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "a step of one user", "each user's K and V are read", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if users * one / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "K and V read, the weights not", "the weights are read once a step", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + n * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "a step of as many users as fit", "the users are given", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s * 1000 > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "milliseconds against seconds", "tpot is in seconds", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    if n < users:
        return "cache"
    return "fits"


WRONG.append(("03.8", "the time asked before the cache", "the cache is asked about before the time", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w - 2 * spec.vocab_size * spec.hidden_size + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    ("03.8", "the embedding left out of what is read, as in section 4", "all weights count as read here", first_limit)
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s / users > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "the step's time divided by the users", "a step gives everybody a token at its end", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if users * (w + one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "the weights read once per user", "the weights are read once for all", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "any length", "max_seq_len limits a request", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    if context > spec.max_seq_len:
        return "length"
    return "fits"


WRONG.append(("03.8", "the length asked about last", "the first that applies, in the docstring's order", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"


WRONG.append(("03.8", "nothing comes back where all fits", "a return for the last case", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bandwidth_gb_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "GB/s for bytes per second", "gpu.bytes_per_s is in bytes", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 16)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "16 for the bytes of a number", "16 bits are two bytes", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    room = (gpu.memory_bytes - w) * 0.85
    if context > spec.max_seq_len:
        return "length"
    if room <= 0:
        return "weights"
    if room < users * one:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    ("03.8", "weights only where nothing at all remains", "not one request fitting is what counts", first_limit)
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * spec.parameters
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(
    ("03.8", "the published number of weights, which some specs lack", "count the weights from the sizes", first_limit)
)


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    all_ = cache_bytes(spec, context, users, 2)
    n = capacity(gpu.memory_bytes, w, all_, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + all_) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "all users' cache as one request's", "capacity is told what one request takes", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_gib * 1e9, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "GiB for GB", "gpu.memory_bytes is in bytes", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    one = request_bytes(spec, context, 2)
    n = capacity(gpu.memory_bytes, w, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if n == 0:
        return "weights"
    if n < users:
        return "cache"
    if (w + users * one) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


WRONG.append(("03.8", "03.7's formula, for layers that are alike", "layers may have windows", first_limit))

# ---------------------------------------------------------------------------------------------------- 03.8 right


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    weights = 2 * count_weights(spec)
    one = cache_bytes(spec, context, 1, 2)
    fit = capacity(gpu.memory_bytes, weights, one, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if fit == 0:
        return "weights"
    if fit < users:
        return "cache"
    if (weights + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s > tpot:
        return "time"
    return "fits"


RIGHT.append(("03.8", "four ifs, weights and cache by the earlier blanks", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w, kv = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    checks = {
        "length": context > spec.max_seq_len,
        "weights": capacity(gpu.memory_bytes, w, kv, 0.15) < 1,
        "cache": capacity(gpu.memory_bytes, w, kv, 0.15) < users,
        "time": tpot_floor(w, kv, 1, users, gpu.bytes_per_s) > tpot,
        "fits": True,
    }
    return next(name for name, hit in checks.items() if hit)


RIGHT.append(("03.8", "a dict of conditions; a request as one token for tpot_floor", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = count_weights(spec) * 2
    room = 0.85 * (gpu.memory_bytes - w)
    kv = cache_bytes(spec, context, users, 2)
    return (
        "length"
        if spec.max_seq_len < context
        else "weights"
        if cache_bytes(spec, context, 1, 2) > room
        else "cache"
        if kv > room
        else "time"
        if w + kv > tpot * gpu.bytes_per_s
        else "fits"
    )


RIGHT.append(("03.8", "one conditional expression, the room by hand", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    w = 2 * count_weights(spec)
    n = capacity(gpu.memory_bytes, w, cache_bytes(spec, context, 1, 2), 0.15)
    bad = [
        context > spec.max_seq_len,
        not n,
        users > n,
        w + cache_bytes(spec, context, users, 2) > gpu.bytes_per_s * tpot,
        True,
    ]
    return ["length", "weights", "cache", "time", "fits"][bad.index(True)]


RIGHT.append(("03.8", "the index of the first true condition", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    def requests():
        return capacity(
            memory_bytes=gpu.memory_bytes,
            weight_bytes=count_weights(spec) * 2,
            request_bytes=cache_bytes(spec, context, 1, 2),
            reserve=0.15,
        )

    rules = (
        ("length", lambda: context > spec.max_seq_len),
        ("weights", lambda: requests() < 1),
        ("cache", lambda: requests() < users),
        (
            "time",
            lambda: (
                tpot_floor(2 * count_weights(spec), cache_bytes(spec, context, 1, 2), 1, users, gpu.bytes_per_s) > tpot
            ),
        ),
    )
    for name, broken in rules:
        if broken():
            return name
    else:
        return "fits"


RIGHT.append(("03.8", "conditions asked lazily, in a loop", first_limit))


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    answer = "fits"
    w, kv = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    n = capacity(gpu.memory_bytes, w, kv, 0.15)
    if (w + users * kv) / gpu.bytes_per_s > tpot:
        answer = "time"
    if n < users:
        answer = "cache"
    if n == 0:
        answer = "weights"
    if context > spec.max_seq_len:
        answer = "length"
    return answer


RIGHT.append(("03.8", "the last question first, overwritten", first_limit))
