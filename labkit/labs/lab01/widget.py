"""Where a word looks: a widget for attention weights."""

from __future__ import annotations

import html

import ipywidgets
import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.cache.recording import RecordingCache
from labkit.labs.lab01 import figures
from labkit.labs.lab01.sentence import MOST, labels
from labkit.llama import Llama
from labkit.widgets import picture, wide


def read_sentence(model: Llama, tokenizer, sentence: str, limit: int = MOST) -> tuple[list[str], Tensor]:
    """A sentence's words, one per token, and the weights `[num_layers, num_heads, tokens, tokens]`.

    Only the first `limit` tokens are read. Raises ValueError for a sentence of no tokens.
    """
    tokens = tokenizer(sentence, return_tensors="pt").input_ids[:, :limit].to(model.device)
    if tokens.shape[1] == 0:
        raise ValueError("type a sentence: there is nothing to read")
    layers = [RecordingCache() for _ in range(model.spec.num_layers)]
    model(tokens, Cache(layers))
    weights = torch.stack([layer.weights[0] for layer in layers if layer.weights is not None]).cpu()
    return labels(tokenizer, tokens), weights


class AttentionExplorer(ipywidgets.VBox):
    """Sentence, layer, head and query word in; that query's weights over the words out.

    query: the place of the word that asks at first; the last one without it.
    """

    def __init__(
        self, model: Llama, tokenizer, sentence: str, layer: int = 0, query: int | None = None, limit: int = MOST
    ) -> None:
        self.model, self.tokenizer, self.limit = model, tokenizer, limit
        self.reading = True
        spec = model.spec
        heads = [("mean of all", -1), *((str(head), head) for head in range(spec.num_heads))]
        self.sentence = ipywidgets.Text(sentence, description="sentence", continuous_update=False, **wide())
        self.layer = ipywidgets.IntSlider(
            layer, 0, spec.num_layers - 1, description="layer", continuous_update=False, **wide()
        )
        self.head = ipywidgets.Dropdown(options=heads, value=-1, description="head", **wide())
        self.query = ipywidgets.Dropdown(options=[("", 0)], description="query word", **wide())
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("attention-explorer-image")
        super().__init__([self.sentence, self.layer, self.head, self.query, self.label, self.image])
        self.add_class("attention-explorer")
        self.read(query=query)
        self.sentence.observe(self.read, "value")
        for control in (self.layer, self.head, self.query):
            control.observe(self.draw, "value")

    def read(self, change: object = None, query: int | None = None) -> None:
        """Run the model on the sentence; ask from the word at `query`, or from the last one."""
        try:
            self.words, self.weights = read_sentence(self.model, self.tokenizer, self.sentence.value, self.limit)
        except ValueError as error:
            self.label.value = html.escape(str(error))
            return
        self.reading = True  # setting options moves the value several times; one picture at the end is enough
        self.query.options = [(f"{i} · {word}", i) for i, word in enumerate(self.words)]
        last = len(self.words) - 1
        self.query.value = last if query is None else min(query, last)
        self.reading = False
        self.draw()

    def row(self) -> Tensor:
        """The weights shown, `[tokens]`."""
        heads = self.weights[self.layer.value, :, self.query.value]
        return heads.mean(0) if self.head.value < 0 else heads[self.head.value]

    def draw(self, change: object = None) -> None:
        """Bring picture and label up to date."""
        if self.reading:
            return
        row, query = self.row(), self.query.value
        head = "the mean of all heads" if self.head.value < 0 else f"head {self.head.value}"
        title = f"layer {self.layer.value}, {head}: where “{self.words[query]}” looks"
        self.image.show(figures.attention_row(row, self.words, query, title))
        best = row.topk(min(3, query + 1)).indices.tolist()
        shares = ", ".join(f"{row[i]:.0%} to {i} “{html.escape(self.words[i])}”" for i in best)
        self.label.value = (
            f"layer {self.layer.value}, {head}: {query} “{html.escape(self.words[query])}” gives {shares}"
        )
