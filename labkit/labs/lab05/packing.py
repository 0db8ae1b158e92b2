"""05.2: several codes in a byte."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.trials import LAYOUTS
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.references import pack


class Pack(Exercise):
    """Where the memory is saved: a code of 4 bits in a uint8 tensor of its own takes 8."""

    id, title, minutes, difficulty = "05.2", "Codes packed into bytes", 5, 2
    reference = staticmethod(pack)
    why = (
        "Codes of nbits bits overlap nowhere once each is shifted by its place, so | joins them without loss, and"
        " unpacking only has to shift back and mask."
    )
    hints = (
        "Which codes end up in byte 0, and by how many bits must each of them move to the left?",
        "codes[..., place::per_byte] is the code at that place of every byte. Shift it by place * nbits and put it "
        "beside the others with |.",
        "per_byte = 8 // nbits\nout = torch.zeros_like(codes[..., ::per_byte])\nfor place in range(per_byte):\n"
        "    out |= codes[..., place::per_byte] << (place * nbits)",
    )
    hints_for: ClassVar = {
        "not-packed": "How many bytes does a uint8 tensor of n codes take, whatever nbits says?",
        "first-code-high": "Byte 0 of codes 1, 2 is 1 + 16 * 2. Which of the two is shifted?",
        "halves": "codes[..., 0::2] and codes[..., 1::2] are neighbours. What are codes[..., :n // 2] and the rest?",
        "precedence": "Which does Python do first in a + b << 4? Parentheses, or |, which comes after <<.",
        "codes-lost": "Of codes 1 and 2 the byte is 1 + 16 * 2. Which of the two is missing in yours?",
        "fixed-bits": "Which numbers in your code are right for 4 bits only? Write them with nbits.",
        "arguments-changed": "A slice is a view: `|=` and `<<=` on it write into codes. Where does a new tensor start?",
        "memory-kept": "A slice of a large tensor keeps the large tensor alive.",
    }

    def examine(self, answer: Callable) -> None:
        """Codes to follow by hand, then others of the same shape; random ones of 4, 2 and 8 bits, of one to four
        dimensions, one byte alone, thousands; codes in another order in memory."""
        by_hand = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
        self.judge(answer, by_hand, 4)
        self.judge(answer, by_hand.flip(0), 4)
        for nbits in (4, 2, 8):
            for shape in ((2, 3, 16), (5, 8), (2, 3, 4, 24), (8 // nbits,), (3, 4096)):
                self.judge(answer, torch.randint(0, 2**nbits, shape, dtype=torch.uint8), nbits)
            self.judge(answer, torch.full((8 // nbits,), 2**nbits - 1, dtype=torch.uint8), nbits)
        for change, words in LAYOUTS:
            self.judge_layout(answer, change(torch.randint(0, 16, (2, 3, 8), dtype=torch.uint8)), words)
        self.judge_layout(answer, torch.randint(0, 16, (2, 8, 6), dtype=torch.uint8).mT, "transposed")

    def judge(self, answer: Callable, codes: Tensor, nbits: int) -> None:
        """One tensor of codes: bytes, their number, their values, and what they keep in memory."""
        got, want = self.call(answer, codes, nbits), pack(codes, nbits)
        where = f"{list(codes.shape)} codes of {nbits} bits"
        if isinstance(got, Tensor) and got.shape != want.shape:
            self.explain_shape(list(got.shape), list(want.shape), list(codes.shape), nbits, where)
        if isinstance(got, Tensor) and got.shape == want.shape and got.dtype != torch.uint8:
            self.fail("dtype", seen=f"{where} became {got.dtype}: {got.element_size()} bytes for each byte",
                      cause="the result stayed in another type: sums, and arithmetic with wide numbers, give wide ones",
                      look="the dtype of the result: sum(..., dtype=torch.uint8), or .to(torch.uint8)")  # fmt: skip
        self.like(got, want, what=f"{where}, packed: the result")
        if not torch.equal(got, want):
            self.explain(got, want, codes, nbits, where)
        if nbits < 8 and got.untyped_storage().nbytes() > got.numel():
            self.fail("memory-kept", seen=f"the bytes are right, but the tensor they lie in takes "
                      f"{got.untyped_storage().nbytes()} bytes for {got.numel()}",
                      cause="a slice of a longer tensor, or an expanded one, was returned: all of it stays in memory",
                      look="make the result as long as it has to be, or clone the slice")  # fmt: skip

    def judge_layout(self, answer: Callable, codes: Tensor, words: str) -> None:
        """Codes that lie in memory in another order than their dimensions."""
        try:
            self.judge(answer, codes, 4)
        except NotYet as not_yet:
            if not_yet.finding.diagnosis not in ("raised", "values"):
                raise
            self.fail("layout", seen=f"codes {list(codes.shape)}, {words}: {not_yet.finding.seen}. Contiguous in "
                      "memory, codes were packed right",
                      cause="the code counts on the order in memory: view, or a reshape that assumes it",
                      look="slices along the last dimension, or reshape in place of view")  # fmt: skip

    def explain_shape(self, got: list[int], want: list[int], codes: list[int], nbits: int, where: str) -> None:
        """Name the packing that gives so many bytes; the base class speaks of the others."""
        size, here = 8 // nbits, len(codes) - 1
        accuse(type(self), [
            Suspect("not-packed", got == codes and nbits < 8,
                    "each code still has a byte of its own: nothing is saved, whatever the report says",
                    "the docstring: n * nbits / 8 bytes"),
            Suspect("fixed-bits", nbits != 4 and got == [*codes[:-1], codes[-1] // 2],
                    "two codes went into each byte, as for 4 bits", "how many codes fill 8 bits: 8 // nbits"),
            Suspect("wrong-dimension",
                    any(got == [n // size if dim == at else n for dim, n in enumerate(codes)] for at in range(here)),
                    "another dimension than the last was packed",
                    "codes[..., place::per_byte]: the dots stand for all dimensions but the last"),
            Suspect("groups-left", got == [*want, size],
                    "the codes of a byte stand side by side in a dimension of their own",
                    "combine that dimension: shift, then OR or add"),
        ], f"{where}: {codes} became {got}; it should be {want}")  # fmt: skip

    def explain(self, got: Tensor, want: Tensor, codes: Tensor, nbits: int, where: str) -> None:
        """Name the packing that gives these bytes."""
        size, at = 8 // nbits, int((got != want).flatten().int().argmax())  # the first byte that is wrong
        first = [part.flatten()[at].item() for part in (got, want)]
        neighbours, apart = codes.unflatten(-1, (-1, size)), codes.unflatten(-1, (size, -1)).mT
        shifts = [place * nbits for place in range(size)]

        def by(parts: Tensor, moves: list[int]) -> bool:
            """Whether these codes, moved so, make up what came back, joined by OR or by addition."""
            moved = [parts[..., place].long() << moves[place] for place in range(size)]
            joined = moved[0]
            for other in moved[1:]:
                joined = joined | other
            return any(torch.equal(got.long(), made % 256) for made in (joined, torch.stack(moved).sum(0)))

        bits = [f"{byte} ({byte:08b})" for byte in first]
        given = codes.flatten()[at * size : at * size + size].tolist()
        seen = f"{where}: the byte of codes {', '.join(map(str, given))} is {bits[0]}; it should be {bits[1]}"
        places = [neighbours[..., place] for place in range(size)]
        added = places[0]
        for place in range(1, size):
            added = added + places[place] << place * nbits  # what Python makes of a + b << 4 + c << 8
        accuse(type(self), [
            Suspect("eight-bits", nbits == 8, "with 8 bits a code fills its byte: nothing is to be shifted or joined",
                    "8 // nbits is 1 here"),
            Suspect("halves", by(apart, shifts) or by(apart, shifts[::-1]),
                    f"codes that lie {codes.shape[-1] // size} apart share a byte",
                    "neighbours: codes[..., 0::2] and codes[..., 1::2] for 4 bits, not the first half and the second"),
            Suspect("first-code-high", by(neighbours, shifts[::-1]), "the first code went into the highest bits",
                    "the docstring: byte 0 holds code 0 and 16 times code 1"),
            Suspect("precedence", size > 1 and torch.equal(got, added),
                    "+ binds tighter than <<: a + b << 4 is (a + b) << 4", "parentheses round each shift, or | for +"),
            Suspect("codes-lost", any(torch.equal(got, joined) for joined in (
                    *(pieced([code if place in kept else code * 0 for place, code in enumerate(places)],
                    lambda code, place: code << place * nbits)
                    for count in range(1, size) for kept in combinations(range(size), count)), *places)),
                    "of each byte's codes some are left: the others were never added, or shifted out of the byte",
                    "the loop over places, what it adds to, and <<, which shifts up"),
            Suspect("joined-by-and", not got.any(), "nothing is left of any code: & keeps what both have, and they "
                    "overlap nowhere", "| joins, or + with each shift in parentheses"),
            Suspect("shifted-right",
                    any(torch.equal(got, joined) for joined in (
                    pieced(places, lambda code, place: code >> place * nbits),
                    pieced(places, lambda code, place: code >> (size - 1 - place) * nbits))),
                    "codes were shifted down, out of the byte", "<< shifts up, >> down"),
            Suspect("unshifted", by(neighbours, [0] * size), "the codes lie on top of each other",
                    "the shift: place * nbits bits to the left"),
            Suspect("fixed-bits", nbits != 4 and by(neighbours, [4 * place for place in range(size)]),
                    "codes were shifted by 4 bits, whatever nbits is", "the shift: place * nbits"),
            Suspect("wrong-shift", any(by(neighbours, [step * (place + more) for place in range(size)])
                    for step in range(1, 9) for more in (0, 1)),
                    "codes were shifted, by another number of bits than they have, or one place too far",
                    "place * nbits, from place 0 on"),
            Suspect("bits-flipped", torch.equal(got, want ^ 255), "every bit is turned round", "no ~ and no ^"),
        ], seen)  # fmt: skip
        self.fail("values", seen=seen, cause="codes were combined in another way",
                  look="byte 0, in binary: which bits belong to which code?")  # fmt: skip


def pieced(places: list[Tensor], move: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The codes of each byte, moved by `move(codes, place)` and joined."""
    joined = torch.zeros_like(places[0])
    for place, codes in enumerate(places):
        joined = joined | move(codes, place)
    return joined
