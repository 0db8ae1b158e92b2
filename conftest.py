"""The one setting of the notebook run that nbval has no option for."""

from __future__ import annotations

OUTPUT_SECONDS = 60  # nbval waits 5 s for an output to arrive, whatever the cell's time limit: too short when busy


def pytest_collection_modifyitems(items) -> None:
    """Let each nbval cell wait longer for its outputs."""
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_SECONDS
