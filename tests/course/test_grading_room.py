"""What a confined process cannot do, on a system with namespaces, without them, as root and as an ordinary user.

A system that cannot enforce something is asked whether it says so: no test here is left out for want of a right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from labkit.course.grading import confined, usage
from labkit.course.grading.confined import SYSTEM
from labkit.course.grading.room import WORDS, Limits, Room, RoomError, homes, needed, told
from labkit.course.grading.usage import SYSTEM_V, Clock

LINUX = sys.platform.startswith("linux")
WITHOUT = """
import sys
from labkit.course.grading import confined
libc = confined.libc
def forbidden(name, *arguments):
    if name == "unshare" and {condition}:
        raise PermissionError(1, "Operation not permitted")
    return libc(name, *arguments)
confined.libc = forbidden
sys.exit(confined.main())
"""
AS_IN_A_CONTAINER = WITHOUT.format(condition=True)
SHARING_MEMORY = WITHOUT.format(condition="arguments == (confined.NEWIPC,)")
FOR_A_ROOM_INSIDE = """
import sys
from labkit.course.grading import confined
confined.elsewhere = lambda *_: False
sys.exit(confined.main())
"""


@dataclass
class Ran:
    """What a confined Python printed, why it ended, its status, what was enforced, for how long it ran, and where."""

    printed: str
    why: str
    status: int
    report: dict[str, str]
    seconds: float
    room: Room

    def holds(self, name: str) -> bool:
        """Whether something was enforced; where it was not, the teacher was told."""
        reason = self.report[name]
        assert not reason or f"NOT enforced here: {WORDS[name]} ({reason})." in told(self.report, Limits())
        return not reason


@pytest.fixture(params=["as the system allows", "namespaces forbidden"])
def room(request, tmp_path: Path):
    """Runs Python code in a room of its own, in both ways."""
    (tmp_path / "secret.txt").write_text("secret")
    made: list[Room] = []

    def run(code: str, **limits) -> Ran:
        one = Room(Limits(**{"seconds": 30, "memory": 10**9, "disk": 50 * 10**6, **limits}), [tmp_path])
        made.append(one)
        command = one.command(
            [sys.executable, "-c", f"import os, sys, time\nSECRET = {str(tmp_path / 'secret.txt')!r}\n{code}"]
        )
        if "forbidden" in request.param:
            plan = json.loads(one.plan.read_text())  # without mounts nobody else can read a Python in root's home
            one.plan.write_text(json.dumps(plan | {"uid": 0}))
            command[2:4] = ["-c", AS_IN_A_CONTAINER]
        if "memory shared" in request.param:
            command[2:4] = ["-c", SHARING_MEMORY]
        if "inside" in request.param:
            command[2:4] = ["-c", FOR_A_ROOM_INSIDE]
        began = time.monotonic()
        status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
        seconds = time.monotonic() - began
        report = json.loads((one.base / "report").read_text())
        output = one.home / "output.txt"
        return Ran(output.read_text() if output.exists() else "", one.why, status, report, seconds, one)

    before = {kind: held(kind) for kind in SYSTEM_V}
    yield run
    for one in made:
        one.close()
    for kind, known in before.items():  # a room that has neither a user nor a space of its own leaves what it made
        for left in held(kind) - known:
            confined.remove(kind, left)


def held(kind: str) -> set[int]:
    """Ids of what this system holds of one kind of System V's."""
    return {row[SYSTEM_V[kind]] for row in usage.system_v(kind)}


def test_a_room_has_an_environment_and_a_folder_of_its_own(room, monkeypatch) -> None:
    monkeypatch.setenv("PRIVATE_TOKEN", "hidden")
    ran = room("print(os.environ.get('PRIVATE_TOKEN'), os.path.basename(os.getcwd())); open('x', 'w').write('1')")
    assert (ran.printed.split(), ran.status) == (["None", "work"], 0)


def test_time_and_files_are_limited(room) -> None:
    ran = room("while True: pass", seconds=1)
    assert ran.status != 0
    assert "computed for more than 1 seconds" in ran.why
    ran = room("open('big', 'wb').write(bytes(10**7))", file=10**6)
    assert "File too large" in ran.printed
    ran = room("[os.open('/usr', 0) for _ in range(1000)]", open_files=100)
    assert "Too many open files" in ran.printed


def test_processes_that_fork_have_no_more_time_together_than_one(room) -> None:
    ran = room("for _ in range(3): os.fork()\nwhile True: pass", seconds=4)
    assert "computed for more than 4 seconds" in ran.why
    ran = room(  # each of them far below the limit of one process
        "while True:\n    if os.fork() == 0:\n        began = time.process_time()\n"
        "        while time.process_time() < began + 0.2: pass\n        os._exit(0)\n    os.wait()",
        seconds=3,
    )
    assert "computed for more than 3 seconds" in ran.why


@pytest.mark.skipif(not LINUX, reason="elsewhere processes are not counted after their end")
def test_computing_counts_where_nobody_waits_for_its_end(room) -> None:
    """The system adds a child's time to its parent's when the parent waits for it, and only then."""
    ran = room(
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "while True:\n    if os.fork() == 0:\n        began = time.process_time()\n"
        "        while time.process_time() < began + 0.2: pass\n        os._exit(0)\n"
        "    try:\n        os.wait()\n    except ChildProcessError:\n        pass",
        seconds=3, wall_seconds=20.0,
    )  # fmt: skip
    assert "computed for more than 3 seconds" in ran.why


@pytest.mark.skipif(not LINUX, reason="elsewhere processes are not counted after their end")
def test_what_a_parent_gets_of_its_childrens_time_is_counted_once() -> None:
    clock = Clock(os.getpid())
    code = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        while time.process_time() < 0.7: pass\n"
        "        os._exit(0)\n    os.wait()\nprint(sum(os.times()[:4]))\ntime.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        looked = []
        while process.poll() is None:
            looked.append(clock.look())
            time.sleep(0.1)
        used = float(process.communicate()[0])
    assert looked == sorted(looked)
    assert used <= looked[-1] + 0.05 < used + 4 * 0.2 + 0.3


def test_a_process_that_one_look_misses_is_not_counted_anew(monkeypatch) -> None:
    """As where a thread of its parent ends while the parent's threads are gone through."""
    burn = "import time\nwhile time.process_time() < 1: pass\nprint('done', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        clock = Clock(os.getpid())
        before = clock.look()
        with monkeypatch.context() as patch:
            patch.setattr(usage, "family", lambda pid: [])
            assert clock.look() == before
        after = clock.look()
        process.kill()
    assert before > 0.9
    assert after < before + 0.3


def test_what_does_nothing_for_ever_has_an_end(room) -> None:
    ran = room("import subprocess\nsubprocess.Popen(['sleep', '98764'], start_new_session=True)\ntime.sleep(98764)",
               wall_seconds=3.0)  # fmt: skip
    assert "ran for more than 3 seconds on the wall" in ran.why
    assert ran.seconds < 60
    assert "sleep 98764" not in everything_that_runs()


@pytest.mark.skipif(not LINUX, reason="macOS lets nobody limit memory; it is looked at instead")
def test_memory_is_limited(room) -> None:
    ran = room("hoard = [bytearray(10**8) for _ in range(100)]")
    assert "MemoryError" in ran.printed
    assert ran.status == 1


CHUNK = """CHUNK, kept = bytes(20_000_000), []
import ctypes
C = ctypes.CDLL(None)
C.mmap.restype = ctypes.c_void_p
def mapped(f, size, flags=1):  # Python's own keeps the file open
    return C.mmap(None, ctypes.c_size_t(size), 3, flags, f, ctypes.c_long(0))
"""
NAMELESS = {
    "memory files": "for _ in range(20): f = os.memfd_create('a'); os.write(f, CHUNK); kept = [*kept, f]",
    "memory files that are mapped": "for _ in range(20):\n    f = os.memfd_create('a')\n    os.write(f, CHUNK)\n"
    "    ctypes.string_at(mapped(f, len(CHUNK)), len(CHUNK))\n    os.close(f)",
    "memory files that are mapped, but not read": "for _ in range(20):\n    f = os.memfd_create('a')\n"
    "    os.write(f, CHUNK)\n    ctypes.string_at(mapped(f, 4096), 1)\n    os.close(f)",
    "shared memory out of sight": "import mmap\nfor _ in range(20):\n    m = mmap.mmap(-1, len(CHUNK))\n"
    "    m.write(CHUNK)\n    m.madvise(mmap.MADV_DONTNEED)\n    kept.append(m)",
    "shared memory with a name of its own": "for _ in range(20):\n    at = mapped(-1, len(CHUNK), 0x21)\n"
    "    ctypes.memset(at, 1, len(CHUNK))\n"
    "    C.prctl(0x53564d41, ctypes.c_ulong(0), ctypes.c_ulong(at), ctypes.c_ulong(len(CHUNK)), b'mine')\n"
    "    C.madvise(ctypes.c_void_p(at), ctypes.c_size_t(len(CHUNK)), 4)",
    "segments": "import ctypes\nC = ctypes.CDLL(None)\nC.shmat.restype = ctypes.c_void_p\n"
    "for _ in range(20):\n    a = C.shmat(C.shmget(0, ctypes.c_size_t(len(CHUNK)), 0o1600), None, 0)\n"
    "    ctypes.memset(a, 1, len(CHUNK))\n    C.shmdt(ctypes.c_void_p(a))",
}
REMOVED = {
    "removed files": "for _ in range(20):\n    f = open('x', 'wb')\n    f.write(CHUNK)\n    f.flush()\n"
    "    os.remove('x')\n    kept.append(f)",
    "removed files that are mapped": "for _ in range(20):\n    f = os.open('x', os.O_RDWR | os.O_CREAT)\n"
    "    os.write(f, CHUNK)\n    os.remove('x')\n    mapped(f, len(CHUNK))\n    os.close(f)",
    "removed files of which one page is mapped": "for _ in range(20):\n    f = os.open('x', os.O_RDWR | os.O_CREAT)\n"
    "    os.write(f, CHUNK)\n    os.remove('x')\n    mapped(f, 4096)\n    os.close(f)",
}


@pytest.mark.skipif(not LINUX, reason="other systems have no such files")
@pytest.mark.parametrize("kind", NAMELESS)
def test_memory_in_files_without_a_name_is_counted(room, kind: str) -> None:
    ran = room(f"{CHUNK}{NAMELESS[kind]}\ntime.sleep(6)", memory=3 * 10**8)
    if kind != "segments" or ran.holds("shared memory"):
        assert "GB of memory; 0.3 GB are allowed" in ran.why


@pytest.mark.skipif(not LINUX, reason="other systems do not list them")
@pytest.mark.parametrize("room", ["as the system allows", "memory shared", "namespaces forbidden"], indirect=True)
@pytest.mark.parametrize("kind", SYSTEM_V)
def test_what_outlives_every_process_is_removed_when_a_room_with_a_user_or_a_space_of_its_own_ends(room, kind) -> None:
    made = {
        "shm": "shmget(0, ctypes.c_size_t(4096), 0o1600)",
        "sem": "semget(0, 3, 0o1600)",
        "msg": "msgget(0, 0o1600)",
    }
    before = held(kind)
    ran = room(f"import ctypes\nC = ctypes.CDLL(None)\nprint([C.{made[kind]} for _ in range(3)])")
    assert len([number for number in json.loads(ran.printed) if number >= 0]) == 3
    if ran.holds("user") or ran.holds("shared memory"):  # else they may be the teacher's own
        assert held(kind) <= before


@pytest.mark.skipif(not LINUX, reason="other systems do not list what a process has open")
@pytest.mark.parametrize("kind", REMOVED)
def test_files_that_were_removed_while_they_were_open_are_counted(room, kind: str) -> None:
    ran = room(f"{CHUNK}{REMOVED[kind]}\ntime.sleep(6)", disk=10**8)
    assert "MB to files; 100 MB are allowed" in ran.why


@pytest.mark.skipif(not LINUX, reason="other systems have no such folders")
def test_memory_in_the_shared_folders_is_counted_where_they_are_there(room) -> None:
    ran = room(
        "for place in ('/tmp', '/dev/shm', '/run'):\n    open(place + '/x', 'wb').write(bytes(50_000_000))\n"
        "time.sleep(6)",
        memory=10**8,
    )
    assert "GB of memory; 0.1 GB are allowed" in ran.why or "Permission denied" in ran.printed or not ran.holds("files")


def test_a_room_sees_no_network_no_secret_and_no_other_process(room, tmp_path: Path) -> None:
    """Whatever the system enforces cannot be done; whatever it does not, it says."""
    tries = {
        "open(SECRET).read()": "files",
        "open(os.path.dirname(SECRET) + '/mine', 'w')": "files",
        "open(sys.prefix + '/mine', 'w')": "files",
        "os.listdir(os.path.dirname(SECRET))": "files",
        "os.stat(SECRET)": "names",
        "socket.create_connection(('1.1.1.1', 80), 2)": "tcp",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('1.1.1.1', 53))": "network",
        "os.kill(GRADER, 0)": "signals",
        "os.stat(f'/proc/{GRADER}/cmdline')": "processes",
    }
    attempts = "".join(f"    (lambda: {what}),\n" for what in tries)
    ran = room(
        f"import socket\nGRADER = {os.getpid()}\nfor what in (\n{attempts}):\n"
        "    try:\n        what(); print('DONE')\n    except OSError as error:\n        print('no:', error)\n"
    )
    lines = ran.printed.splitlines()
    assert len(lines) == len(tries), ran.printed
    for (what, name), line in zip(tries.items(), lines, strict=True):
        if ran.holds(name):
            assert line.startswith("no:"), (what, line)
    if ran.holds("files"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt"]


def test_the_home_of_who_grades_is_out_of_reach(room, tmp_path: Path, monkeypatch) -> None:
    """Also where the submission runs as the same user, who may read it all."""
    home = tmp_path.parent / f"{tmp_path.name}-home"
    home.mkdir()
    (home / "diary.txt").write_text("dear diary")
    (home / "diary.txt").chmod(0o644)
    monkeypatch.setenv("HOME", str(home))
    ran = room(f"try:\n    print(open({str(home / 'diary.txt')!r}).read())\nexcept OSError:\n    print('no')")
    assert home in homes()
    assert ran.printed.strip() == ("no" if ran.holds("files") else "dear diary")


def test_what_a_submission_needs_does_not_open_the_home_that_it_lies_in(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/code").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, tmp_path / "home", tmp_path / "home/code"))))
    assert {tmp_path, tmp_path / "home", tmp_path / "home/code"} & set(needed()) == {tmp_path / "home/code"}


def test_a_class_in_a_folder_that_is_needed_is_hidden_all_the_same(room, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path.parent), os.environ.get("PYTHONPATH", "")]))
    ran = room("try:\n    print(open(SECRET).read())\nexcept OSError:\n    print('no')")
    assert ran.printed.strip() == ("no" if ran.holds("files") else "secret")


def test_a_folder_that_is_the_courses_own_is_refused() -> None:
    with pytest.raises(RoomError, match="cannot be hidden from a submission: the course lies in it"):
        Room(Limits(), [needed()[0]])


@pytest.mark.skipif(not LINUX, reason="mounts are Linux's")
def test_no_folder_at_the_top_but_the_systems_own_is_in_sight(room) -> None:
    code = (  # where the top cannot be read, its names are known from outside
        "def seen(folder):\n    try:\n        return os.listdir(folder)\n    except OSError:\n        return None\n"
        f"for name in sorted({{*(seen('/') or ()), *{os.listdir('/')!r}}}):\n"
        "    names = seen('/' + name)\n    print(name, 'no' if names is None else len(names))"
    )
    ran = room(code)
    assert {line.rsplit(maxsplit=1)[0] for line in ran.printed.splitlines()} >= {*os.listdir("/")}
    used = {*SYSTEM, *(path.parts[1] for path in (*needed(), Path(tempfile.gettempdir())))}
    for line in ran.printed.splitlines() if ran.holds("files") else ():
        name, seen = line.rsplit(maxsplit=1)
        link = os.path.islink(f"/{name}") or not os.path.isdir(f"/{name}")
        assert seen in ("0", "no") or name in used or link, line


def everything_that_runs() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_what_is_left_running_ends_with_the_room(room) -> None:
    ran = room(
        "import subprocess\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(98765)'], start_new_session=True)\n"
        "print('left')"
    )
    assert ran.printed.strip() == "left"
    assert "time.sleep(98765)" not in everything_that_runs()


@pytest.fixture
def ordinary(room):
    """Why a room ended its code where the grader is not root: a room in a room, whose user is not."""

    def run(code: str, container: bool = False, **limits) -> str:
        given = {"seconds": 20, "wall_seconds": 20.0, "memory": 10**9, "disk": 50 * 10**6, **limits}
        ran = room(
            "import json, subprocess\n"
            "from labkit.course.grading.room import Limits, Room\n"
            f"inner = Room(Limits(**{given!r}))\n"
            f"code = 'import os, sys, time\\n' + {code!r}\n"
            "command = inner.command([sys.executable, '-c', code])\n"
            f"command[2:4] = ['-c', {AS_IN_A_CONTAINER!r}] if {container} else command[2:4]\n"
            "subprocess.run(command)\n"
            "why = inner.why\n"
            "inner.close()\n"
            "print(json.dumps([why, inner.base.exists()]))\n",
            memory=4 * 10**9, disk=500 * 10**6, seconds=100,
        )  # fmt: skip
        why, left = json.loads(ran.printed.splitlines()[-1])
        assert not left
        return str(why)

    return run


@pytest.mark.skipif(not LINUX, reason="other systems do not list what a process has open")
@pytest.mark.parametrize("room", ["a room inside"], indirect=True)
def test_processes_that_have_ended_do_not_stop_the_looking(ordinary) -> None:
    """What they hold is nobody's to see, which is also how a process looks that forbids it."""
    why = ordinary(
        "for _ in range(50):\n    if os.fork() == 0:\n        os._exit(0)\n"
        "time.sleep(1)\nend = time.monotonic() + 10\n"
        "kept = [os.memfd_create('a') for _ in range(20)]\nfor f in kept: os.write(f, bytes(20_000_000))\n"
        "while time.monotonic() < end: time.sleep(0.1)\n",
        memory=3 * 10**8,
    )
    assert "GB of memory; 0.3 GB are allowed" in why


@pytest.mark.skipif(not LINUX, reason="other systems have no such files")
@pytest.mark.parametrize("room", ["a room inside"], indirect=True)
def test_a_file_without_a_name_counts_in_full_where_only_root_may_know_its_size(ordinary) -> None:
    """What is in sight of it is the one page that is mapped."""
    code = NAMELESS["memory files that are mapped, but not read"]
    assert "GB of memory; 0.3 GB are allowed" in ordinary(f"{CHUNK}{code}\ntime.sleep(6)", memory=3 * 10**8)
    code = REMOVED["removed files of which one page is mapped"]
    why = ordinary(f"{CHUNK}{code}\ntime.sleep(6)", disk=10**8, file=3 * 10**7)
    assert "MB to files; 100 MB are allowed" in why


@pytest.mark.skipif(not LINUX, reason="other systems mount no model")
def test_what_is_written_in_the_models_place_is_counted(room, tmp_path_factory, monkeypatch) -> None:
    """The model itself is not: neither where it was put nor where it is after its folder got another name."""
    model = tmp_path_factory.mktemp("models")
    model.chmod(0o755)
    (model / "weights").write_bytes(bytes(30_000_000))
    (model / "weights").chmod(0o644)
    monkeypatch.setattr(Room, "models", lambda self: [(str(model), str(self.home / "cache" / "model"))])
    move = "os.chdir('..')\nos.rename('cache', 'moved')\nos.makedirs('cache/model')\n"
    ran = room(f"{move}print(os.path.getsize('moved/model/weights'))\ntime.sleep(2)", disk=2 * 10**7)
    assert "ended by itself" in ran.why, ran.printed
    ran = room(f"{move}open('cache/model/x', 'wb').write(bytes(30_000_000))\ntime.sleep(4)", disk=2 * 10**7)
    assert "it wrote 30 MB to files; 20 MB are allowed" in ran.why, ran.printed


WRITE = "open('x', 'wb').write(bytes(60_000_000))\ntime.sleep(4)"


@pytest.mark.skipif(not LINUX, reason="other systems have other permissions")
@pytest.mark.parametrize("room", ["a room inside"], indirect=True)
def test_a_folder_that_forbids_to_be_read_ends_the_submission(ordinary) -> None:
    why = ordinary(f"os.mkdir('d', 0o300)\nos.chdir('d')\n{WRITE}", container=True)
    assert "forbade to look at the files" in why


@pytest.mark.skipif(not LINUX, reason="other systems have other limits")
def test_folders_deeper_than_a_path_can_say_end_the_submission_and_are_removed(room) -> None:
    ran = room(f"for _ in range(30):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\n{WRITE}")
    assert "forbade to look at the files" in ran.why
    ran.room.close()
    assert not ran.room.base.exists()


@pytest.mark.skipif(not LINUX, reason="mounts are Linux's")
def test_the_graders_terminals_and_devices_are_out_of_sight_and_a_room_has_its_own(room) -> None:
    mine, theirs = os.openpty()
    os.chmod(os.ttyname(theirs), 0o666)
    code = (
        f"try:\n    os.close(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY))\n    print('DONE')\n"
        "except OSError:\n    print('no')\n"
        "open('/dev/null', 'w').write('x')\nprint(len(open('/dev/urandom', 'rb').read(3)), flush=True)\n"
        "import pty\ntry:\n    print(*sorted(os.listdir('/dev')), flush=True)\n"
        "    pty.spawn([sys.executable, '-c', 'import sys; print(sys.stdout.isatty())'])\n"
        "except OSError:\n    print('no')"
    )
    ran = room(code)
    os.close(mine)
    os.close(theirs)
    lines = ran.printed.split("\n")
    if ran.holds("files"):
        assert lines[0] == "no"
    if ran.holds("names"):
        needed = {"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero"}
        assert {name for name in lines[2].split() if not name.startswith("nvidia")} == needed
        assert lines[3].strip() == "True"
    assert lines[1] == "3"


@pytest.mark.skipif(not LINUX, reason="mounts are Linux's")
@pytest.mark.parametrize("room", ["a room inside"], indirect=True)
def test_an_ordinary_graders_room_has_devices_and_terminals_that_work(ordinary) -> None:
    code = "open('/dev/null', 'w').write('x')\nopen('/dev/shm/x', 'w').write('x')\nimport pty\npty.openpty()"
    assert ordinary(code) == "it ended by itself, as after exit()"


NO_PROC = """
import sys
from labkit.course.grading import confined
mount = confined.mount
def forbidden(source, target, *rest):
    if target == "/proc":
        raise PermissionError(1, "Operation not permitted")
    mount(source, target, *rest)
confined.mount = forbidden
sys.exit(confined.main())
"""


@pytest.mark.skipif(not LINUX, reason="other systems have no /proc")
def test_who_may_not_mount_proc_is_told_that_processes_are_in_sight() -> None:
    one = Room(Limits())
    command = one.command([sys.executable, "-c", f"import os; os.stat('/proc/{os.getpid()}'); print('seen')"])
    command[2:4] = ["-c", NO_PROC]
    try:
        subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
        assert (one.home / "output.txt").read_text() == "seen\n"
        report = json.loads((one.base / "report").read_text())
        assert report["processes"]
        assert f"NOT enforced here: {WORDS['processes']} ({report['processes']})." in told(report, Limits())
    finally:
        one.close()


OWN_SPACES = """
import ctypes
C = ctypes.CDLL(None)
try:
    if C.unshare(0x10000000 | 0x20000 | 0x8000000) or C.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None):
        raise OSError
    kept = [open(f'/tmp/{number}', 'wb') for number in range(20)]
    for file in kept: file.write(bytes(20_000_000))
    print('DONE')
except OSError:
    print('forbidden')
time.sleep(8)
"""


@pytest.mark.skipif(not LINUX, reason="other systems have no namespaces")
def test_what_makes_namespaces_of_its_own_is_ended(room) -> None:
    ran = room(OWN_SPACES, memory=3 * 10**8)
    assert "namespaces of its own" in ran.why or ran.printed.strip() == "forbidden"


@pytest.mark.skipif(not LINUX, reason="other systems have no namespaces")
@pytest.mark.parametrize("room", ["a room inside"], indirect=True)
def test_an_ordinary_graders_room_ends_what_makes_namespaces_of_its_own(ordinary) -> None:
    assert "namespaces of its own" in ordinary(OWN_SPACES) or not namespaces_for_users()


def namespaces_for_users() -> bool:
    return Path("/proc/sys/user/max_user_namespaces").read_text().strip() != "0"


@pytest.mark.skipif(not LINUX, reason="elsewhere a process ends with its first thread")
def test_a_process_whose_first_thread_has_ended_hides_nothing(room) -> None:
    ran = room(
        "import ctypes, threading\ndef go_on():\n    time.sleep(0.5)\n"
        "    kept = [os.memfd_create('a') for _ in range(20)]\n    for f in kept: os.write(f, bytes(20_000_000))\n"
        "    time.sleep(8)\n    os._exit(0)\n"
        "threading.Thread(target=go_on).start()\nctypes.CDLL(None).pthread_exit(None)",
        memory=3 * 10**8,
    )
    assert "forbade to look" in ran.why


@pytest.mark.parametrize("room", ["a room inside"], indirect=True)  # the other way may be root's
def test_somebody_who_is_not_root_gets_what_the_system_gives_them(room) -> None:
    """A room in a room, whose user is not root: namespaces where the kernel allows them; else it is said."""
    ran = room(
        "import json, subprocess\n"
        "from labkit.course.grading.room import Limits, Room, told\n"
        "inner = Room(Limits(seconds=20))\n"
        "done = subprocess.run(inner.command([sys.executable, '-c', 'import os; print(os.getuid())']))\n"
        "report = json.loads((inner.base / 'report').read_text())\n"
        "uid = (inner.home / 'output.txt').read_text().strip()\n"
        "same = uid == str(os.getuid()) or not os.getuid()\n"
        "print(json.dumps([done.returncode, same, report, told(report, Limits())]))\n"
    )
    assert ran.status == 0, ran.printed
    code, same, report, lines = json.loads(ran.printed.splitlines()[-1])
    assert code == 0
    assert same
    for name in WORDS:  # enforced, or said not to be
        assert not report[name] or any(report[name] in line for line in lines)


def test_what_is_not_enforced_is_said() -> None:
    lines = told({"user": "", "network": "no namespaces", "files": "denied"}, Limits())
    assert "a user of its own" in lines[0]
    assert "3600 s on the wall" in lines[0]
    assert f"NOT enforced here: {WORDS['network']} (no namespaces)." in lines
    assert len(lines) >= 3
