"""Where ranks meet: what is wrong with the place, or who is missing, is one line, in the time that the docs give."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_ktr import launch
from megatron_ktr.distributed import rendezvous, roll_call
from megatron_ktr.distributed.rendezvous import Deadline, Place, check_own_address, connect, meet, read_place, say_once
from megatron_ktr.errors import UserError
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

SHORT = 1 / 60
"""Minutes, for what never comes."""
LONG = PATIENCE_SECONDS / 60


class Until(Deadline):
    """Ends as soon as something has happened, however long that takes."""

    def __init__(self, has_happened: Callable[[], bool]) -> None:
        super().__init__(LONG)
        self._has_happened = has_happened

    @property
    def seconds_left(self) -> float:
        return 0.0 if self._has_happened() else super().seconds_left


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_meetings", [])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_the_place_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_place() is None
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    assert read_place() == Place(1, 2, "node0", 29500)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert read_place() is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 1 .*, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": ""}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1, got '2'"),
        ({"RANK": "-1"}, "RANK must be"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK must be a whole number from 0 to 0"),
        ({"RANK": ""}, "RANK is not set"),
        ({"MASTER_ADDR": " ", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 1 to 65535, got 'http'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be"),
    ],
)
def test_variables_that_cannot_be_are_named(monkeypatch: pytest.MonkeyPatch, changes: Any, expected: str) -> None:
    for name, value in {**COMPLETE, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        read_place()


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[int]:
    """Something that is no store; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                guest, _ = listener.accept()
                with guest, contextlib.suppress(OSError):
                    guest.settimeout(1.0)
                    guest.recv(64)
                    guest.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_an_address_that_cannot_be_reached_is_one_line(free_port: int, capfd: Any) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT {free_port}: not reached within .*: connection refused; is that"):
        connect("127.0.0.1", free_port, deadline=Deadline(SHORT))
    with pytest.raises(UserError, match="MASTER_ADDR no.such.invalid, .* not reached within"):
        connect("no.such.invalid", free_port, deadline=Deadline(SHORT))
    with pytest.raises(UserError, match="MASTER_ADDR 'a..b' is no name of a machine"):
        connect("a..b", free_port, deadline=Deadline(SHORT))
    with (
        server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port,
        pytest.raises(UserError, match="something else answers there"),
    ):
        connect("127.0.0.1", port, deadline=Deadline(SHORT))
    assert capfd.readouterr().err == "", "C++ has its own idea of an error message"


def test_who_is_waited_for_is_said_once_after_a_while(free_port: int, capfd: Any, monkeypatch: Any) -> None:
    asked: list[str] = []

    def note(patience: Deadline | None, line: str) -> Deadline | None:
        asked.append(line)
        return say_once(patience, line)

    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "say_once", note)
    with pytest.raises(UserError):
        connect("127.0.0.1", free_port, deadline=Until(lambda: len(asked) == 2))
    assert capfd.readouterr().err == f"waiting for rank 0 at 127.0.0.1:{free_port}: connection refused\n"


def test_rank_0_makes_sure_that_its_address_leads_to_it(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_own_address("127.0.0.1", free_port, deadline=Deadline(LONG))
    with server(b"") as port, pytest.raises(UserError, match=f"MASTER_PORT {port} cannot be opened .* already in use"):
        check_own_address("127.0.0.1", port, deadline=Deadline(SHORT))
    with pytest.raises(UserError, match="no.such.invalid does not lead to this machine"):
        check_own_address("no.such.invalid", free_port, deadline=Deadline(SHORT))
    dial = socket.create_connection
    with server(b"") as port:
        monkeypatch.setattr(socket, "create_connection", lambda place, timeout: dial(("127.0.0.1", port), timeout))
        with pytest.raises(UserError, match="does not lead to this machine.*another machine answers there"):
            check_own_address("node7", free_port, deadline=Deadline(SHORT))


def meet_all(*places: Place) -> list[Any]:
    """What each rank got: a store, or its error."""

    def come(place: Place) -> Any:
        try:
            return meet(place, minutes=LONG)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(come, places))


def test_ranks_that_all_come_share_a_store(free_port: int) -> None:
    first, second, third = meet_all(*(Place(rank, 3, "127.0.0.1", free_port) for rank in range(3)))
    first.set("key", "value")
    assert second.get("key") == third.get("key") == b"value"


def meet_in_vain(*places: Place, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank got, whose time was over when all of these had registered or been refused."""
    registered: list[Place] = []
    register = roll_call._register

    def note(roll: Any, place: Place, number: int) -> bool:
        try:
            return register(roll, place, number)
        finally:
            registered.append(place)

    def deadline(minutes: float) -> Deadline:
        return Until(lambda: len(registered) == len(places)) if minutes == LONG else Deadline(minutes)

    with monkeypatch.context() as patch:
        patch.setattr(roll_call, "_register", note)
        patch.setattr(rendezvous, "Deadline", deadline)
        return meet_all(*places)


def test_missing_double_and_differently_counted_ranks_are_named(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(0, 4, "127.0.0.1", free_port)
    found = meet_in_vain(place, Place(2, 4, "127.0.0.1", free_port), monkeypatch=monkeypatch)
    assert "2 of 4 ranks (1, 3) had not come" in found[0]
    assert "some ranks (rank 0 says which) had not come" in found[1] or "connection to rank 0 broke" in found[1]
    place = Place(0, 3, "127.0.0.1", free_port)
    found = meet_in_vain(place, *[Place(1, 3, "127.0.0.1", free_port)] * 2, monkeypatch=monkeypatch)
    assert any("rank 1 is there already" in str(answer) for answer in found[1:])
    place = Place(0, 2, "127.0.0.1", free_port)
    found = meet_in_vain(place, Place(1, 3, "127.0.0.1", free_port), monkeypatch=monkeypatch)
    assert any("told of 2 ranks, another one of 3" in str(answer) for answer in found) or any(
        "told of 3 ranks, another one of 2" in str(answer) for answer in found
    )


# The launcher


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a launcher sets for itself and its ranks is taken back: launchers of other tests are started from here."""
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE")
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("launching")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc-per-node", "x"], "Unsupported nproc_per_node value: x"),
        (["--nproc-per-node", "0"], "must be at least 1"),
        (["--nnodes", "2:x"], "invalid literal"),
        (["--nnodes", "0"], "min_nodes must be > 0"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank must be 0 .. 1"),
        (["--nnodes", "2", "--node-rank", "-1"], "--node-rank must be 0 .. 1"),
        (["--master-port", "65536"], "65536"),
        (["--rdzv-conf", "timeout"], "launcher"),
        (["--rdzv-conf", "timeout=soon"], "timeout"),
    ],
)
def test_the_launcher_refuses_arguments_in_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        launch.main([*arguments, "script.py"])


def test_a_node_that_cannot_reach_node_0_says_so_in_one_line(free_port: int) -> None:
    arguments = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1", "--rdzv-conf", "timeout=2"]
    arguments += ["--master-addr", "127.0.0.1", "--master-port", str(free_port), "script.py"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ktr.launch", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: MASTER_ADDR 127.0.0.1, MASTER_PORT {free_port}: not reached within")
