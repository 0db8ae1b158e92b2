"""Runs a server as long as somebody holds the other end of its standard input, and ends all of the server's processes.

    python vllm_guard.py COMMAND...

A notebook's kernel may be interrupted, restarted or killed: what stands in its `finally` may never run. Its end of this
pipe closes in any case, and that ends the server. Needs Python alone. Exits as the server did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds between asking a server to end and ending it


def main(command: list[str]) -> int:
    """Returns the server's exit status, 128 + its signal where one ended it, 127 where it could not be started."""
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    signal.signal(signal.SIGTERM, lambda *_: end(server))
    threading.Thread(target=end_when_left, args=(server,), daemon=True).start()
    status = server.wait()
    end_group(server.pid, signal.SIGKILL)  # what it has left running
    return status if status >= 0 else 128 - status


def end_when_left(server: subprocess.Popen) -> None:
    """Wait until nobody holds the pipe, then end the server."""
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1024):
            pass
    end(server)


def end(server: subprocess.Popen) -> None:
    """Ask the server and its children to end, and end them when they do not."""
    end_group(server.pid, signal.SIGTERM)
    patience = time.monotonic() + GRACE
    while server.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    end_group(server.pid, signal.SIGKILL)


def end_group(group: int, how: signal.Signals) -> None:
    """Send a signal to every process of the server's session that is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, how)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
