"""vLLM's external launcher for CPU, with separate shared memory for every engine."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

SHARED_MEMORY = Path("/dev/shm")


class CpuRanksExecutor(ExecutorWithExternalLauncher):
    """Runs engines inside the ranks of a process group that exists already. All ranks of the world make one at the same
    time.

    The tensor-parallel ranks of an engine exchange data through shared memory. Its name is derived from the address at
    which the process group would be joined, and vLLM's own launcher uses the same address in every run. Two runs on one
    machine would therefore share memory, and a run that was killed would leave a name that no later run can take. Here
    names are random. They are removed as soon as every rank has opened the memory, which lasts as long as its
    processes.
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
        # No process group is joined at this address, because it exists already. It only names the shared memory.
        return f"file://{self._name}", rank, local_rank
