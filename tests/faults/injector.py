"""Faults at chosen points of a command: the k-th rename, fsync, write, collective or phase, the same for every run.

A moment of wall time is another moment on every machine; the k-th call of a point is not. ``install`` wraps the points
in the process that is to fail, from outside; the product knows nothing of it. A counting run (``action`` "count")
tells how many calls a command makes, and a seed draws k from that. When the moment has come, the injector makes a file
that says so: a fault that never happened is no fault that was survived.

    point        calls that count
    rename       os.rename, os.replace
    sync         os.fsync
    open         a file below ``root`` is opened for writing
    write        a piece of a hashed file is written (files/checksums.py)
    mkdir        os.mkdir
    remove       os.unlink, os.remove, os.rmdir
    collective   a call of torch.distributed
    exchange     the same, inside a phase of a training step
    phase        a phase of the training step begins or ends

    action       what happens there, before the call
    none         nothing
    count        nothing; the numbers of calls are written at the end
    kill         SIGKILL to this process
    term         SIGTERM to this process
    stop         SIGSTOP to this process; the harness lets it go on or kills it
    full, io     the call fails with ENOSPC or EIO; at "open" the first write to the file does
    torn         at "open" and "write": half of the bytes are written, then SIGKILL
    interrupt    ctrl-C
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "barrier",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)
ERRNO = {"full": errno.ENOSPC, "io": errno.EIO}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}


@dataclass(frozen=True)
class Plan:
    """One fault: ``action`` at the ``k``-th call (from 1) of ``point``."""

    point: str = ""
    k: int = 0
    action: str = "count"

    def __str__(self) -> str:
        return f"{self.action} at {self.point} {self.k}"


def draw(rng: random.Random, counts: dict[str, int], points: tuple[str, ...], actions: tuple[str, ...]) -> Plan:
    """A plan at one of ``points`` that the command reaches."""
    point = rng.choice([name for name in points if counts.get(name)])
    action = rng.choice([name for name in actions if name != "torn" or point in ("open", "write")])
    return Plan(point, rng.randint(1, counts[point]), action)


class Injector:
    """Counts the calls of every point, and does what the plan says at one of them."""

    def __init__(self, plan: Plan, *, root: str, fired: Path) -> None:
        self.plan = plan
        self.root = root
        self.fired = fired
        """Is made when the fault happens."""
        self.is_in_phase = False
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, point: str) -> bool:
        """Counts a call. Returns True where the plan's moment has come and the caller has to do the rest."""
        with self._lock:
            self.counts[point] += 1
            is_moment = point == self.plan.point and self.counts[point] == self.plan.k
        if not is_moment:
            return False
        if (number := SIGNALS.get(self.plan.action)) is not None:
            self.fire()
            os.kill(os.getpid(), number)
            return False
        if self.plan.action in ERRNO and point != "open":
            self.fire()
            raise self.error()
        return self.plan.action not in ("count", "none")

    def fire(self) -> None:
        os.close(os.open(self.fired, os.O_CREAT | os.O_WRONLY, 0o600))

    def error(self) -> OSError:
        number = ERRNO[self.plan.action]
        return OSError(number, os.strerror(number))

    def is_ours(self, path: Any) -> bool:
        """Whether ``path`` is below the directory that is watched."""
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root)


class _Failing:
    """A file whose first write fails, or is torn by the death of the process."""

    def __init__(self, file: Any, injector: Injector) -> None:
        self._file = file
        self._injector = injector

    def write(self, data: Any) -> int:
        self._injector.fire()
        if self._injector.plan.action != "torn":
            raise self._injector.error()
        _tear(self._file, data)
        raise AssertionError("killed")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _tear(file: Any, data: Any) -> None:
    file.write(data[: len(data) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def install(plan: Plan, *, root: Path, fired: Path) -> Injector:
    """Wraps every point in this process, for good. The file ``fired`` is made when the fault happens."""
    injector = Injector(plan, root=str(root), fired=fired)
    for module, names, point in (
        (os, ("rename", "replace"), "rename"),
        (os, ("fsync",), "sync"),
        (os, ("mkdir",), "mkdir"),
        (os, ("unlink", "remove", "rmdir"), "remove"),
    ):
        for name in names:
            # A lock file or a scratch file elsewhere would make the numbers differ from one machine to another.
            _wrap(module, name, injector, point, only_ours=name != "fsync")
    original = io.open

    @functools.wraps(original)
    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        is_moment = bool(set(mode) & set("wax+")) and injector.is_ours(file) and injector.reach("open")
        made = original(file, mode, *arguments, **options)
        return _Failing(made, injector) if is_moment else made

    io.open = builtins.open = opened  # ty: ignore
    _wrap_product(injector)
    return injector


def _wrap(
    module: Any,
    name: str,
    injector: Injector,
    point: str,
    *,
    only_ours: bool = False,
    is_due: Callable[[], bool] = lambda: True,
) -> None:
    original: Callable[..., Any] = getattr(module, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        # A path relative to an open directory is one of ``shutil.rmtree``.
        is_counted = not only_ours or options.get("dir_fd") is not None or injector.is_ours(arguments[0])
        if is_counted and is_due():
            injector.reach(point)
        return original(*arguments, **options)

    setattr(module, name, wrapped)


def _wrap_product(injector: Injector) -> None:
    import torch.distributed

    from megatron_ktr.files.checksums import HashingFile
    from megatron_ktr.run.metrics import PhaseTimer

    for name in COLLECTIVES:
        _wrap(torch.distributed, name, injector, "exchange", is_due=lambda: injector.is_in_phase)
        _wrap(torch.distributed, name, injector, "collective")
    write, phase, tell = HashingFile.write, PhaseTimer.phase, PhaseTimer._tell

    def written(self: Any, data: Any) -> int:
        if injector.reach("write"):
            injector.fire()
            _tear(self._file, memoryview(data).cast("B"))
        return write(self, data)

    def entered(self: Any, name: str) -> Any:
        injector.reach("phase")
        return phase(self, name)

    def told(self: Any, name: str | None) -> None:
        injector.is_in_phase = name is not None
        tell(self, name)

    HashingFile.write, PhaseTimer.phase, PhaseTimer._tell = written, entered, told  # ty: ignore


def write_counts(injector: Injector, path: Path) -> None:
    path.write_text(json.dumps(dict(injector.counts)), encoding="utf-8")
