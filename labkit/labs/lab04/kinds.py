"""04.3: what a layer of each kind keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import check_whole
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import layer_elements
from labkit.specs import Layer

CASES = (
    (Layer("full", 3, 7, 7), 5),
    (Layer("full", 3, 7, 11), 5),
    (Layer("window", 2, 13, 17, window=19), 23),
    (Layer("window", 2, 13, 17, window=19), 5),
    (Layer("latent", latent_dim=29), 31),
    (Layer("latent", 4, 7, 7, latent_dim=29), 31),
    (Layer("shared"), 31),
    (Layer("shared", 2, 13, 13), 31),
    (Layer("state", state_bytes=37), 31),
    (Layer("full", 3, 7, 11), 0),
)


class LayerElements(Exercise):
    """Five kinds of layer."""

    id, title, minutes, difficulty = "04.3", "What each kind of layer keeps", 3, 2
    reference = staticmethod(layer_elements)
    hints = (
        "Take the kinds one by one. For each: how many tokens does it hold, and how many numbers for each of them?",
        "full and window differ in the tokens held; full and latent in the numbers per token; shared and state hold "
        "none.",
        'if layer.kind == "latent": return seq_len * layer.latent_dim\n'
        'if layer.kind in ("shared", "state"): return 0\n'
        "held = seq_len if layer.window is None else min(seq_len, layer.window)\n"
        "return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)",
    )
    hints_for: ClassVar = {
        "latent-twice": "K and V are both computed from the one vector. How many vectors are kept?",
        "latent-per-head": "All heads make their K and V from the same vector.",
        "window-overfull": "After 5 tokens, can a window of 19 hold 19?",
        "shared-counted": "Whose K and V does this layer read? Where are those counted already?",
        "k-width-for-both": "K and V of one layer need not be equally wide.",
    }

    def examine(self, answer: Callable) -> None:
        """Each kind, with sizes that share no factor."""
        for layer, seq_len in CASES:
            what = f'a "{layer.kind}" layer after {seq_len} tokens'
            got = check_whole(type(self), self.call(answer, layer, seq_len), what)
            want = layer_elements(layer, seq_len)
            if got != want:
                self.explain(layer, seq_len, got, f"{what}: {got:,} numbers; it holds {want:,}")

    def explain(self, layer: Layer, seq_len: int, got: int, seen: str) -> None:
        """Name the mistake from the number that came back."""
        width, kv = layer.k_dim + layer.v_dim, layer.num_kv_heads
        held = layer.tokens_held(seq_len)
        one_side = (held * kv * layer.k_dim, held * kv * layer.v_dim)
        latent, window, dense = layer.kind == "latent", layer.kind == "window", layer.kind in ("full", "window")
        accuse(type(self), [
            Suspect("k-only", layer.k_dim == layer.v_dim and got == one_side[0] > 0, "V was not counted",
                    "both widths"),
            Suspect("k-width-for-both", dense and got in (2 * one_side[0], 2 * one_side[1]),
                    "one width was taken for K and for V", "layer.k_dim + layer.v_dim"),
            Suspect("window-ignored", window and got == seq_len * kv * width,
                    "every token was counted; those that left the window are dropped", "min"),
            Suspect("window-overfull", window and got == (layer.window or 0) * kv * width,
                    "a full window was counted before it is full", "min(seq_len, layer.window)"),
            Suspect("latent-twice", latent and got == 2 * seq_len * layer.latent_dim,
                    "the latent was counted for K and for V", "the one vector both are made from"),
            Suspect("latent-per-head", latent and kv > 0 and got > 0 and got % (seq_len * layer.latent_dim * kv) == 0,
                    "the latent was counted once per head", "all heads share one vector per token"),
            Suspect("latent-as-heads", latent and got == seq_len * kv * width,
                    "the heads' K and V were counted; they are made when needed, not kept", "layer.latent_dim"),
            Suspect("shared-counted", layer.kind == "shared" and got > 0,
                    "K and V were counted that another layer keeps", 'what the docstring says of "shared"'),
            Suspect("state-counted", layer.kind == "state" and got != 0, "a state does not grow with tokens",
                    'what the docstring says of "state"'),
            Suspect("one-token", seq_len > 1 and got > 0 and got * held in (sum(one_side), held * layer.latent_dim),
                    "the tokens were left out", "seq_len"),
        ], seen)  # fmt: skip
        self.fail("count", seen=seen, cause="a factor is missing or one too many", look="this layer, by hand")
