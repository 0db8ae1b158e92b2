"""`labkit doctor`, `labkit model`, `labkit open`, `labkit size`: what a learner types, directly or through make."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from labkit.course.commands import add_all
from labkit.places import checkout, course_folder
from labkit.printable import printable

JUPYTER = Path(__file__).resolve().parent / "jupyter"  # for JupyterLab: settings, words for pictures and sliders
FIRST_LAB = "01_attention_basics.ipynb"


SIZE_ABOUT = """Bytes of a model's weights and KV cache; with --gpu: what fits, how fast it can be
at best, and what breaks first. Nothing is downloaded, and no weights are loaded: for a
config.json of most types, transformers' class is built without memory, in some seconds
the first time; everything else is arithmetic.
GB is 10^9 bytes, GiB 2^30."""
SIZE_EXAMPLES = """examples:
  labkit size qwen2.5-7b
  labkit size qwen2.5-7b --gpu h100-80gb --context 32K --users 16
  labkit size llama-3.1-70b --gpu h100-80gb --ranks 4 --kv-dtype float8
  labkit size qwen2.5-7b --gpu h100-80gb --kv-dtype int4 --group-size 32
  labkit size path/to/config.json --json
  labkit size --list gpus"""


class AddressError(ValueError):
    """JupyterLab cannot listen where it was told to; the message says what to type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. What a person can mend is said in one line on stderr.

    Output that cannot be written ends a command too: quietly when the reader has gone (`labkit size --list | head`).
    """
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks is no reason to fail
    status, ended = 0, None
    try:
        try:
            status = _run(arguments)
        except SystemExit as error:  # argparse's, after --help or a line on what is wrong
            ended = error
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            what = error.filename or "the output"
            _complain(f"{what} cannot be written or read ({error.strerror or error})")
            status = 1
        ended = None
    for stream in (sys.stdout, sys.stderr):
        if not _flushes(stream):  # send what it holds to nowhere, or Python tries once more when it ends
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if ended:
        raise ended
    return status


class Closed(io.StringIO):
    """In the place of an output that was closed before the command began: nothing can be written to it."""

    def write(self, text: str) -> int:
        """Raises OSError."""
        raise OSError(errno.EBADF, "it is closed")


def _fill_closed_streams() -> None:
    """Where a shell closed input, output or errors (`>&-`), Python has None, which print() takes for the output.

    Their numbers must not go to files that are opened later: what a library or a program of ours prints goes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stdout = sys.stdout or Closed()
    sys.stderr = sys.stderr or io.StringIO()


def _run(arguments: Sequence[str] | None) -> int:
    """The command itself, its own errors as a line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return _command(options)
    except ImportError as error:
        from labkit.course.doctor import REINSTALL

        _complain(f"something that was installed is missing ({error}): {REINSTALL}")
        return 1


def _command(options: argparse.Namespace) -> int:
    try:
        from labkit.course.workspace import WorkspaceError
        from labkit.files import user_path
        from labkit.lab_model import ModelError
    except ImportError:
        if options.run is run_doctor:  # it says of each part whether it is there
            return run_doctor(options)
        raise

    try:
        user_path(".")
    except OSError as error:  # torch would end this process without a word of ours
        _complain(str(error.strerror))
        return 1
    try:
        return options.run(options)
    except (AddressError, ModelError, WorkspaceError) as error:
        _complain(str(error))
        return 1


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"labkit: {printable(line)}", file=sys.stderr)


def _flushes(stream: TextIO) -> bool:
    """Whether a stream takes what was written to it."""
    try:
        stream.flush()
        return True
    except OSError:
        return False


class Parser(argparse.ArgumentParser):
    """As argparse's, save that help which cannot be written is an error."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="labkit", description="KV-cache labs: set up, check, open.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="check everything a lab needs, one line each")
    doctor.set_defaults(run=run_doctor)
    model = commands.add_parser("model", help="fetch the lab model, or verify the one that is there")
    model.set_defaults(run=run_model)
    opener = commands.add_parser("open", help="put the notebooks into a folder and open them in JupyterLab")
    opener.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="for your copies; a changed one stays as it is (default: work/ in a checkout, or else the current folder "
        "if it is empty, or else kv-cache-labs/ in it)",
    )
    opener.add_argument("--port", default=os.environ.get("PORT") or "8888", help="default: PORT, or 8888")
    opener.add_argument("--host", help="default: HOST if it is this machine's own, or 127.0.0.1")
    opener.add_argument("--no-server", action="store_true", help="put the notebooks there, and start nothing")
    opener.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    opener.set_defaults(run=run_open)
    _add_size(commands)
    add_all(commands)
    return parser


def _add_size(commands: Any) -> None:
    size = commands.add_parser(
        "size",
        help="what a model's weights and KV cache take, and what fits on a GPU",
        description=SIZE_ABOUT,
        epilog=SIZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size.add_argument(
        "model", nargs="?", metavar="MODEL", help="a name from --list, a config.json, or a folder with one"
    )
    size.add_argument(
        "--list", nargs="?", const="all", metavar="WHAT", help="name what is known: models, gpus or links"
    )
    size.add_argument("--gpu", metavar="NAME", help="plan for this GPU; put your own into data/gpus-mine.json")
    size.add_argument("--ranks", metavar="N", help="GPUs that share the model by tensor parallelism (default: 1)")
    size.add_argument("--link", metavar="NAME", help="what connects them (default: the GPU's fastest)")
    size.add_argument("--context", metavar="TOKENS", help="tokens per user; 128K is 131,072 (default: 8192)")
    size.add_argument("--users", "--batch", metavar="N", help="requests at the same time (default: 1)")
    size.add_argument("--kv-dtype", metavar="D", help="float16, float8, int8, int4, int2 (default: float16)")
    size.add_argument("--group-size", metavar="N", help="of int8, int4, int2: numbers that share a scale (default: 64)")
    size.add_argument("--residual-length", metavar="N", help="of these: newest tokens in 16 bits (default: 64)")
    size.add_argument("--sink-length", metavar="N", help="of these: first tokens in 16 bits (default: 0)")
    size.add_argument("--block-size", metavar="N", help="keep K and V in blocks of so many tokens; of int4, a group")
    size.add_argument("--budget", metavar="N", help="keep so many tokens per request at most, evict the others")
    size.add_argument("--weight-dtype", metavar="D", help="also mxfp4, float32 (default: bfloat16)")
    size.add_argument("--reserve", metavar="SHARE", help="of what the weights leave, kept free (default: 0.15)")
    size.add_argument("--parameters", metavar="N", help="weights in all, in place of those published or counted")
    size.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes, times in seconds")
    size.set_defaults(run=run_size)


def host_from_environment() -> str:
    """`HOST`, where it holds an address that only this machine reaches, or 127.0.0.1.

    Some shells and conda export one that holds a machine's name or type. Letting others in takes a word on the command
    line: an address that they can reach is not taken from the environment, which a line on stderr says.
    """
    host = os.environ.get("HOST", "").strip()
    if host == "localhost":
        return host
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_loopback:
            return str(address)
        _complain(
            f"HOST={host} in the environment would let other machines in and is left out; "
            f"if that is meant, type `{typed(host=host)}`"
        )
    return "127.0.0.1"


def run_doctor(options: argparse.Namespace) -> int:
    """One line per check; status 1 if any fails."""
    from labkit.course.doctor import checks

    lines = checks(thorough=True)
    print("\n".join(map(str, lines)))
    return 0 if all(line.ok for line in lines) else 1


def run_model(options: argparse.Namespace) -> int:
    """Fetch, convert or verify; prints the folder. `LABKIT_MODEL` names another model to fetch and read."""
    if os.environ.get("LABKIT_MODEL", "").strip():
        from labkit import models

        spec = models.spec()
        print(f"{models.folder()}: {spec.num_layers} layers, {spec.num_parameters / 1e6:.0f} M parameters")
        return 0
    from labkit.lab_model import ensure_lab_model

    print(f"{ensure_lab_model(thorough=True)}: complete, checksums match")
    return 0


def run_open(options: argparse.Namespace) -> int:
    """Make sure of the model, refresh the learner's copies, then become JupyterLab."""
    from labkit.course.workspace import refresh, work_folder
    from labkit.lab_model import ensure_lab_model

    host, port = "", 0
    if not options.no_server:
        host = options.host or host_from_environment()
        port = check_address(host, options.port)
    work = work_folder(options.folder, checkout())
    if not os.environ.get("LABKIT_MODEL", "").strip():
        ensure_lab_model()
    lines = refresh(course_folder("notebooks"), work)
    with contextlib.suppress(OSError):  # the labs open also where nobody reads this
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    if options.no_server:
        return 0
    command = jupyter_command(work, host, port, no_browser=options.no_browser)
    os.execve(command[0], command, jupyter_environment(dict(os.environ), work))


def run_size(options: argparse.Namespace) -> int:
    """Arithmetic on a model's shape: tables, or one JSON object."""
    from labkit.sizing.command import run

    return run(options)


def jupyter_environment(environment: dict[str, str], work: Path) -> dict[str, str]:
    """What JupyterLab, which opens `work`, and its kernels inherit, from what this process has."""
    # One more place to look for settings and extensions: the learner's own come first and stay as they are.
    for name in ("JUPYTER_CONFIG_PATH", "JUPYTER_PATH"):
        environment[name] = os.pathsep.join(filter(None, [environment.get(name), str(JUPYTER)]))
    environment.setdefault("GOMP_SPINCOUNT", "20000")  # why: docs/design.md
    return environment | spare_folders(work)


def spare_folders(work: Path) -> dict[str, str]:
    """Places in `work` for what Jupyter and IPython keep in the home folder, where that cannot be written to."""
    from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir, jupyter_runtime_dir

    from labkit.course.doctor import writable

    homes = {
        "JUPYTER_CONFIG_DIR": jupyter_config_dir(),
        "JUPYTER_DATA_DIR": jupyter_data_dir(),
        "JUPYTER_RUNTIME_DIR": jupyter_runtime_dir(),
        "IPYTHONDIR": os.environ.get("IPYTHONDIR") or os.path.expanduser("~/.ipython"),
    }
    bad = [name for name, folder in homes.items() if not writable(name, Path(folder), "").ok]
    if bad:
        _complain(f"the home folder cannot be written to: Jupyter keeps its settings in {work.name}/.home")
    return {name: str(work / ".home" / name.lower()) for name in bad}


def typed(host: str = "", port: str | int = "") -> str:
    """How a learner says where to listen: to make in a checkout, to labkit where a wheel was installed."""
    if checkout():
        return "make lab" + (f" HOST={host}" if host else "") + (f" PORT={port}" if port else "")
    return "labkit open" + (f" --host {host}" if host else "") + (f" --port {port}" if port else "")


def check_address(host: str, port: str) -> int:
    """The port as a number, if JupyterLab can listen on it; AddressError says what to type otherwise."""
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise AddressError(f"PORT={port[:20]} is not a port: give a number from 1 to 65535, as in `{typed(port=8889)}`")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is not in use
            probe.bind(address)
    except (socket.gaierror, ValueError):  # ValueError: no name at all, as of too many characters
        raise AddressError(
            f"HOST={host[:80]} is not an address: leave it out, or type `{typed(host='127.0.0.1')}`"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = int(port) + 1 if int(port) < 65535 else 8888
            problem = f"port {port} is in use: stop what runs there, or choose another, as in `{typed(port=other)}`"
        else:
            problem = f"{host}:{port} cannot be used ({error.strerror}): choose others with `{typed('…', '…')}`"
        raise AddressError(problem) from None
    return int(port)


def jupyter_command(work: Path, host: str, port: int, *, no_browser: bool) -> list[str]:
    """JupyterLab on exactly this address, in `work`, showing the first lab, open to who has its token or password.

    All other settings of the learner's own stay.
    """
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.ip={host}", f"--ServerApp.port={port}"]
    command.append("--ServerApp.identity_provider_class=labkit.course.guard.Guarded")
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={work}"]
    if (work / FIRST_LAB).is_file():
        command.append(f"--LabApp.default_url=/lab/tree/{FIRST_LAB}")
    if no_browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command


if __name__ == "__main__":
    sys.exit(main())
