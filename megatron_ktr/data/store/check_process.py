"""Checks the records of a store in several processes.

``python -m megatron_ktr.data.store.check_process`` is one of them. They are new processes and no forks, because the
training process may hold a device and threads; and not those of ``multiprocessing``, which would import the training
program again. A process reads its ``CheckJob`` from standard input and writes pickled ``ChunkFindings``, the last of
them None.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

import megatron_ktr
from megatron_ktr.data.store.check_job import CHUNK, CheckJob, ChunkFindings, check_chunk
from megatron_ktr.data.store.record_store import RecordStore
from megatron_ktr.data.store.sealed import open_sealed
from megatron_ktr.errors import UserError

_Item = ChunkFindings | UserError | None


def chunks_of_processes(job: CheckJob, *, num_processes: int) -> Iterator[ChunkFindings]:
    """The findings of all chunks of the job's store, in the order in which the processes finish them.

    Raises:
        UserError: a process was ended from outside, or met an error of the user.
    """
    package_root = str(Path(megatron_ktr.__file__).parent.parent)
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_ktr.data.store.check_process"]
    items: SimpleQueue[tuple[int, _Item]] = SimpleQueue()
    with tempfile.TemporaryFile() as errors:
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=-1
            )
            for _ in range(num_processes)
        ]
        try:
            for index, process in enumerate(processes):
                Thread(target=_listen, args=(index, process, items), daemon=True).start()
                _send(process, pickle.dumps((job, index, num_processes)))
            open_ones = set(range(num_processes))
            while open_ones:
                index, item = items.get()
                if isinstance(item, UserError):
                    raise item
                if item is None:
                    open_ones.discard(index)
                    _require_finished(processes[index], errors)
                else:
                    yield item
        finally:
            for process in processes:
                process.kill()
                process.wait()
                assert process.stdout is not None, "it was opened above"
                process.stdout.close()


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    assert process.stdin is not None, "it was opened above"
    try:
        process.stdin.write(message)
        process.stdin.close()
    except BrokenPipeError:
        pass  # the process has ended, and its exit status says why


def _listen(index: int, process: subprocess.Popen[bytes], items: SimpleQueue[tuple[int, _Item]]) -> None:
    assert process.stdout is not None, "it was opened above"
    try:
        while (item := pickle.load(process.stdout)) is not None:
            items.put((index, item))
    except (EOFError, pickle.UnpicklingError, ValueError, OSError):
        pass  # it ended before it was done
    items.put((index, None))


def _require_finished(process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
    code = process.wait()
    if code < 0:
        raise UserError(f"a process that checks records was ended by signal {-code}: was the memory full?")
    if code:
        errors.seek(0)
        told = errors.read()[-4000:].decode(errors="replace")
        raise RuntimeError(f"a process that checks records failed with exit code {code}:\n{told}")


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not belong between the findings
    job, index, num_processes = pickle.load(sys.stdin.buffer)
    try:
        table = open_sealed(job.file.path)
        if table is None:
            raise UserError(f"record_store_dir: {job.file.path} was damaged or removed while it was read: start again")
        store, checker = RecordStore(table, job.rules, path=job.path, file=job.file), job.checker()
        for start in range(index * CHUNK, len(store), num_processes * CHUNK):
            pickle.dump(check_chunk(store, checker, start=start), out)
            out.flush()
    except UserError as error:
        pickle.dump(error, out)
    pickle.dump(None, out)
    out.flush()


if __name__ == "__main__":
    main()
