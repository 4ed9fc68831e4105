"""Two nodes on one machine: two network namespaces joined by a virtual cable, each with a loopback of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

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
def two_nodes(prefix: str, *, addresses: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """As ``cabled_nodes``. Skips the test where the machine lets nobody make them."""
    with contextlib.ExitStack() as stack:
        try:
            names = stack.enter_context(cabled_nodes(prefix, addresses=addresses))
        except NoNodesError as error:
            pytest.skip(str(error))
        yield names


@contextlib.contextmanager
def cabled_nodes(prefix: str, *, addresses: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Names of two namespaces whose ``eth0`` are the ends of one cable, with these addresses.

    Raises:
        NoNodesError: they cannot be made here.
    """
    if shutil.which("ip") is None:
        raise NoNodesError("two nodes need the command ip (iproute2)")
    names = (f"{prefix}{os.getpid()}a", f"{prefix}{os.getpid()}b")
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                raise NoNodesError(f"network namespaces may not be made here: {made.stderr.strip()}")
        cable = ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        if cable.returncode:
            raise NoNodesError(f"virtual network cables may not be made here: {cable.stderr.strip()}")
        for name, address in zip(names, addresses, strict=True):
            must(ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0"))
            must(ip("-n", name, "link", "set", "eth0", "up"))
            must(ip("-n", name, "link", "set", "lo", "up"))
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)  # the cable goes with either end
