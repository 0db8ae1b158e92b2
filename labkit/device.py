"""Where a lab runs: the device, the number of CPU threads, the profile. Every setting is read from the environment."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from labkit.limits import usable_cores

DEVICES = ("auto", "cpu", "cuda")
PROFILES = ("quick", "full")
LEAST_FREE_GPU_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Device:
    """The device that was picked, and one sentence saying why."""

    torch_device: torch.device
    reason: str


def pick_device() -> Device:
    """The device that `LABKIT_DEVICE` (auto, cpu or cuda; auto when unset) leads to.

    A GPU is taken only if it has 4 GB free and computes a small product correctly. When it does not, the CPU is taken
    and the reason says so, also under `LABKIT_DEVICE=cuda`. ValueError for any other setting.
    """
    wanted = _setting("LABKIT_DEVICE", DEVICES)
    if wanted == "cpu":
        return Device(torch.device("cpu"), "CPU, as LABKIT_DEVICE=cpu asks")
    problem = cuda_problem()
    if problem is None:
        return Device(torch.device("cuda"), f"GPU: {torch.cuda.get_device_name()}")
    asked = "LABKIT_DEVICE=cuda cannot be met: " if wanted == "cuda" else ""
    return Device(torch.device("cpu"), f"CPU. {asked}{problem}")


@functools.cache  # decided once: our own model on the GPU must not make the GPU look too small later
def cuda_problem() -> str | None:
    """Why the GPU cannot be used, as a sentence; None when it can."""
    try:
        if not torch.cuda.is_available():
            return "There is no CUDA GPU that this PyTorch can use."
        free, total = torch.cuda.mem_get_info()
        if free < LEAST_FREE_GPU_BYTES:
            return f"The GPU has {free / 1e9:.1f} GB free of {total / 1e9:.1f} GB; the labs need 4 GB."
        ones = torch.ones(64, 64, device="cuda")
        if not bool(((ones @ ones).cpu() == 64).all()):
            return "The GPU computed a wrong product at its first use."
    except Exception as error:  # drivers fail in many types, and each must lead to the CPU
        return f"The GPU failed at its first use ({type(error).__name__}: {first_line(error)})."
    return None


def set_threads() -> int:
    """Tell torch how many CPU threads to use, and return the number: `LABKIT_THREADS`, or else every usable core.

    Left to itself torch may start a thread per core of the host; those above what a container may use spin and wait.
    """
    text = os.environ.get("LABKIT_THREADS", "").strip()
    if text and not (text.isdigit() and int(text) > 0):
        raise ValueError(f"LABKIT_THREADS={text!r}: it must be a whole number, at least 1, or unset")
    threads = int(text) if text else usable_cores()
    torch.set_num_threads(threads)
    return threads


def profile() -> str:
    """`LABKIT_PROFILE`: "quick" (also when unset) or "full". ValueError for any other setting."""
    return _setting("LABKIT_PROFILE", PROFILES)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


def _setting(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise ValueError(f"{name}={os.environ[name]!r}: it must be one of {', '.join(choices)}, or unset")
    return value
