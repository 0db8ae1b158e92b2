"""The times that the notebooks store agree with the results that are kept beside them: both are of a quiet machine."""

import json
import re
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).resolve().parent.parent
FACTOR = 1.6  # two runs on one quiet machine, and contexts that are not quite the same, differ by less
# The notebooks and these results are of one machine.
# Notebook, cell, what it prints (one number), the result file, and what it should be, from the file's figures.
STORED = [
    ("02", "c029", r"([\d.]+) GB/s read", "xeon_decode", lambda x: x["float32 read bandwidth GB/s"]),
    ("02", "c038", r"200 tokens.*: ([\d.]+) s without", "xeon_positions",
     lambda x: 200e-3 * (x["without_cache_ms_at_8"] + x["without_cache_ms_at_207"]) / 2),
    ("02", "c038", r"without, ([\d.]+) s with", "xeon_positions",
     lambda x: 200e-3 * (x["with_cache_ms_at_8"] + x["with_cache_ms_at_207"]) / 2),
    ("02", "c043", r"TPOT ([\d.]+) ms", "xeon_positions", lambda x: x["with_cache_ms_at_128"]),
    ("03", "c052", r"reading at ([\d.]+) GB/s", "xeon_decode", lambda x: x["float32 read bandwidth GB/s"]),
    ("03", "c061", r", ([\d.]+) GB/s;", "xeon_decode", lambda x: x["float32 read bandwidth GB/s"]),
    ("03", "c071", r" 1 x    16 tokens: +([\d.]+) ms", "xeon_positions", lambda x: x["with_cache_ms_at_8"]),
    ("03", "c071", r" 1 x 1,024 tokens: +([\d.]+) ms", "xeon_positions", lambda x: x["with_cache_ms_at_512"]),
    ("05", "c067", r"full: .* ([\d.]+) ms at 4,096", "xeon_kv_quantization", lambda x: between(x, "full", 4096)),
    ("05", "c067", r"int4: .* ([\d.]+) ms at 4,096", "xeon_kv_quantization", lambda x: between(x, "int4", 4096)),
]  # fmt: skip


def between(figures, cache, tokens):
    """Milliseconds of a decode step, between those at 2,000 and at 8,000 tokens."""
    low, high = (figures[f"{cache} ms a step, {length} tokens"] for length in (2000, 8000))
    return low + (high - low) * (tokens - 2000) / 6000


def stored_number(notebook, cell, pattern):
    """The number that a cell's stored output prints at `pattern`."""
    (path,) = (HERE / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = {each.id: each for each in nbformat.read(path, as_version=4).cells}
    said = "".join(output.get("text", "") for output in cells[cell].outputs)
    found = re.search(pattern, said)
    assert found, f"{path.name}, cell {cell}, prints nothing like {pattern}: it prints {said}"
    return float(found[1])


@pytest.mark.parametrize(
    ("notebook", "cell", "pattern", "results", "figure"), STORED, ids=[f"{row[0]} {row[1]} {row[2]}" for row in STORED]
)
def test_a_stored_time_is_that_of_the_results(notebook, cell, pattern, results, figure):
    kept = json.loads((HERE / "data" / "results" / f"{results}.json").read_text(encoding="utf-8"))
    expected = figure(kept["figures"])
    got = stored_number(notebook, cell, pattern)
    apart = max(got / expected, expected / got)
    # Lossy: times. Record the notebooks or the results again, on one quiet machine.
    assert apart <= FACTOR, f"{got:g} is stored, {results}.json says {expected:.3g}: {apart:.1f} times apart"
