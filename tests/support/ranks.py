"""A pool of gloo ranks: processes spawned once per test session, a fresh world for every call.

A torchrun of four ranks costs many seconds, nearly all of it imports. The pool pays for them once; a call costs
what its collectives cost. Use it as the fixture ``ranks``::

    def add_ranks(context, *, value):            # module level: it is sent by name
        groups = context.init(ParallelSizes(tensor=2))
        return value + groups.rank

    def test_ranks_add(ranks):
        assert ranks(add_ranks, world_size=2, value=10) == [10, 11]
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from tests.support.patience import PATIENCE_SECONDS

COLLECTIVE_TIMEOUT_SECONDS = 0.8 * PATIENCE_SECONDS
"""Less than the pool waits: the ranks then say what they were waiting in."""


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
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(
        self, fn: Callable[..., Any], world_size: int = 4, *, timeout: float = PATIENCE_SECONDS, **kwargs: Any
    ) -> list[Any]:
        if world_size > self._max_world_size:
            raise ValueError(f"the pool has {self._max_world_size} ranks, asked for {world_size}")
        self._spawn(world_size)
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            for rank in range(world_size):
                job = (fn, rank, world_size, os.path.join(folder, "store"), kwargs)
                self._workers[rank][1].send_bytes(pickle.dumps(job))
            results, errors = self._collect(world_size, timeout=timeout)
        if errors:
            self.close()
            raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Ends every process of the pool, and what they started: megatron-core's saver keeps a manager, which would
        stay for good once its parent is killed."""
        for process, connection in self._workers:
            connection.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def _spawn(self, world_size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        while len(self._workers) < world_size:
            ours, theirs = spawn.Pipe()
            # Not a daemon: saving a distributed checkpoint starts processes of its own.
            process = spawn.Process(target=_work, args=(theirs,), daemon=False)
            with _environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world_size: int, *, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
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


def _work(connection: Connection) -> None:
    """A worker: prepares the platform once, then runs one job after the other until the pool hangs up."""
    import torch

    from megatron_ktr.distributed.platform import start

    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    start("cpu")
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer = pickle.dumps((False, _run(job)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        with contextlib.suppress(BrokenPipeError):
            connection.send_bytes(answer)


def _leave_with_parent(parent: int) -> None:
    """Ends this process once the test session is gone, also one that was killed while ranks waited in a collective."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run(job: bytes) -> Any:
    import torch

    from megatron_ktr.distributed.groups import destroy_parallel

    fn, rank, world_size, store_path, kwargs = pickle.loads(job)
    # torchrun's variables too: code under test may read them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(Path(store_path)), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    torch.manual_seed(0)
    result = fn(RankContext(rank=rank, world_size=world_size), **kwargs)
    # Nobody leaves while another rank still talks to it.
    torch.distributed.barrier()
    destroy_parallel()
    # Models and their hooks are cycles that still hold the groups, and those their threads.
    gc.collect()
    return result
