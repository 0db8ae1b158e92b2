from __future__ import annotations

import pytest

from labkit.llama import Llama
from tests.quality.subjects import wide


@pytest.fixture(scope="session")
def model() -> Llama:
    return wide()
