"""Every check of a function of tensors asks whether it would run on a GPU; every reference would."""

from __future__ import annotations

import pytest

from labkit.course.checks import devices
from tests.labs.kill_table import gather

_, EXERCISES = gather()
ASKED = {
    "01.1", "01.3", "01.3b", "01.4", "01.5", "01.6", "02.7", "04.1", "04.4", "05.1", "05.2", "05.3", "05.6", "06.2",
    "06.5", "07.2", "07.3", "07.4", "07.5", "07.6", "07.7",
}  # fmt: skip


@pytest.mark.parametrize("id", sorted(ASKED))
def test_a_reference_would_run_on_a_gpu(id: str, monkeypatch) -> None:
    met = []

    def look(answer, reference, args, by_name) -> str:
        with devices.Places((list(args), dict(by_name))) as places:
            reference(*args, **by_name)
        met.append(places.met)
        return ""

    monkeypatch.setattr(devices, "mixed_devices", look)
    EXERCISES[id].trial(EXERCISES[id].reference)
    assert met
    assert set(met) == {""}
