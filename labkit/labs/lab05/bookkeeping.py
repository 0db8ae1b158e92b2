"""05.5: what a quantized layer gave to quantize_group and what it reads, and what that says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.course.checks.caches import check_kinds
from labkit.course.exercise import Exercise
from labkit.labs.lab05.layers import CHANGE, VALUES, Shape, fits, ids, is_values, listed, numbered, numbered_pair


def check_given(
    exercise: type[Exercise],
    given: list[tuple[Tensor, Tensor]],
    sizes: tuple[int, int],
    groups: int,
    groups_before: int,
    pieces: Sequence[int],
    where: str,
    shape: Shape,
) -> None:
    """Fail unless `given` is `groups` whole groups of successive tokens, oldest first.

    sizes: group_size and residual_length. groups_before: how many there were before the last append. pieces:
    tokens of each append. where: the case, in words.
    """
    group_size = sizes[0]
    for k, v in given:
        check_group(exercise, k, v, where, shape)
    tokens = [token for k, _ in given for token in ids(k)]
    by_call = [ids(k) for k, _ in given]
    if by_call and by_call[::2] == by_call[1::2] and len(set(tokens)) == len(tokens) // 2:
        exercise.fail(
            "once-for-each",
            seen=f"{where}: each group went through quantize_group twice in a row",
            cause="quantize_group was called once for K and once for V; one call takes both",
            look="append: quantize_group(k, v), once for each group, and keep what it returns",
        )
    if len(set(tokens)) < len(tokens):
        exercise.fail(
            "quantized-again",
            seen=f"{where}: token {first_repeated(tokens)} was given to quantize_group twice",
            cause="a group's tokens still wait after it was quantized, or all tokens are quantized at every append",
            look="append: after quantize_group, go on with k[:, :, group_size:] only",
        )
    check_sizes(exercise, [k.shape[2] for k, _ in given], sizes, pieces, where)
    if tokens != list(range(len(tokens))):
        starts = [sum(pieces[:place]) for place in range(len(pieces))]
        within = [start + first for start, piece in zip(starts, pieces, strict=True)
                  for first in range(0, piece - group_size + 1, group_size)]  # fmt: skip
        if all(group == list(range(group[0], group[0] + group_size)) and group[0] in within for group in by_call):
            exercise.fail(
                "groups-anew",
                seen=f"{where}: quantize_group was given tokens {listed(by_call[-1])}, which came in one append; "
                f"{listed(range(len(tokens) - group_size, len(tokens)))} were next",
                cause="groups are cut from each append's tokens alone; what waited before is not joined with them",
                look="append: torch.cat((waiting, new), dim=2) first, then cut groups from the beginning",
            )
        exercise.fail(
            "not-the-oldest",
            seen=f"{where}: quantize_group was given tokens {listed(tokens[-group_size:])}; "
            f"{listed(range(len(tokens) - group_size, len(tokens)))} were next",
            cause="the group was cut from the end of what waits, or old and new were joined in another order",
            look="the slice that is quantized, [:, :, :group_size], and torch.cat((waiting, new), dim=2)",
        )
    check_count(exercise, len(given), groups, groups_before, group_size, where)


def check_group(exercise: type[Exercise], k: Tensor, v: Tensor, where: str, shape: Shape) -> None:
    """One group: the right shape, keys as K and values as V, and nothing that was quantized before."""
    if not (fits(k, shape) and fits(v, shape) and k.shape == v.shape):
        exercise.fail(
            "group-shape",
            seen=f"{where}: quantize_group was given K of shape {list(k.shape)} and V of {list(v.shape)}",
            cause="batch or heads were dropped, or another dimension than the tokens' was sliced",
            look="the slice: k[:, :, :group_size], and v alike; tokens are dimension 2",
        )
    if is_values(k) or (v.numel() and not is_values(v)):
        exercise.fail(
            "quantizes-k-as-v",
            seen=f"{where}: quantize_group was given {'V' if is_values(k) else 'K'} as its K, "
            f"{'V' if is_values(v) else 'K'} as its V",
            cause="k and v changed places, or a line for v was copied from that for k and still says k",
            look="the call: quantize_group(k, v), and what each name stands for by then",
        )
    for x, more in ((k, 0.0), (v, VALUES)):
        plain = (numbered(ids(x), torch.float64, shape) + more).to(x.dtype)
        if torch.equal(x, plain):
            continue
        if ((x - plain - CHANGE).abs() < CHANGE / 2).any():
            exercise.fail(
                "quantized-twice",
                seen=f"{where}: quantize_group was given tokens that restore had given back",
                cause="groups are restored, joined with new tokens and quantized anew: each round adds its own error",
                look="append: a group that is quantized stays as it is",
            )
        exercise.fail(
            "keys-changed",
            seen=f"{where}: quantize_group was given other numbers than those that came, off by up to "
            f"{(x - plain).abs().max().item():.2g}",
            cause="they were converted to another dtype on the way, or reshaped across tokens or heads",
            look="append: what is joined, kept and cut is what came",
        )


def check_sizes(
    exercise: type[Exercise], given: list[int], sizes: tuple[int, int], pieces: Sequence[int], where: str
) -> None:
    """Every group has group_size tokens. given: how many each has; sizes: group_size and residual_length."""
    group_size, residual_length = sizes
    if not (wrong := [size for size in given if size != group_size]):
        return
    seen = f"{where}: quantize_group was given a group of {wrong[0]}"
    if set(given) == {residual_length} and pieces[-1] != residual_length:
        exercise.fail(
            "sizes-swapped",
            seen=seen,
            cause="groups have residual_length tokens: the two sizes changed places",
            look="__init__: the order is group_size, residual_length",
        )
    if given == list(pieces[: len(given)]):
        exercise.fail(
            "groups-as-they-came",
            seen=seen,
            cause="whatever one append brings is taken for a group",
            look="append: join what waits and what comes, then cut groups of group_size",
        )
    if wrong[0] < group_size:
        exercise.fail(
            "short-group",
            seen=seen,
            cause="fewer than group_size tokens were quantized together: those left behind the last whole group, say",
            look="the condition: is there a whole group?",
        )
    exercise.fail(
        "long-group",
        seen=seen,
        cause="more than one group's tokens were given in one call",
        look="the slice that is quantized, [:, :, :group_size], and a loop around it",
    )


def check_count(
    exercise: type[Exercise], made: int, groups: int, groups_before: int, group_size: int, where: str
) -> None:
    """As many groups as there should be by now."""
    if made > groups:
        exercise.fail(
            "residual-not-kept",
            seen=f"{where}: {made * group_size} tokens are quantized; {groups * group_size} may be",
            cause="a group is quantized while fewer than residual_length tokens stay behind it",
            look="the condition: group_size tokens to quantize and residual_length newer ones",
        )
    if made < groups and made == groups_before + 1:
        exercise.fail(
            "one-group-per-append",
            seen=f"{where}: one group was quantized; {groups - groups_before} could be",
            cause="an `if` where a loop is needed",
            look="append: `while` there are enough tokens",
        )
    if made < groups:
        exercise.fail(
            "waits-too-long",
            seen=f"{where}: {made * group_size} tokens are quantized; {groups * group_size} could be",
            cause="the condition asks for more than group_size + residual_length tokens (`>` for `>=`?), looks at "
            "what came last alone, stands where not every append comes by, or is never true",
            look="the condition with exactly group_size + residual_length tokens",
        )


def first_repeated(tokens: list[int]) -> int:
    """The first token that is there a second time."""
    return next(token for index, token in enumerate(tokens) if token in tokens[:index])


def check_read(
    exercise: type[Exercise],
    got: tuple[Tensor, Tensor],
    held: int,
    quantized: int,
    where: str,
    shape: Shape,
    group_size: int,
) -> None:
    """Every token once and in order, the `quantized` first as restore gives them, those that wait as they came."""
    plain = numbered_pair(0, held, got[0].dtype, shape)
    for name, x in zip("KV", got, strict=True):
        check_joined(exercise, name, x, plain[0].shape, where)
        tokens = x.shape[2] if x.dim() == 4 else held
        known = {
            held - quantized + group_size: ("one-group-read", "one group and those that wait"),
            held - quantized: ("groups-unread", "those that wait"),
            quantized: ("waiting-unread", "groups"),
        }
        if tokens != held and tokens in known:
            diagnosis, which = known[tokens]
            exercise.fail(
                diagnosis,
                seen=f"{where}: read() gives {name} of {tokens} tokens, {which} only",
                cause="the others were left out",
                look="read(): groups and waiting, joined along dimension 2",
            )
        if tokens != held:
            exercise.fail(
                "tokens-lost" if tokens < held else "tokens-twice",
                seen=f"{where}: read() gives {name} of {tokens} tokens",
                cause="tokens were dropped: where append joins new to waiting, where it cuts a group off, or in read()"
                if tokens < held
                else "tokens of a group that was quantized still wait",
                look="append: what waits afterwards is everything behind the last group, old and new",
            )
    plain = numbered_pair(0, held, shape=shape)
    want = [torch.cat((x[:, :, :quantized] + CHANGE, x[:, :, quantized:]), dim=2) for x in plain]
    check_kinds(exercise, got, (want[0], want[1]), where)
    for name, x, exact, wanted in zip("KV", got, plain, want, strict=True):
        exercise.like(x, wanted, what=f"{name}, {where}")
        if ids(x) != list(range(held)) and sorted(ids(x)) == list(range(held)):
            exercise.fail(
                "read-order",
                seen=f"{where}: read() gives {name} of every token, in the order {listed(ids(x))}",
                cause="what is joined stands in another order than the tokens came: what came last is the newest",
                look="read(): groups in the order they were made, then what waits"
                if quantized
                else "append: torch.cat((waiting, new), dim=2)",
            )
        if quantized and torch.equal(x, exact):
            exercise.fail(
                "reads-originals",
                seen=f"{where}: {quantized} tokens were quantized, and read() gives {name} exactly as it came",
                cause="a full-precision copy is kept and read: nothing is saved, and no error shows",
                look="append: once a group is quantized, its tokens are kept in no other form",
            )
        exercise.same(x, wanted, what=f"{name}, {where}")


def check_joined(exercise: type[Exercise], name: str, x: Tensor, want: torch.Size, where: str) -> None:
    """Fail when tokens were put behind each other along another dimension than theirs."""
    if x.dim() == 4 and x.numel() == want.numel() and x.shape != want and x.shape[2] < want[2]:
        along = [dim for dim in (0, 1, 3) if x.shape[dim] > want[dim]]
        if len(along) == 1:
            exercise.fail(
                "joined-along",
                seen=f"{where}: read() gives {name} of {list(x.shape)}; it should be {list(want)}",
                cause=f"tokens were joined along dimension {along[0]}",
                look="torch.cat(..., dim=2): tokens are dimension 2",
            )
