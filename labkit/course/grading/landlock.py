"""Landlock: what a process of Linux can give up for good without asking anybody (landlock(7)).

It is the second choice, for where namespaces are forbidden: files cannot be read or written, but are not out of sight.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Sequence

CREATE, ADD, RESTRICT = 444, 445, 446  # the system calls' numbers, the same on every processor
ABI, BENEATH = 1, 1  # "which version?"; a rule for all files beneath one
READ_FILE, READ_DIR, EXECUTE, WRITE_FILE, IOCTL = 1 << 2, 1 << 3, 1 << 0, 1 << 1, 1 << 15
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights on files a version knows; 16 from the fifth on
FOR_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | IOCTL
TCP, SIGNALS = 3, 2  # both directions; of the scopes, the one for signals
DEVICES = ("null", "zero", "full", "random", "urandom")  # and NVIDIA's

C = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Landlock's version in this kernel, 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, C.syscall(CREATE, None, ctypes.c_size_t(0), ABI))


def leaves_open(version: int, otherwise: str) -> dict[str, str]:
    """For each thing that a process should not do, "" where this version stops it, else why not.

    otherwise: why no namespace does.
    """
    seen = "Landlock stops reading and writing, not looking"
    return {
        "files": "" if version >= 3 else f"{otherwise}, and this kernel's Landlock lets files be emptied"
        if version else f"{otherwise}, and this kernel has no Landlock: it reads and writes what its user can",
        "names": f"{otherwise}; {seen}" if version else otherwise,
        "tcp": "" if version >= 4 else otherwise,
        "network": f"{otherwise}; UDP and sockets that are files stay open" if version >= 4 else otherwise,
        "signals": "" if version >= 6 else otherwise,
        "processes": otherwise,
    }  # fmt: skip


def restrict(read: Sequence[str], write: Sequence[str]) -> None:
    """Keep this process and all it starts from every file but those below `read` and `write`. Raises OSError."""
    known = version()
    files = (1 << RIGHTS.get(known, 16)) - 1
    scopes = (files, TCP if known >= 4 else 0, SIGNALS if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    rules = call(CREATE, struct.pack("3Q", *scopes), ctypes.c_size_t(size), 0)
    look = READ_FILE | READ_DIR | EXECUTE
    for paths, rights in ((read, look), (write, files), (devices(), READ_FILE | WRITE_FILE | IOCTL)):
        for path in paths:
            allow(rules, path, rights & files)
    call(RESTRICT, rules, 0)
    os.close(rules)


def allow(rules: int, path: str, rights: int) -> None:
    """Add a rule; a path that is not there needs none."""
    try:
        beneath = os.open(path, os.O_PATH)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(beneath).st_mode):
        rights &= FOR_A_FILE
    call(ADD, rules, BENEATH, struct.pack("=Qi", rights, beneath), 0)
    os.close(beneath)


def devices() -> list[str]:
    """The devices that a computation needs."""
    return [f"/dev/{name}" for name in os.listdir("/dev") if name in DEVICES or name.startswith("nvidia")]


def call(number: int, *arguments: object) -> int:
    """A system call; OSError says what went wrong."""
    result = C.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
