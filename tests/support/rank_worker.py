"""What a rank of ``ranks.RankPool`` runs. Importing this module is what every rank has in common: the whole trainer, on
CPU. A server imports it once, and the ranks are its forks. Python's own server of forks is not used for it: there is
one in a process, and what is tested uses that.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import pickle
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

import torch

from megatron_ktr.distributed.platform import start
from megatron_ktr.files.hf_model import make_torchvision_importable
from tests.support.patience import PATIENCE_SECONDS

# Threads do not survive a fork.
torch.set_num_threads(1)
start("cpu")
make_torchvision_importable()

import megatron_ktr.train  # noqa: E402, F401  # megatron-core is imported for the platform that has started
from megatron_ktr.distributed.groups import destroy_parallel  # noqa: E402

# A rank collects garbage after every call, and need not look at what all ranks share.
gc.collect()
gc.freeze()

COLLECTIVE_TIMEOUT_SECONDS = 0.8 * PATIENCE_SECONDS
"""Less than the pool waits: the ranks then say what they were waiting in."""


def serve(pool: Connection) -> None:
    """Forks a rank for every connection that the pool sends, until the pool hangs up."""
    signal.signal(signal.SIGCHLD, _reap)
    threads = threading.active_count()
    assert threads == 1, f"{threads} threads: only one of them survives a fork"
    while True:
        try:
            handle = recv_handle(pool)
        except (EOFError, OSError):
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pool.close()
            _work(Connection(handle))
            os._exit(0)
        os.close(handle)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _work(connection: Connection) -> None:
    """Runs one job after the other until the pool hangs up."""
    torch.set_num_threads(1)  # makes torch's own pool of threads anew; two threads at once would fail in that
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
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
    """Ends this process once the server of forks is gone, which ends with the test session, also one that was killed
    while ranks waited in a collective."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run(job: bytes) -> object:
    from tests.support.ranks import RankContext

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
