"""A process of the harness in a world of its own: the network of one node, and a /dev/shm that nobody else uses."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_libc = ctypes.CDLL(None, use_errno=True)


def enter_network(name: str) -> None:
    """This process, and what it starts, lives in the network namespace ``name`` from now on."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    _check(_libc.setns(descriptor, _CLONE_NEWNET), f"setns {name}")
    os.close(descriptor)


def with_shared_memory_in(folder: Path) -> bool:
    """This process, and what it starts, finds ``folder`` at /dev/shm from now on, so what they leave there can be told
    from what others do. Returns False, and changes nothing, where the machine does not allow it."""
    if _libc.unshare(_CLONE_NEWNS):
        return False
    folder.mkdir(exist_ok=True)
    # As a slave: what is unmounted outside goes here, too, but nothing that is mounted here is seen outside.
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "mount / as a slave")
    _check(_libc.mount(os.fsencode(folder), b"/dev/shm", None, _MS_BIND, None), f"mount {folder} at /dev/shm")
    return True


def _check(code: int, what: str) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
