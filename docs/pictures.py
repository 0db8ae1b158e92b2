"""Take the pictures that the README shows out of the notebooks: `python docs/pictures.py`."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {"time_per_token.png": ("02_cache_from_scratch.ipynb", "figures.time_per_token(")}


def picture(notebook: str, call: str) -> bytes:
    """The PNG that the cell with `call` in it shows."""
    for cell in nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells:
        if cell.cell_type == "code" and call in cell.source:
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    return base64.b64decode(png)
    raise SystemExit(f"{notebook} has no cell with {call!r} that shows a picture: run `make notebooks` first")


def main() -> None:
    """Write every picture."""
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    for name, (notebook, call) in PICTURES.items():
        (folder / name).write_bytes(picture(notebook, call))


if __name__ == "__main__":
    main()
