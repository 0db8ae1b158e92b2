"""pytest plugin for nbval: wait longer than its fixed 5 s for the outputs of a cell that a busy machine runs slowly."""

SECONDS = 60


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = SECONDS
