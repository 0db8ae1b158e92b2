"""Run a command once, though several are started at the same time: under a lock, and only if its stamp is not there.

    python once.py .venv/.stamp COMMAND...

The lock, in the stamp's folder, is given back when the command and this process have ended, however they end. Stamps
of other versions (`.kind-version`) go before the command starts, for it changes what they stand for. make runs this
file before anything is installed: it needs Python alone.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path


def main(stamp: Path, command: list[str]) -> int:
    """Returns the command's exit status, or 0 if it was not needed."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(stamp.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(lock, True)  # so that it is held until the command has ended too
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another make sets up {stamp.parent}; waiting for it.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        print(f"This file system has no locks ({error.strerror}): start no second make until this one is done.")
    if stamp.exists():
        return 0
    for other in stamp.parent.glob(".*-*"):
        other.unlink()
    status = subprocess.run(command, pass_fds=[lock], check=False).returncode
    if status == 0:
        stamp.touch()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{error.filename or sys.argv[1]}: {error.strerror}")
