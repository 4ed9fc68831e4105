"""Runs a function on many inputs in processes that may hang, die or take too much memory: that costs one input.

    for task, result in run_tasks(look_at, tasks, jobs=8, deadline_seconds=120, memory_bytes=4 << 30): ...

Each process works on one input at a time. If it does not answer in time, it is killed with its own children (decord
runs in one) and replaced. ``concurrent.futures`` gives up all work when one process dies.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeVar

from megatron_ktr.errors import UserError, is_out_of_memory, one_line

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TaskFailed:
    """The process did not answer."""

    how: Literal["hangs", "crashes", "memory"]
    reason: str


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    jobs: int,
    deadline_seconds: float,
    memory_bytes: int,
) -> Iterator[tuple[Task, Result | TaskFailed]]:
    """Yields (task, result of ``function``) as they are done, in any order. ``tasks`` is taken from as processes are
    free.

    Args:
        function: of the top level of a module, so that another process can import it.
        memory_bytes: the most memory that a process may allocate.
    """
    waiting = iter(tasks)
    first = next(waiting, None)
    if first is None:
        return
    context = _start_server(function.__module__)
    workers: list[_Worker] = []
    try:
        task: Task | None = first
        while task is not None or any(worker.is_busy for worker in workers):
            while task is not None:
                free = next((worker for worker in workers if not worker.is_busy), None)
                if free is None and len(workers) == jobs:
                    break
                if free is None:
                    free = _Worker(context, function, memory_bytes=memory_bytes)
                    workers.append(free)
                free.start(task, deadline_seconds=deadline_seconds)
                task = next(waiting, None)
            busy = [worker for worker in workers if worker.is_busy]
            wait([worker.connection for worker in busy], timeout=max(0.0, min(worker.seconds_left for worker in busy)))
            for worker in busy:
                done = worker.poll()
                if done is None:
                    continue
                if isinstance(done[1], TaskFailed):
                    worker.close()
                    workers.remove(worker)
                yield done
    finally:
        for worker in workers:
            worker.close()


def _start_server(module: str) -> Any:
    """Starts the process that all others are forked from, unless it runs. It imports ``module``, and torch with it, so
    that each of the others is only a fork away."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    before = os.environ.get("PYTHONPATH")
    # Python does not hand its search path to this server, which may then find another installation of this package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


class _Worker:
    """One process, and the task that it works on."""

    def __init__(self, context: Any, function: Callable[[Any], Any], *, memory_bytes: int) -> None:
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(function, theirs, os.getpid(), memory_bytes), daemon=True, name="media"
        )
        self._process.start()
        theirs.close()
        try:
            self.connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            ended = _how_it_ended(self._process.exitcode)
            raise UserError(f"no process can be started to read media (--jobs): it {ended} at once") from None
        self._task: Any = None
        self._deadline = 0.0
        self._seconds = 0.0
        self.is_busy = False

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def start(self, task: Any, *, deadline_seconds: float) -> None:
        self._task, self._seconds, self.is_busy = task, deadline_seconds, True
        self._deadline = time.monotonic() + deadline_seconds
        with suppress(OSError):  # it has died: ``poll`` says so
            self.connection.send(task)

    def poll(self) -> tuple[Any, Any] | None:
        """(task, result) if there is one or it can no longer come."""
        result: Any
        try:
            if self.connection.poll():
                result = self.connection.recv()
            elif self.seconds_left > 0:
                return None
            else:
                result = TaskFailed("hangs", f"takes longer than {self._seconds:g} s")
        except (EOFError, OSError):
            self._process.join(timeout=5)
            result = TaskFailed("crashes", f"its process {_how_it_ended(self._process.exitcode)}")
        self.is_busy = False
        if isinstance(result, UserError):  # the machine's fault, not the input's: a package is missing
            raise result
        return self._task, result

    def close(self) -> None:
        process_id = self._process.pid
        if process_id is not None:
            with suppress(OSError):
                os.killpg(process_id, signal.SIGKILL)  # its children too
        self._process.kill()
        self._process.join()
        self.connection.close()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _serve(function: Callable[[Any], Any], connection: Connection, parent: int, memory_bytes: int) -> None:
    """What a process does: answers each task with its result, until nobody asks."""
    with suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears ctrl-C and ends its processes
    logging.disable(logging.WARNING)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    with suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            connection.send(_call(function, connection.recv(), memory_bytes=memory_bytes))


def _call(function: Callable[[Any], Any], task: Any, *, memory_bytes: int) -> Any:
    try:
        return function(task)
    except UserError as error:
        return error
    except Exception as error:
        if is_out_of_memory(error):
            return TaskFailed("memory", f"needs more than {memory_bytes / 1e9:g} GB of memory")
        return TaskFailed("crashes", f"{type(error).__name__}: {one_line(error)}")


def _end_without(parent: int) -> None:
    """Ends this process and its children when the process that asked for it is gone, however it ended."""
    while _is_alive(parent):
        time.sleep(1.0)
    with suppress(OSError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
