"""Ports for processes that are told by number where to listen."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_EPHEMERAL = (32768, 60999)
"""Those that Linux hands out by itself, unless it was told otherwise."""


def free_port() -> int:
    """A port of this machine on which nobody listens.

    Between this call and the moment in which a process listens there, all other tests of the machine open sockets. The
    system hands out ports of its own range for them, so this one is outside of it. A port of that range may also be
    given to the very connection that looks for a listener there, which then talks to itself.
    """
    low, high = _ephemeral()
    outside = [*range(10_000, low), *range(high + 1, 65_536)] or range(low, high + 1)
    chance = random.SystemRandom()  # no test's seed: tests that run side by side must not draw alike
    while True:
        port = chance.choice(outside)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return _EPHEMERAL
    return low, high
