"""Figures of lab 01: attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from labkit.plots.described import described, ends, listed, number, spans
from labkit.plots.style import COLORS, HEAT, bare, figure, row_of


def lookup(query: Tensor, keys: Tensor, weights: Tensor, names: Sequence[str], features: Sequence[str]) -> Figure:
    """One query against key cards: the cards, the scores, the weights. `keys` is `[names, features]`."""
    fig, (cards, bars, shares) = row_of(3, 9.0, 2.9, widths=(2.2, 1, 1))
    table, rows = [query.tolist(), *keys.tolist()], ["query", *names]
    low, high = min(map(min, table)), max(map(max, table))
    bare(cards).imshow(table, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = value < (low + high) / 2
            cards.text(j, i, f"{value:g}", ha="center", va="center", color="white" if dark else "black")
    cards.axhline(0.5, color="white", linewidth=4)
    cards.set_xticks(range(len(features)), features)
    cards.set_yticks(range(len(rows)), rows)
    cards.set_title("the query and the key cards", fontsize=10)
    scores = (keys @ query).tolist()
    for axes, values, title, color, digits in (
        (bars, scores, "score: query · key", COLORS["key"], ".3g"),
        (shares, weights.tolist(), "weight: softmax", COLORS["query"], ".2f"),
    ):
        axes.barh(range(len(names)), values, color=color)
        for i, value in enumerate(values):
            axes.text(max(value, 0), i, f" {value + 0.0:{digits}}", va="center")  # + 0.0: no "-0"
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        low, high = min(0, *values), max(0, *values)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.4 * (high - low or 1))
        axes.grid(visible=False)  # it would cross the numbers
        axes.set_title(title, fontsize=10)
    fits = ", ".join(
        f"{name} {score:.3g} and {weight:.2f}"
        for name, score, weight in zip(names, scores, weights.tolist(), strict=True)
    )
    return described(
        fig,
        f"A query and {len(names)} key cards as rows of numbers, {listed(features)}; beside them, as bars, "
        f"each card's score and weight: {fits}.",
    )


def largest_weights(unscaled: Tensor, scaled: Tensor) -> Figure:
    """Histograms of the largest weight of each query, without and with the division by sqrt(head_dim)."""
    fig, axes = figure(7.0, 2.8)
    bins = [i / 40 for i in range(41)]
    axes.hist(scaled.tolist(), bins=bins, color=COLORS["key"], label="scores / sqrt(head_dim)")
    outline = COLORS["highlight"]
    axes.hist(unscaled.tolist(), bins=bins, color=outline, label="scores as they are", histtype="step", linewidth=2)
    axes.set(xlabel="largest weight of a query over 32 keys", ylabel="number of queries", xlim=(0, 1))
    axes.legend()
    return described(
        fig,
        "Histograms of the largest weight that a query gives to one of 32 keys. Scores as they are: half lie "
        f"above {unscaled.median():.2f}. Scores / sqrt(head_dim): half lie above {scaled.median():.2f}.",
    )


def permissions(mask: Tensor, past: int) -> Figure:
    """A causal mask, `[new_tokens, past + new_tokens]`: which keys each new token may see."""
    new_tokens, kv_len = mask.shape
    fig, axes = figure(0.55 * kv_len + 2.4, 0.5 * new_tokens + 1.4)
    color = [COLORS["pale"], COLORS["key"]]
    for i in range(new_tokens):
        for j in range(kv_len):
            seen = bool(mask[i, j])
            bare(axes).add_patch(plt.Rectangle((j, i), 1, 1, facecolor=color[seen], edgecolor="white", linewidth=2))
    if past:
        axes.axvline(past, color=COLORS["highlight"], linewidth=3)
        axes.text(past / 2, -0.15, "held", ha="center")
    axes.text(past + new_tokens / 2, -0.15, "new", ha="center")
    axes.set(xlim=(0, kv_len), ylim=(new_tokens, 0), xlabel="key at position (blue: may be seen)", aspect="equal")
    axes.set_ylabel("query")
    axes.set_xticks([j + 0.5 for j in range(kv_len)], [str(j) for j in range(kv_len)])
    axes.set_yticks([i + 0.5 for i in range(new_tokens)], [f"new {i} (at {past + i})" for i in range(new_tokens)])
    rows = "; ".join(
        f"new {i} (at {past + i}): {spans(row.nonzero().flatten().tolist())}" for i, row in enumerate(mask.cpu())
    )
    return described(
        fig, f"A grid of {new_tokens} new tokens by {kv_len} keys, {past} of them held. Keys that may be seen: {rows}."
    )


def heads_in_memory(tokens: int, num_heads: int, head_dim: int, wrong: Tensor, right: Tensor) -> Figure:
    """Which token each number of a head belongs to, for two ways of splitting `[heads, tokens, head_dim]` token ids."""
    fig, panels = row_of(2, 8.4, 2.3)
    for axes, heads, title in (
        (panels[0], wrong, "view to the final shape: heads mix tokens"),
        (panels[1], right, "each head has all tokens in order"),
    ):
        flat = heads.reshape(num_heads * tokens, head_dim).T
        bare(axes).imshow(flat.tolist(), cmap=HEAT, vmin=0, vmax=tokens - 1, aspect="auto")
        for row in range(head_dim):
            for column in range(num_heads * tokens):
                value = int(flat[row, column])
                axes.text(
                    column, row, str(value), ha="center", va="center", color="white" if value < tokens / 2 else "black"
                )
        for h in range(1, num_heads):
            axes.axvline(h * tokens - 0.5, color="white", linewidth=4)
        axes.set_xticks(
            [h * tokens + (tokens - 1) / 2 for h in range(num_heads)], [f"head {h}" for h in range(num_heads)]
        )
        axes.set_yticks([])
        axes.set_xlabel(f"in each head, from left to right: rows 0 to {tokens - 1}")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel(f"a row's {head_dim} numbers")
    fig.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    mixed, whole = (
        listed(str(token) for token in sorted(set(heads[0].flatten().tolist()))) for heads in (wrong, right)
    )
    return described(
        fig,
        f"The numbers of {num_heads} heads in two grids, each number marked by its token. Left, view to the "
        f"final shape: head 0 has numbers of tokens {mixed} alone. Right, each head has all tokens in order: "
        f"head 0 has tokens {whole}.",
    )


def turning(frequencies: Tensor, distances: Tensor, scores: Tensor) -> Figure:
    """Rotary positions: how far three pairs have turned by each position, and a score against the distance."""
    fig, (turn, score) = row_of(2, 8.6, 3.0)
    for pair, color, end in ((0, "key", 13), (8, "query", 65), (16, "value", 65)):
        positions = [step / 10 for step in range(10 * (end - 1) + 1)]
        angle = [(p * float(frequencies[pair])) % (2 * math.pi) for p in positions]
        # A line from one whole turn to the start of the next would cross the picture: break it there.
        line = [b if b >= a else math.nan for a, b in zip([0.0, *angle], angle, strict=False)]
        label = f"pair {pair}" + f", to position {end - 1}" * (end < 65)
        turn.plot(positions, line, ".-", linewidth=1, markersize=4, markevery=10, color=COLORS[color], label=label)
    turn.set(xlabel="position", ylabel="angle (a turn is 6.28)")
    turn.legend(loc="upper left", ncols=3, fontsize=8, bbox_to_anchor=(0, 1.17))
    for row, (color, style) in zip(scores, (("highlight", "-"), ("key", "--")), strict=True):
        score.plot(distances, row, style, color=COLORS[color])
    score.set(xlabel="distance between query and key (tokens)", ylabel="score")
    score.legend(
        ["query at position 100", "query at position 5,000"],
        loc="upper left", ncols=2, fontsize=8, bbox_to_anchor=(0, 1.17),
    )  # fmt: skip
    turns = listed(
        f"pair {pair} every {number(2 * math.pi / float(frequencies[pair]))} positions" for pair in (0, 8, 16)
    )
    apart = float((scores[0] - scores[1]).abs().max())
    return described(
        fig,
        f"Left, the angle of three pairs against the position, each a saw of whole turns: {turns}. Right, the "
        "score against the distance of query and key, from the query at position 100 and from the one at "
        f"5,000: two curves {'one on the other' if apart < 0.05 else f'up to {number(apart)} apart'}.",
    )


def key_change(change: Mapping[str, Sequence[float]]) -> Figure:
    """Relative change of the old tokens' keys by layer, log scale. Keys of `change`: "mask on", "mask off"."""
    fig, axes = figure(7.4, 3.2)
    for name, color in (("mask off", "highlight"), ("mask on", "key")):
        values = [max(value, 1e-9) for value in change[name]]
        axes.semilogy(range(len(values)), values, "o-", markersize=4, color=COLORS[color], label=name)
    axes.axhline(1.2e-7, color=COLORS["theory"], linestyle=":", label="spacing of float32 numbers, 1.2e-7")
    axes.set(xlabel="layer", ylabel="relative change of old keys\n(0 drawn at 1e-9)", ylim=(5e-10, 10))
    axes.legend(fontsize=8)
    most = listed(f"{name}: up to {max(values):.1e}" for name, values in change.items())
    return described(
        fig,
        f"Relative change of the old tokens' keys in each of {len(change['mask on'])} layers, log scale. "
        f"{most}; the spacing of float32 numbers, 1.2e-7, is a dotted line.",
    )


def last_row(weights: Tensor, words: Sequence[str], title: str = "") -> Figure:
    """One attention matrix `[tokens, tokens]`: the row that the next token needs framed, the others faded."""
    tokens = len(words)
    fig, axes = figure(5.4, 3.9)
    shade = [[float(weights[i, j]) if j <= i else float("nan") for j in range(tokens)] for i in range(tokens)]
    image = bare(axes).imshow(shade, cmap=HEAT, vmin=0, vmax=1)
    veil = plt.Rectangle((-0.5, -0.5), tokens, tokens - 1, facecolor="white", alpha=0.55, linewidth=0)
    axes.add_patch(veil)
    fig.colorbar(image, ax=axes, label="weight (rows above: the same scale, faded)", shrink=0.9)
    axes.add_patch(
        plt.Rectangle((-0.5, tokens - 1.5), tokens, 1, fill=False, edgecolor=COLORS["highlight"], linewidth=2.5)
    )
    axes.set(ylim=(tokens - 0.5, -0.5), xlim=(-0.5, tokens - 0.5), xlabel="key (white: hidden)", ylabel="query")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(tokens), words, rotation=60, ha="right")
    axes.set_yticks(range(tokens), words)
    weight, place = weights[-1].max(0)
    return described(
        fig,
        f"Attention weights of {tokens} words, {title}, as a triangle of queries by keys. The last row, the "
        f"one that the next token needs, is framed: “{words[-1]}” gives most, {weight:.0%}, to “{words[int(place)]}”.",
    )


def tower(weights: Tensor, words: Sequence[str], layers: Sequence[int]) -> Figure:
    """Attention of some layers, mean over heads. `weights` is `[num_layers, num_heads, tokens, tokens]`."""
    side = max(3.3, 0.6 + 0.12 * len(words))  # inches: room for one label per token
    fig, panels = row_of(len(layers), side * len(layers), side + 0.4, widths=None)
    for axes, layer in zip(panels, layers, strict=True):
        mean = weights[layer].mean(0)
        hidden = torch.ones_like(mean, dtype=torch.bool).triu(1)
        image = bare(axes).imshow(mean.masked_fill(hidden, math.nan).tolist(), cmap=HEAT, vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, mean of {weights.shape[1]} heads", fontsize=10)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        axes.set_yticks(range(len(words)), words if axes is panels[0] else [], fontsize=7)
        axes.set_xlabel("key (white: hidden)")
    panels[0].set_ylabel("query")
    fig.colorbar(image, ax=panels, label="weight", shrink=0.8)
    firsts = listed(f"{weights[layer, :, 2:, 0].mean():.0%} in layer {layer}" for layer in layers)
    return described(
        fig,
        f"Attention weights of {len(words)} words in {len(layers)} layers, each the mean of its heads, as "
        f"triangles of queries by keys. The share that goes to the first word, from the third on: {firsts}.",
    )


def where_weight_goes(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked shares of attention by layer: to the first token, the token itself, the one before, all others."""
    fig, axes = figure(7.6, 3.2)
    colors = [COLORS["highlight"], COLORS["query"], COLORS["value"], COLORS["pale"]]
    bottom = [0.0] * len(next(iter(shares.values())))
    for (name, values), color in zip(shares.items(), colors, strict=True):
        axes.bar(range(len(bottom)), values, width=1.0, bottom=bottom, color=color, label=name)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    axes.set(xlabel="layer", ylabel="share of attention,\nfrom the third token on", ylim=(0, 1))
    axes.set(xlim=(-0.5, len(bottom) - 0.5), xticks=sorted({*range(0, len(bottom), 5), len(bottom) - 1}))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4, fontsize=8)
    means = listed(
        f"{name} {sum(values) / len(values):.0%} ({min(values):.0%} to {max(values):.0%})"
        for name, values in shares.items()
    )
    return described(
        fig, f"Stacked bars, one for each layer: where attention goes. Mean over layers, and range: {means}."
    )


def attention_row(weights: Tensor, words: Sequence[str], query: int, title: str) -> Figure:
    """One query's weights over the words it may see; the query's own word is marked. `weights` is `[tokens]`."""
    fig, axes = figure(max(5.5, 0.42 * len(words) + 1.2), 2.7)
    colors = [COLORS["highlight"] if i == query else COLORS["key"] for i in range(len(words))]
    axes.bar(range(len(words)), weights.tolist(), color=colors)
    axes.axvspan(query + 0.5, len(words) - 0.5, color=COLORS["pale"], zorder=0)
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    top = min(1.0, max(0.05, 1.15 * float(weights.max())))
    axes.set(ylabel="weight", ylim=(0, top), xlim=(-0.6, len(words) - 0.4))
    axes.set_xlabel("key (orange: the asking token itself; grey: hidden)")
    axes.set_title(title, fontsize=10)
    best = weights[: query + 1].topk(min(3, query + 1))
    most = listed(
        f"{weight:.0%} to {place} “{words[place]}”"
        for weight, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return described(
        fig,
        f"Bars: {title}, a bar for each of {len(words)} words. Most goes to: {most}; words after {query} are hidden.",
    )


def times_by_length(
    lengths: Sequence[int], seconds: Mapping[str, Sequence[float]], ylabel: str = "milliseconds", title: str = ""
) -> Figure:
    """Measured time against the number of tokens, both axes logarithmic."""
    fig, axes = figure(7.0, 3.3)
    looks = [(COLORS["without cache"], "o-"), (COLORS["key"], "s-"), (COLORS["value"], "^-")]
    for (name, values), (color, style) in zip(seconds.items(), looks, strict=False):
        axes.loglog(lengths, [1e3 * value for value in values], style, color=color, label=name, markersize=5)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens in the prompt", ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.legend()
    return described(
        fig,
        f"Lines: {ylabel} against tokens in the prompt, both axes logarithmic. {ends(seconds, lengths, 'ms', 1e3)}.",
    )
