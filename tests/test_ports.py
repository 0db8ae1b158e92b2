"""Ports for servers: free ones, and each a different one."""

from __future__ import annotations

import random
import socket

import pytest

from tests import ports
from tests.ports import free_port, free_ports


def test_ports_that_are_asked_for_together_are_distinct(monkeypatch) -> None:
    monkeypatch.setattr(ports, "LAST", ports.FIRST + 100)  # with so few, two draws of one port would meet
    assert len(set(free_ports(50))) == 50


def test_a_port_that_somebody_listens_on_is_passed_over(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        taken = server.getsockname()[1]
        other = taken + 1 if taken + 1 < ports.LAST else taken - 1
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, population, k: [taken, other])
        assert free_port() == other
        with pytest.raises(OSError, match="1 are free: not 2"):
            free_ports(2)
