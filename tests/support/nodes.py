"""Nodes on one machine: network namespaces, each with a loopback of its own, joined by a virtual switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.support.patience import PATIENCE_SECONDS


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def must(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


class NoNodesError(Exception):
    """The machine lets nobody make network namespaces; the message says why."""


@contextlib.contextmanager
def joined_nodes(prefix: str, *, addresses: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """As ``linked_nodes``. Skips the test where the machine lets nobody make them."""
    with contextlib.ExitStack() as stack:
        try:
            names = stack.enter_context(linked_nodes(prefix, addresses=addresses))
        except NoNodesError as error:
            pytest.skip(str(error))
        yield names


@contextlib.contextmanager
def linked_nodes(prefix: str, *, addresses: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Names of one namespace for each of ``addresses``, which are of one network of 256. Each has a cable ``eth0`` to a
    switch in a namespace of its own.

    Raises:
        NoNodesError: they cannot be made here.
    """
    if shutil.which("ip") is None:
        raise NoNodesError("nodes need the command ip (iproute2)")
    names = tuple(f"{prefix}{os.getpid()}{chr(ord('a') + place)}" for place in range(len(addresses)))
    switch = f"{prefix}{os.getpid()}switch"
    try:
        for name in (switch, *names):
            ip("netns", "delete", name)  # left by a process of the same number that was killed
            made = ip("netns", "add", name)
            if made.returncode:
                raise NoNodesError(f"network namespaces may not be made here: {made.stderr.strip()}")
        made = ip("-n", switch, "link", "add", "switch", "type", "bridge")
        if made.returncode:
            raise NoNodesError(f"virtual switches may not be made here: {made.stderr.strip()}")
        must(ip("-n", switch, "link", "set", "switch", "up"))
        for place, (name, address) in enumerate(zip(names, addresses, strict=True)):
            port = f"port{place}"
            cable = ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            if cable.returncode:
                raise NoNodesError(f"virtual network cables may not be made here: {cable.stderr.strip()}")
            must(ip("-n", switch, "link", "set", port, "master", "switch", "up"))
            must(ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0"))
            must(ip("-n", name, "link", "set", "eth0", "up"))
            must(ip("-n", name, "link", "set", "lo", "up"))
        yield names
    finally:
        for name in (*names, switch):
            ip("netns", "delete", name)  # the cables go with either end
