"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000  # below those that systems hand to whoever asks for any: Linux from 32,768, others 49,152


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, and that nobody gets by chance before it is used."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Such ports, no two of them the same."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST, LAST), 100):
        if len(found) == count:
            break
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise OSError(f"of 100 ports between {FIRST} and {LAST} of 127.0.0.1, {len(found)} are free: not {count}")
    return found
