"""Writes megatron-core's sharded state in the background: a snapshot first, the files in a thread, metadata at the end.

megatron-core's own asynchronous saving forks the training process (once per save and once per file) and spawns a
manager that imports the main script again. A fork of a process that runs gloo, NCCL or OpenMP threads may hang, and
the manager costs every rank seconds. Here a save has three parts:

    snapshot   collective: plan who writes what, copy this rank's part to host memory      (training waits)
    write      a thread appends the copies to ``__<rank>_0.distcp``, hashed on the way     (training goes on)
    finish     collective: results of all ranks become ``.metadata`` and ``metadata.json`` (training waits, briefly)

The files have megatron-core's ``torch_dist`` format, so its loader reads them. A tensor that several data-parallel
ranks hold is written by one of them; these tensors are spread evenly over the ranks.
"""

from __future__ import annotations

import dataclasses
import pickle
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ktr.files.checksums import Digest, HashingFile, write_hashed
from megatron_ktr.files.torch_dist_checks import METADATA_FILE
from megatron_ktr.files.torch_dist_files import save_tensor

Written = tuple[list[WriteResult], dict[str, Digest]]
"""What a rank has written: the position of each chunk, and the checksum of the rank's file by name."""


class _RankWriter(FileSystemWriter):
    """Writes this rank's file. ``prepare_write_data`` copies the data; ``write``, in any thread, writes it."""

    can_run_decentralized_global_plan = True

    def __init__(self, directory: Path, *, rank: int) -> None:
        super().__init__(directory)
        self.directory = directory
        self.file_name = f"__{rank}_0{DEFAULT_SUFFIX}"
        self._prefix = _StoragePrefix(f"__{rank}_")
        self._items: list[tuple[WriteItem, Any]] = []

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data=self._prefix)

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        # These are copies on the host, because training changes the tensors in place while the thread writes.
        self._items = [(item, _copy(item, planner.resolve_data(item))) for item in plan.items]

    def write(self) -> Written:
        results: list[WriteResult] = []
        if not self._items:
            return results, {}
        with open(self.directory / self.file_name, "wb") as opened:
            file = HashingFile(opened)
            while self._items:
                item, data = self._items.pop()
                start = file.tell()
                if item.type == WriteItemType.BYTE_IO:
                    file.write(data)
                else:
                    save_tensor(data, file)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(self.file_name, start, length)))
            file.sync()
        return results, {self.file_name: file.digest}


def _copy(item: WriteItem, data: Any) -> Any:
    if item.type == WriteItemType.BYTE_IO:
        return data.getvalue()
    data = data.detach()
    return data.clone(memory_format=torch.contiguous_format) if data.device.type == "cpu" else data.to("cpu")


class BackgroundSave:
    """One save in progress. The constructor takes the snapshot (collective over the world) and starts the thread."""

    def __init__(self, state: ShardedStateDict, directory: Path, *, data_group: ProcessGroup) -> None:
        """``state`` must hold sharded tensors only. ``directory`` must exist without tensor files, and be seen by every
        rank."""
        self.directory = directory
        strategy = get_default_save_sharded_strategy()
        self._format = CheckpointingConfig(strategy.backend, strategy.version)
        FullyParallelSaveStrategyWrapper(strategy, data_group).apply_saving_parallelization(state)
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
        self._writer = _RankWriter(directory, rank=torch.distributed.get_rank())
        writer: Any = self._writer  # core declares its own class and calls what torch's has
        (_, self._metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(state, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self._written: Written = ([], {})
        self.error: Exception | None = None
        """The reason why this rank could not write, or None; valid once the thread has ended."""
        # It is a daemon thread: a run that fails must not wait for a checkpoint that nobody will complete.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._written = self._writer.write()
        except Exception as error:
            self.error = error

    @property
    def is_written(self) -> bool:
        """Whether the thread has ended: this rank's part is on disk, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def gather_results(self) -> list[Written]:
        """Gives every rank what all ranks wrote. Collective; every rank must have called ``wait``."""
        gathered: list[Written] = [([], {})] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._written)
        return gathered

    def finish(self, written: list[Written]) -> dict[str, Digest]:
        """Writes the metadata, which makes the directory a checkpoint. Only rank 0 calls it.

        Returns the checksums that were computed while the files were written, by name.
        """
        metadata = self._metadata
        assert metadata is not None, "rank 0 received it when the plan was made"
        # This field serves a cache of plans that is not used here, and grows with ranks x tensors.
        metadata.__dict__.pop("all_local_plans", None)
        metadata.version, metadata.storage_meta = CURRENT_DCP_VERSION, StorageMeta()
        metadata.storage_data = {result.index: result.storage_data for results, _ in written for result in results}
        digests = {name: digest for _, found in written for name, digest in found.items()}
        digests[METADATA_FILE] = write_hashed(self.directory / METADATA_FILE, pickle.dumps(metadata))
        save_config(self._format, str(self.directory))
        return digests
