"""What to forget: quality, recall, bytes and time of caches that evict, against the full one.

    python -m benchmarks.eviction [--texts 6] [--trials 40] [--rounds 7] [--only half kvpress sinks recall bytes time]

One run, the lab model in float32.

half: of passages of the project's texts 256 tokens go through the model at once, every layer keeps 128 of them, and the
112 predictions that follow go through what is left; what is kept is also packed in 8 and 4 bits, and shared among heads
(whose bytes are then more than half). Beside the policies stand two that drop nothing: merging (neighbours averaged,
128 entries), and Quest, which keeps all and lets each of the 112, one by one, read 128 in every layer, or all in the
first two. kvpress: the same passages and policies in kvpress, in an environment of its own. sinks: a window of 256
tokens, with no sink, one and four, over 768 tokens that come 16 at a time; the last 512 are scored. bytes: what is held
beside what sizing says of the budget, and what a decode step at 2,000 tokens reads of its caches. recall: a four-digit
number planted early, in the middle or late in prose; the question is either read with the text, before eviction
(known), or after it (not known). The policy that is best at a quarter is chosen on half of the trials and judged on
the rest; "SnapKV for a question" was tuned on such questions about the same texts, with other numbers at other places,
the others have their papers' parameters. time: decode steps in alternation, the last of all and only on a quiet
machine. A full cache of 2,000 tokens against one that evicts a token at every step, chosen then or several at once
(`eviction_times.OVERHEAD`); the caches of a step, without the model's products, that hold 8,000 tokens against those
that keep a quarter of them. A sample has as many steps as are chosen for at once; the slowest of them is told, too.
Merging and Quest are timed beside the others, without a bar, since they evict nothing.

Figures come to stdout, part by part, and what is done to stderr. Where the machine is not quiet when times are due,
all other figures stand and a bar says that times are missing.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from itertools import combinations

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch
from torch import Tensor

from benchmarks import kvpress_environment, kvpress_side, report
from benchmarks.eviction_caches import SHARES, filled, logits_of, policies, progress, quest, step_of_caches
from benchmarks.eviction_recall import measure_recall, recall_figures
from benchmarks.eviction_times import measure_times
from benchmarks.report import bar, finish
from labkit import models, quality, sizing
from labkit.cache import Cache
from labkit.cache.evicting import ExpectedAttention, KeyNorm, Merging, Random, SnapKV, Window
from labkit.device import set_threads
from labkit.llama import Llama
from labkit.measure import device_name
from labkit.quality import Quality
from labkit.quality.compare import score
from labkit.quality.reading import read

PROMPT, KEPT, SCORED = 256, 128, 112
PASSAGES = (0, 800, 1600)  # tokens at which they begin
WINDOW, SEEN, CHUNK = 256, 768, 16
PARTS = ("half", "kvpress", "sinks", "bytes", "recall", "time")  # in the order in which they are measured
# The policies that are ranked, from best to worst.
RANKING = ("SnapKV", "H2O, mean", "KeyDiff", "expected attention", "TOVA", "sinks and window", "key norm", "random")


def passage_quality(model: Llama, tokens: Tensor, makers: dict[str, Callable[[], Cache]]) -> dict[str, Quality]:
    """Of each cache beside the full one, of the predictions that follow a prompt of 256 tokens, `[1, 369]` in all."""
    rows, reference, full = {}, None, None
    reading = read(model, tokens[:, :PROMPT])
    for name, make in {"full": model.cache, **makers}.items():
        cache = reading.given(make())
        logs = logits_of(model, tokens[:, PROMPT : PROMPT + SCORED], cache).double().log_softmax(dim=-1)
        reference = logs if reference is None else reference
        rows[name] = score(logs, reference, tokens[0, PROMPT + 1 : PROMPT + SCORED + 1])
        full = rows[name] if full is None else full
    assert full is not None
    return {name: Quality(found[0], full[0], found[1], found[2].bool()) for name, found in rows.items()}


def measure_half(model: Llama, texts: dict[str, Tensor]) -> dict[str, Quality]:
    """Quality of every policy at half the cache, passages pooled."""
    makers = {
        name: lambda policy=policy: Cache.evicting(model.spec.num_layers, policy, KEPT, during="prompt")
        for name, policy in policies(model).items()
    }
    for nbits in (8, 4):
        makers[f"SnapKV, int{nbits}"] = lambda nbits=nbits: Cache.evicting(
            model.spec.num_layers, SnapKV(window=32), KEPT, during="prompt", nbits=nbits
        )
        makers[f"all, int{nbits}"] = lambda nbits=nbits: Cache.quantized(
            model.spec.num_layers, nbits, group_size=32, residual_length=32
        )
    makers["Quest"] = lambda: quest(model, KEPT)
    makers["Quest, two layers whole"] = lambda: quest(model, KEPT, whole=2)
    makers["SnapKV, heads share"] = lambda: Cache.evicting(
        model.spec.num_layers, SnapKV(window=32), KEPT, during="prompt", safeguard=0.2
    )
    found: dict[str, list[Quality]] = {}
    for place, part in enumerate(parts := passages(texts)):
        drawn = Random(seed=place)  # of its own for each passage: one draw for all would be luck
        makers["random"] = lambda drawn=drawn: Cache.evicting(model.spec.num_layers, drawn, KEPT, during="prompt")
        for name, result in passage_quality(model, part, makers).items():
            found.setdefault(name, []).append(result)
        progress(f"half the cache: passage {place + 1} of {len(parts)}")
    return {name: Quality.pooled(some) for name, some in found.items()}


@torch.inference_mode()
def wrong_counts(model: Llama, tokens: Tensor) -> int:
    """In how many layers of all policies another number of tokens stands than half of the prompt, which is kept."""
    reading, wrong = read(model, tokens[:, :PROMPT]), 0
    for policy in policies(model).values():
        cache = reading.given(Cache.evicting(model.spec.num_layers, policy, KEPT, during="prompt"))
        wrong += sum(layer.physical_len != KEPT for layer in cache.layers)
    return wrong


def passages(texts: dict[str, Tensor]) -> list[Tensor]:
    """Pieces of the texts, int `[1, 369]` each: a prompt, what is scored, and the token after it."""
    size = PROMPT + SCORED + 1
    pieces = [tokens[:, start : start + size] for tokens in texts.values() for start in PASSAGES]
    return [piece for piece in pieces if piece.shape[1] == size]


def beside_kvpress(half: dict[str, Quality], texts: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """kvpress' perplexities on the same passages, and the bars of ours beside them; `random` is another draw there."""
    theirs = kvpress_side.measure([piece[0].tolist() for piece in passages(texts)], prompt=PROMPT, kept=KEPT)
    for name, value in theirs.items():
        print(f"  kvpress, {name:<24} perplexity {value:.3f}", flush=True)
    figures = {f"half, {name}: kvpress' perplexity": round(value, 3) for name, value in theirs.items()}
    both = [name for name in theirs if name in half and name not in ("full", "random")]
    worse = {name: half[name].perplexity - theirs[name] for name in both}
    ours = {name: half[name].perplexity for name in both}
    other_way = [
        (one, other)
        for one, other in combinations(both, 2)
        if (ours[one] - ours[other]) * (theirs[one] - theirs[other]) < 0
        and min(abs(ours[one] - ours[other]), abs(theirs[one] - theirs[other])) > 0.1
    ]
    apart = abs(half["full"].perplexity - theirs["full"]) if "full" in theirs else math.inf
    return figures, [
        bar("the full cache: perplexity apart from kvpress'", apart, "<=", 0.1),  # the same question is asked there
        *(bar(f"{name}: perplexity above kvpress'", more, "<=", 0.1) for name, more in worse.items()),
        bar("pairs of policies, more than 0.1 apart, that kvpress ranks the other way", len(other_way), "<=", 0),
    ]


def measure_sinks(model: Llama, texts: dict[str, Tensor]) -> dict[str, Quality]:
    """Quality of a window with and without sinks, at the positions of the text and at those in the cache."""
    makers = {
        f"{sinks} sinks{where}": lambda sinks=sinks, turn=turn: Cache.evicting(
            model.spec.num_layers, Window(sinks=sinks), WINDOW, frequencies=turn
        )
        for where, turn in (("", None), (", places in the cache", model.frequencies))
        for sinks in (0, 1, 4)
    }
    found: dict[str, list[Quality]] = {}
    for place, tokens in enumerate(texts.values()):
        progress(f"sinks: text {place + 1} of {len(texts)}")
        for name, one in quality.compare(model, tokens[:, :SEEN], makers, chunk=CHUNK, context=WINDOW).items():
            found.setdefault(name, []).append(one)
    return {name: Quality.pooled(parts) for name, parts in found.items()}


def wrong_bytes(model: Llama, tokens: Tensor) -> int:
    """By how many bytes caches were off from what sizing says of the budget, over all steps and policies."""
    off, budget = 0, 48
    heads, dim, layers = model.spec.num_heads, model.spec.head_dim, model.spec.num_layers
    packing = sizing.Quantized(4, 16, 8, "float32", drops=False)
    packed = {"nbits": 4, "group_size": 16, "residual_length": 8}
    caches = [(Cache.evicting(layers, KeyNorm(), budget + 16, **packed), sizing.Evicting(budget + 16, packing=packing))]
    for policy in policies(model).values():
        policy = SnapKV(window=32) if isinstance(policy, SnapKV) else policy
        rows = 4 * heads * (dim * dim + dim + 1) if isinstance(policy, ExpectedAttention) else 0
        victims = 2 if isinstance(policy, Merging) else 1  # a pair for one slot
        tally = policy.lasting and not rows
        kept = sizing.Evicting(budget, "float32", tally=tally, victims=victims, state_bytes=rows)
        caches.append((Cache.evicting(layers, policy, budget), kept))
    for cache, kept in caches:
        for first, end in [(0, 64), *((i, i + 1) for i in range(64, 72)), (72, 80), (80, 81)]:
            model(tokens[:, first:end], cache, last_only=True)
            off += abs(cache.nbytes - sizing.cache_bytes(model.spec, end, 1, kept))
    return off


@torch.inference_mode()
def bytes_read(model: Llama) -> dict[tuple[str, float], int]:
    """What a decode step at 2,000 tokens seen reads of its caches, by what is kept or read and the share."""
    tokens, spec = 2000, model.spec
    makers: dict[tuple[str, float], Callable[[], Cache]] = {("full", 1.0): model.cache}
    for share in SHARES[1:]:
        budget = int(share * tokens)
        for name in ("sinks and window", "merging"):  # every policy that evicts reads as much as the first
            policy = policies(model)[name]
            makers[name, share] = lambda policy=policy, budget=budget: Cache.evicting(spec.num_layers, policy, budget)
        makers["Quest", share] = lambda budget=budget: quest(model, budget)
    found = {}
    for which, make in makers.items():
        cache = filled(make(), spec, tokens)
        before = sum(layer.bytes_read for layer in cache.layers)
        step_of_caches(cache, spec)
        found[which] = sum(layer.bytes_read for layer in cache.layers) - before
    return found


def quality_figures(part: str, results: dict[str, Quality]) -> dict[str, float]:
    """Perplexities, and what they differ by from the full cache's."""
    figures: dict[str, float] = {}
    for name, result in results.items():
        print(f"  {name:<32} {result}", flush=True)
        figures |= {
            f"{part}, {name}: perplexity": round(result.perplexity, 3),
            f"{part}, {name}: minus full": round(result.difference, 3),
            f"{part}, {name}: minus full, spread": round(result.difference_spread, 3),
            f"{part}, {name}: KL": round(result.kl, 5),
        }
    return figures


def half_part(model: Llama, texts: dict[str, Tensor]) -> tuple[dict[str, float], list[dict], dict[str, Quality]]:
    """Figures and bars of half the cache, and what they were made of."""
    print(f"{KEPT} of {PROMPT} tokens kept, {SCORED} predictions behind each passage:")
    half = measure_half(model, texts)
    figures = quality_figures("half", half)
    worst = max((name for name in half if name != "random"), key=lambda name: half[name].perplexity)
    drawn = beside(half["random"], half[worst])
    figures["half, random's perplexity over the worst other's"] = round(drawn.ratio, 4)
    figures["half, random's perplexity over the worst other's, spread"] = round(drawn.ratio_spread, 4)
    print(
        f"  the worst but random is {worst}: random has {drawn.ratio:.3f} ± {drawn.ratio_spread:.3f} of its perplexity"
    )
    print(f"  from best to worst: {', '.join(sorted(RANKING, key=lambda name: half[name].perplexity))}")
    least = drawn.ratio - (2 * drawn.ratio_spread if drawn.blocks > 1 else 0)
    bars = [
        bar("random's perplexity over the worst other's, two standard errors less", least, ">=", 1.1),
        bar("SnapKV's perplexity over the full cache's", half["SnapKV"].ratio, "<=", 1.05),
        bar("layers that keep another number of tokens", wrong_counts(model, next(iter(texts.values()))), "<=", 0),
    ]
    return figures, bars, half


def beside(one: Quality, other: Quality) -> Quality:
    """One cache's predictions beside another's of the same tokens; of the divergence nothing is said."""
    unknown = torch.full_like(one.divergence, math.nan)
    return Quality(one.surprise, other.surprise, unknown, one.agrees)


def kvpress_part(half: dict[str, Quality], texts: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars beside kvpress'; where it gives no answer, what was measured before is kept."""
    try:
        return beside_kvpress(half, texts)
    except kvpress_side.KvpressError as error:
        print(f"  {error}")
        return {}, [bar("kvpress ran", 0, ">=", 1)]


def sinks_part(model: Llama, texts: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars of a window with and without sinks."""
    print(f"a window of {WINDOW} of {SEEN} tokens:")
    sinks = measure_sinks(model, texts)
    return quality_figures("window", sinks), [
        bar("no sinks, perplexity over the full cache's", sinks["0 sinks"].ratio, ">=", 1.5),
        *(bar(f"{n} sinks, perplexity over the full cache's", sinks[f"{n} sinks"].ratio, "<=", 1.15) for n in (1, 4)),
    ]


def bytes_part(model: Llama, texts: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """Figures of what a step reads, and the bar on what is held."""
    figures: dict[str, float] = {}
    for (name, share), count in (reads := bytes_read(model)).items():
        figures[f"bytes a step reads at 2000 tokens, {name} at {share:.0%}"] = count
        less = count / reads["full", 1.0]
        print(f"  2,000 tokens, {name} at {share:.0%}: a step reads {count / 1e6:.1f} MB of its caches, {less:.1%}")
    wrong = wrong_bytes(model, next(iter(texts.values())))
    return figures, [bar("bytes beside the budget's, all steps and policies", wrong, "<=", 0)]


def time_part(model: Llama, rounds: int) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars of times, if the machine is quiet now; else one bar that says that they are missing."""
    if reason := report.busy():
        print(f"  no times: {reason}")
        return {}, [bar("times were measured", 0, ">=", 1)]
    return measure_times(model, rounds)


def measured(
    arguments: argparse.Namespace, model: Llama, encode: Callable[[str], list[int]], texts: dict[str, Tensor]
) -> tuple[dict[str, float], list[dict]]:
    """Figures and bars of the parts that are asked for: first what a busy machine measures as well, times last."""
    figures: dict[str, float] = {}
    bars: list[dict] = []
    half: dict[str, Quality] = {}

    def recall_part() -> tuple[dict[str, float], list[dict]]:
        print("a planted number, all places together, with intervals at 95%:")
        return recall_figures(measure_recall(model, encode, texts, arguments.trials), len(texts))

    def first_part() -> tuple[dict[str, float], list[dict]]:
        more, own, found = half_part(model, texts)
        half.update(found)
        return more, own

    parts = {
        "half": first_part,
        "kvpress": lambda: kvpress_part(half, texts),
        "sinks": lambda: sinks_part(model, texts),
        "bytes": lambda: bytes_part(model, texts),
        "recall": recall_part,
        "time": lambda: time_part(model, arguments.rounds),
    }
    for name in PARTS:
        if name in arguments.only:
            more, own = parts[name]()
            figures, bars = figures | more, bars + own
            progress(f"{name}: done")
    return figures, bars


def asked_for(names: Sequence[str]) -> argparse.Namespace:
    """What the command line says, of so many texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--texts", type=int, default=len(names), help="how many of the project's texts")
    parser.add_argument("--trials", type=int, default=40, help="numbers planted at each of the three places")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    arguments = parser.parse_args()
    if "kvpress" in arguments.only and "half" not in arguments.only:
        parser.error("kvpress is measured beside `half`: name both")
    return arguments


def make_kvpress_ready() -> None:
    """Its environment, first of all: what was measured for long should not end for want of it."""
    try:
        kvpress_environment.ready()
    except kvpress_environment.NotMade as error:
        without = " ".join(part for part in PARTS if part != "kvpress")
        raise SystemExit(f"{error}\nOr leave it out: --only {without}") from None


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    names = sorted(path.stem for path in quality.TEXTS.glob("*.txt"))
    arguments = asked_for(names)
    set_threads()
    if "kvpress" in arguments.only:
        make_kvpress_ready()
    model, tokenizer = models.load(device="cpu"), models.tokenizer()
    texts = {
        name: tokenizer(quality.load_text(name), return_tensors="pt").input_ids for name in names[: arguments.texts]
    }
    progress("the model is loaded")
    print(f"{device_name()}; {len(texts)} texts")
    figures, bars = measured(arguments, model, lambda text: tokenizer(text, add_special_tokens=False).input_ids, texts)
    for entry in bars:
        print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
    command = f"python -m benchmarks.eviction --texts {arguments.texts} --trials {arguments.trials}"
    only = "" if tuple(arguments.only) == PARTS else f" --only {' '.join(arguments.only)}"
    return finish("eviction", figures, bars, "cpu", f"{command} --rounds {arguments.rounds}{only}")


if __name__ == "__main__":
    raise SystemExit(main())
