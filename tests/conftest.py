import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
torch.set_num_threads(1)  # several workers share the cores
# With CI=true Hypothesis would try the same examples for ever; what fails is printed so that it can be tried again.
settings.register_profile("labs", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("labs")


@pytest.fixture(scope="session")
def lab_model() -> Path:
    """The lab model's folder; fetched and converted once per machine."""
    from labkit.lab_model import ensure_lab_model

    return ensure_lab_model(progress=False)


def pytest_collection_finish() -> None:
    """What is there when tests begin stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()
