"""06.5: attention by a block table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import neighbours
from labkit.course.checks.attention import suspects as attention_suspects
from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import LOOSE, agree, draw, shifted
from labkit.course.checks.trials import LAYOUTS, Case, Judge, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab06.references import paged_attention

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def batch(
    lengths: list[int], num_heads: int, num_kv_heads: int, size: int, *, head_dim: int = 8, spare: int = 3,
    padding: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> Arguments:  # fmt: skip
    """Random rows of these lengths whose blocks lie anywhere; every slot holds numbers, empty ones too.

    padding: entries of the table behind the last block of the longest row.
    """
    counts = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(shifted(seed))).int()
    table = torch.full((len(lengths), max(counts) + padding), -1, dtype=torch.int32)
    for row, (blocks, count) in enumerate(zip(order[: sum(counts)].split(counts), counts, strict=True)):
        table[row, :count] = blocks
    q = draw(len(lengths), num_heads, head_dim, seed=seed, dtype=dtype)
    keys, values = (draw(len(order), size, num_kv_heads, head_dim, seed=seed + n, dtype=dtype) for n in (1, 2))
    return q, keys, values, table, torch.tensor(lengths)


def cut(x: Tensor) -> Tensor:
    """The same numbers in one piece, cut from a larger memory."""
    return torch.cat((x[:1], x, x[:2]))[1:-2]


def taken(keys: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` slots of these blocks: [num_kv_heads, length, head_dim]."""
    return keys[blocks.long()].flatten(0, 1)[:length].transpose(0, 1)


def by_rows(arguments: Arguments, rows: Callable[[int, int], tuple[Tensor, int] | None], pad: int = 0, *,
            axis: int = -1, heads: Callable[[int, int], Tensor] = neighbours) -> Tensor | None:  # fmt: skip
    """Attention where row and length say which blocks are read, and how many slots; None where they cannot be. pad:
    zeros behind each row, up to so many slots. axis: of softmax, over [num_kv_heads, group, slots]. heads: the KV head
    of each query head."""
    q, keys, values, _, lengths = arguments
    out = []
    for row, length in enumerate(lengths.tolist()):
        chosen = rows(row, length)
        if chosen is None or int(chosen[0].max()) >= len(keys) or chosen[1] < 1:
            return None
        k, v = (taken(x, *chosen) for x in (keys, values))
        k, v = (torch.cat((x, x.new_zeros(len(x), max(0, pad - x.shape[1]), x.shape[2])), dim=1) for x in (k, v))
        index, shape = heads(q.shape[1], len(k)), (len(k), -1, k.shape[1])
        scores = (q[row][:, None] @ k[index].transpose(1, 2) / q.shape[2] ** 0.5)[:, 0]
        weights = torch.softmax(scores.reshape(shape), dim=axis).reshape(scores.shape)
        out.append((weights[:, None] @ v[index])[:, 0])
    return torch.stack(out)


def suspects(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> list[Suspect]:
    """What people write in place of it: with the table first, then with attention."""
    case = (q, keys, values, block_table, lengths)
    size, most = keys.shape[1], int(lengths.max())

    def blocks(row: int, length: int) -> Tensor:
        return block_table[row, : -(-length // size)]

    def first(row: int, length: int) -> tuple[Tensor, int] | None:
        found = blocks(0, length)
        return (found, length) if int(found.min()) >= 0 and len(found) * size >= length else None

    def whole(row: int, padding: int = 0) -> Tensor:
        """All entries of a row's table; padding: the block that stands for those behind the last one."""
        return block_table[row].masked_fill(block_table[row] < 0, padding)

    wide = block_table.shape[1] * size
    LENGTH = "the slots that are read: lengths[row] of them"
    listed = [
        Suspect("no-table", lambda: by_rows(case, lambda row, n: (torch.arange(-(-n // size)), n)),
                "every row read blocks 0, 1, ...: the table was not used", "keys[blocks], blocks from the row's table",
                "what came back is attention over the first blocks of the memory"),
        Suspect("first-row", [lambda: by_rows(case, first)], "every row was answered with the first row's blocks",
                "block_table[row]",
                "all rows answered from the first row's tokens"),
        Suspect("one-too-many", [
                    lambda: by_rows(case, lambda row, n: (whole(row), min(n + 1, wide))),
                    lambda: by_rows(case, lambda row, n: (whole(row, -1), min(n + 1, wide))),
                    lambda: by_rows(case, lambda row, n: (blocks(row, n), min(n + 1, -(-n // size) * size)))],
                "the slot behind the row's last token was read: `<=` stands for `<`, or a length is one too large",
                LENGTH, "each row answered with one slot too many"),
        Suspect("empty-slots-read", [
                    lambda: by_rows(case, lambda row, n: (whole(row), most)),
                    lambda: by_rows(case, lambda row, n: (whole(row, -1), most))],
                "every row was read as far as the longest one goes", LENGTH,
                "what lies behind the last tokens of shorter rows takes part in the answer"),
        Suspect("empty-slots-read", [
                    lambda: by_rows(case, lambda row, n: (blocks(row, n), -(-n // size) * size)),
                    lambda: by_rows(case, lambda row, n: (whole(row), wide)),
                    lambda: by_rows(case, lambda row, n: (whole(row, -1), wide))],
                "slots behind the row's last token were read", LENGTH,
                "what lies in empty slots takes part in the answer"),
        Suspect("empty-slots-weigh", [
                    lambda: by_rows(case, lambda row, n: (blocks(row, n), n), pad=most),
                    lambda: by_rows(case, lambda row, n: (blocks(row, n), n), pad=-(-most // size) * size),
                    lambda: by_rows(case, lambda row, n: (blocks(row, n), n), pad=block_table.shape[1] * size)],
                "empty slots were set to 0, and a score of 0 gets weight: exp(0) is 1",
                "what softmax gets for a slot that holds no token: nothing, or -inf",
                "the weights of a row's own tokens sum to less than 1"),
        Suspect("newest-left-out", lambda: by_rows(case, lambda row, n: (blocks(row, n), max(n - 1, 1))),
                "the newest token was not read", "lengths counts it too: it sees itself",
                "each row answered without its newest token"),
        Suspect("full-blocks-only", lambda: by_rows(case, lambda row, n: (
                    blocks(row, n), max(n // size * size, min(n, size)))),
                "the tokens of the last block were left out", "how many blocks: rounded up",
                "tokens of a block that is not full take no part"),
        Suspect("blocks-reversed", lambda: by_rows(case, lambda row, n: (blocks(row, n).flip(0), n)),
                "the blocks were read from the last to the first", "the order of the table is that of the tokens",
                "the blocks were read from the last to the first, the empty slots in the middle"),
        Suspect("axis-group", lambda: by_rows(case, lambda row, n: (blocks(row, n), n), axis=1),
                "softmax ran along the query heads that share a KV head", "dim= of softmax: the tokens",
                "the weights of one token sum to 1 over query heads; those of one query head should, over tokens"),
        Suspect("axis-heads", lambda: by_rows(case, lambda row, n: (blocks(row, n), n), axis=0),
                "softmax ran along the KV heads", "dim= of softmax: the tokens",
                "the weights of one token sum to 1 over KV heads; those of one query head should, over tokens"),
        Suspect("head-mapping", lambda: by_rows(case, lambda row, n: (blocks(row, n), n),
                                                heads=lambda h, kv: torch.arange(h).clamp(max=kv - 1)),
                "query head h was sent to KV head h, and all behind the last KV head to that one",
                "query head h reads KV head h // (num_heads // num_kv_heads): neighbours share",
                "the first query heads read a KV head each, all others the last"),
    ]  # fmt: skip
    dense = [[taken(x, blocks(row, n), n)[None] for x in (keys, values)] for row, n in enumerate(lengths.tolist())]
    by_row = [attention_suspects(q[row][None, :, None], k, v, causal=False) for row, (k, v) in enumerate(dense)]
    for same in zip(*by_row, strict=True):
        count = min(len(suspect.variants) for suspect in same)
        listed.append(Suspect(
            same[0].diagnosis, [lambda same=same, place=place: stacked(same, place) for place in range(count)],
            same[0].cause, same[0].look, same[0].seen,
        ))  # fmt: skip
    return listed


def stacked(same: tuple[Suspect, ...], place: int) -> Tensor | None:
    """What one variant of a suspect gives in every row; None where its shapes do not fit together."""
    try:
        return torch.stack([suspect.variants[place]()[0, :, 0] for suspect in same])
    except (RuntimeError, IndexError):
        return None


class PagedAttention(Exercise):
    """Attention by table."""

    id, title, minutes, difficulty = "06.5", "Attention by a block table", 8, 3
    needs = ("06.2",)
    reference = staticmethod(paged_attention)
    why = (
        "Each row's blocks come in the order of its tokens, so gathered and cut to the length they are its K and V. "
        "What lies behind the length is cut off before anything is multiplied, since 0 times NaN is NaN."
    )
    hints = (
        "Take one row: which blocks hold its tokens, and how many slots of them?",
        "keys[blocks] is [blocks, block_size, num_kv_heads, head_dim]. Flatten the first two, cut to the length, bring "
        "the heads to the front; then it is lab 04's attention.",
        "blocks = block_table[row, : -(-length // block_size)]\n"
        "k = keys[blocks].flatten(0, 1)[:length].transpose(0, 1)\n"
        "grouped = q[row].reshape(num_kv_heads, -1, head_dim)",
    )
    hints_for: ClassVar = {
        "empty-slots-read": "A row of 5 tokens in blocks of 4 has 8 slots. Which 3 hold nothing of it?",
        "reads-stale": "Cut K and V to the length before the product, or fill with 0 what is behind it, in V too.",
        "head-mapping": "Query heads 0, 1, 2 share KV head 0: reshape q to [num_kv_heads, queries, head_dim].",
        "reads-everything": "keys.flatten(0, 1)[slots] or keys[blocks] gathers a row's own. What copies the rest?",
    }

    def examine(self, answer: Callable) -> None:
        """Rows of several lengths, blocks of several sizes; NaN in empty slots; memory that others fill."""
        cases = [
            Case(batch([6, 1, 11], 6, 2, 4)),
            Case(batch([5, 8], 4, 4, 3, head_dim=12, seed=3)),
            Case(batch([7, 7, 2, 16], 6, 1, 16, head_dim=5, seed=6)),
            Case(batch([3, 4], 2, 2, 1, seed=9)),
            Case(batch([301], 8, 2, 32, head_dim=20, seed=12)),
            Case(batch([2051, 3], 2, 1, 1, head_dim=4, spare=300, seed=15)),
        ]
        known: dict[int, list[Suspect]] = {}

        def once(*case: Any) -> list[Suspect]:
            return known.setdefault(id(case[0]), suspects(*case))

        compare(type(self), answer, paged_attention, cases, suspects=once, what="the output", layouts=False)
        for change, words in LAYOUTS:  # the memory of all rows is one piece, of a larger one: `view` of it is right
            for case in cases[:2]:
                q, keys, values, table, lengths = case.args
                memory = cut(keys), cut(values)
                varied = Case((change(q), *memory, change(table), change(lengths)), f"{words}, keys and values as ever")
                Judge(type(self), answer, paged_attention, once, "the output", False, ()).call(varied, "layout")
        self.check_large(answer)
        self.check_stale(answer)
        for dtype in (torch.float32, torch.bfloat16):  # a copy in float32 is none where that is the dtype
            self.check_work(answer, dtype)

    def check_large(self, answer: Callable) -> None:
        """Scores in the hundreds, of which exp is infinite."""
        q, *others = batch([6, 1, 11], 6, 2, 4, seed=24)
        got, want = self.call(answer, 300 * q, *others), paged_attention(300 * q, *others)
        if not agree(got, want, LOOSE):
            self.fail("scores-overflow", seen="with queries 300 times as large, whose scores are in the hundreds, "
                      + ("the output holds NaN" if isinstance(got, Tensor) and got.isnan().any() else "other numbers "
                         "come out"),
                      cause="exp of a score above 88 is infinite in float32: a softmax takes the greatest score off "
                      "first", look="where the softmax is computed: torch.softmax does that by itself")  # fmt: skip

    def check_stale(self, answer: Callable) -> None:
        """NaN in every slot that holds no token."""
        q, keys, values, table, lengths = batch([6, 1, 9], 6, 2, 4, seed=20)
        size, empty = keys.shape[1], torch.ones(keys.shape[:2], dtype=torch.bool)
        for row, length in enumerate(lengths.tolist()):
            for place in range(length):
                empty[table[row, place // size], place % size] = False
        want = paged_attention(q, keys, values, table, lengths)
        hidden = empty[..., None, None]
        stale = [x.masked_fill(hidden, float("nan")) for x in (keys, values)]
        if agree(got := self.call(answer, q, *stale, table, lengths), want, LOOSE):
            return
        seen = "the output holds NaN" if isinstance(got, Tensor) and got.isnan().any() else "other numbers come out"
        of_keys = not agree(self.call(answer, q, stale[0], values, table, lengths), want, LOOSE)
        of_values = not agree(self.call(answer, q, keys, stale[1], table, lengths), want, LOOSE)
        if of_keys and not of_values:
            self.fail("reads-stale-keys", seen=f"with NaN in the keys of slots that hold no token, {seen}; with NaN in "
                      "their values alone it is right",
                      cause="a NaN key makes its score NaN, and NaN is still NaN when -inf is added to it or it "
                      "is multiplied with 0", look="the scores of empty slots: replaced, by masked_fill or where, or "
                      "K cut to the row's length")  # fmt: skip
        where = " in their values" if of_values and not of_keys else ""
        self.fail("reads-stale", seen=f"with NaN in the slots that hold no token{where and ',' + where}, {seen}",
                  cause="empty slots are read and weighed with 0, and 0 times NaN is NaN: memory that was never "
                  "written may hold it" if of_values else
                  "what empty slots hold takes part in the answer: memory that was never written may hold NaN",
                  look="where V is cut to the row's length, or what is put there in place of empty slots" if where else
                  "where K and V are cut to the row's length")  # fmt: skip

    def check_work(self, answer: Callable, dtype: torch.dtype) -> None:
        """Two short rows in a memory of 500 blocks."""
        q, keys, values, table, lengths = batch([9, 5], 4, 2, 4, spare=495, dtype=dtype)
        effort = effort_of(lambda: self.run(lambda: answer(q, keys, values, table, lengths)))
        check_stays(type(self), effort)
        if effort.largest >= keys.nbytes // 4:
            self.fail(
                "reads-everything",
                seen=f"rows of 9 and 5 tokens; {len(keys)} blocks in memory: a tensor of {effort.largest:,} bytes is "
                f"made, {effort.largest / keys.nbytes:.0%} of all keys",
                cause="all blocks are copied, scored or compared, those of other requests too",
                look="what is gathered: keys[blocks], a row's own",
            )
