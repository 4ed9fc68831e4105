"""A pool of gloo ranks: processes made once per test session, a fresh world for every call.

A torchrun of four ranks costs many seconds, nearly all of it imports. One process pays for them once
(``rank_worker.py``); the ranks are its forks, and a call costs what its collectives cost. Use it as the fixture
``ranks``::

    def add_ranks(context, *, value):            # module level: it is sent by name
        groups = context.init(ParallelSizes(tensor=2))
        return value + groups.rank

    def test_ranks_add(ranks):
        assert ranks(add_ranks, world_size=2, value=10) == [10, 11]
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any

import psutil

from tests.support.patience import PATIENCE_SECONDS


class RankError(AssertionError):
    """A function failed on some ranks; the message holds their tracebacks."""


@dataclass(frozen=True)
class RankContext:
    """What a function gets on its rank. The world is already joined; ``init`` may be called several times."""

    rank: int
    world_size: int

    def init(self, sizes: Any = None, *, seed: int = 0) -> Any:
        """Splits the world by ``ParallelSizes`` (default: all data parallel) and returns ``ParallelGroups``."""
        from megatron_ktr.distributed.groups import ParallelSizes, init_parallel
        from megatron_ktr.distributed.platform import current

        return init_parallel(sizes or ParallelSizes(), platform=current(), seed=seed)


class RankPool:
    """``pool(fn, world_size=n, **kwargs)`` runs ``fn(context, **kwargs)`` on n ranks, returns n results by rank.

    Results are pickled by value. If a rank raises, all tracebacks come back in one ``RankError``. After a failure
    or after ``timeout`` seconds the processes are killed (others may hang in a collective) and made anew.
    """

    def __init__(self, max_world_size: int = 4) -> None:
        self._max_world_size = max_world_size
        self._server: tuple[Any, Any] | None = None
        self._workers: list[Connection] = []

    def __call__(
        self, fn: Callable[..., Any], world_size: int = 4, *, timeout: float = PATIENCE_SECONDS, **kwargs: Any
    ) -> list[Any]:
        if world_size > self._max_world_size:
            raise ValueError(f"the pool has {self._max_world_size} ranks, asked for {world_size}")
        while len(self._workers) < world_size:
            self._workers.append(self._fork())
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            for rank in range(world_size):
                job = (fn, rank, world_size, os.path.join(folder, "store"), kwargs)
                self._workers[rank].send_bytes(pickle.dumps(job))
            results, errors = self._collect(world_size, timeout=timeout)
        if errors:
            self._end_workers()
            raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Ends every process of the pool."""
        if self._server is not None:
            self._end_workers()
            process, connection = self._server
            connection.close()
            process.join()
            self._server = None

    def _end_workers(self) -> None:
        """Ends them and what they started: megatron-core's saver keeps a manager, which would stay for good once its
        parent is killed."""
        assert self._server is not None
        for connection in self._workers:
            connection.close()
        self._workers = []
        processes = psutil.Process(self._server[0].pid).children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)

    def _fork(self) -> Connection:
        """A new worker, a fork of the server, which is started first."""
        if self._server is None:
            spawn = multiprocessing.get_context("spawn")
            ours, theirs = spawn.Pipe()
            # Not daemons: saving a distributed checkpoint starts processes of its own.
            process = spawn.Process(target=_serve, args=(theirs,), daemon=False)
            with _environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                process.start()
            theirs.close()
            self._server = process, ours
        process, connection = self._server
        ours, theirs = multiprocessing.Pipe()
        send_handle(connection, theirs.fileno(), process.pid)
        theirs.close()
        return ours

    def _collect(self, world_size: int, *, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        waiting = {self._workers[rank]: rank for rank in range(world_size)}
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting and (seconds := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=seconds):
                rank = waiting.pop(connection)
                try:
                    is_error, payload = pickle.loads(connection.recv_bytes())
                except EOFError:
                    is_error, payload = True, "the process died"
                (errors if is_error else results)[rank] = payload
                if is_error:
                    # The others may wait for this rank for ever; give them a moment for their own tracebacks.
                    deadline = min(deadline, time.monotonic() + 2.0)
        for rank in waiting.values():
            errors[rank] = "no answer: killed" if errors else f"no answer within {timeout} s: killed"
        return results, errors


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    from tests.support.rank_worker import serve

    serve(connection)
