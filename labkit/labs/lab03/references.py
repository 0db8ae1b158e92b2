"""What fills the blanks of lab 03: ordinary code with the signatures of the stubs."""

from __future__ import annotations

from labkit.specs import GpuSpec, ModelSpec


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    """Bytes of K and V in all layers, for `batch` requests of `tokens` tokens each.

    spec.each_layer: the layers, each with num_kv_heads, k_dim and v_dim (numbers in one head's key and in its value)
    and window: how many of the newest tokens it keeps, or None where it keeps them all.
    """
    elements = 0
    for layer in spec.each_layer:
        held = tokens if layer.window is None else min(tokens, layer.window)
        elements += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return elements * batch * bytes_per_element


def count_weights(spec: ModelSpec) -> int:
    """How many weights a Llama-style model has (a count, not bytes), from the sizes in its spec.

    spec: num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size, and two that are
    True or False: qkv_bias (q, k and v have a bias each), tied_head (the embedding is the head as well).
    """
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = 2 * spec.hidden_size * q_width + 2 * spec.hidden_size * kv_width
    biases = q_width + 2 * kv_width if spec.qkv_bias else 0
    mlp = 3 * spec.hidden_size * spec.intermediate_size
    norms = 2 * spec.hidden_size
    tables = (1 if spec.tied_head else 2) * spec.vocab_size * spec.hidden_size
    return spec.num_layers * (attention + biases + mlp + norms) + tables + spec.hidden_size


def capacity(memory_bytes: int, weight_bytes: int, request_bytes: int, reserve: float) -> int:
    """How many whole requests fit beside the weights; 0 when the weights do not fit.

    reserve: the share of what the weights leave that is kept free, such as 0.15. request_bytes: the cache of one.
    """
    room = (memory_bytes - weight_bytes) * (1 - reserve)
    return max(0, int(room // request_bytes))


def tpot_floor(weight_bytes: int, bytes_per_token: int, context: int, batch: int, bytes_per_s: float) -> float:
    """Seconds that one decode step must take, for `batch` requests that hold `context` tokens each.

    weight_bytes: all that a step reads of the weights. bytes_per_token: K and V of one token, all layers.
    bytes_per_s: what the device reads from its memory in a second.
    """
    return (weight_bytes + batch * context * bytes_per_token) / bytes_per_s


def attainable(flops: float, nbytes: float, flop_per_s: float, bytes_per_s: float) -> float:
    """Operations per second that a piece of work can reach at most.

    flops: operations it does. nbytes: bytes it moves. flop_per_s, bytes_per_s: the device's peak rates.
    """
    return min(flop_per_s, flops / nbytes * bytes_per_s)


def conversation_cost(
    calls: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
) -> float:
    """Dollars for a conversation of `calls` calls, each of which sends everything so far.

    prefix: tokens that every call begins with. added: tokens that each call adds behind what stood before.
    answer: tokens of each answer; the next call sends it too. Prices are in dollars per million tokens:
    cached_price for input that the call before has sent too, input_price for the other input, output_price for answers.
    """
    dollars, before = 0.0, 0
    for call in range(1, calls + 1):
        sent = prefix + call * added + (call - 1) * answer
        dollars += before * cached_price + (sent - before) * input_price + answer * output_price
        before = sent
    return dollars / 1e6


def request_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    """Bytes of the cache of one request of `context` tokens, for a model whose layers are alike and keep every token.

    spec: num_layers, num_heads, num_kv_heads, head_dim.
    """
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * bytes_per_element


def first_limit(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
    """What keeps a GPU from serving `users` requests of `context` tokens each in 16 bits: the first that applies of

    "length": a request is longer than spec.max_seq_len, what the model was trained for.
    "weights": with 0.15 of what the weights leave kept free, not one request fits into gpu.memory_bytes.
    "cache": fewer requests fit than there are users.
    "time": reading all weights and all K and V once, at gpu.bytes_per_s, takes more than `tpot` seconds.
    "fits": none of these.
    """
    if context > spec.max_seq_len:
        return "length"
    weights, request = 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)
    fit = capacity(gpu.memory_bytes, weights, request, 0.15)
    if fit < users:
        return "cache" if fit else "weights"
    return "time" if (weights + users * request) / gpu.bytes_per_s > tpot else "fits"
