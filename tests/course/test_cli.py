import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from traitlets.config import Config

from labkit import lab_model, places
from labkit.course import cli, doctor
from labkit.course.guard import Guarded
from labkit.course.workspace import WorkspaceError
from labkit.quality.texts import load_text
from tests.ports import free_port

ROOT = places.checkout()


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("PORT", "HOST", "LABKIT_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def taken():
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free():
    return free_port()


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """`labkit open` up to the moment when it would become JupyterLab: the commands it would run."""
    commands = []
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / cli.FIRST_LAB).write_text("{}")
    monkeypatch.setattr(cli, "checkout", lambda: tmp_path)
    monkeypatch.setattr(cli, "course_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(lab_model, "ensure_lab_model", lambda **_: tmp_path)
    monkeypatch.setattr(cli.os, "execve", lambda program, command, environment: commands.append(command))
    return commands


def test_help_imports_neither_torch_nor_transformers():
    code = "import sys, labkit.course.cli as cli\ntry: cli.main(['--help'])\nfinally: print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(result.stdout.splitlines()[-1].replace("'", '"'))
    assert "labkit.course.cli" in modules
    assert not {"torch", "transformers", "matplotlib"} & set(modules)


@pytest.mark.parametrize(("well", "status"), [(True, 0), (False, 1)])
def test_doctor_prints_a_line_per_check_and_fails_if_one_fails(monkeypatch, capsys, well, status):
    lines = [doctor.Line("Python", True, "fine"), doctor.Line("model", well, "seen", "do this")]
    monkeypatch.setattr(doctor, "checks", lambda thorough: lines)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().out.splitlines() == [str(line) for line in lines]


def test_model_reports_the_folder_it_verified(monkeypatch, capsys, tmp_path):
    asked = {}
    monkeypatch.setattr(lab_model, "ensure_lab_model", lambda **how: asked.update(how) or tmp_path)
    assert cli.main(["model"]) == 0
    assert asked == {"thorough": True}
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["model", "open"])
def test_a_model_that_cannot_be_had_is_one_line_on_stderr(monkeypatch, capsys, command, free):
    def fail(**_):
        raise lab_model.ModelError("no network")

    monkeypatch.setattr(lab_model, "ensure_lab_model", fail)
    monkeypatch.setenv("PORT", str(free))
    assert cli.main([command]) == 1
    assert capsys.readouterr() == ("", "labkit: no network\n")


def test_open_starts_jupyterlab_on_this_machine_only_in_work_on_lab_01(opened, tmp_path, free, capsys):
    cli.main(["open", "--port", str(free)])
    (command,) = opened
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    for flag in (
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={free}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={tmp_path / 'work'}",
        f"--LabApp.default_url=/lab/tree/{cli.FIRST_LAB}",
    ):
        assert flag in command
    assert "--no-browser" not in command
    assert (tmp_path / "work" / cli.FIRST_LAB).read_text() == "{}"
    assert capsys.readouterr().out == f"{cli.FIRST_LAB}: copied\n"


def test_the_notebooks_are_put_into_a_folder_that_one_names_and_nothing_is_started(
    opened, taken, tmp_path, monkeypatch
):
    monkeypatch.setenv("PORT", str(taken))  # nobody is to listen: whether the port is free does not matter
    assert cli.main(["open", str(tmp_path / "mine"), "--no-server"]) == 0
    assert (tmp_path / "mine" / cli.FIRST_LAB).read_text() == "{}"
    assert not (tmp_path / "work").exists()
    assert opened == []


def test_where_a_wheel_was_installed_what_to_type_is_labkits(monkeypatch, taken, capsys):
    monkeypatch.setattr(cli, "checkout", lambda: None)
    assert cli.main(["open", "--port", str(taken)]) == 1
    assert "as in `labkit open --port " in capsys.readouterr().err
    with pytest.raises(cli.AddressError, match=r"`labkit open --host 127\.0\.0\.1`"):
        cli.check_address("no host", "8888")


@pytest.mark.parametrize(("user", "flagged"), [(0, True), (1000, False)])
def test_only_root_is_allowed_as_root(opened, monkeypatch, free, user, flagged):
    monkeypatch.setattr(cli.os, "geteuid", lambda: user)
    cli.main(["open", "--port", str(free), "--no-browser"])
    assert ("--allow-root" in opened[0]) == flagged
    assert "--no-browser" in opened[0]


def test_port_and_host_come_from_the_environment_and_flags_win(opened, monkeypatch, free):
    monkeypatch.setenv("PORT", str(free))
    monkeypatch.setenv("HOST", "localhost")
    cli.main(["open"])
    assert {f"--ServerApp.port={free}", "--ServerApp.ip=localhost"} <= set(opened[0])
    monkeypatch.setenv("PORT", "1")
    cli.main(["open", "--port", str(free), "--host", "127.0.0.1"])
    assert {f"--ServerApp.port={free}", "--ServerApp.ip=127.0.0.1"} <= set(opened[1])


def test_a_port_in_use_is_one_line_that_names_another_and_starts_nothing(opened, taken, capsys, tmp_path):
    assert cli.main(["open", "--port", str(taken)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"port {taken} is in use" in said[0]
    assert "make lab PORT=" in said[0]
    assert opened == []
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "88 88", "²", "٨٨٨٨", "9" * 5000])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(cli.AddressError, match="not a port") as error:
        cli.check_address("127.0.0.1", port)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("asked", [["--port", "1\n2"], ["--host", "a\nb", "--port", "1"], ["--port", "\x1b[31m"]])
def test_what_no_terminal_shows_is_written_out_on_one_line(opened, asked, capsys):
    assert cli.main(["open", *asked]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\\n" in said or "\\x1b" in said
    assert opened == []


@pytest.mark.parametrize("host", ["a..b", "a" * 300, "nul\0byte"])
def test_a_host_that_can_be_no_name_is_one_line(host, free):
    with pytest.raises(cli.AddressError, match="is not an address") as error:
        cli.check_address(host, str(free))
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_refused(host, free, monkeypatch):
    if host.endswith("invalid"):  # as a resolver says it, without asking one
        failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(failure))
    with pytest.raises(cli.AddressError, match="HOST="):
        cli.check_address(host, str(free))


def test_a_work_folder_that_cannot_be_used_is_one_line_on_stderr(opened, tmp_path, free, capsys):
    (tmp_path / "work").write_text("a file")
    assert cli.main(["open", "--port", str(free)]) == 1
    assert "work folder" in capsys.readouterr().err
    assert issubclass(WorkspaceError, RuntimeError)
    assert opened == []


def test_the_command_serves_a_lab_to_who_has_the_token_and_to_nobody_else(tmp_path, free):
    """The command itself, run: it must listen, refuse a stranger, and serve lab 01's file from `work/`.

    The learner's settings switch Jupyter's own check off, which must not be obeyed.
    """
    work = tmp_path / "work"
    work.mkdir()
    (work / cli.FIRST_LAB).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    own = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    (tmp_path / "JUPYTER_CONFIG_DIR").mkdir()
    settings = {"IdentityProvider": {"token": ""}, "ServerApp": {"token": "", "password": ""}}
    (tmp_path / "JUPYTER_CONFIG_DIR/jupyter_server_config.json").write_text(json.dumps(settings))
    command = cli.jupyter_command(work, "127.0.0.1", free, no_browser=True)
    environment = cli.jupyter_environment({**os.environ, **own, "JUPYTER_TOKEN": ""}, work)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{free}"
        wait_for(address, server, tmp_path / "log")
        token = json.loads(next((tmp_path / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json")).read_text())["token"]
        assert len(token) >= 40
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/api/contents/{cli.FIRST_LAB}")
        with urllib.request.urlopen(f"{address}/api/contents/{cli.FIRST_LAB}?token={token}") as response:
            assert json.load(response)["path"] == cli.FIRST_LAB
        with urllib.request.urlopen(f"{address}/?token={token}") as response:
            assert response.url.partition("?")[0] == f"{address}/lab/tree/{cli.FIRST_LAB}"
        settings = f"{address}/lab/api/settings/@jupyterlab/apputils-extension:notification?token={token}"
        with urllib.request.urlopen(settings, timeout=10) as response:
            notification = json.load(response)["schema"]["properties"]
        assert notification["fetchNews"]["default"] == "false"
        assert notification["checkForUpdates"]["default"] is False
        extension = f"{address}/lab/extensions/kv-cache-labs/static/words.js?token={token}"
        with urllib.request.urlopen(extension, timeout=10) as response:
            assert b"_JUPYTERLAB" in response.read()
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address, server, log):
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def test_the_command_is_installed_as_labkit():
    program = shutil.which("labkit", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("labkit is not installed beside this Python")
    assert "doctor" in subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("exported", "host"),
    [
        (None, "127.0.0.1"),
        ("", "127.0.0.1"),
        ("::1", "::1"),
        ("127.0.0.2", "127.0.0.2"),
        ("localhost", "localhost"),
        ("x86_64-conda-linux-gnu", "127.0.0.1"),
        ("a-machines-name", "127.0.0.1"),
    ],
)
def test_an_exported_host_that_is_no_address_is_not_taken_for_one(monkeypatch, capsys, exported, host) -> None:
    if exported is not None:
        monkeypatch.setenv("HOST", exported)
    assert cli.host_from_environment() == host
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("exported", ["0.0.0.0", "::", "192.168.0.7", "8.8.8.8", "fe80::1"])
def test_others_are_let_in_by_the_command_line_alone(opened, monkeypatch, capsys, free, exported) -> None:
    monkeypatch.setenv("HOST", exported)
    monkeypatch.setattr(cli, "check_address", lambda host, port: int(port))
    cli.main(["open", "--port", str(free)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"make lab HOST={exported}" in said
    cli.main(["open", "--port", str(free), "--host", exported])
    assert capsys.readouterr().err == ""
    ips = [[flag for flag in command if flag.startswith("--ServerApp.ip=")] for command in opened]
    assert ips == [["--ServerApp.ip=127.0.0.1"], [f"--ServerApp.ip={exported}"]]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, False),
        ({"IdentityProvider": {"token": ""}}, False),
        ({"IdentityProvider": {"token": "  "}}, False),
        ({"ServerApp": {"token": ""}}, False),
        ({"PasswordIdentityProvider": {"token": ""}}, False),
        ({"IdentityProvider": {"token": "mine"}}, True),
        ({"PasswordIdentityProvider": {"token": "", "hashed_password": "argon2:x"}}, True),
    ],
)
def test_nobody_gets_in_without_token_or_password_whatever_a_settings_file_says(settings, kept) -> None:
    config = Config(settings)
    if "token" in config.ServerApp:  # as the server hands an older name on
        config.IdentityProvider.token = config.ServerApp.token
    guard = Guarded(config=config)
    assert guard.auth_enabled
    assert guard.token_generated != kept
    assert (guard.token in ("mine", "")) == kept
    guard.token = ""
    assert guard.auth_enabled


@pytest.mark.parametrize("command", [["doctor"], ["model"], ["open"], ["size", "qwen2.5-7b"]])
def test_in_a_folder_that_was_deleted_every_command_is_one_line(command, monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(command) == 1
    assert capsys.readouterr() == ("", "labkit: the current folder was deleted: change to another\n")


def test_a_home_that_cannot_be_written_to_is_said_once_and_jupyter_keeps_its_files_in_work(
    monkeypatch, tmp_path, capsys
) -> None:
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.spare_folders(tmp_path / "work") == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    spare = cli.spare_folders(tmp_path / "work")
    assert spare.keys() == {"JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"}
    assert len(set(spare.values())) == 4
    assert all(folder.startswith(str(tmp_path / "work" / ".home")) for folder in spare.values())
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert "JUPYTER_RUNTIME_DIR" not in cli.spare_folders(tmp_path / "work")  # one that was named and is good stays


BROKEN = {"reader gone": BrokenPipeError(errno.EPIPE, "Broken pipe"), "disk full": OSError(errno.ENOSPC, "No space")}


class Broken(io.RawIOBase):
    """What lies below a stream, and takes nothing."""

    def __init__(self, error):
        self.error = error

    def writable(self):
        return True

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, content):
        raise self.error


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", [["doctor"], ["model"], ["size", "qwen2.5-7b"], ["size", "--list"], ["--help"]])
def test_output_that_cannot_be_written_is_one_line_or_none(monkeypatch, capsys, tmp_path, command, broken) -> None:
    monkeypatch.setattr(doctor, "checks", lambda thorough: [doctor.Line("Python", True, "fine")])
    monkeypatch.setattr(lab_model, "ensure_lab_model", lambda **how: tmp_path)
    stream = io.TextIOWrapper(io.BufferedWriter(Broken(BROKEN[broken])), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        status = cli.main(command)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    if broken == "reader gone":
        assert (status, said) == (0, "")
    else:
        assert status == 1
        assert said == "labkit: the output cannot be written or read (No space)\n"


COMMANDS = [["size", "--list", "gpus"], ["size", "no-such-model"], ["model"], ["--help"]]
FORKS = """
import itertools, json, os, sys
import labkit.course.workspace, labkit.lab_model, labkit.sizing.command  # once, not in each child
from labkit.course import cli
reader, closed = os.pipe()
os.close(reader)  # `closed` is a pipe that nobody reads
full = os.open("/dev/full", os.O_WRONLY)
STREAMS = {"full out": (full, None), "full err": (None, full), "gone out": (closed, None), "gone err": (None, closed),
           "shut out": ("shut", None), "shut err": (None, "shut")}
for command, streams in itertools.product(json.loads(sys.argv[1]), STREAMS):
    kept, err = os.pipe()
    if (child := os.fork()) == 0:
        break
    os.close(err)
    with os.fdopen(kept, errors="replace") as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([command, streams, status, said]), flush=True)
else:
    sys.exit()
quiet = os.open(os.devnull, os.O_WRONLY)
others = (err if streams == "shut err" else quiet, err)  # where what is said must not land instead
for number, (wanted, other) in enumerate(zip(STREAMS[streams], others), start=1):
    if wanted == "shut":  # as a shell's >&-
        os.close(number)
        setattr(sys, ["stdin", "stdout", "stderr"][number], None)
    else:
        os.dup2(other if wanted is None else wanted, number)
sys.exit(cli.main(command))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_every_command_ends_well_on_every_broken_output() -> None:
    """Real processes: Python itself flushes what is left when it ends."""
    environment = {**os.environ, "LABKIT_CACHE": "~nobody-of-this-name", "PYTHONPATH": str(ROOT)}
    environment["PYTHONUNBUFFERED"] = ""  # as a learner's Python: it writes at the end
    command = [sys.executable, "-c", FORKS, json.dumps(COMMANDS)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == 6 * len(COMMANDS)
    for command, streams, status, err in results:
        case = (command, streams, status, err)
        fails = command in (["size", "no-such-model"], ["model"])
        assert "Traceback" not in err, case
        assert "Exception ignored" not in err, case
        unwritable = {"full out": "No space left on device", "shut out": "it is closed"}.get(streams)
        assert status == (1 if fails or unwritable else 0) or (fails and streams == "gone err"), case
        if unwritable and not fails:
            assert err == f"labkit: the output cannot be written or read ({unwritable})\n", case
        if streams == "shut err":  # here it is the output: a complaint is no answer
            assert "labkit: " not in err, case


@pytest.mark.parametrize("command", [["doctor"], ["model"], ["size", "--list"], ["open"]])
def test_where_packages_are_missing_every_command_says_so_and_what_to_do(command) -> None:
    """Python without its site-packages, as after an installation that was broken off."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    run = subprocess.run(
        [sys.executable, "-S", "-m", "labkit.course.cli", *command], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 1
    if command == ["doctor"]:
        assert run.stderr == ""
        lines = run.stdout.splitlines()
        assert lines[0].startswith("ok    Python")
        assert all(line.startswith("FAIL") and "No module named" in line and "make lab" in line for line in lines[1:])
        assert len(lines) == 9
    else:
        assert run.stdout == ""
        assert run.stderr.startswith("labkit: something that was installed is missing (No module named ")
        assert "make lab" in run.stderr
        assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding, monkeypatch) -> None:
    bytes_out, bytes_err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(bytes_err, encoding=encoding))
    monkeypatch.setattr(doctor, "checks", lambda thorough: [doctor.Line("é\udcff", False, "kv labs é", "mend")])
    assert cli.main(["doctor"]) == 1
    monkeypatch.setenv("LABKIT_MODEL", "é→\udcff")
    assert cli.main(["model"]) == 1
    assert b"FAIL" in bytes_out.getvalue()
    assert bytes_err.getvalue().startswith(b"labkit: ")


NO_FILES = {
    "pipe": lambda path: os.mkfifo(path),
    "folder without one": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "huge": lambda path: (path.touch(), os.truncate(path, 10**12)),
    "nothing": lambda path: None,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("user", ["model", "cache", "text"])
def test_whatever_a_path_leads_to_every_user_of_it_says_one_line(kind, user, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "odd.json"
    NO_FILES[kind](path)
    before = {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()}
    if user == "text":
        with pytest.raises(ValueError, match=r"cannot be read|nearest") as caught:
            load_text(path)
        assert "\n" not in str(caught.value)
        return
    elif user == "model":
        monkeypatch.setenv("LABKIT_MODEL", str(path))
        assert cli.main(["model"]) == 1
    elif kind in ("folder without one", "nothing"):
        return  # such a cache is a good one
    else:
        monkeypatch.setenv("LABKIT_CACHE", str(path))
        assert cli.main(["model"]) == 1
        (line,) = [line for line in doctor.checks() if line.name == "cache folder"]
        assert not line.ok
    assert capsys.readouterr().err.count("\n") == 1
    assert {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("named", ["~nobody-of-this-name/x.json", "n" * 300 + ".json", "./" + "n" * 300])
def test_a_name_that_cannot_be_is_one_line_for_every_user_of_it(named, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("LABKIT_MODEL", "LABKIT_CACHE"):
        monkeypatch.delenv("LABKIT_MODEL", raising=False)
        monkeypatch.setenv(variable, named)
        assert cli.main(["model"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert all(len(line) < 400 for line in said.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_jupyter_gets_our_settings_after_the_learners_own_and_asks_nothing_about_news() -> None:
    work = ROOT / "work"
    environment = cli.jupyter_environment({"JUPYTER_CONFIG_PATH": "mine", "GOMP_SPINCOUNT": "5"}, work)
    assert environment["JUPYTER_CONFIG_PATH"].split(os.pathsep) == ["mine", str(cli.JUPYTER)]
    assert environment["GOMP_SPINCOUNT"] == "5"
    for name in ("JUPYTER_CONFIG_PATH", "JUPYTER_PATH"):
        assert cli.jupyter_environment({}, work)[name] == str(cli.JUPYTER)
    overrides = json.loads((cli.JUPYTER / "labconfig" / "default_setting_overrides.json").read_text())
    assert overrides["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
