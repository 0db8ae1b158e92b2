"""Models for the labs: the lab model, any Llama-architecture model in its place, or random weights of any shape.

`LABKIT_MODEL` names a folder or a hub id to use instead of the lab model: Llama, Mistral or Qwen2, in safetensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from labkit.device import first_line, pick_device
from labkit.files import read_text, real_file, user_path
from labkit.lab_model import NAME, ModelError, cache_folder, ensure_lab_model
from labkit.llama import Llama, rope_frequencies
from labkit.specs import ModelSpec, decoder_spec

__all__ = [
    "ModelError",
    "cache_folder",
    "ensure_lab_model",
    "folder",
    "from_folder",
    "from_hf",
    "load",
    "random",
    "source",
    "spec",
    "tokenizer",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OR_UNSET = "Name a folder or a hub id (owner/name), or unset it."
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def named_model() -> str:
    """What `LABKIT_MODEL` says; empty when the lab model is to be used."""
    return os.environ.get("LABKIT_MODEL", "").strip()


def source() -> str:
    """Which model the labs use: the lab model's name, or what `LABKIT_MODEL` names."""
    return named_model() or NAME


def folder(progress: bool = True) -> Path:
    """The folder of the model in use, fetched first where that is needed. Raises ModelError."""
    named = named_model()
    if not named:
        return ensure_lab_model(progress)
    try:
        path = user_path(named)
        if path.is_dir():
            for file in path.iterdir():  # whoever opens a pipe waits for ever
                if not file.is_dir():
                    real_file(file)
            return path
    except OSError as error:
        what = f"{Path(error.filename).name[:80]}: " if error.filename else ""
        raise ModelError(f"LABKIT_MODEL={named[:80]} cannot be used: {what}{error.strerror}. {OR_UNSET}") from None
    if not HUB_ID.fullmatch(named):
        raise ModelError(f"LABKIT_MODEL={named[:80]}: no such folder. {OR_UNSET}")
    return _from_hub(named)


def spec() -> ModelSpec:
    """The shape of the model in use."""
    return _spec(folder(), source())


def load(
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, *, prepack: bool = True
) -> Llama:
    """The model in use, with its weights in `dtype` on `device` (None: the one that `pick_device` picks).

    prepack: on a CPU whose products are faster so, lay weights out for its kernels (see `prepacked`); they can be read,
    but cannot change afterwards. Raises ModelError.
    """
    model = from_folder(folder(), dtype, pick_device().torch_device if device is None else device, source())
    return model.prepack() if prepack else model


def tokenizer() -> Any:
    """The tokenizer of the model in use, a transformers tokenizer with its chat template. Raises ModelError.

    Code that a model's folder brings along is not run.
    """
    from transformers import AutoTokenizer

    path = folder()
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception, transformers many types
        raise ModelError(f"{path} has no tokenizer that transformers can read ({first_line(error)})") from error


def random(
    spec: ModelSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    prepack: bool = True,
) -> Llama:
    """A model of any shape with random weights, normal with deviation 0.02; norms are 1.

    One seed gives the same weights on one kind of device and dtype; a GPU draws others than a CPU.
    prepack: as in `load`.
    """
    model = _empty(spec, dtype, device)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.prepack() if prepack else model


def from_folder(
    path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", name: str = ""
) -> Llama:
    """The model in a folder of Hugging Face's layout: `config.json` and safetensors, in one file or in shards.

    Raises ModelError when it is not a Llama, Mistral or Qwen2 model, or when a file is missing or damaged.
    """
    shape = _spec(path, name or path.name)
    try:
        weights = Checkpoint(path)
        _on_meta(shape, dtype).check_shapes(weights.shapes())  # before there is memory for what the config promises
        return _fill(_empty(shape, dtype, device), weights)
    except (SafetensorError, ValueError, OSError, MemoryError, RuntimeError) as error:
        said = first_line(error) or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {said}. Fetch it again, or name another model.") from error


def from_hf(model: Any) -> Llama:
    """Our decoder with the weights of a transformers model (Llama, Mistral or Qwen2), same dtype and device."""
    return _fill(_empty(decoder_spec(model.config.to_dict()), model.dtype, model.device), model.state_dict())


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        files = [safe_open(file, framework="pt") for file in weight_files(path)]
        self.files = {name: file for file in files for name in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, no floating-point numbers: quantized weights are not read")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the files' headers."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a folder's model: those of its index, or else its only one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        found = [path / name for name in _indexed(index)]
    else:
        found = [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("consolidated")]
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found:
        raise ValueError(f"it has no {', '.join(missing) or '*.safetensors file'}")
    return found


def _indexed(index: Path) -> list[str]:
    """The names of the files that an index lists, each a file beside it."""
    try:
        content = json.loads(read_text(index))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index.name} is not valid JSON ({first_line(error)})") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index.name} has no weight_map from tensors to file names")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if PurePath(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{index.name} names {outside[0][:80]!r}, which is no safetensors file beside it")
    return names


def _spec(path: Path, name: str) -> ModelSpec:
    try:
        return decoder_spec(path, name)
    except ValueError as error:
        raise ModelError(f"{path} is not a Llama-architecture model: {first_line(error)}") from error


def _empty(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> Llama:
    """A model with memory for its weights and nothing in it: no weight is ever held twice."""
    model = _on_meta(spec, dtype)
    model.to_empty(device=device).requires_grad_(False)
    model.frequencies = rope_frequencies(spec).to(device)
    return model


def _on_meta(spec: ModelSpec, dtype: torch.dtype) -> Llama:
    """A model without memory: shapes only."""
    with torch.device("meta"):
        return Llama(spec).to(dtype)


def _fill(model: Llama, weights: Mapping[str, Tensor]) -> Llama:
    """Load `weights`; ValueError when they do not fit, or when one is not a number: it would spoil every answer."""
    model.load(weights)
    for name, parameter in model.named_parameters():
        if not all(bound.isfinite() for bound in parameter.aminmax()):
            raise ValueError(f"{name} has values that are not finite (NaN or infinity) in {parameter.dtype}")
    return model


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["original/*", "consolidated*"]))
    except Exception as error:  # the hub client raises many types: network, authorisation, name, disk
        raise ModelError(
            f"LABKIT_MODEL={name}: there is no such folder, and the hub gives no such model "
            f"({type(error).__name__}: {first_line(error)}). Check the name and the network, or unset LABKIT_MODEL."
        ) from error
