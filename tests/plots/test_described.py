"""A figure's words go where its picture goes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from IPython.core.formatters import DisplayFormatter

from labkit.plots import against_length, described, figure, row_of
from labkit.plots.described import ends, listed, number, spans


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("made", [figure, lambda: row_of(2, 4.0, 2.0)])
def test_what_a_notebook_stores_beside_the_picture(made) -> None:
    fig, _ = made()
    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type_by_name("labkit.plots.described", "Described", lambda fig: b"\x89PNG")
    assert formatter.format(fig)[1] == {}
    described(fig, "two words,\n    then more")
    data, metadata = formatter.format(fig)
    assert data["image/png"] == b"\x89PNG"
    assert metadata == {"image/png": {"alt": "two words, then more"}}


def test_it_prints_as_the_notebooks_store_it() -> None:
    assert repr(figure()[0]).startswith("<Figure size ")


def test_a_figure_from_elsewhere_cannot_keep_words() -> None:
    with pytest.raises(TypeError, match=r"plots\.figure"):
        described(plt.figure(), "a figure")


def test_lines_are_told_by_their_ends() -> None:
    fig = against_length([1, 2, 8192], {"a": [0.5, 1, 1234.5], "b": [1, 2, 3]}, xlabel="tokens", ylabel="MB")
    assert fig.alt == "Lines: MB against tokens. a: 0.5 at 1, 1,230 at 8,192; b: 1 at 1, 3 at 8,192."


def test_numbers_and_lists_read_as_people_write_them() -> None:
    assert [number(x) for x in (0.012345, 4.0, 99.96, 1234.5, 0)] == ["0.0123", "4", "100", "1,230", "0"]
    assert [listed(parts) for parts in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [spans(places) for places in ([], [3], [0, 1, 2], [0, 1, 4, 7, 8])] == [
        "none",
        "3",
        "0 to 2",
        "0 to 1, 4 and 7 to 8",
    ]
    assert ends({"a": [0.001, 0.002]}, [1, 2.5], "ms", 1e3) == "a: 1 ms at 1, 2 ms at 2.5"
