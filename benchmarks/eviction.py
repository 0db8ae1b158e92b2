"""What to forget: quality, recall, bytes and time of caches that evict, against the full one.

    python -m benchmarks.eviction [--texts 6] [--trials 40] [--rounds 7] [--only half kvpress sinks recall bytes time]

One run, the lab model in float32.

half: of passages of the project's texts 256 tokens go through the model at once, every layer keeps 128 of them, and the
112 predictions that follow go through what is left; what is kept is also packed in 8 and 4 bits, and shared among heads
(whose bytes are then more than half). Beside the policies stand two that drop nothing: merging (neighbours averaged,
128 entries), and Quest, which keeps all and lets each of the 112, one by one, read 128 in every layer, or all in the
first two. kvpress: the same passages and policies in kvpress, in an environment of its own. sinks: a window of 256
tokens, with no sink, one and four, over 768 tokens that come 16 at a time; the last 512 are scored. recall: a
four-digit number planted early, in the middle or late in prose; the question is either read with the text, before
eviction (known), or after it (not known). bytes: what is held beside what sizing says of the budget, and what a decode
step at 2,000 tokens reads of its caches. time: decode steps in alternation. A full cache of 2,000 tokens against one
that evicts a token at every step, chosen then or several at once (`OVERHEAD`); the caches of a step, without the
model's products, that hold 8,000 tokens against those that keep a quarter of them. A sample has as many steps as are
chosen for at once.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from functools import partial
from itertools import combinations

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs: a busy neighbour must not decide a comparison

import torch
from torch import Tensor

from benchmarks import kvpress_environment, kvpress_side
from benchmarks.report import bar, begin, finish
from labkit import models, quality, sizing
from labkit.cache import Cache
from labkit.cache.evicting import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Merging,
    Policy,
    Random,
    SnapKV,
    Window,
)
from labkit.device import set_threads
from labkit.llama import Llama
from labkit.measure import Timing, alternate, device_name
from labkit.quality import Quality
from labkit.quality.compare import score
from labkit.quality.reading import read
from labkit.quality.recall import NUMBER, PLACES, QUESTION, planted, wilson
from labkit.specs import ModelSpec

PROMPT, KEPT, SCORED = 256, 128, 112
PASSAGES = (0, 800, 1600)  # tokens at which they begin
WINDOW, SEEN, CHUNK = 256, 768, 16
TEXT_TOKENS = 300
SHARES = (1.0, 0.5, 0.25, 0.12)
PAGE = 16  # tokens to a page of Quest's
PARTS = ("half", "kvpress", "sinks", "recall", "bytes", "time")
# The policies that are ranked, from best to worst.
RANKING = ("SnapKV", "H2O, mean", "KeyDiff", "expected attention", "TOVA", "sinks and window", "key norm", "random")
OVERHEAD = {  # policies at 2,000 tokens, and how many victims are chosen at once
    "sinks and window": 1, "H2O": 1, "TOVA": 1, "key norm": 16, "SnapKV": 16, "KeyDiff": 16, "expected attention": 128,
}  # fmt: skip


def policies(model: Llama) -> dict[str, Policy]:
    """Every policy, by the name that it has in figures."""
    return {
        "SnapKV": SnapKV(window=32),
        "SnapKV, window of 64": SnapKV(),
        "SnapKV for a question": SnapKV(window=4, pool=13, pool_by="max", sinks=4),
        "H2O": H2O(),
        "H2O, mean": H2O(recent=0, mean=True),
        "KeyDiff": KeyDiff(),
        "expected attention": ExpectedAttention(frequencies=model.frequencies),
        "TOVA": TOVA(),
        "sinks and window": Window(sinks=4),
        "key norm": KeyNorm(),
        "merging": Merging(frequencies=model.frequencies),
        "random": Random(),
    }


def logits_of(model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
    """Of each token, `[tokens, vocab_size]`; one by one where the cache reads less in a step of one token alone."""
    pieces = tokens.split(1 if any(layer.selects for layer in cache.layers) else tokens.shape[1], dim=1)
    return torch.cat([model(piece, cache)[0] for piece in pieces])


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


def quest(model: Llama, tokens: int, whole: int = 0) -> Cache:
    """A cache that keeps all and reads so many tokens in every layer but the first `whole`, in the paper 2."""
    budget = max(tokens, 2 * PAGE)
    return Cache.selecting(model.spec.num_layers, lambda layer: budget if layer >= whole else 10**9, page_size=PAGE)


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
    for place, part in enumerate(passages(texts)):
        drawn = Random(seed=place)  # of its own for each passage: one draw for all would be luck
        makers["random"] = lambda drawn=drawn: Cache.evicting(model.spec.num_layers, drawn, KEPT, during="prompt")
        for name, result in passage_quality(model, part, makers).items():
            found.setdefault(name, []).append(result)
    return {name: Quality.pooled(parts) for name, parts in found.items()}


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
    both = [name for name in theirs if name in half and name != "random"]
    apart = {name: abs(half[name].perplexity - theirs[name]) for name in both}
    ours = {name: half[name].perplexity for name in both}
    other_way = [
        (one, other)
        for one, other in combinations(both, 2)
        if (ours[one] - ours[other]) * (theirs[one] - theirs[other]) < 0
        and min(abs(ours[one] - ours[other]), abs(theirs[one] - theirs[other])) > 0.1
    ]
    return figures, [
        *(bar(f"{name}: perplexity beside kvpress'", off, "<=", 0.1) for name, off in apart.items()),
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
    for tokens in texts.values():
        for name, one in quality.compare(model, tokens[:, :SEEN], makers, chunk=CHUNK, context=WINDOW).items():
            found.setdefault(name, []).append(one)
    return {name: Quality.pooled(parts) for name, parts in found.items()}


def recalls(model: Llama, cache: Cache, asked: list[int], answer: list[int]) -> bool:
    """Whether every token of the answer is the likeliest behind what the cache holds and what is still `asked`."""
    logits = logits_of(model, torch.tensor([asked + answer[:-1]]), cache)[-len(answer) :]
    return logits.argmax(dim=-1).tolist() == answer


def recall_caches(model: Llama, tokens: int) -> dict[tuple[str, float], Callable[[], Cache]]:
    """Every cache that is asked for a number, for a text of so many tokens, by its name and share."""
    makers: dict[tuple[str, float], Callable[[], Cache]] = {("full", 1.0): model.cache}
    for name, policy in policies(model).items():
        if "window of 64" in name:
            continue  # more than a budget of 12%
        for share in SHARES[1:]:  # all of it is the full cache, whoever chooses
            makers[name, share] = lambda policy=policy, share=share: Cache.evicting(
                model.spec.num_layers, policy, share, during="prompt"
            )
    return makers | {("Quest", share): lambda share=share: quest(model, int(share * tokens)) for share in SHARES[1:]}


def measure_recall(
    model: Llama, encode: Callable[[str], list[int]], texts: dict[str, Tensor], trials: int
) -> dict[tuple[str, float, bool, str], tuple[int, int]]:
    """Hits and trials by policy, share of the cache, whether the question was known, and place."""
    chance, found = random.Random(0), {}
    proses = [tokens[0].tolist() for tokens in texts.values()]
    question = encode(QUESTION)
    for place, share_of_text in PLACES.items():
        for trial in range(trials):
            number = str(chance.randint(1000, 9999))
            start = chance.randrange(0, 1500)
            fact = encode(NUMBER.format(number))
            text = planted(proses[trial % len(proses)][start:], {share_of_text: fact}, TEXT_TOKENS)
            answer = encode(f" {number}")
            for known in (True, False):
                # Of a known question all but the last token is read with the text: eviction lies before the answer.
                first = len(text) + (len(question) - 1 if known else 0)
                asked = text + question
                reading = read(model, torch.tensor([asked[:first]]))
                for (name, share), make in recall_caches(model, first).items():
                    hit = recalls(model, reading.given(make()), asked[first:], answer)
                    hits, tried = found.get((name, share, known, place), (0, 0))
                    found[name, share, known, place] = hits + hit, tried + 1
    return found


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


def filled(cache: Cache, spec: ModelSpec, tokens: int) -> Cache:
    """The cache with so many random tokens, in one step."""
    generator = torch.Generator().manual_seed(0)
    with cache.step([tokens]) as step:
        for layer in cache.layers:
            k, v = torch.randn(2, 1, spec.num_kv_heads, tokens, spec.head_dim, generator=generator)
            layer.append(k, v, step)
    return cache


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


def step_of_caches(cache: Cache, spec: ModelSpec) -> None:
    """One token through the layers of a cache, without the model's products."""
    generator = torch.Generator().manual_seed(cache.seq_len)
    k, v = torch.randn(2, 1, spec.num_kv_heads, 1, spec.head_dim, generator=generator)
    q = torch.randn(1, spec.num_heads, 1, spec.head_dim, generator=generator)
    with cache.step([1]) as step:
        for layer in cache.layers:
            layer.append(k, v, step)
            layer.attend(q, step)


@torch.inference_mode()
def measure_overhead(model: Llama, rounds: int) -> dict[str, Timing]:
    """A decode step of the whole model at 2,000 tokens: full, and evicting one at every step."""
    tokens, spec = 2000, model.spec
    caches = {"full": filled(model.cache(tokens + (rounds + 2) * 16), spec, tokens)}
    for name, every in OVERHEAD.items():
        caches[name] = filled(Cache.evicting(spec.num_layers, policies(model)[name], tokens, every=every), spec, tokens)
    token = torch.tensor([[7]])

    return times_of_steps(caches, lambda cache: model(token, cache, last_only=True), 16, rounds)


def times_of_steps(
    caches: dict[str, Cache], act: Callable[[Cache], object], least: int, rounds: int
) -> dict[str, Timing]:
    """Seconds of one `act` on each cache, in alternation: a sample is the mean of `least`, or of a whole round of
    choosing where several victims are chosen at once."""
    steps = {name: max(least, OVERHEAD.get(name, 1)) for name in caches}

    def run(name: str) -> None:
        for _ in range(steps[name]):
            act(caches[name])

    timings = alternate({name: partial(run, name) for name in caches}, repeats=rounds, warmup=1)
    return {name: Timing(tuple(sample / steps[name] for sample in one.samples)) for name, one in timings.items()}


@torch.inference_mode()
def measure_quarter(model: Llama, rounds: int) -> dict[str, Timing]:
    """What a step spends on its caches, attention and evicting, at 8,000 tokens seen: all of them, and a quarter kept.

    In all layers, without the model's products: what a step does once for all of them counts once, as in the model.
    """
    seen, spec = 8000, model.spec
    caches = {"full": filled(model.cache(seen + (rounds + 2) * 4), spec, seen)}
    for name, every in OVERHEAD.items():
        policy = policies(model)[name]
        caches[name] = filled(Cache.evicting(spec.num_layers, policy, seen // 4, every=every), spec, seen)
    return times_of_steps(caches, lambda cache: step_of_caches(cache, spec), 4, rounds)


def recall_figures(found: dict[tuple[str, float, bool, str], tuple[int, int]]) -> tuple[dict[str, float], list[dict]]:
    """Shares and their intervals by cell, and the bar on the best policy at a quarter."""
    figures: dict[str, float] = {}
    totals: dict[tuple[str, float, bool], list[int]] = {}
    places = list(dict.fromkeys(place for *_, place in found))
    for (name, share, known, place), (hits, trials) in found.items():
        low, high = wilson(hits, trials)
        cell = f"recall, {name} at {share:.0%}, {'known' if known else 'not known'}, {place}"
        figures |= {cell: round(hits / trials, 4), f"{cell}, low": round(low, 4), f"{cell}, high": round(high, 4)}
        total = totals.setdefault((name, share, known), [0, 0])
        total[0], total[1] = total[0] + hits, total[1] + trials
    for (name, share, known), (hits, trials) in totals.items():
        asked = "known" if known else "not known"
        by_place = [f"{place} {told(*found[name, share, known, place])}" for place in places]
        print(f"  {name:<22} {share:4.0%} {asked:<9} {told(hits, trials)}, {trials} trials; {', '.join(by_place)}")
    full = {known: totals["full", 1.0, known] for known in (True, False) if ("full", 1.0, known) in totals}
    bars = []
    for known, (hits, trials) in full.items():
        ceiling, asked = max(hits / trials, 1e-9), "known" if known else "not known"
        at_quarter = {
            name: hits / n / ceiling
            for (name, share, known_), (hits, n) in totals.items()
            if (share, known_) == (0.25, known) and name != "Quest"  # which evicts nothing
        }
        if not at_quarter:
            continue
        best = max(at_quarter, key=lambda name: at_quarter[name])
        print(f"  the best at 25%, question {asked}: {best}, {at_quarter[best]:.2f} of what the full cache recalls")
        figures[f"best recall at 25% over the full cache's, {asked}"] = round(at_quarter[best], 4)
        if known:
            bars.append(bar("best recall at 25% over the full cache's, known", at_quarter[best], ">=", 0.9))
    bars.append(bar("fewest trials in a cell of recall", min(n for _, n in found.values()), ">=", 40))
    return figures, bars


def told(hits: int, trials: int) -> str:
    """A share and its interval."""
    low, high = wilson(hits, trials)
    return f"{hits / trials:.2f} ({max(low, 0):.2f} to {min(high, 1):.2f})"


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


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = sorted(path.stem for path in quality.TEXTS.glob("*.txt"))
    parser.add_argument("--texts", type=int, default=len(names), help="how many of the project's texts")
    parser.add_argument("--trials", type=int, default=40, help="numbers planted at each of the three places")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    arguments = parser.parse_args()
    set_threads()
    if "kvpress" in arguments.only and "half" not in arguments.only:
        parser.error("kvpress is measured beside `half`: name both")
    if "kvpress" in arguments.only:
        try:
            kvpress_environment.ready()  # before the look at how busy the machine is: making it is work
        except kvpress_environment.NotMade as error:
            raise SystemExit(
                f"{error}\nOr leave it out: --only {' '.join(part for part in PARTS if part != 'kvpress')}"
            ) from None
    begin()
    model, tokenizer = models.load(device="cpu"), models.tokenizer()
    texts = {name: tokenizer(quality.load_text(name), return_tensors="pt").input_ids for name in names}
    texts = dict(list(texts.items())[: arguments.texts])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    print(f"{device_name()}; {len(texts)} texts")
    figures: dict[str, float] = {}
    bars = []
    if "half" in arguments.only:
        print(f"{KEPT} of {PROMPT} tokens kept, {SCORED} predictions behind each passage:")
        half = measure_half(model, texts)
        figures |= quality_figures("half", half)
        worst = max((name for name in half if name != "random"), key=lambda name: half[name].perplexity)
        bars.append(bar(f"random's perplexity over {worst}'s", half["random"].ratio / half[worst].ratio, ">=", 1.1))
        bars.append(bar("SnapKV's perplexity over the full cache's", half["SnapKV"].ratio, "<=", 1.05))
        order = sorted(RANKING, key=lambda name: half[name].perplexity)
        print(f"  from best to worst: {', '.join(order)}")
    if "kvpress" in arguments.only:
        try:
            more, own = beside_kvpress(half, texts)
        except kvpress_side.KvpressError as error:  # what was measured before is kept
            print(f"  {error}")
            more, own = {}, [bar("kvpress ran", 0, ">=", 1)]
        figures, bars = figures | more, bars + own
    if "sinks" in arguments.only:
        print(f"a window of {WINDOW} of {SEEN} tokens:")
        sinks = measure_sinks(model, texts)
        figures |= quality_figures("window", sinks)
        bars.append(bar("no sinks, perplexity over the full cache's", sinks["0 sinks"].ratio, ">=", 1.5))
        bars += [
            bar(f"{n} sinks, perplexity over the full cache's", sinks[f"{n} sinks"].ratio, "<=", 1.15) for n in (1, 4)
        ]
    if "recall" in arguments.only:
        print("a planted number, all places together, with intervals at 95%:")
        more, own = recall_figures(measure_recall(model, encode, texts, arguments.trials))
        figures, bars = figures | more, bars + own
    if "bytes" in arguments.only:
        tokens = next(iter(texts.values()))
        bars.append(bar("bytes beside the budget's, all steps and policies", wrong_bytes(model, tokens), "<=", 0))
        for (name, share), count in (reads := bytes_read(model)).items():
            figures[f"bytes a step reads at 2000 tokens, {name} at {share:.0%}"] = count
            less = count / reads["full", 1.0]
            print(f"  2,000 tokens, {name} at {share:.0%}: a step reads {count / 1e6:.1f} MB of its caches, {less:.1%}")
    if "time" in arguments.only:
        for name, timing in (times := measure_overhead(model, arguments.rounds)).items():
            figures[f"ms a step at 2000 tokens, {name}"] = round(timing.median * 1e3, 3)
            more_than = timing.median / times["full"].median - 1
            print(f"  2,000 tokens, {name:<20} {timing} a step of the model, {more_than:+.1%}", flush=True)
            if name != "full":
                bars.append(bar(f"{name}: share that evicting adds to a step at 2000 tokens", more_than, "<=", 0.10))
        for name, timing in (layers := measure_quarter(model, arguments.rounds)).items():
            figures[f"ms of a step's caches at 8000 tokens, {name}"] = round(timing.median * 1e3, 4)
            gain = layers["full"].median / timing.median
            print(f"  8,000 tokens, {name:<20} {timing} a step of all caches, {gain:.2f} times as fast", flush=True)
            if name != "full":
                bars.append(bar(f"{name}: a quarter of 8000 tokens, times as fast", gain, ">=", 1.5))
    for entry in bars:
        print(f"  {'holds' if entry['holds'] else 'MISSED':<7} {entry['name']}: {entry['value']} ({entry['bar']})")
    command = f"python -m benchmarks.eviction --texts {arguments.texts} --trials {arguments.trials}"
    only = "" if tuple(arguments.only) == PARTS else f" --only {' '.join(arguments.only)}"
    return finish("eviction", figures, bars, "cpu", f"{command} --rounds {arguments.rounds}{only}")


if __name__ == "__main__":
    raise SystemExit(main())
