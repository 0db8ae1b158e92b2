"""What a lab needs, checked: one line per thing, and for each that fails its remedy."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from labkit.places import checkout
from labkit.printable import printable

OLDEST, NEWEST = (3, 11), (3, 13)
LEAST_FREE_BYTES = 2_000_000_000
WIDGETS = Path("labextensions", "@jupyter-widgets", "jupyterlab-manager", "package.json")
MORE_MEMORY = "close other programs, or raise the limit (ulimit -v, a container's): a lab needs 2 GB of free memory"
SETTING = "correct the setting and start again"
REINSTALL = (
    "run `make clean` and `make lab` again (in an environment of your own: `pip install -c requirements.lock -e .`)"
    if checkout()
    else "install it again: `pip install --force-reinstall` and the wheel that you installed"
)


@dataclass(frozen=True)
class Line:
    """One thing a lab needs: is it there, what was seen, and what to do when it is not."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = "ok  " if self.ok else "FAIL"
        return printable(f"{mark}  {self.name:<15} {self.detail}" + ("" if self.ok else f" → {self.remedy}"))


def checks(thorough: bool = False) -> list[Line]:
    """Every check, in order. `thorough` compares the model's checksums, not only its sizes (about a second)."""
    return [_guarded(name, check) for name, check in _table(thorough)]


def card() -> str:
    """What the first cell of a lab shows: Python, torch, device, profile and model; failing checks with remedies.

    Names no folder unless something is wrong in it, so that a stored page says nothing of whose machine it was.
    """
    from labkit.lab_model import NAME

    lines = checks()
    seen = {line.name: line.detail for line in lines if line.ok}
    model = os.environ.get("LABKIT_MODEL", "").strip() or NAME
    rows = [("Python", "torch"), ("device", "profile")]
    top = [" · ".join(seen[name] for name in row if name in seen) for row in rows]
    return "\n".join([*filter(None, top), f"model {model}", *(str(line) for line in lines if not line.ok)])


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Line:
    """Python is one of those that the labs are tested on."""
    ok = OLDEST <= version[:2] <= NEWEST
    then = "`make clean` and `make lab PYTHON=python3.12`" if checkout() else "labkit into an environment of that one"
    remedy = f"install Python 3.11, 3.12 or 3.13, then {then}"
    return Line("Python", ok, f"Python {'.'.join(map(str, version))}", remedy)


def check_torch() -> Line:
    """PyTorch imports; it is told how many threads to use."""
    import torch

    from labkit.device import set_threads

    return Line("torch", True, f"torch {torch.__version__}, {set_threads()} CPU threads")


def check_weights() -> Line:
    """In which dtypes a CPU's products read weights that are laid out for them, and what was measured."""
    import torch

    from labkit.prepacked import float32_gain, has_product, least_gain

    used = ["bfloat16"] if has_product(torch.bfloat16) else []
    gain = float32_gain() if has_product(torch.float32) else 0.0
    used += ["float32"] if gain >= least_gain() else []
    detail = f"prepacked on a CPU in {' and '.join(used) or 'no dtype'}"
    return Line("weights", True, f"{detail} (in float32 {gain:.1f} times as fast; used from {least_gain():g})")


def check_device() -> Line:
    """The device that was picked, and the memory free on it."""
    from labkit.device import pick_device
    from labkit.measure import memory

    device = pick_device()
    seen = memory(device.torch_device)
    free, total = seen["free"], seen["total"]
    detail = (
        f"{device.reason}{'' if device.reason.endswith('.') else ','} {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    )
    if os.environ.get("LABKIT_DEVICE", "").strip().lower() == "cuda" and device.torch_device.type != "cuda":
        return Line("device", False, detail, "free or repair the GPU, or unset LABKIT_DEVICE; the labs run on the CPU")
    return Line("device", free >= LEAST_FREE_BYTES, detail, MORE_MEMORY)


def check_profile() -> Line:
    """`LABKIT_PROFILE` is one there is."""
    from labkit.device import profile

    return Line("profile", True, f"profile {profile()}")


def check_model(thorough: bool = False) -> Line:
    """The model's files are there and whole. Fetches nothing."""
    from labkit.lab_model import NAME, damage

    if named := os.environ.get("LABKIT_MODEL", "").strip():
        return _check_named_model(named)
    folder = _cache() / NAME
    reason = damage(folder, thorough)
    if reason:
        remedy = f"{'run `make lab` again, or' if checkout() else 'run'} `labkit model`: it fetches 93 MB, once"
        return Line("model", False, f"{NAME} in {folder}: {reason}", remedy)
    return Line("model", True, f"{NAME} in {folder}")


def _check_named_model(named: str) -> Line:
    """Of a folder, that it holds a model that the labs can run; a hub's is asked for when a lab loads it."""
    from labkit import models
    from labkit.lab_model import ModelError

    try:
        if os.path.exists(os.path.expanduser(named)) or not models.HUB_ID.fullmatch(named):
            models.spec()
    except ModelError as error:
        return Line("model", False, str(error), SETTING)
    return Line("model", True, f"{named} (LABKIT_MODEL; read when a lab loads it)")


def check_work_folder() -> Line:
    """The folder where progress is kept, the current one unless `LABKIT_PROGRESS` names a file, can be written to."""
    from labkit.course.progress import default_path
    from labkit.files import real_file, user_path

    named = os.environ.get("LABKIT_PROGRESS", "").strip()
    remedy = "set it to a file in a writable folder, or unset it"
    try:
        path = default_path()
        real_file(path)
    except OSError as error:
        detail = f"LABKIT_PROGRESS={named[:80]} cannot be used ({error.strerror})"
        return Line("working folder", False, detail, remedy)
    if named and not (line := writable("working folder", path.parent, remedy)).ok:
        return dataclasses.replace(line, detail=f"of LABKIT_PROGRESS, {line.detail}")
    return writable("working folder", user_path("."), "make it writable, or work in a folder that is")


def check_cache_folder() -> Line:
    """The cache folder can be written to; one that is read-only serves as well once the model is in it."""
    from labkit.lab_model import NAME, damage

    folder = _cache()
    line = writable("cache folder", folder, "make it a writable folder, or set LABKIT_CACHE to one")
    if not line.ok and damage(folder / NAME) is None:
        return Line("cache folder", True, f"{folder}, read-only, with the model in it")
    return line


def check_widgets() -> Line:
    """ipywidgets imports, and JupyterLab has the extension that shows its widgets."""
    import ipywidgets
    from jupyter_core.paths import jupyter_path

    found = any((Path(path) / WIDGETS).is_file() for path in jupyter_path())
    detail = f"ipywidgets {ipywidgets.__version__}, JupyterLab extension {'there' if found else 'missing'}"
    return Line("widgets", found, detail, f"install jupyterlab_widgets: {REINSTALL}")


def _table(thorough: bool) -> list[tuple[str, Callable[[], Line]]]:
    return [
        ("Python", check_python),
        ("torch", check_torch),
        ("weights", check_weights),
        ("device", check_device),
        ("profile", check_profile),
        ("model", lambda: check_model(thorough)),
        ("working folder", check_work_folder),
        ("cache folder", check_cache_folder),
        ("widgets", check_widgets),
    ]


def _guarded(name: str, check: Callable[[], Line]) -> Line:
    """A check that raises is a failing line: the doctor reports on a broken installation, it must not break."""
    try:
        return check()
    except Exception as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in said:
            return Line(name, False, f"memory ran out ({said})", MORE_MEMORY)
        if isinstance(error, ImportError):
            return Line(name, False, f"does not import ({said})", REINSTALL)
        if isinstance(error, ValueError | OSError):
            return Line(name, False, said, SETTING)
        return Line(name, False, f"{type(error).__name__}: {said}", REINSTALL)


def _cache() -> Path:
    """The cache folder; ValueError when what LABKIT_CACHE says can be none."""
    from labkit.lab_model import ModelError, cache_folder

    try:
        return cache_folder()
    except ModelError as error:
        raise ValueError(str(error)) from None


def writable(name: str, folder: Path, remedy: str) -> Line:
    """Whether files can be written in a folder, or in the nearest above it that exists, where it would be made."""
    from labkit.files import folder_problem, nearest

    try:
        if (problem := folder_problem(folder)) is not None:
            return Line(name, False, f"{folder} cannot be written to ({problem})", remedy)
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(b"x")
    except OSError as error:
        return Line(name, False, f"{folder} cannot be written to ({error.strerror or error})", remedy)
    return Line(name, True, f"{folder} is writable")
