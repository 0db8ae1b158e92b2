"""04.3: what a layer of each kind keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab04.references import layer_elements
from labkit.specs import Layer

DENSE = ((3, 7, 11, 5), (3, 7, 7, 5), (1, 64, 128, 4096), (8, 13, 5, 100_003), (2, 9, 17, 1))  # the last: seq_len
WINDOWS = (23, 5, 18, 19, 20, 1, 70_000)  # tokens, with a window of 19
LATENTS = ((29, 4, 7, 5, 31), (576, 128, 192, 128, 4097), (13, 1, 2, 3, 1), (17, 0, 0, 0, 7))


def some_heads(chance: random.Random) -> tuple[int, int, int, int]:
    """KV heads, their widths, and tokens."""
    return chance.randint(1, 64), chance.randint(1, 256), chance.randint(1, 256), chance.randint(1, 5_000)


def dense(num_kv_heads: int, k_dim: int, v_dim: int, seq_len: int) -> int:
    """K and V of every token."""
    return seq_len * num_kv_heads * (k_dim + v_dim)


def windowed(window: int, num_kv_heads: int, k_dim: int, v_dim: int, seq_len: int) -> int:
    """K and V of the last `window` tokens."""
    return dense(num_kv_heads, k_dim, v_dim, min(seq_len, window))


def latent(latent_dim: int, num_kv_heads: int, k_dim: int, v_dim: int, seq_len: int) -> int:
    """One vector per token, whatever the heads."""
    return seq_len * latent_dim


def nothing(num_kv_heads: int, k_dim: int, v_dim: int, seq_len: int) -> int:
    """What shared layers and states keep of a token."""
    return 0


class LayerElements(Exercise):
    """Five kinds of layer."""

    id, title, minutes, difficulty = "04.3", "What each kind of layer keeps", 3, 2
    reference = staticmethod(layer_elements)
    why = (
        "Each kind has its own rule for what one token adds and for how many tokens stay. A latent layer keeps one "
        "vector for K and V together; shared and state layers add nothing per token."
    )
    hints = (
        "Take the kinds one by one. For each: how many tokens does it hold, and how many numbers for each of them?",
        "full and window differ in the tokens held; full and latent in the numbers per token; shared and state hold "
        "none.",
        'if layer.kind == "latent": return seq_len * layer.latent_dim\n'
        'if layer.kind in ("shared", "state"): return 0\n'
        'held = min(seq_len, layer.window) if layer.kind == "window" else seq_len\n'
        "return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)",
    )
    hints_for: ClassVar = {
        "latent-twice": "K and V are both computed from the one vector. How many vectors are kept?",
        "latent-per-head": "All heads make their K and V from the same vector.",
        "window-overfull": "After 5 tokens, can a window of 19 hold 19?",
        "shared-counted": "Whose K and V does this layer read? Where are those counted already?",
        "k-width-for-both": "K and V of one layer need not be equally wide.",
        "factor": "Numbers are asked for, not bytes: no dtype comes in, so no 2 for float16 either.",
    }

    def examine(self, answer: Callable) -> None:
        """Kind by kind, sizes that share no factor, before, at and after the edge of a window; then no token at all."""
        self.examine_kind("full", answer, dense, lambda *s: Layer("full", *s), [*DENSE, *hidden(some_heads)],
                          widths(dense))  # fmt: skip
        window = [(19, *sizes, seq_len) for sizes in ((2, 13, 17), (5, 8, 8)) for seq_len in WINDOWS]
        window += hidden(lambda chance: (chance.randint(1, 3_000), *some_heads(chance)))
        self.examine_kind(
            "window", answer, windowed, lambda window, kv, k, v: Layer("window", kv, k, v, window), window,
            [
                Suspect("window-ignored", lambda window, *sizes: dense(*sizes),
                        "every token was counted; those that left the window are dropped",
                        "min(seq_len, layer.window)"),
                Suspect("window-overfull", lambda window, kv, k, v, n: dense(kv, k, v, window),
                        "a full window was counted before it is full", "min(seq_len, layer.window)"),
                Suspect("window-overfull", lambda window, kv, k, v, n: dense(kv, k, v, max(window, n)),
                        "the larger of tokens and window was taken", "min(seq_len, layer.window)"),
                Suspect("window-off-by-one", [lambda window, *sizes: windowed(window + 1, *sizes),
                                              lambda window, *sizes: windowed(window - 1, *sizes)],
                        "one token too many or too few was counted: a window of 19 holds 19",
                        "min(seq_len, layer.window)"),
                *widths(windowed),
            ],
        )  # fmt: skip
        self.examine_kind(
            "latent", answer, latent, lambda dim, kv, k, v: Layer("latent", kv, k, v, latent_dim=dim), LATENTS,
            [
                Suspect("latent-twice", lambda dim, heads, k, v, n: 2 * n * dim,
                        "the latent was counted for K and for V", "the one vector both are made from"),
                Suspect("latent-per-head", [lambda dim, heads, k, v, n: n * dim * heads,
                                            lambda dim, heads, k, v, n: n * dim * max(1, heads),
                                            lambda dim, heads, k, v, n: 2 * n * dim * heads],
                        "the latent was counted once per head", "all heads share one vector per token"),
                Suspect("latent-as-heads", lambda dim, *sizes: dense(*sizes),
                        "the heads' K and V were counted; they are made when needed, not kept", "layer.latent_dim"),
                Suspect("latent-and-heads", lambda dim, *sizes: dense(*sizes) + sizes[-1] * dim,
                        "the heads' K and V were counted besides; they are made when needed, not kept",
                        "layer.latent_dim alone"),
                Suspect("one-token", lambda dim, *sizes: dim, "the tokens were left out", "seq_len"),
            ],
        )  # fmt: skip
        self.keeps_nothing(answer, "shared")
        self.keeps_nothing(answer, "state")
        for layer in (Layer("full", 3, 7, 11), Layer("window", 2, 13, 17, 19), Layer("latent", latent_dim=29)):
            judge(
                type(self), lambda seq_len, layer=layer: self.ask(answer, layer, seq_len), lambda seq_len: 0, [(0,)],
                (), what=f'the count of a "{layer.kind}" layer', whole=True, otherwise="no-tokens",
            )  # fmt: skip

    def ask(self, answer: Callable, layer: Layer, seq_len: int) -> object:
        """One call; what it raises is told with the kind of layer."""
        try:
            return self.call(answer, layer, seq_len)
        except NotYet as not_yet:
            found = not_yet.finding
            raise NotYet(replace(found, seen=f'a "{layer.kind}" layer: {found.seen}')) from None

    def examine_kind(self, kind: str, answer: Callable, want: Callable, layer: Callable[..., Layer],
                     cases: Sequence[tuple[int, ...]], suspects: list[Suspect]) -> None:  # fmt: skip
        """One kind of layer, beside a formula of its sizes."""
        unknown = Suspect("kind-not-met", lambda *_: 0, "no branch answers this kind: 0 is what is left for all others",
                          f'the name that is compared with layer.kind: "{kind}", letter by letter')  # fmt: skip
        judge(
            type(self), lambda *sizes: self.ask(answer, layer(*sizes[:-1]), sizes[-1]), want, cases,
            [unknown, *suspects],
            what=f'the count of a "{kind}" layer', whole=True, otherwise="count",
        )  # fmt: skip

    def keeps_nothing(self, answer: Callable, kind: Literal["shared", "state"]) -> None:
        """A layer without K and V of its own, however the heads it reads are described."""
        said = {"shared": "another layer keeps what it reads", "state": "a state does not grow with tokens"}[kind]
        judge(
            type(self),
            lambda kv, k, v, n: self.ask(answer, Layer(kind, kv, k, v, state_bytes=37 * (kind == "state")), n),
            nothing,
            ((3, 7, 11, 31), (1, 64, 64, 4097), (0, 0, 0, 7)),
            [
                Suspect(f"{kind}-counted", [dense, lambda heads, k, v, n: 2 * n * heads * k], "K and V were counted; "
                        + said, f'what the docstring says of "{kind}"'),
                Suspect(f"{kind}-counted", [lambda *_: 37, lambda *_: 37 / 2, lambda *_: 37 // 2,
                                            lambda *sizes: 37 * sizes[-1]],
                        "state_bytes was counted: it is in bytes, and does not grow with tokens",
                        f'what the docstring says of "{kind}"'),
            ],
            what=f'the count of a "{kind}" layer', whole=True, otherwise=f"{kind}-counted",
        )  # fmt: skip


def widths(want: Callable[..., int]) -> list[Suspect]:
    """Mistakes in the widths of K and V; `want` has (..., num_kv_heads, k_dim, v_dim, seq_len)."""

    def changed(change: Callable[[int, int], tuple[int, int]]) -> Callable[..., int]:
        return lambda *sizes: want(*sizes[:-3], *change(*sizes[-3:-1]), sizes[-1])

    both = "layer.k_dim + layer.v_dim"
    return [
        Suspect("k-only", [changed(lambda k, v: (k, 0)), changed(lambda k, v: (0, v))], "K or V was not counted", both),
        Suspect("k-width-for-both", [changed(lambda k, v: (k, k)), changed(lambda k, v: (v, v))],
                "one width was taken for K and for V", both),
        Suspect("widths-multiplied", changed(lambda k, v: (k * v, 0)), "the two widths were multiplied", both),
        Suspect("bracket", [lambda *s: want(*s[:-2], 0, s[-1]) + s[-2],
                            lambda *s: want(*s[:-2], 0, s[-1]) + want(*s[:-4], 1, 0, *s[-2:]),
                            lambda *s: want(*s[:-2], 0, s[-1]) + s[-4] * s[-2]],
                "v_dim was added after the product: a bracket is missing",
                "num_kv_heads x (k_dim + v_dim), then the tokens"),
        Suspect("one-head", lambda *sizes: want(*sizes[:-4], 1, *sizes[-3:]), "one KV head was counted",
                "layer.num_kv_heads"),
        Suspect("one-token", lambda *sizes: want(*sizes[:-1], 1), "the tokens were left out", "seq_len"),
    ]  # fmt: skip
