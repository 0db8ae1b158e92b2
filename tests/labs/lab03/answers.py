"""Wrong answers to lab 03, and other right ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch

from labkit import sizing
from labkit.labs.lab03.references import (
    cache_bytes,
    capacity,
    conversation_cost,
    count_weights,
    first_limit,
    request_bytes,
    tpot_floor,
)
from labkit.llama import Llama
from labkit.specs import ModelSpec
from tests.labs.answer import Wrong

HEADS = "rasbt/LLMs-from-scratch#922"

# 03.1


def by_layer(numbers: Callable, held: Callable = lambda layer, tokens: layer.tokens_held(tokens)) -> Callable:
    """Bytes with another idea of what one token adds, or of how many tokens a layer holds."""

    def answer(spec, tokens, batch, bytes_per_element):
        return sum(held(layer, tokens) * numbers(layer) for layer in spec.each_layer) * batch * bytes_per_element

    return answer


def both(layer):
    return layer.num_kv_heads * (layer.k_dim + layer.v_dim)


def lab_02_formula(spec, tokens, batch, bytes_per_element):
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * batch * bytes_per_element


def returns_in_the_loop(spec, tokens, batch, bytes_per_element):
    for layer in spec.each_layer:
        return layer.tokens_held(tokens) * both(layer) * batch * bytes_per_element


def keeps_the_last_layer(spec, tokens, batch, bytes_per_element):
    elements = 0
    for layer in spec.each_layer:
        elements = layer.tokens_held(tokens) * both(layer)
    return elements * batch * bytes_per_element


def heads_of_the_spec(spec, tokens, batch, bytes_per_element):
    total = 0
    for layer in spec.each_layer:
        total += layer.tokens_held(tokens) * spec.num_kv_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


def query_heads(spec, tokens, batch, bytes_per_element):
    total = 0
    for layer in spec.each_layer:
        total += layer.tokens_held(tokens) * spec.num_heads * (layer.k_dim + layer.v_dim)
    return total * batch * bytes_per_element


def window_of_the_spec(spec, tokens, batch, bytes_per_element):
    held = min(tokens, spec.window) if spec.window else tokens
    return sum(held * both(layer) for layer in spec.each_layer) * batch * bytes_per_element


def always_two_bytes(spec, tokens, batch, bytes_per_element):
    return cache_bytes(spec, tokens, batch, 2)


def forgets_the_batch(spec, tokens, batch, bytes_per_element):
    return cache_bytes(spec, tokens, 1, bytes_per_element)


def adds_to_its_count(spec, tokens, batch, bytes_per_element):
    layer = spec.each_layer[0]
    return cache_bytes(spec, tokens, batch, bytes_per_element) + both(layer)


def as_a_tensor(spec, tokens, batch, bytes_per_element):
    return torch.tensor(cache_bytes(spec, tokens, batch, bytes_per_element))


def by_live_tensors(spec, tokens, batch, bytes_per_element):
    dtype = {1: torch.int8, 2: torch.float16, 4: torch.float32}[bytes_per_element]
    total = 0
    for layer in spec.each_layer:
        for width in (layer.k_dim, layer.v_dim):
            tensor = torch.empty(batch, layer.num_kv_heads, tokens, width, dtype=dtype)
            total += (tensor if layer.window is None else tensor[:, :, -layer.window :].clone()).nbytes
    return total


def by_sizing(spec, tokens, batch, bytes_per_element):
    return sizing.cache_bytes(spec, tokens, batch, {1: "float8", 2: "float16", 4: "float32"}[bytes_per_element])


def in_32_bits(spec, tokens, batch, bytes_per_element):
    per_token = np.array([both(layer) for layer in spec.each_layer], dtype=np.int32)
    held = np.array([layer.tokens_held(tokens) for layer in spec.each_layer], dtype=np.int32)
    return int(np.dot(per_token, held)) * batch * bytes_per_element


def by_name(answer: Callable) -> Callable:
    """An answer that takes a model for the first one of its name."""
    known: dict[str, ModelSpec] = {}
    return lambda spec, *others: answer(known.setdefault(spec.name, spec), *others)


def remembering(answer: Callable) -> Callable:
    """An answer that keeps its results by the number of tokens alone."""
    known = {}
    return lambda spec, tokens, batch, size: known.setdefault(tokens, answer(spec, tokens, batch, size))


# 03.2


def weights(
    *,
    kv=lambda spec: spec.num_kv_heads,
    square=False,
    mlp=3,
    norms=2,
    last=1,
    tables=None,
    bias=None,
    output=True,
    head_dim=lambda spec: spec.head_dim,
    bias_width=None,
) -> Callable:
    """A count with one part changed."""

    def answer(spec):
        hidden, q_width, kv_width = spec.hidden_size, spec.num_heads * head_dim(spec), kv(spec) * head_dim(spec)
        layer = 4 * hidden * hidden if square else hidden * (q_width * (2 if output else 1) + 2 * kv_width)
        layer += mlp * hidden * spec.intermediate_size + norms * hidden
        if spec.qkv_bias if bias is None else bias:
            layer += bias_width(spec) if bias_width else q_width + 2 * kv_width
        stored = (1 if spec.tied_head else 2) if tables is None else tables
        return spec.num_layers * layer + stored * spec.vocab_size * hidden + last * hidden

    return answer


def q_of_hidden_size(spec):
    widths = 2 * spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (widths + 3 * spec.intermediate_size + 2)
    if spec.qkv_bias:
        layer += widths - spec.hidden_size
    return spec.num_layers * layer + (2 - spec.tied_head) * spec.vocab_size * spec.hidden_size + spec.hidden_size


def from_a_live_model(spec):
    return sum(parameter.numel() for parameter in Llama(spec).parameters())


def part_by_part(spec):
    total = spec.vocab_size * spec.hidden_size + spec.hidden_size
    if not spec.tied_head:
        total += spec.vocab_size * spec.hidden_size
    for _ in range(spec.num_layers):
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads):
            total += spec.hidden_size * heads * spec.head_dim
            total += heads * spec.head_dim if spec.qkv_bias else 0
        total += spec.num_heads * spec.head_dim * spec.hidden_size
        total += 3 * spec.hidden_size * spec.intermediate_size + 2 * spec.hidden_size
    return total


# 03.3


def fits_by_counting(memory_bytes, weight_bytes, request_bytes, reserve):
    room, count = (memory_bytes - weight_bytes) * (1 - reserve), 0
    while (count + 1) * request_bytes <= room:
        count += 1
    return count


def fits_with_a_test(memory_bytes, weight_bytes, request_bytes, reserve):
    if weight_bytes >= memory_bytes:
        return 0
    return int((memory_bytes - weight_bytes) * (1 - reserve) / request_bytes)


# 03.4, 03.5


def step_by_parts(weight_bytes, bytes_per_token, context, batch, bytes_per_s):
    seconds = weight_bytes / bytes_per_s
    for _ in range(batch):
        seconds += context * bytes_per_token / bytes_per_s
    return seconds


def rate_by_the_slower(flops, nbytes, flop_per_s, bytes_per_s):
    return flops / max(flops / flop_per_s, nbytes / bytes_per_s)


def rate_by_the_ridge(flops, nbytes, flop_per_s, bytes_per_s):
    if flops / nbytes < flop_per_s / bytes_per_s:
        return flops * bytes_per_s / nbytes
    return flop_per_s


# 03.6


def bill_of(sent: Callable, kept: Callable) -> Callable:
    """A bill with another idea of what call i sends, or of how much of it is cached."""

    def answer(calls, prefix, added, answer, input_price, output_price, cached_price):
        dollars = 0.0
        for call in range(1, calls + 1):
            now = sent(call, prefix, added, answer)
            old = kept(call, prefix, lambda i: sent(i, prefix, added, answer))
            dollars += old * cached_price + (now - old) * input_price + answer * output_price
        return dollars / 1e6

    return answer


def everything(call, prefix, added, answer):
    return prefix + call * added + (call - 1) * answer


def sent_before(call, prefix, sent):
    return sent(call - 1) if call > 1 else 0


def all_but_the_newest(calls, prefix, added, answer, input_price, output_price, cached_price, first=True):
    dollars = calls * answer * output_price
    for call in range(1, calls + 1):
        now = everything(call, prefix, added, answer)
        old = now - added if first or call > 1 else 0
        dollars += old * cached_price + (now - old) * input_price
    return dollars / 1e6


def free_answers(calls, prefix, added, answer, input_price, output_price, cached_price):
    return conversation_cost(calls, prefix, added, answer, input_price, 0.0, cached_price)


def whole_dollars(*args):
    return conversation_cost(*args) * 1e6


def cents(*args):
    return conversation_cost(*args) * 100


def billed_again(calls, prefix, added, answer, input_price, output_price, cached_price):
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = everything(call, prefix, added, answer)
        dollars += before * cached_price + sent * input_price + answer * output_price
        before = sent
    return dollars / 1e6


def at_the_output_price(calls, prefix, added, answer, input_price, output_price, cached_price):
    return conversation_cost(calls, prefix, added, answer, output_price, input_price, cached_price)


def bill_in_closed_form(calls, prefix, added, answer, input_price, output_price, cached_price):
    total = calls * prefix + added * calls * (calls + 1) // 2 + answer * calls * (calls - 1) // 2
    last = prefix + calls * added + (calls - 1) * answer
    return ((total - last) * cached_price + last * input_price + calls * answer * output_price) / 1e6


def bill_by_sizing(calls, prefix, added, answer, input_price, output_price, cached_price):
    price = sizing.Price(input_price, output_price, cached=cached_price)
    return sizing.conversation_cost(price, calls, prefix=prefix, added=added, answer=answer, caching=True).dollars


def rounded_calls(calls, prefix, added, answer, *prices):
    bills = [conversation_cost(call, prefix, added, answer, *prices) for call in range(calls + 1)]
    return sum(round(now - before, 2) for before, now in pairwise(bills))


# 03.7


def with_heads(heads: Callable) -> Callable:
    """The planner with another number of heads."""
    return lambda spec, context, size: 2 * spec.num_layers * heads(spec) * spec.head_dim * context * size


def from_hidden_size(spec, context, bytes_per_element):
    return 2 * spec.num_layers * spec.hidden_size * context * bytes_per_element


def always_float16(spec, context, bytes_per_element):
    return request_bytes(spec, context, 2)


def by_the_group(spec, context, bytes_per_element):
    group = spec.num_heads // spec.num_kv_heads
    return 2 * spec.num_layers * (spec.num_heads // group) * spec.head_dim * context * bytes_per_element


# 03.8


def limit_by(
    *,
    trained=lambda spec: spec.max_seq_len,
    reserve=0.15,
    per_weight=2,
    requests=1,
    nothing="weights",
    seconds=lambda weights, request, users, gpu: (weights + users * request) / gpu.bytes_per_s,
    order=("length", "memory", "time"),
) -> Callable:
    """A sizing with one part changed."""

    def answer(spec, gpu, users, context, tpot):
        weights, request = per_weight * count_weights(spec), cache_bytes(spec, context, 1, 2)
        fit = capacity(gpu.memory_bytes, weights, cache_bytes(spec, context, requests or users, 2), reserve)
        memory = "" if fit >= users else "cache" if fit > 0 else nothing
        found = {
            "length": "length" if context > trained(spec) else "",
            "memory": memory,
            "time": "time" if seconds(weights, request, users, gpu) > tpot else "",
        }
        return next((found[name] for name in order if found[name]), "fits")

    return answer


def by_the_token(spec, gpu, users, context, tpot):
    if context > spec.max_seq_len:
        return "length"
    weights, request = 2 * count_weights(spec), request_bytes(spec, context, 2)
    fit = capacity(gpu.memory_bytes, weights, request, 0.15)
    if fit < users:
        return "cache" if fit else "weights"
    return "time" if (weights + users * request) / gpu.bytes_per_s > tpot else "fits"


def bytes_of_a_request_per_token(spec, gpu, users, context, tpot):
    step = tpot_floor(2 * count_weights(spec), cache_bytes(spec, context, 1, 2), context, users, gpu.bytes_per_s)
    return "time" if (said := early(spec, gpu, users, context)) == "fits" and step > tpot else said


def early(*sizes):
    """What `first_limit` says but for the time."""
    return first_limit(*sizes[:4], math.inf)


def every_token_read(spec, gpu, users, context, tpot):
    step = tpot_floor(2 * count_weights(spec), cache_bytes(spec, 1, 1, 2), context, users, gpu.bytes_per_s)
    return "time" if (said := early(spec, gpu, users, context)) == "fits" and step > tpot else said


def per_token_of_a_request(spec, gpu, users, context, tpot):
    """Right: what a token takes on average, so that tpot_floor serves."""
    each = cache_bytes(spec, context, 1, 2) // context
    step = tpot_floor(2 * count_weights(spec), each, context, users, gpu.bytes_per_s)
    return "time" if (said := early(spec, gpu, users, context)) == "fits" and step > tpot else said


def without_the_embedding(spec, gpu, users, context, tpot, *, tied=True):
    table = 2 * spec.vocab_size * spec.hidden_size * (tied or not spec.tied_head)
    step = (2 * count_weights(spec) - table + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s
    return "time" if (said := early(spec, gpu, users, context)) == "fits" and step > tpot else said


def time_before_the_cache(spec, gpu, users, context, tpot):
    said = first_limit(spec, gpu, 1, context, math.inf)
    step = (2 * count_weights(spec) + cache_bytes(spec, context, users, 2)) / gpu.bytes_per_s
    return said if said != "fits" else "time" if step > tpot else early(spec, gpu, users, context)


def sixteen_bytes_a_number(spec, gpu, users, context, tpot):
    weights, request = 2 * count_weights(spec), cache_bytes(spec, context, 1, 16)
    fit = capacity(gpu.memory_bytes, weights, request, 0.15)
    if context > spec.max_seq_len:
        return "length"
    if fit < users:
        return "cache" if fit else "weights"
    return "time" if (weights + users * request) / gpu.bytes_per_s > tpot else "fits"


def words_exchanged(*sizes):
    right = first_limit(*sizes)
    return {"weights": "cache", "cache": "weights"}.get(right, right)


def weights_alone_or_cache(spec, gpu, users, context, tpot):
    if context > spec.max_seq_len:
        return "length"
    weights = 2 * count_weights(spec)
    if weights > gpu.memory_bytes:
        return "weights"
    if capacity(gpu.memory_bytes, weights, cache_bytes(spec, context, 1, 2), 0.15) < users:
        return "cache"
    step = tpot_floor(weights, cache_bytes(spec, 1, 1, 2), context, users, gpu.bytes_per_s)
    return "time" if step > tpot else "fits"


def reserve_off_the_whole(spec, gpu, users, context, tpot):
    if context > spec.max_seq_len:
        return "length"
    weights, request = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    fit = (0.85 * gpu.memory_bytes - weights) // request
    if fit < users:
        return "cache" if fit >= 1 else "weights"
    return "time" if (weights + users * request) / gpu.bytes_per_s > tpot else "fits"


def with_a_list(spec, gpu, users, context, tpot):
    weights, request = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    room = (gpu.memory_bytes - weights) * 0.85
    tests = [
        (context > spec.max_seq_len, "length"),
        (room < request, "weights"),
        (room < users * request, "cache"),
        ((weights + users * request) / gpu.bytes_per_s > tpot, "time"),
    ]
    return next((name for failed, name in tests if failed), "fits")


def step_by_step(spec, gpu, users, context, tpot):
    if context > spec.max_seq_len:
        return "length"
    weights = 2 * count_weights(spec)
    fit = capacity(gpu.memory_bytes, weights, cache_bytes(spec, context, 1, 2), 0.15)
    if fit == 0:
        return "weights"
    if fit < users:
        return "cache"
    step = tpot_floor(weights, cache_bytes(spec, context, 1, 2), 1, users, gpu.bytes_per_s)
    if step > tpot:
        return "time"
    return "fits"


def only_news(calls, prefix, added, answer, input_price, output_price, cached_price):
    """The cached part is the newest message and answer, where it should be all that went before."""
    news = [prefix + added, *[answer + added] * (calls - 1)]
    cached = [0, *news[:-1]]
    return (sum(a * input_price + b * cached_price for a, b in zip(news, cached, strict=True))
            + calls * answer * output_price) / 1e6  # fmt: skip


def all_and_news(calls, prefix, added, answer, input_price, output_price, cached_price):
    """All that is sent has the cached price, and what is new the input price as well."""
    bill = 0.0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        bill += (sent * cached_price if call > 1 else 0) + (added + (answer if call > 1 else prefix)) * input_price
    return (bill + calls * answer * output_price) / 1e6


WRONG = [
    Wrong("03.6", "news-cached", "caches the newest part only", only_news),
    Wrong("03.6", "billed-twice", "bills all as cached, and the new part besides", all_and_news),
    Wrong("03.4", "argument", "the context shared by the batch", lambda w, t, c, b, s: (w + t * (c // b) * b) / s),
    Wrong("03.1", "window-ignored", "every layer keeps every token", by_layer(both, lambda layer, tokens: tokens)),
    Wrong("03.1", "window-too-large", "a window is full from the first token on",
           by_layer(both, lambda layer, tokens: layer.window or tokens)),
    Wrong("03.1", "window-too-large", "max in the place of min",
           by_layer(both, lambda layer, tokens: max(tokens, layer.window or 0))),
    Wrong("03.1", "window-everywhere", "the model's window for every layer", window_of_the_spec),
    Wrong("03.1", "uniform", "lab 02's formula", lab_02_formula),
    Wrong("03.1", "uniform", "the spec's KV heads for every layer", heads_of_the_spec),
    Wrong("03.1", "values-as-wide-as-keys", "twice the keys",
           by_layer(lambda layer: 2 * layer.num_kv_heads * layer.k_dim)),
    Wrong("03.1", "k-only", "V left out", by_layer(lambda layer: layer.num_kv_heads * layer.k_dim)),
    Wrong("03.1", "query-heads", "query heads kept", query_heads, source=HEADS),
    Wrong("03.1", "one-layer", "return inside the loop", returns_in_the_loop),
    Wrong("03.1", "one-layer", "= in the place of +=", keeps_the_last_layer),
    Wrong("03.1", "ignored", "always two bytes per number", always_two_bytes),
    Wrong("03.1", "ignored", "the batch left out", forgets_the_batch),
    Wrong("03.1", "window-emptied", "a full window holds nothing",
           by_layer(both, lambda layer, tokens: tokens if tokens <= (layer.window or tokens) else 0)),
    Wrong("03.1", "window-off-by-one", "a window keeps one token fewer",
           by_layer(both, lambda layer, tokens: min(tokens, layer.window - 1) if layer.window else tokens)),
    Wrong("03.1", "window-shared", "one window for all requests",
           lambda spec, tokens, batch, size: cache_bytes(spec, tokens * batch, 1, size)),
    Wrong("03.1", "brackets", "the KV heads multiply the keys alone",
           by_layer(lambda layer: layer.num_kv_heads * layer.k_dim + layer.v_dim)),
    Wrong("03.1", "kinds-not-layers", "layers that are alike counted once",
           lambda spec, tokens, batch, size: batch * size
           * sum(layer.tokens_held(tokens) * both(layer) for layer in set(spec.each_layer))),
    Wrong("03.1", "hidden-size", "hidden_size for the keys' width",
           lambda spec, tokens, batch, size: 2 * spec.num_layers * spec.hidden_size * tokens * batch * size),
    Wrong("03.1", "window-everywhere", "two things: the model's window, and values as wide as keys",
           lambda spec, tokens, batch, size: sum(2 * layer.num_kv_heads * layer.k_dim for layer in spec.each_layer)
           * min(tokens, spec.window or tokens) * batch * size),
    Wrong("03.1", "trained-length", "no more tokens than the model was trained for",
           lambda spec, tokens, batch, size: cache_bytes(spec, min(tokens, spec.max_seq_len), batch, size)),
    Wrong("03.1", "ignored", "results kept by the number of tokens alone", remembering(cache_bytes)),
    Wrong("03.1", "bits", "bits for bytes", lambda *sizes: 8 * cache_bytes(*sizes)),
    Wrong("03.1", "units", "MiB for bytes", lambda *sizes: cache_bytes(*sizes) / 2**20),
    Wrong("03.1", "not-whole", "a float", lambda *sizes: cache_bytes(*sizes) / 1),
    Wrong("03.1", "not-a-number", "a tensor", as_a_tensor),
    Wrong("03.1", "values", "a constant on top", adds_to_its_count),
    Wrong("03.1", "wraps", "summed in 32 bits", in_32_bits),
    Wrong("03.1", "remembered", "models known by name", by_name(cache_bytes)),
    Wrong("03.2", "remembered", "models known by name", by_name(count_weights)),
    Wrong("03.7", "remembered", "models known by name", by_name(request_bytes)),
    Wrong("03.8", "remembered", "models known by name", by_name(first_limit)),
    Wrong("03.5", "operations-as-rate", "the operations as a rate", lambda f, n, p, b: min(f, p, f / n * b)),
    Wrong("03.5", "threshold", "1 for the ridge", lambda f, n, p, b: p if f > n else f / n * b),
    Wrong("03.6", "rounded", "each call rounded to cents", rounded_calls),
    Wrong("03.2", "published", "the spec's own figure", lambda spec: spec.num_parameters),
    Wrong("03.2", "square", "four squares of hidden_size", weights(square=True)),
    Wrong("03.2", "kv-as-wide-as-q", "k and v as wide as q", weights(kv=lambda spec: spec.num_heads), source=HEADS),
    Wrong("03.2", "tied", "a tied head counted twice", weights(tables=2)),
    Wrong("03.2", "tied", "no head at all", weights(tables=1)),
    Wrong("03.2", "tables", "layers only", weights(tables=0)),
    Wrong("03.2", "mlp", "an MLP of two matrices", weights(mlp=2)),
    Wrong("03.2", "norms", "no norms", weights(norms=0, last=0)),
    Wrong("03.2", "norms", "no last norm", weights(last=0)),
    Wrong("03.2", "bias", "no biases", weights(bias=False)),
    Wrong("03.2", "bias", "biases always", weights(bias=True)),
    Wrong("03.2", "bias-width", "three biases as wide as q's",
           weights(bias_width=lambda spec: 3 * spec.num_heads * spec.head_dim)),
    Wrong("03.2", "bias-width", "three biases of hidden_size", weights(bias_width=lambda spec: 3 * spec.hidden_size)),
    Wrong("03.2", "bias-width", "q's bias alone", weights(bias_width=lambda spec: spec.num_heads * spec.head_dim)),
    Wrong("03.2", "head-dim", "hidden_size // num_heads",
           weights(head_dim=lambda spec: spec.hidden_size // spec.num_heads)),
    Wrong("03.2", "head-dim", "hidden_size / num_heads",
           weights(head_dim=lambda spec: spec.hidden_size / spec.num_heads)),
    Wrong("03.2", "head-dim", "q and the output hidden_size squared", q_of_hidden_size),
    Wrong("03.2", "head-dim", "attention's output hidden_size squared", lambda spec: count_weights(spec)
           + spec.num_layers * spec.hidden_size * (spec.hidden_size - spec.num_heads * spec.head_dim)),
    Wrong("03.2", "output-missing", "no output matrix", weights(output=False)),
    Wrong("03.2", "norms", "two norms in all", weights(norms=0, last=3)),
    Wrong("03.2", "mlp", "four matrices in the MLP", weights(mlp=4)),
    Wrong("03.2", "bias-width", "q's bias of hidden_size",
           weights(bias_width=lambda spec: spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim)),
    Wrong("03.2", "positions", "a table of positions",
           lambda spec: count_weights(spec) + spec.max_seq_len * spec.hidden_size),
    Wrong("03.2", "output-bias", "a bias of attention's output",
           lambda spec: count_weights(spec) + spec.num_layers * spec.hidden_size * spec.qkv_bias),
    Wrong("03.2", "bias-width", "the biases of one layer",
           lambda spec: count_weights(replace(spec, qkv_bias=False))
           + (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.qkv_bias),
    Wrong("03.2", "tables-per-layer", "the tables in every layer",
           lambda spec: count_weights(spec) + (spec.num_layers - 1)
           * ((2 - spec.tied_head) * spec.vocab_size + 1) * spec.hidden_size),
    Wrong("03.2", "bytes", "bytes for weights", lambda spec: 2 * count_weights(spec)),
    Wrong("03.2", "units", "millions", lambda spec: count_weights(spec) / 1e6),
    Wrong("03.2", "group-size", "the group size for the KV heads",
           weights(kv=lambda spec: spec.num_heads // spec.num_kv_heads), source=HEADS),
    Wrong("03.3", "reserve-of-all", "the reserve off the whole memory",
           lambda m, w, q, r: max(0, int((m * (1 - r) - w) // q))),
    Wrong("03.3", "no-reserve", "nothing kept free", lambda m, w, q, r: max(0, (m - w) // q)),
    Wrong("03.3", "only-the-reserve", "reserve for 1 - reserve", lambda m, w, q, r: max(0, int((m - w) * r // q))),
    Wrong("03.3", "weights-left-out", "no weights", lambda m, w, q, r: int(m * (1 - r) // q)),
    Wrong("03.3", "below-zero", "a negative number", lambda m, w, q, r: int((m - w) * (1 - r) // q)),
    Wrong("03.3", "rounded-up", "rounded to the nearest", lambda m, w, q, r: max(0, round((m - w) * (1 - r) / q))),
    Wrong("03.3", "weights-per-request", "weights for each request",
           lambda m, w, q, r: max(0, int(m * (1 - r) // (w + q)))),
    Wrong("03.3", "not-rounded", "a fraction of a request", lambda m, w, q, r: max(0.0, (m - w) * (1 - r) / q)),
    Wrong("03.3", "below-zero", "a negative number, cut off towards 0", lambda m, w, q, r: int((m - w) * (1 - r) / q)),
    Wrong("03.3", "below-zero", "-1 for what does not fit",
           lambda m, w, q, r: -1 if w > m else capacity(m, w, q, r)),
    Wrong("03.3", "rounded-twice", "rounded before the reserve",
           lambda m, w, q, r: max(0, int((m - w) // q * (1 - r)))),
    Wrong("03.3", "reserve-in-percent", "0.15 percent", lambda m, w, q, r: max(0, int((m - w) * (1 - r / 100) // q))),
    Wrong("03.3", "one-at-least", "one user always fits", lambda *sizes: max(1, capacity(*sizes))),
    Wrong("03.3", "one-too-few", "full to the last byte is too full",
           lambda m, w, q, r: max(0, -int(-((m - w) * (1 - r)) // q) - 1)),
    Wrong("03.3", "reserve-of-weights", "a share of the weights",
           lambda m, w, q, r: max(0, int((m - w * (1 + r)) // q))),
    Wrong("03.3", "values", "nothing fits beside weights of half the memory",
           lambda m, w, q, r: 0 if 2 * w > m else capacity(m, w, q, r)),
    Wrong("03.3", "values", "the sign lost", lambda m, w, q, r: int(abs(m - w) * (1 - r) // q)),
    Wrong("03.3", "not-whole", "// between floats", lambda *sizes: float(capacity(*sizes))),
    Wrong("03.3", "returned-none", "nothing when the weights do not fit",
           lambda m, w, q, r: int((m - w) * (1 - r) // q) if m > w else None),
    Wrong("03.4", "weights-per-request", "weights read for each request", lambda w, t, c, b, s: b * (w + c * t) / s),
    Wrong("03.4", "cache-shared", "one request's K and V for all", lambda w, t, c, b, s: (w + c * t) / s),
    Wrong("03.4", "per-request", "divided by the batch", lambda w, t, c, b, s: (w + b * c * t) / s / b),
    Wrong("03.4", "weights-left-out", "the cache alone", lambda w, t, c, b, s: b * c * t / s),
    Wrong("03.4", "cache-left-out", "the weights alone", lambda w, t, c, b, s: w / s),
    Wrong("03.4", "one-token", "the new token's K and V alone", lambda w, t, c, b, s: (w + b * t) / s),
    Wrong("03.4", "inverted", "steps per second", lambda w, t, c, b, s: s / (w + b * c * t)),
    Wrong("03.4", "longest", "the larger of the two reads", lambda w, t, c, b, s: max(w, b * c * t) / s),
    Wrong("03.4", "k-and-v-twice", "twice, for K and V", lambda w, t, c, b, s: (w + 2 * b * c * t) / s),
    Wrong("03.4", "half-the-context", "half of the context, on average", lambda w, t, c, b, s: (w + b * c / 2 * t) / s),
    Wrong("03.4", "token-more", "the new token besides", lambda w, t, c, b, s: (w + b * (c + 1) * t) / s),
    Wrong("03.4", "brackets", "the cache alone divided", lambda w, t, c, b, s: w + b * c * t / s),
    Wrong("03.4", "inverted", "tokens per second", lambda w, t, c, b, s: b * s / (w + b * c * t)),
    Wrong("03.4", "rounded", "whole seconds", lambda *sizes: int(tpot_floor(*sizes))),
    Wrong("03.4", "units", "milliseconds", lambda *sizes: 1e3 * tpot_floor(*sizes)),
    Wrong("03.5", "higher-roof", "max for min", lambda f, n, p, b: max(p, f / n * b)),
    Wrong("03.5", "inverted", "bytes per operation", lambda f, n, p, b: min(p, n / f * b)),
    Wrong("03.5", "compute-only", "the flat roof alone", lambda f, n, p, b: p),
    Wrong("03.5", "memory-only", "the slanted roof alone", lambda f, n, p, b: f / n * b),
    Wrong("03.5", "one-after-the-other", "times added", lambda f, n, p, b: f / (f / p + n / b)),
    Wrong("03.5", "seconds", "the time", lambda f, n, p, b: max(f / p, n / b)),
    Wrong("03.5", "intensity", "operations per byte", lambda f, n, p, b: f / n),
    Wrong("03.5", "bandwidth-roof", "no intensity", lambda f, n, p, b: min(p, b)),
    Wrong("03.5", "peaks-exchanged", "the device's rates exchanged", lambda f, n, p, b: min(b, f / n * p)),
    Wrong("03.5", "share", "a percentage of the peak", lambda f, n, p, b: 100 * min(1, f / n * b / p)),
    Wrong("03.5", "bytes-multiplied", "operations times bytes", lambda f, n, p, b: min(p, f * n * b)),
    Wrong("03.5", "higher-roof", "the sides exchanged", lambda f, n, p, b: p if f / n < p / b else f / n * b),
    Wrong("03.5", "values", "nothing at the ridge",
           lambda f, n, p, b: f / n * b if f / n * b < p else (p if f / n * b > p else 0)),
    Wrong("03.6", "history-not-sent", "one message a call",
           bill_of(lambda call, prefix, added, answer: prefix + added, sent_before)),
    Wrong("03.6", "answers-not-sent", "answers are not sent again",
           bill_of(lambda call, prefix, added, answer: prefix + call * added, sent_before)),
    Wrong("03.6", "answers-too-early", "a call sends its own answer",
           bill_of(lambda call, prefix, added, answer: prefix + call * (added + answer), sent_before)),
    Wrong("03.6", "starts-at-nothing", "calls counted from 0",
           bill_of(lambda call, prefix, added, answer: prefix + (call - 1) * (added + answer), sent_before)),
    Wrong("03.6", "first-call-cached", "the prefix cached at once",
           bill_of(everything, lambda call, prefix, sent: prefix)),
    Wrong("03.6", "answer-cached", "all but the newest message cached, from call 2 on",
           lambda *sizes: all_but_the_newest(*sizes, first=False)),
    Wrong("03.6", "answer-cached", "all but the newest message cached, at every call", all_but_the_newest),
    Wrong("03.6", "only-the-prefix", "the history is never cached",
           bill_of(everything, lambda call, prefix, sent: prefix if call > 1 else 0)),
    Wrong("03.6", "no-caching", "no caching", bill_of(everything, lambda call, prefix, sent: 0)),
    Wrong("03.6", "all-cached", "new tokens cached too",
           bill_of(everything, lambda call, prefix, sent: sent(call) * (call > 1))),
    Wrong("03.6", "billed-twice", "cached tokens billed twice", billed_again),
    Wrong("03.6", "output-free", "free answers", free_answers),
    Wrong("03.6", "units", "not divided by a million", whole_dollars),
    Wrong("03.6", "units", "cents", cents),
    Wrong("03.6", "one-call-fewer", "the last call's input left out",
           lambda c, p, a, n, i, o, k: conversation_cost(c, p, a, n, i, o, k)
           - (conversation_cost(c, p, a, n, i, 0, k) - conversation_cost(c - 1, p, a, n, i, 0, k))),
    Wrong("03.6", "prefix-not-cached", "the prefix is never cached",
           bill_of(everything, lambda call, prefix, sent: sent(call - 1) - prefix if call > 1 else 0)),
    Wrong("03.6", "cached-price", "the cached price as a discount",
           lambda c, p, a, n, i, o, k: conversation_cost(c, p, a, n, i, o, i - k)),
    Wrong("03.6", "rounded", "rounded to cents", lambda *sizes: round(conversation_cost(*sizes), 2)),
    Wrong("03.6", "prices-exchanged", "input and output prices exchanged", at_the_output_price),
    Wrong("03.7", "group-size", "the blank as it stands",
           with_heads(lambda spec: spec.num_heads // spec.num_kv_heads), source=HEADS),
    Wrong("03.7", "group-size", "whichever is larger",
           with_heads(lambda spec: max(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads))),
    Wrong("03.7", "query-heads", "query heads", with_heads(lambda spec: spec.num_heads), source="SnapKV#16"),
    Wrong("03.7", "hidden-size", "hidden_size for the width of the keys", from_hidden_size),
    Wrong("03.7", "written-down", "8 heads, whatever the model", with_heads(lambda spec: 8)),
    Wrong("03.7", "divided-twice", "KV heads grouped again",
           with_heads(lambda spec: spec.num_kv_heads / (spec.num_heads // spec.num_kv_heads))),
    Wrong("03.7", "k-only", "K without V", lambda *sizes: request_bytes(*sizes) // 2),
    Wrong("03.7", "query-heads", "KV heads times their queries",
           with_heads(lambda spec: spec.num_kv_heads * (spec.num_heads // spec.num_kv_heads))),
    Wrong("03.7", "values", "half KV heads, half group size",
           with_heads(lambda spec: (spec.num_kv_heads + spec.num_heads // spec.num_kv_heads) / 2)),
    Wrong("03.7", "written-down", "head_dim 128, whatever the model",
           lambda spec, context, size: 2 * spec.num_layers * spec.num_kv_heads * 128 * context * size),
    Wrong("03.7", "ignored", "always float16", always_float16),
    Wrong("03.8", "length-ignored", "any length", limit_by(trained=lambda spec: 10**9)),
    Wrong("03.8", "boundary", "max_seq_len itself refused", limit_by(trained=lambda spec: spec.max_seq_len - 1)),
    Wrong("03.8", "no-reserve", "nothing kept free", limit_by(reserve=0.0)),
    Wrong("03.8", "reserve-of-all", "the reserve off the whole memory", reserve_off_the_whole),
    Wrong("03.8", "weights-counted", "a count for bytes", limit_by(per_weight=1)),
    Wrong("03.8", "weights-alone", "weights only where they alone do not fit", weights_alone_or_cache),
    Wrong("03.8", "window-ignored", "03.7's formula for a model with a window", by_the_token),
    Wrong("03.8", "boundary", "tpot itself too slow",
           lambda spec, gpu, users, context, tpot: first_limit(spec, gpu, users, context, tpot * (1 - 1e-12))),
    Wrong("03.8", "length-of-all", "all users' tokens as one length",
           lambda spec, gpu, users, context, tpot: "length" if users * context > spec.max_seq_len
           else first_limit(spec, gpu, users, context, tpot)),
    Wrong("03.8", "context-twice", "a request's bytes for a token's",
           bytes_of_a_request_per_token),
    Wrong("03.8", "words-exchanged", "cache for weights", words_exchanged),
    Wrong("03.8", "users-twice", "users in both factors",
           limit_by(seconds=lambda weights, request, users, gpu: (weights + users**2 * request) / gpu.bytes_per_s)),
    Wrong("03.8", "milliseconds", "milliseconds against seconds",
           limit_by(seconds=lambda weights, request, users, gpu: 1e3 * (weights + users * request) / gpu.bytes_per_s)),
    Wrong("03.8", "only-the-reserve", "0.85 for the reserve", limit_by(reserve=0.85)),
    Wrong("03.8", "order", "cache asked before weights", limit_by(nothing="cache")),
    Wrong("03.8", "order", "the time before memory", limit_by(order=("length", "time", "memory"))),
    Wrong("03.8", "order", "the length last", limit_by(order=("memory", "time", "length"))),
    Wrong("03.8", "batch-twice", "all users' cache as one request", limit_by(requests=0)),
    Wrong("03.8", "time-ignored", "no time", limit_by(order=("length", "memory"))),
    Wrong("03.8", "time-of-one", "a step of one user",
           limit_by(seconds=lambda weights, request, users, gpu: (weights + request) / gpu.bytes_per_s)),
    Wrong("03.8", "weights-per-request", "weights read per user",
           limit_by(seconds=lambda weights, request, users, gpu: users * (weights + request) / gpu.bytes_per_s)),
    Wrong("03.8", "cache-left-out", "weights read alone",
           limit_by(seconds=lambda weights, request, users, gpu: weights / gpu.bytes_per_s)),
    Wrong("03.8", "window-read", "one token's bytes times the context, in the step alone", every_token_read),
    Wrong("03.8", "embedding-left-out", "read without the embedding", without_the_embedding),
    Wrong("03.8", "embedding-left-out", "read without an embedding that is not the head",
           lambda *sizes: without_the_embedding(*sizes, tied=False)),
    Wrong("03.8", "order", "time asked before the cache", time_before_the_cache),
    Wrong("03.8", "cache-bytes", "16 for the bytes of a number", sixteen_bytes_a_number),
    Wrong("03.8", "per-request", "the step's time shared by the users",
           limit_by(seconds=lambda weights, request, users, gpu: (weights / users + request) / gpu.bytes_per_s)),
    Wrong("03.8", "inverted", "tokens per second against seconds",
           limit_by(seconds=lambda weights, request, users, gpu: gpu.bytes_per_s / (weights + users * request))),
    Wrong("03.8", "not-an-answer", "None for what fits as text", lambda *sizes: str(None)),
    Wrong("03.8", "returned-none", "nothing where it fits",
           lambda *sizes: None if first_limit(*sizes) == "fits" else first_limit(*sizes)),
    Wrong("03.8", "values", "half the bandwidth",
           limit_by(seconds=lambda weights, request, users, gpu: 2 * (weights + users * request) / gpu.bytes_per_s)),
]  # fmt: skip

RIGHT: list[tuple[str, Callable]] = [
    ("03.1", by_live_tensors),
    ("03.1", by_sizing),
    ("03.1", by_layer(both)),
    ("03.1", lambda *sizes: np.int64(cache_bytes(*sizes))),
    ("03.1", lambda spec, tokens, batch, size: batch * size * sum(
        count * layer.tokens_held(tokens) * layer.elements_per_token for layer, count in spec.layer_counts.items())),
    ("03.2", from_a_live_model),
    ("03.2", part_by_part),
    ("03.2", weights()),
    ("03.3", fits_by_counting),
    ("03.3", fits_with_a_test),
    ("03.3", lambda m, w, q, r: max(0, math.floor((m - w) * (1 - r) / q))),
    ("03.3", lambda m, w, q, r: max(0, int((m - w) * (1 - r))) // q),
    ("03.3", lambda m, w, q, r: np.int64(max(0, np.floor_divide(m - w - r * (m - w), q)))),
    ("03.4", lambda w, t, c, b, s: float(Fraction(w + t * c * b) / Fraction(s))),
    ("03.4", step_by_parts),
    ("03.4", lambda w, t, c, b, s: w / s + b * c * t / s),
    ("03.5", lambda f, n, p, b: np.minimum(p, f * b / n)),
    ("03.5", lambda f, n, p, b: p * min(1, (f / n) / (p / b))),
    ("03.5", rate_by_the_slower),
    ("03.5", rate_by_the_ridge),
    ("03.6", bill_in_closed_form),
    ("03.6", bill_by_sizing),
    ("03.6", bill_of(everything, sent_before)),
    ("03.7", lambda spec, context, size: np.prod(
        [2, spec.num_layers, spec.num_kv_heads, spec.head_dim, context, size], dtype=np.int64)),
    ("03.7", by_the_group),
    ("03.7", lambda spec, context, size: cache_bytes(spec, context, 1, size)),
    ("03.8", per_token_of_a_request),
    ("03.8", with_a_list),
    ("03.8", step_by_step),
    ("03.8", limit_by()),
]  # fmt: skip
