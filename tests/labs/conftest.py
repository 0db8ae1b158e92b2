from __future__ import annotations

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def closed():
    """No figure of a test is open in the next one."""
    yield
    plt.close("all")
