"""03.1: the bytes of a cache, layer by layer. 03.2: the weights beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import cache_bytes, count_weights
from labkit.llama import Llama
from labkit.specs import LayerGroup, ModelSpec

FULL = ModelSpec(
    name="11 full layers of 7 KV heads",
    num_layers=11, num_heads=35, num_kv_heads=7, head_dim=22, hidden_size=221, intermediate_size=13,
    vocab_size=17, max_seq_len=19,
)  # fmt: skip
MIXED = ModelSpec(
    name="13 layers with windows of 37 and 23, or none",
    num_layers=13, num_heads=30, num_kv_heads=3, head_dim=26, hidden_size=190, intermediate_size=13,
    vocab_size=17, max_seq_len=19, window=37, v_head_dim=10,
    layers=[LayerGroup("window", 3), LayerGroup("full", 1, num_kv_heads=5), LayerGroup("window", 1, window=23)],
)  # fmt: skip


def layers_bytes(held: Callable, numbers: Callable, count: Callable = lambda spec: spec.each_layer) -> Callable:
    """The formula with another idea of how many tokens a layer holds, or of the numbers that one token adds."""

    def formula(spec: ModelSpec, tokens: int, batch: int, size: int) -> int:
        return sum(held(layer, tokens) * numbers(layer, spec) for layer in count(spec)) * batch * size

    return formula


def held(layer, tokens: int) -> int:
    """Tokens that a layer holds."""
    return layer.tokens_held(tokens)


def numbers(layer, spec: ModelSpec) -> int:
    """Numbers that one token adds."""
    return layer.num_kv_heads * (layer.k_dim + layer.v_dim)


LOOP = "the loop: each layer says for itself how many heads, how wide, and how many tokens it keeps"


class CacheBytes(Exercise):
    """Bytes of a model whose layers differ."""

    id, title, minutes, difficulty = "03.1", "Bytes, layer by layer", 5, 2
    reference = staticmethod(cache_bytes)
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
        "values-as-wide-as-keys": "A layer has a k_dim and a v_dim. Some models have narrower values.",
    }
    suspects: ClassVar = (
        Suspect("window-ignored", layers_bytes(lambda layer, tokens: tokens, numbers),
                "every layer was taken to keep every token", "layer.window: a full window lets the oldest token go"),
        Suspect("window-too-large", layers_bytes(lambda layer, tokens: layer.window or tokens, numbers),
                "a layer with a window was given its whole window, however few tokens there are",
                "the tokens a layer holds: the smaller of two numbers"),
        Suspect("window-too-large", layers_bytes(lambda layer, tokens: max(tokens, layer.window or 0), numbers),
                "the larger of tokens and window was taken", "min or max? A window is the most that a layer holds"),
        Suspect("window-everywhere",
                lambda spec, tokens, batch, size: layers_bytes(
                    lambda layer, n: min(n, spec.window or n), numbers)(spec, tokens, batch, size),
                "the model's window was taken for every layer's", LOOP),
        Suspect("uniform",
                lambda spec, tokens, batch, size: 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
                * min(tokens, spec.window or tokens) * batch * size,
                "lab 02's formula: one number of heads and one width for all layers", LOOP),
        Suspect("uniform",
                lambda spec, tokens, batch, size: 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
                * tokens * batch * size,
                "lab 02's formula: one number of heads and one width for all layers", LOOP),
        Suspect("uniform", layers_bytes(held, lambda layer, spec: spec.num_kv_heads * (layer.k_dim + layer.v_dim)),
                "spec.num_kv_heads was used where the layer has a number of its own", LOOP),
        Suspect("values-as-wide-as-keys", layers_bytes(held, lambda layer, spec: 2 * layer.num_kv_heads * layer.k_dim),
                "values were taken to be as wide as keys", "the factor 2: a layer has k_dim and v_dim"),
        Suspect("k-only", layers_bytes(held, lambda layer, spec: layer.num_kv_heads * layer.k_dim),
                "K was counted and V was not", "the numbers that one token adds: those of its key and of its value"),
        Suspect("query-heads", layers_bytes(held, lambda layer, spec: spec.num_heads * (layer.k_dim + layer.v_dim)),
                "query heads were counted, not KV heads", "layer.num_kv_heads: queries are not kept"),
        Suspect("one-layer", layers_bytes(held, numbers, lambda spec: spec.each_layer[:1]),
                "the loop ended after its first layer", "the indentation of `return`, and `+=` or `=`"),
        Suspect("one-layer", layers_bytes(held, numbers, lambda spec: spec.each_layer[-1:]),
                "only the last layer was kept", "`=` where `+=` was meant, or a sum made anew in each turn"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """A plain model and one of three kinds of layer; below, between and above the windows; two dtypes."""
        cases = [
            (FULL, 31, 37, 4), (FULL, 31, 37, 2), (MIXED, 11, 29, 2), (MIXED, 31, 29, 2), (MIXED, 101, 29, 2),
            (MIXED, 101, 1, 2), (MIXED, 37, 29, 1),
        ]  # fmt: skip
        judge(type(self), answer, cache_bytes, cases, self.suspects, what="the cache in bytes", whole=True)


TINY = ModelSpec(
    name="3 layers, head of its own, no biases",
    num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, hidden_size=28, intermediate_size=46,
    vocab_size=97, max_seq_len=64,
)  # fmt: skip
BIASED = ModelSpec(
    name="5 layers, tied head, biases",
    num_layers=5, num_heads=4, num_kv_heads=1, head_dim=6, hidden_size=22, intermediate_size=34,
    vocab_size=53, max_seq_len=64, qkv_bias=True, tied_head=True, model_type="qwen2",
)  # fmt: skip
ROUNDED = ModelSpec(
    name="2 layers, head of its own, biases",
    num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8, hidden_size=38, intermediate_size=26,
    vocab_size=61, max_seq_len=64, qkv_bias=True, parameters=30_000,
)  # fmt: skip


def live(spec: ModelSpec) -> int:
    """The weights of a model that exists."""
    return sum(weight.numel() for weight in Llama(spec).parameters())


def counted(
    *, q: int = 2, kv: int = 2, kv_heads: str = "num_kv_heads", bias: bool | None = None, mlp: int = 3, norms: int = 2,
    tables: int | None = None, last: int = 1, layers: bool = True, square: bool = False, q_hidden: bool = False,
    head_dim: Callable[[ModelSpec], float] = lambda spec: spec.head_dim,
    bias_width: Callable[[ModelSpec], float] | None = None,
) -> Callable[[ModelSpec], float]:  # fmt: skip
    """The count with parts of it changed."""

    def formula(spec: ModelSpec) -> float:
        hidden, width = spec.hidden_size, spec.num_heads * head_dim(spec)
        narrow = getattr(spec, kv_heads) * head_dim(spec)
        width = hidden if q_hidden else width
        attention = 4 * hidden**2 if square else (q * width + kv * narrow) * hidden
        biases = (bias_width(spec) if bias_width else width + 2 * narrow) * (spec.qkv_bias if bias is None else bias)
        layer = attention + biases + mlp * hidden * spec.intermediate_size + norms * hidden
        both = (1 if spec.tied_head else 2) if tables is None else tables
        return (spec.num_layers if layers else 1) * layer + both * spec.vocab_size * hidden + last * hidden

    return formula


BIASES = "the width of each bias: as many numbers as its matrix has outputs, num_heads or num_kv_heads x head_dim"
HEAD_DIM = "head_dim was taken to be hidden_size / num_heads"
CHOSEN = "spec.head_dim: a model may choose it freely, and these do"
TABLE = "the table of matrices above the blank, row by row"


class CountWeights(Exercise):
    """The weights of a Llama shape."""

    id, title, minutes, difficulty = "03.2", "Count the weights", 5, 2
    reference = staticmethod(count_weights)
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
        "square": "num_heads x head_dim need not be hidden_size.",
        "tied": "With a tied head, one table serves twice. How often is it stored?",
    }
    suspects: ClassVar = (
        Suspect("published", lambda spec: spec.num_parameters, "the figure in the spec was handed on",
                "the sizes in the docstring: a published figure may be rounded, and here it is"),
        Suspect("square", counted(square=True), "each of the four attention matrices was taken as hidden_size squared",
                "q has num_heads x head_dim outputs, k and v num_kv_heads x head_dim"),
        Suspect("kv-as-wide-as-q", counted(kv_heads="num_heads"), "k and v were given as many heads as q", TABLE),
        Suspect("tied", counted(tables=2), "the head was counted also where it is the embedding",
                "spec.tied_head: one table or two"),
        Suspect("tied", counted(tables=1), "the head was left out where it is a matrix of its own",
                "spec.tied_head: one table or two"),
        Suspect("tables", counted(tables=0), "embedding and head were left out", "what stands outside the layers"),
        Suspect("output-missing", counted(q=1), "attention's output matrix was left out", TABLE),
        Suspect("v-missing", counted(kv=1), "k and v were counted once, not once each", TABLE),
        Suspect("mlp", counted(mlp=2), "two matrices of the MLP were counted; there are gate, up and down", TABLE),
        Suspect("norms", counted(norms=0, last=0), "the norms were left out", "two per layer, and one after the last"),
        Suspect("norms", counted(norms=1), "one norm per layer was counted", "two per layer, and one after the last"),
        Suspect("norms", counted(last=0), "the norm after the last layer was left out", "what stands outside"),
        Suspect("norms", counted(norms=0), "the norms of the layers were left out", "two per layer, one at the end"),
        Suspect("bias", counted(bias=False), "the biases of q, k and v were left out", "spec.qkv_bias"),
        Suspect("bias", counted(bias=True), "biases were counted also where there are none", "spec.qkv_bias"),
        Suspect("bias-width", counted(bias_width=lambda spec: 3 * spec.num_heads * spec.head_dim),
                "the biases of k and v were made as wide as q's", BIASES),
        Suspect("bias-width", counted(bias_width=lambda spec: 3 * spec.hidden_size),
                "each bias was given hidden_size numbers", BIASES),
        Suspect("bias-width", counted(bias_width=lambda spec: 3 * spec.num_kv_heads * spec.head_dim),
                "q's bias was made as narrow as those of k and v", BIASES),
        Suspect("bias-width", counted(bias_width=lambda spec: spec.num_heads * spec.head_dim),
                "one bias was counted; q, k and v have one each", BIASES),
        Suspect("bias-width", counted(bias_width=lambda spec: (spec.num_heads + spec.num_kv_heads) * spec.head_dim),
                "two biases were counted; q, k and v have one each", BIASES),
        Suspect("bias-width", counted(bias_width=lambda spec: 3), "a bias was taken for one number", BIASES),
        Suspect("head-dim", counted(head_dim=lambda spec: spec.hidden_size // spec.num_heads), HEAD_DIM, CHOSEN),
        Suspect("head-dim", counted(head_dim=lambda spec: spec.hidden_size / spec.num_heads), HEAD_DIM, CHOSEN),
        Suspect("head-dim", counted(q_hidden=True, bias_width=lambda spec: (
            spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim)), "q's outputs were taken to be hidden_size",
            "num_heads x head_dim: a model may choose head_dim freely, and these do"),
        Suspect("head-dim", counted(q_hidden=True), "q and the output were taken as hidden_size squared",
                "num_heads x head_dim: a model may choose head_dim freely, and these do"),
        Suspect("one-layer", counted(layers=False), "one layer was counted", "spec.num_layers, and what it multiplies"),
        Suspect("bytes", lambda spec: 2 * count_weights(spec), "bytes were counted", "the docstring: a count"),
        Suspect("bytes", lambda spec: 4 * count_weights(spec), "bytes were counted", "the docstring: a count"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Three models that exist; what their tensors hold is what must come out."""
        cases = [(TINY,), (BIASED,), (ROUNDED,)]
        judge(type(self), answer, live, cases, self.suspects, what="the number of weights held", whole=True)
