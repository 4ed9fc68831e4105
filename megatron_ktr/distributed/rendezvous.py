"""Brings the processes of a run together: rank 0 (or its launcher) opens a port, the others connect, all are counted.

    read_place         reads and checks RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    check_own_address  on rank 0: checks that the port is free, and that the address given to the others leads here
    connect            on the others: waits until a store answers there
    meet               does both, then a roll call: every rank is there once, and all expect the same number of ranks
    join_world         makes torch's process group of these ranks

torch would notice most problems too, but later. Its client waits in C++, where no signal reaches it, for up to 1.7
times its timeout, and writes stack traces to the error stream. It would wait for a rank that never comes as long as the
slowest collective may take. Here Python waits, for ``RENDEZVOUS_MINUTES``, and a failure is reported in one line.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

from megatron_ktr.distributed.roll_call import call_roll
from megatron_ktr.distributed.waiting import PATIENCE_SECONDS, Deadline, Place, first_line, say_once
from megatron_ktr.errors import LostRankError, UserError

RENDEZVOUS_MINUTES = 10.0
"""How long the processes of a run wait for each other at the start."""
_TRY_SECONDS = 5.0
_meetings: list[tuple[Place, str]] = []
"""Of this process, the last one is the present one: its place, and the prefix of its store."""
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_number(name: str, *, low: int, high: int, default: int | None = None) -> int:
    """The whole number in the environment variable ``name``.

    Raises:
        UserError: the variable is not set (and there is no ``default``), no whole number, or not in ``low`` ..
        ``high``.
    """
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise UserError(f"the environment variable {name} must be a whole number from {low} to {high}, got {text!r}")
    return number


def read_place() -> Place | None:
    """Reads the variables that torchrun or a scheduler has set; None for a single process.

    Raises:
        UserError: some variables are missing or hold impossible values.
    """
    given = [name for name in _VARIABLES if os.environ.get(name, "").strip()]
    if "WORLD_SIZE" not in given:
        if "RANK" in given:
            # Taken for a single process, every process of the run would train a model of its own.
            raise UserError(f"RANK={os.environ['RANK']} is set but WORLD_SIZE is not: start with torchrun, or set both")
        return None
    world_size = read_number("WORLD_SIZE", low=1, high=2**20)
    if world_size == 1:
        read_number("RANK", low=0, high=0, default=0)
        return None
    if missing := [name for name in _VARIABLES if name not in given]:
        raise UserError(f"WORLD_SIZE={world_size} but {', '.join(missing)} is not set: start with torchrun")
    return Place(
        rank=read_number("RANK", low=0, high=world_size - 1),
        world_size=world_size,
        address=os.environ["MASTER_ADDR"].strip(),
        port=read_number("MASTER_PORT", low=1, high=65535),
    )


def meet(place: Place, *, minutes: float = RENDEZVOUS_MINUTES) -> Any:
    """Waits until all ranks have come, and returns the store of the run (``torch.distributed.Store``).

    Raises:
        UserError: the port cannot be opened or reached, a rank is missing or there twice, or ranks expect different
            numbers of ranks.
    """
    import torch.distributed as dist

    deadline = Deadline(minutes)
    # Under torchrun the launcher on node 0 has opened the port already, and every rank connects to it.
    is_host = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if is_host:
        check_own_address(place.address, place.port, deadline=deadline)
        try:
            with _without_native_messages():
                store = dist.TCPStore(
                    place.address,
                    place.port,
                    world_size=None,
                    is_master=True,
                    timeout=datetime.timedelta(seconds=max(1.0, deadline.seconds_left)),
                    wait_for_workers=False,
                )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{place}: rank 0 cannot open its port: {first_line(error)}") from error
    else:
        store = connect(place.address, place.port, deadline=deadline)
    prefix = call_roll(store, place, deadline=deadline)
    _meetings.append((place, prefix))
    return dist.PrefixStore(prefix, store)


def join_world(
    backend: str,
    *,
    device: Any = None,
    timeout_minutes: float,
    rendezvous_minutes: float = RENDEZVOUS_MINUTES,
) -> None:
    """Makes torch's default process group, of all ranks of the run or of this process alone.

    ``timeout_minutes`` is for later collectives. Raises ``UserError`` if the ranks do not come together.
    """
    import torch.distributed as dist

    place = read_place()
    # A single process gets a store in its own memory, without a port that another run on this machine might use.
    store = dist.HashStore() if place is None else meet(place, minutes=rendezvous_minutes)
    rank, world_size = (0, 1) if place is None else (place.rank, place.world_size)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
    except RuntimeError as error:
        raise LostRankError(
            f"{place or 'a process alone'}: the ranks met, but cannot connect to each other over {backend}: "
            f"{first_line(error)}; docs/launching.md says which interface each takes (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)"
        ) from error


def connect_again(*, timeout_seconds: float) -> Any:
    """A second connection to the store of the run, for a thread of its own: a client waits for one answer at a time.
    None if the ranks did not meet here. Raises ``UserError`` if the store does not answer."""
    import torch.distributed as dist

    if not _meetings:
        return None
    place, prefix = _meetings[-1]
    store = connect(place.address, place.port, deadline=Deadline(timeout_seconds / 60))
    store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
    return dist.PrefixStore(prefix, store)


def connect(address: str, port: int, *, deadline: Deadline) -> Any:
    """Connects to the store at ``address``, as soon as one answers there.

    Raises:
        UserError: none answers before the deadline; the message has the reason of the last attempt.
    """
    import torch.distributed as dist

    reason, patience = "", Deadline(PATIENCE_SECONDS / 60)
    while True:
        try:
            # A plain connection is tried first, because torch's own would wait in C++.
            socket.create_connection((address, port), timeout=_TRY_SECONDS).close()
            with _without_native_messages():
                return dist.TCPStore(
                    address,
                    port,
                    is_master=False,
                    timeout=datetime.timedelta(seconds=min(2 * _TRY_SECONDS, max(1.0, deadline.seconds_left))),
                    wait_for_workers=False,
                )
        except UnicodeError as error:
            raise UserError(f"MASTER_ADDR {address!r} is no name of a machine: {error}") from error
        except OSError as error:
            reason = _words(error)
        except RuntimeError as error:
            reason = f"something else answers there: {first_line(error)}"
        if not deadline.seconds_left:
            raise UserError(
                f"MASTER_ADDR {address}, MASTER_PORT {port}: not reached within {deadline}: {reason}; is that rank 0's "
                "machine, has rank 0 started, does a firewall close the port?"
            )
        patience = say_once(patience, f"waiting for rank 0 at {address}:{port}: {reason}")
        time.sleep(min(1.0, deadline.seconds_left))


def check_own_address(address: str, port: int, *, deadline: Deadline) -> None:
    """Checks on rank 0's machine that ``port`` is free, and that ``address`` leads to this machine.

    Raises:
        UserError: the port is taken, or the address leads elsewhere or nowhere.
    """
    reason, patience = "", Deadline(PATIENCE_SECONDS / 60)
    with _open_port(port) as listener:
        while True:
            try:
                if _leads_here(address, port, listener):
                    return
                reason = "another machine answers there"
                deadline = min(deadline, Deadline(0.5), key=lambda each: each.seconds_left)
            except UnicodeError as error:
                raise UserError(f"MASTER_ADDR {address!r} is no name of a machine: {error}") from error
            except OSError as error:
                reason = _words(error)
            if not deadline.seconds_left:
                raise UserError(
                    f"MASTER_ADDR {address} does not lead to this machine, {socket.gethostname()}, where rank 0 runs "
                    f"(port {port}, tried for {deadline}): {reason}; give rank 0's name or address, as others reach it"
                )
            patience = say_once(patience, f"rank 0 does not reach itself at {address}:{port}: {reason}")
            time.sleep(min(1.0, deadline.seconds_left))


def _open_port(port: int) -> socket.socket:
    try:
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EADDRINUSE):
                raise
            return socket.create_server(("", port))
        except ValueError:  # no dual stack on this system
            return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"MASTER_PORT {port} cannot be opened on {socket.gethostname()}, where rank 0 runs: {_words(error)}; "
            "another run may use it: choose another port, the same on all nodes"
        ) from error


def _leads_here(address: str, port: int, listener: socket.socket) -> bool:
    token = secrets.token_bytes(16)
    with socket.create_connection((address, port), timeout=_TRY_SECONDS) as caller:
        caller.sendall(token)
        end = time.monotonic() + 2.0
        while (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                guest, _ = listener.accept()
            except TimeoutError:
                return False
            # Other nodes may connect at the same time; they send nothing, and their connections are ignored.
            with guest, contextlib.suppress(OSError):
                guest.settimeout(0.5)
                if guest.recv(len(token)) == token:
                    return True
    return False


@contextlib.contextmanager
def _without_native_messages() -> Iterator[None]:
    """Drops what C++ writes to the error stream. For a failed connection that is a stack trace, which adds nothing to
    the exception."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no error stream
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror or str(error)).lower()
