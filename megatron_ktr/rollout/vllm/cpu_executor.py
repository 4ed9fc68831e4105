"""vLLM's external launcher on CPU, with shared memory of its own for every engine."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

SHARED_MEMORY = Path("/dev/shm")


class CpuRanksExecutor(ExecutorWithExternalLauncher):
    """Engines inside the ranks of a process group that exists already; every rank of the world makes its part at the
    same time.

    The tensor-parallel ranks of an engine exchange through shared memory, named after where the process group would be
    joined. vLLM's own launcher says the same place in every run: two runs on one machine would meet in the same
    memory, and one that was killed leaves a name that no later run can take. Here names are random, and gone as soon
    as every rank has opened the memory: it lasts as long as the processes.
    """

    def _init_executor(self) -> None:
        name = [f"megatron-ktr-{uuid.uuid4().hex}"]
        torch.distributed.broadcast_object_list(name, src=0)
        self._name = name[0]
        super()._init_executor()
        torch.distributed.barrier()
        for path in SHARED_MEMORY.glob(f"{self._name}*"):
            path.unlink(missing_ok=True)

    def _distributed_args(self) -> tuple[str, int, int]:
        _, rank, local_rank = super()._distributed_args()
        # Nothing is joined there: the process group exists.
        return f"file://{self._name}", rank, local_rank
