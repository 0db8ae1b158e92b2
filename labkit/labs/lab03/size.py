"""03.1: the bytes of a cache, layer by layer. 03.2: the weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import cache_bytes, count_weights
from labkit.labs.lab03.slips import Slip, remembered, shape, suspects_of
from labkit.llama import Llama
from labkit.specs import Layer, LayerGroup, ModelSpec

FULL = shape("all layers keep everything", (11, 35, 7, 22, 221), trained=19)
MIXED = shape(
    "windows of 37 and 23, or none", (13, 30, 3, 26, 190), trained=19, window=37, v_head_dim=11,
    layers=[
        LayerGroup("window", 3), LayerGroup("full", 1, num_kv_heads=5, head_dim=34, v_head_dim=15),
        LayerGroup("window", 1, window=23),
    ],
)  # fmt: skip
WINDOWED = shape("a window of 4,096 in every layer", (5, 8, 2, 46, 370), trained=19, window=4096)


def layers_bytes(
    *,
    held: Callable[[Layer, int, ModelSpec], float] = lambda layer, tokens, spec: layer.tokens_held(tokens),
    heads: Callable[[Layer, ModelSpec], float] = lambda layer, spec: layer.num_kv_heads,
    width: Callable[[Layer, ModelSpec], float] = lambda layer, spec: layer.k_dim + layer.v_dim,
    layers: Callable[[ModelSpec], Iterable[Layer]] = lambda spec: spec.each_layer,
    rest: Callable[[int, int], float] = lambda batch, size: batch * size,
) -> Callable[[ModelSpec, int, int, int], float]:
    """The formula with another idea of what a layer holds, of the numbers that a token adds, or of what follows."""

    def formula(spec: ModelSpec, tokens: int, batch: int, size: int) -> float:
        numbers = sum(held(layer, tokens, spec) * heads(layer, spec) * width(layer, spec) for layer in layers(spec))
        return numbers * rest(batch, size)

    return formula


LOOP = "the loop: each layer says for itself how many heads, how wide, and how many tokens it keeps"
UNIFORM = "lab 02's formula: one number of heads and one width for all layers"
WIDTHS = "the numbers that one token adds: those of its key and of its value"
CACHE_SLIPS = {
    "held": (
        Slip("window-ignored", lambda layer, tokens, spec: tokens, "every layer was taken to keep every token",
             "layer.window: a full window lets the oldest token go"),
        Slip("window-too-large", lambda layer, tokens, spec: layer.window or tokens,
             "a layer with a window was given its whole window, however few tokens there are",
             "the tokens a layer holds: the smaller of two numbers"),
        Slip("window-too-large", lambda layer, tokens, spec: max(tokens, layer.window or 0),
             "the larger of tokens and window was taken", "min or max? A window is the most that a layer holds"),
        Slip("window-everywhere", lambda layer, tokens, spec: min(tokens, spec.window or tokens),
             "the model's window was taken for every layer's", LOOP),
        Slip("window-layers-left-out", lambda layer, tokens, spec: 0 if layer.window else tokens,
             "layers with a window were left out", LOOP),
        Slip("full-layers-left-out", lambda layer, tokens, spec: min(tokens, layer.window or 0),
             "layers without a window were left out", "layer.window is None: such a layer keeps every token"),
        Slip("window-off-by-one", lambda layer, tokens, spec: min(tokens, layer.window - 1) if layer.window else tokens,
             "a window of n was taken to keep n - 1 tokens", "a window keeps as many tokens as its number says"),
        Slip("window-off-by-one", lambda layer, tokens, spec: min(tokens, layer.window + 1) if layer.window else tokens,
             "a window of n was taken to keep n + 1 tokens", "a window keeps as many tokens as its number says"),
        Slip("window-dropped", lambda layer, tokens, spec: max(0, tokens - layer.window) if layer.window else tokens,
             "the tokens that a window lets go were counted", "a full window keeps what its number says"),
        Slip("window-emptied", lambda layer, tokens, spec: tokens if tokens <= (layer.window or tokens) else 0,
             "a layer whose window is full was taken to keep nothing", "a full window keeps what its number says"),
        Slip("trained-length", lambda layer, tokens, spec: layer.tokens_held(min(tokens, spec.max_seq_len)),
             "tokens beyond max_seq_len were left out", "what a layer holds: all tokens, or its newest"),
        Slip("tokens-left-out", lambda layer, tokens, spec: 1, "the cache of one token was counted", "`tokens`"),
    ),
    "heads": (
        Slip("uniform", lambda layer, spec: spec.num_kv_heads,
             "spec.num_kv_heads was used where the layer has a number of its own", LOOP),
        Slip("query-heads", lambda layer, spec: spec.num_heads, "query heads were counted, not KV heads",
             "layer.num_kv_heads: queries are not kept"),
        Slip("group-size", lambda layer, spec: spec.num_heads // spec.num_kv_heads,
             "query heads per KV head were counted, not KV heads", "layer.num_kv_heads"),
        Slip("heads-left-out", lambda layer, spec: 1, "one KV head was counted", "layer.num_kv_heads"),
    ),
    "width": (
        Slip("values-as-wide-as-keys", lambda layer, spec: 2 * layer.k_dim, "values were taken to be as wide as keys",
             "the factor 2: a layer has k_dim and v_dim"),
        Slip("values-as-wide-as-keys", lambda layer, spec: 2 * layer.v_dim, "keys were taken to be as wide as values",
             "the factor 2: a layer has k_dim and v_dim"),
        Slip("k-only", lambda layer, spec: layer.k_dim, "K was counted and V was not", WIDTHS),
        Slip("k-only", lambda layer, spec: layer.v_dim, "V was counted and K was not", WIDTHS),
        Slip("two-too-many", lambda layer, spec: 2 * (layer.k_dim + layer.v_dim),
             "k_dim + v_dim is K and V together, and was doubled", "the factor 2"),
        Slip("uniform", lambda layer, spec: 2 * spec.head_dim,
             "spec.head_dim was used where a layer's keys and values have widths of their own", LOOP),
        Slip("product-of-widths", lambda layer, spec: layer.k_dim * layer.v_dim,
             "the widths of keys and values were multiplied", "a token leaves a key and a value: k_dim + v_dim"),
        Slip("product-of-widths", lambda layer, spec: 2 * layer.k_dim * layer.v_dim,
             "the widths of keys and values were multiplied", "a token leaves a key and a value: k_dim + v_dim"),
    ),
    "layers": (
        Slip("one-layer", lambda spec: spec.each_layer[:1], "the loop ended after its first layer",
             "the indentation of `return`, and `+=` or `=`"),
        Slip("one-layer", lambda spec: spec.each_layer[-1:], "only the last layer was kept",
             "`=` where `+=` was meant, or a sum made anew in each turn"),
        Slip("first-for-all", lambda spec: spec.each_layer[:1] * spec.num_layers,
             "the first layer was taken for all of them", LOOP),
        Slip("kinds-not-layers", lambda spec: set(spec.each_layer), "layers that are alike were counted once",
             "every layer keeps its own K and V"),
        Slip("layer-missing", lambda spec: spec.each_layer[1:], "the first layer was left out", "the loop's start"),
        Slip("layer-missing", lambda spec: spec.each_layer[:-1], "the last layer was left out", "the loop's end"),
        Slip("layers-squared", lambda spec: spec.each_layer * spec.num_layers,
             "the sum over layers was multiplied by their number once more", "the loop goes over all of them already"),
    ),
    "rest": (
        Slip("ignored", lambda batch, size: size, "one request was counted", "`batch`: each has a cache of its own"),
        Slip("ignored", lambda batch, size: 2 * batch, "two bytes a number were counted", "`bytes_per_element`"),
        Slip("ignored", lambda batch, size: 4 * batch, "four bytes a number were counted", "`bytes_per_element`"),
        Slip("bytes-left-out", lambda batch, size: batch, "numbers were counted, not bytes", "`bytes_per_element`"),
        Slip("bits", lambda batch, size: 8 * batch * size, "bits were counted", "the size of one number: bytes"),
        Slip("bytes-divided", lambda batch, size: batch / size, "it was divided by the bytes of a number",
             "`bytes_per_element`: numbers x bytes per number"),
    ),
}  # fmt: skip


class CacheBytes(Exercise):
    """Bytes of a model whose layers differ."""

    id, title, minutes, difficulty = "03.1", "Bytes, layer by layer", 5, 2
    reference = staticmethod(cache_bytes)
    why = (
        "A cache is a sum over layers, and each layer knows its own heads, widths and window. Requests and bytes "
        "per number are the same for all of them, so they multiply the sum."
    )
    hints = (
        "Take one layer and one token: how many numbers are its keys, its values? How many tokens does the layer keep?",
        "Walk over spec.each_layer and add up held x num_kv_heads x (k_dim + v_dim). Requests and bytes per number "
        "come last.",
        "for layer in spec.each_layer:\n    held = tokens if layer.window is None else min(tokens, layer.window)\n"
        "    elements += held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)\n"
        "return elements * batch * bytes_per_element",
    )
    hints_for: ClassVar = {
        "window-ignored": "What does a layer do with its oldest token when the window is full?",
        "window-too-large": "A window of 4,096 and 100 tokens so far: how many does the layer hold?",
        "uniform": "spec.num_kv_heads speaks for most layers. Who speaks for this one?",
        "k-only": "A token leaves two vectors behind in every KV head. Which one is in the formula?",
        "query-heads": "Who is kept for later steps: queries, or the keys and values they meet?",
        "brackets": "num_kv_heads heads, each with a key and a value. What do the brackets hold?",
        "one-layer": "Print the sum after each turn of the loop. When does it stop growing?",
        "values-as-wide-as-keys": "A layer has a k_dim and a v_dim. Some models have narrower values.",
    }
    suspects: ClassVar = (
        Suspect("wraps", lambda *case: (cache_bytes(*case) + 2**31) % 2**32 - 2**31,
                "a sum was made in 32-bit integers, which begin again below 0 at 2**31",
                "every dtype of 32 bits: Python's own whole numbers have no end"),
        Suspect("uniform", (
                lambda spec, tokens, batch, size: 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
                * min(tokens, spec.window or tokens) * batch * size,
                lambda spec, tokens, batch, size: 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
                * tokens * batch * size), UNIFORM, LOOP),
        Suspect("hidden-size", lambda spec, tokens, batch, size: (
            2 * spec.num_layers * spec.hidden_size * tokens * batch * size),
            "hidden_size was taken for the width of a token's keys", LOOP),
        Suspect("brackets", (
            lambda spec, tokens, batch, size: batch * size * sum(
                layer.tokens_held(tokens) * (layer.num_kv_heads * layer.k_dim + layer.v_dim)
                for layer in spec.each_layer),
            lambda spec, tokens, batch, size: batch * size * sum(
                layer.tokens_held(tokens) * layer.num_kv_heads * layer.k_dim + layer.v_dim
                for layer in spec.each_layer)),
            "num_kv_heads multiplied the keys only", "the brackets around k_dim + v_dim"),
        Suspect("brackets", lambda spec, tokens, batch, size: batch * sum(
            layer.tokens_held(tokens) * layer.num_kv_heads * (layer.k_dim * size + layer.v_dim)
            for layer in spec.each_layer),
            "bytes_per_element multiplied the keys only", "the brackets around k_dim + v_dim"),
        Suspect("window-shared", lambda spec, tokens, batch, size: size * sum(
            layer.tokens_held(tokens * batch) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
            for layer in spec.each_layer),
            "one window was shared by all requests", "each request has a window of its own: `batch` comes last"),
        *suspects_of(layers_bytes, CACHE_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Models of one kind of layer and of three; below, at and above each window; each argument alone; nothing held
        and much; one call twice; more than 32 bits count; models of one name."""
        cases = [
            (FULL, 31, 37, 4), (FULL, 31, 37, 2), (FULL, 53, 37, 2), (FULL, 31, 3, 2), (MIXED, 11, 29, 2),
            (MIXED, 31, 29, 2), (MIXED, 101, 29, 2), (MIXED, 101, 1, 2), (MIXED, 37, 29, 1), (MIXED, 36, 29, 1),
            (MIXED, 38, 29, 1), (MIXED, 22, 5, 2), (MIXED, 23, 5, 2), (MIXED, 24, 5, 2), (MIXED, 1, 1, 4),
            (MIXED, 70_001, 3, 2), (WINDOWED, 4_095, 1, 2), (WINDOWED, 4_096, 1, 2), (WINDOWED, 4_097, 1, 2),
            (FULL, 31, 37, 4),
        ]  # fmt: skip
        cases += hidden(lambda chance: (
            chance.choice((FULL, MIXED, WINDOWED)), chance.randint(1, 9_999), chance.randint(1, 99),
            chance.choice((1, 2, 4)),
        ))  # fmt: skip
        nothing, much = [(FULL, 0, 7, 2), (MIXED, 0, 7, 2)], [(FULL, 640_007, 1, 1)]
        for some in (cases, nothing, much):
            judge(type(self), answer, cache_bytes, some, self.suspects, what="the cache in bytes", whole=True)
        for spec in (FULL, MIXED):
            others = [(replace(spec, num_layers=5, layers=None), 31, 37, 2), (replace(spec, head_dim=18), 31, 37, 2)]
            known = (remembered(cache_bytes, spec), *self.suspects)
            judge(type(self), answer, cache_bytes, others, known, what="the cache in bytes", whole=True)


TINY = shape("MLP 46, vocabulary 97, head of its own, no biases", (3, 6, 2, 10, 28), mlp=46, vocabulary=97)
BIASED = shape(
    "MLP 34, vocabulary 53, tied head, biases",
    (5, 4, 1, 6, 22),
    mlp=34,
    vocabulary=53,
    qkv_bias=True,
    tied_head=True,
    model_type="qwen2",
)
ROUNDED = shape(
    "MLP 26, vocabulary 61, head of its own, biases",
    (2, 6, 3, 8, 38),
    mlp=26,
    vocabulary=61,
    qkv_bias=True,
    parameters=30_000,
)
SQUARE = shape("MLP 58, vocabulary 71, tied head, no biases", (7, 3, 3, 14, 42), mlp=58, vocabulary=71, tied_head=True)
LARGER = shape(
    "MLP 1,030, vocabulary 2,003, head of its own, biases",
    (11, 10, 5, 38, 390),
    mlp=1_030,
    vocabulary=2_003,
    qkv_bias=True,
)


@cache
def live(spec: ModelSpec) -> int:
    """The weights of a model that exists."""
    return sum(weight.numel() for weight in Llama(spec).parameters())


def counted(
    *, q: float = 2, kv: float = 2, kv_heads: Callable[[ModelSpec], float] = lambda spec: spec.num_kv_heads,
    q_width: Callable[[ModelSpec], float] = lambda spec: spec.num_heads * spec.head_dim,
    head_dim: Callable[[ModelSpec], float] = lambda spec: spec.head_dim,
    bias: Callable[[ModelSpec], bool] = lambda spec: spec.qkv_bias,
    bias_width: Callable[[ModelSpec], float] | None = None,
    mlp: float = 3, norms: float | Callable[[ModelSpec], float] = 2, last: float = 1,
    more: Callable[[ModelSpec], float] = lambda spec: 0,
    tables: Callable[[ModelSpec], float] = lambda spec: 1 if spec.tied_head else 2,
    layers: Callable[[ModelSpec, float, float], float] = lambda spec, layer, outside: spec.num_layers * layer + outside,
    square: bool = False,
) -> Callable[[ModelSpec], float]:  # fmt: skip
    """The count with parts of it changed."""

    def formula(spec: ModelSpec) -> float:
        hidden, narrow = spec.hidden_size, kv_heads(spec) * head_dim(spec)
        width = q_width(spec) / spec.head_dim * head_dim(spec)
        attention = 4 * hidden**2 if square else (q * width + kv * narrow) * hidden
        biases = (bias_width(spec) if bias_width else width + 2 * narrow) if bias(spec) else 0
        count = norms(spec) if callable(norms) else norms
        layer = attention + biases + mlp * hidden * spec.intermediate_size + count * hidden
        return more(spec) + layers(spec, layer, tables(spec) * spec.vocab_size * hidden + last * hidden)

    return formula


def many(diagnosis: str, right: int, what: str, look: str, *counts: float) -> list[Slip]:
    """A part that was counted another number of times than `right`."""
    return [Slip(diagnosis, count, f"{what}: {count:g} were counted, and there are {right}", look) for count in counts]


BIASES = "the width of each bias: as many numbers as its matrix has outputs, num_heads or num_kv_heads x head_dim"
HEAD_DIM = "head_dim was taken to be hidden_size / num_heads"
CHOSEN = "spec.head_dim: a model may choose it freely, and these do"
TABLE = "the table of matrices above the blank, row by row"
TIED = "spec.tied_head: one table or two"
WEIGHT_SLIPS = {
    "square": (
        Slip("square", True, "each of the four attention matrices was taken as hidden_size squared",
             "q has num_heads x head_dim outputs, k and v num_kv_heads x head_dim"),
    ),
    "kv_heads": (
        Slip("kv-as-wide-as-q", lambda spec: spec.num_heads, "k and v were given as many heads as q", TABLE),
        Slip("group-size", lambda spec: spec.num_heads // spec.num_kv_heads,
             "query heads per KV head were counted, not KV heads", TABLE),
        Slip("kv-heads", lambda spec: 1, "k and v were given one head", TABLE),
        Slip("kv-heads", lambda spec: spec.num_kv_heads / spec.head_dim,
             "k and v were given as many outputs as there are KV heads", "num_kv_heads x head_dim"),
    ),
    "tables": (
        Slip("tied", lambda spec: 2, "the head was counted also where it is the embedding", TIED),
        Slip("tied", lambda spec: 1, "the head was left out where it is a matrix of its own", TIED),
        Slip("tied", lambda spec: 2 if spec.tied_head else 1, "tied and untied were exchanged", TIED),
        Slip("tables", lambda spec: 0, "embedding and head were left out", "what stands outside the layers"),
        Slip("tables", lambda spec: 0 if spec.tied_head else 1, "the embedding was left out", "outside the layers"),
    ),
    "q": many("output-missing", 2, "matrices of q's width, q and attention's output", TABLE, 1, 0, 3, 4),
    "kv": many("v-missing", 2, "matrices of the KV heads' width, k and v", TABLE, 1, 0, 4),
    "mlp": many("mlp", 3, "matrices of the MLP, gate, up and down", TABLE, 2, 1, 0, 4, 6),
    "norms": (
        *many("norms", 2, "norms of a layer", "two per layer, and one after the last", 1, 0, 3, 4),
        Slip("norms", lambda spec: 2 / spec.num_layers, "two norms were counted in all", "every layer has its own two"),
        Slip("norms", lambda spec: 2 * spec.hidden_size, "a norm was given hidden_size squared weights",
             "one weight per number"),
        Slip("norms", lambda spec: 2 / spec.hidden_size, "a norm was taken for one weight", "one weight per number"),
    ),
    "more": (
        Slip("output-bias", lambda spec: spec.num_layers * spec.hidden_size * spec.qkv_bias,
             "attention's output was given a bias", "the table: q, k and v have biases, where there are any"),
        Slip("mlp-bias", lambda spec: spec.num_layers * (2 * spec.intermediate_size + spec.hidden_size),
             "the MLP was given biases", "the table: no such row"),
        Slip("positions", lambda spec: spec.max_seq_len * spec.hidden_size,
             "a table of positions was counted", "a Llama-style model rotates, and has no such table"),
    ),
    "last": many("norms", 1, "norms after the last layer", "what stands outside the layers", 0, 2),
    "bias": (
        Slip("bias", lambda spec: False, "the biases of q, k and v were left out", "spec.qkv_bias"),
        Slip("bias", lambda spec: True, "biases were counted also where there are none", "spec.qkv_bias"),
        Slip("bias", lambda spec: not spec.qkv_bias, "biases were counted where there are none", "spec.qkv_bias"),
    ),
    "bias_width": (
        Slip("bias-width", lambda spec: 3 * spec.num_heads * spec.head_dim,
             "the biases of k and v were made as wide as q's", BIASES),
        Slip("bias-width", lambda spec: 3 * spec.hidden_size, "each bias was given hidden_size numbers", BIASES),
        Slip("bias-width", lambda spec: spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim,
             "q's bias was given hidden_size numbers", BIASES),
        Slip("bias-width", lambda spec: spec.hidden_size, "one bias of hidden_size numbers was counted", BIASES),
        Slip("bias-width", lambda spec: 3 * spec.num_kv_heads * spec.head_dim,
             "q's bias was made as narrow as those of k and v", BIASES),
        Slip("bias-width", lambda spec: spec.num_heads * spec.head_dim,
             "one bias was counted; q, k and v have one each", BIASES),
        Slip("bias-width", lambda spec: (spec.num_heads + spec.num_kv_heads) * spec.head_dim,
             "two biases were counted; q, k and v have one each", BIASES),
        Slip("bias-width", lambda spec: 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim,
             "four biases were counted; the output has none", BIASES),
        Slip("bias-width", lambda spec: 2 * spec.num_kv_heads * spec.head_dim, "q's bias was left out", BIASES),
        Slip("bias-width", lambda spec: (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim / spec.num_layers,
             "the biases of one layer were counted", "every layer has its own"),
        Slip("bias-width", lambda spec: 3, "a bias was taken for one number", BIASES),
    ),
    "head_dim": (
        Slip("head-dim", lambda spec: spec.hidden_size // spec.num_heads, HEAD_DIM, CHOSEN),
        Slip("head-dim", lambda spec: spec.hidden_size / spec.num_heads, HEAD_DIM, CHOSEN),
    ),
    "q_width": (
        Slip("head-dim", lambda spec: spec.hidden_size, "q's outputs were taken to be hidden_size",
             "num_heads x head_dim: a model may choose head_dim freely, and these do"),
        Slip("kv-heads", lambda spec: spec.num_kv_heads * spec.head_dim, "q was given as few heads as k and v", TABLE),
    ),
    "layers": (
        Slip("one-layer", lambda spec, layer, outside: layer + outside, "one layer was counted",
             "spec.num_layers, and what it multiplies"),
        Slip("tables-per-layer", lambda spec, layer, outside: spec.num_layers * (layer + outside),
             "what stands outside the layers was counted in each of them", "embedding, head and last norm: once"),
        Slip("tables", lambda spec, layer, outside: spec.num_layers * layer, "only the layers were counted",
             "embedding, head and last norm stand outside the layers"),
        Slip("bytes", lambda spec, layer, outside: 2 * (spec.num_layers * layer + outside), "bytes were counted",
             "the docstring: a count"),
        Slip("bytes", lambda spec, layer, outside: 4 * (spec.num_layers * layer + outside), "bytes were counted",
             "the docstring: a count"),
    ),
}  # fmt: skip


class CountWeights(Exercise):
    """The weights of a Llama shape."""

    id, title, minutes, difficulty = "03.2", "Count the weights", 5, 2
    reference = staticmethod(count_weights)
    why = (
        "A matrix has as many weights as inputs x outputs. Attention's widths are heads x head_dim, which need "
        "not be hidden_size; what stands outside the layers counts once, and a tied head is the embedding itself."
    )
    hints = (
        "Write the shape of each matrix of one layer beside its name. A matrix from n to m numbers has n x m weights.",
        "q and the output: hidden_size x num_heads x head_dim. k and v: hidden_size x num_kv_heads x head_dim. Three "
        "of hidden_size x intermediate_size. Two norms. Times layers, then what stands outside them.",
        "layer = 2*hidden*q_width + 2*hidden*kv_width + 3*hidden*intermediate + 2*hidden\n"
        "layer += q_width + 2*kv_width if spec.qkv_bias else 0\n"
        "return num_layers*layer + (1 if spec.tied_head else 2)*vocab*hidden + hidden",
    )
    hints_for: ClassVar = {
        "published": "The spec repeats what a model card says, and cards round. Count.",
        "kv-as-wide-as-q": "How many heads do k and v have under grouped-query attention?",
        "head-dim": "Does hidden_size divide by num_heads? Then print spec.head_dim beside it.",
        "bias-width": "A bias is added to the output. How many outputs does q have, and how many k?",
        "mlp": "How many matrices lead from hidden_size to intermediate_size, and how many back?",
        "norms": "Norms stand in every layer and once after the last. How many are that for three layers?",
        "output-missing": "Attention's heads are joined at its end. By which matrix?",
        "square": "num_heads x head_dim need not be hidden_size.",
        "tied": "With a tied head, one table serves twice. How often is it stored?",
    }
    suspects: ClassVar = (
        Suspect("published", lambda spec: spec.num_parameters, "the figure in the spec was handed on",
                "the sizes in the docstring: a published figure may be rounded, and here it is"),
        Suspect("head-dim", counted(more=lambda spec: spec.num_layers * spec.hidden_size * (
            spec.hidden_size - spec.num_heads * spec.head_dim)),
            "q, or attention's output, was taken as hidden_size squared", CHOSEN),
        Suspect("head-dim", counted(q_width=lambda spec: spec.hidden_size, bias_width=lambda spec: (
            (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)),
            "q and the output were taken as hidden_size squared", CHOSEN),
        *suspects_of(counted, WEIGHT_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Models that exist, with and without biases, tied or not; what their tensors hold is what must come
        out; several of one name."""
        cases = [(TINY,), (BIASED,), (ROUNDED,), (SQUARE,), (LARGER,), (TINY,)]
        cases += hidden(lambda chance: (
            replace(BIASED, num_layers=chance.randint(1, 6), hidden_size=2 * chance.randint(5, 30),
                    intermediate_size=chance.randint(5, 60), tied_head=chance.random() < 0.5),
        ), count=4)  # fmt: skip
        judge(type(self), answer, live, cases, self.suspects, what="the number of weights held", whole=True)
        others = [(replace(TINY, num_layers=4),), (replace(TINY, hidden_size=34, qkv_bias=True),)]
        known = (remembered(live, TINY), *self.suspects)
        judge(type(self), answer, live, others, known, what="the number of weights held", whole=True)
