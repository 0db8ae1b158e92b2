"""A kernel that a learner wrote is run by Triton's interpreter, and reads nobody's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton.language as language

from labkit.labs.lab06.attending import batch
from labkit.labs.lab06.launch import Memory, Stray, launch, tl
from labkit.labs.lab06.references import paged_attention, paged_decode
from tests.labs.lab06.kernel_answers import ENTRY, kernel


def case(dtype: torch.dtype = torch.float32):
    return batch([6, 1, 8], 4, 2, 4, dtype=dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_kernel_gives_what_gathered_attention_gives(dtype: torch.dtype, most: float, size: int) -> None:
    given = batch([5, 17, 1], 6, 2, size, dtype=dtype)
    off = (launch(paged_decode, *given).float() - paged_attention(*given).float()).abs().max()
    assert off <= most  # bounded: the kernel sums in float32, the twin in the dtype


def test_it_notes_which_entries_of_the_table_are_read() -> None:
    memory = Memory({})
    given = case()
    launch(paged_decode, *given, memory=memory)
    used = {int(n) for n in (given[3].flatten() >= 0).nonzero()}
    assert memory.entries("table") == used
    assert memory.entries("lengths") == {0, 1, 2}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"block": ENTRY.format("1000000000")}, "far from every tensor"),
        ({"block": ENTRY.format("row * blocks_per_row + start // BLOCK_SIZE - 100")}, "number -"),
        ({"block": "block = tl.load(lengths_ptr + row) * 1000"}, "number|far from every tensor"),
        ({"here": "here = start + place < length; tl.store(q_ptr + place, 0.0)"}, "was written, not out"),
        ({"here": "here = start + place < length; tl.store(out_ptr - 5 + place, 0.0)"}, "written"),
        ({"here": "here = start + place < length; tl.atomic_add(out_ptr, 1.0)"}, "atomic"),
    ],
)
def test_an_address_that_is_nobodys_is_an_error_and_not_the_end_of_the_process(other, said: str) -> None:
    given = case()
    before = [x.clone() for x in given]
    with pytest.raises(Stray, match=said):
        launch(kernel(**other), *given)
    assert all(map(torch.equal, before, given))


def test_triton_is_as_it_was_afterwards() -> None:
    names = ("sum", "max", "zeros", "load", "arange", "reduce", "program_id")
    before = [getattr(language, name) for name in names]
    launch(paged_decode, *case())
    with pytest.raises(Stray):
        launch(kernel(block=ENTRY.format("1000")), *case())
    assert [getattr(language, name) for name in names] == before
    assert tl is language


def a_fresh_python(code: str, **environment: str) -> str:
    """What it prints."""
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    return told.stdout.strip() or told.stderr


@pytest.mark.parametrize("setting", ["0", "1"])
def test_whether_triton_was_imported_for_the_interpreter_makes_no_difference(setting: str) -> None:
    code = (
        "from tests.labs.lab06.test_launch import case, launch, paged_attention, paged_decode as kernel\n"
        "print(bool((launch(kernel, *case()) - paged_attention(*case())).abs().max() < 1e-5))"
    )
    assert a_fresh_python(code, TRITON_INTERPRET=setting) == "True"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from labkit.labs.lab06.references import paged_decode
types = ["*fp16"] * 3 + ["*i32", "*i64", "*fp16", "fp32", "i32", "i32", "i32", "constexpr", "constexpr"]
kernel = triton.jit(paged_decode)
source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), {(10,): 64, (11,): 16})
print("ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm)
"""


def test_it_compiles_for_a_gpu_also_where_there_is_none(tmp_path: Path) -> None:
    assert a_fresh_python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "True"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_it_gives_the_same() -> None:
    given = [x.cuda() for x in batch([5, 70, 1], 8, 2, 16, head_dim=64, dtype=torch.float16)]
    assert (launch(paged_decode, *given) - paged_attention(*given)).abs().max() < 2e-3
