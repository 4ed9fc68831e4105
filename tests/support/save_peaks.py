"""What saving and loading a checkpoint holds of host and of device memory, byte for byte, on a machine without a
device.

The emulated border (``device_border.py``) knows on which side each tensor would lie on a GPU machine; here the tensors
that come to be during a save, or a load, are added up by side.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.device_border import _Sides, _tensors, device_border


@dataclass
class Peak:
    """Bytes beside what was there before."""

    host: int = 0
    device: int = 0


class _Watch(TorchDispatchMode):
    """Adds up the new storages that are alive, before each operation: by then it is settled where each one lies."""

    def __init__(self, sides: _Sides) -> None:
        super().__init__()
        self.sides = sides
        self.peak = Peak()
        self._new: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look()
        known = {tensor.untyped_storage()._cdata for tensor in _tensors(args, kwargs or {})}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and tensor.device.type != "meta":
                self._new[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def look(self) -> None:
        self._new = {key: entry for key, entry in self._new.items() if not entry[0].expired()}
        on_device = sum(size for key, (_, size) in self._new.items() if self.sides._known.get(key, (0,))[0])
        self.peak.device = max(self.peak.device, on_device)
        self.peak.host = max(self.peak.host, sum(size for _, size in self._new.values()) - on_device)


@contextlib.contextmanager
def watched(sides: _Sides) -> Iterator[Peak]:
    watch = _Watch(sides)
    with watch:
        yield watch.peak
        watch.look()


class NoData:
    """A source that is nowhere."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def _policy(context: Any, *, hf_dir: Path, run_dir: Path, values: dict[str, Any], sizes: Any = None) -> Any:
    from megatron_ktr.config import config_from_values
    from megatron_ktr.config.part_options import PolicyOptions
    from megatron_ktr.distributed.optimizer_state import prepare_optimizer_for_load
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy

    config = config_from_values(dict(model=str(hf_dir), run_dir=str(run_dir), params_dtype="bf16") | values)
    policy = Policy(
        hf_dir, options=PolicyOptions.of(config), ranks=context.init(sizes), platform=current(), num_steps=5
    )
    prepare_optimizer_for_load(policy.optimizer)  # moments, as after a step
    return policy


def measure_peaks(context: Any, *, hf_dir: Path, run_dir: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Peaks of this rank in one save, until its files are written, and in loading it: bytes; and its parameters."""
    from megatron_ktr.config.part_options import CheckpointOptions
    from megatron_ktr.distributed import checkpoint_writer
    from megatron_ktr.run.checkpoint import Checkpoints
    from megatron_ktr.run.checkpoint_state import load_sharded_state
    from megatron_ktr.run.directory import list_checkpoints

    may_write, save_tensor = threading.Event(), checkpoint_writer.save_tensor
    with device_border() as sides:
        policy = _policy(context, hf_dir=hf_dir, run_dir=run_dir, values=values)
        checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions(resolved=""))
        # The writing thread frees what it has written: it is held until all that it is given was counted.
        checkpoint_writer.save_tensor = lambda *args: (may_write.wait(), save_tensor(*args))[1]
        try:
            with watched(sides) as saved:
                checkpoints.save(1)
            may_write.set()
            checkpoints.close()
        finally:
            may_write.set()
            checkpoint_writer.save_tensor = save_tensor
        ((_, checkpoint),) = list_checkpoints(run_dir)
        with watched(sides) as loaded:
            load_sharded_state(policy, checkpoint)
    parameters = sum(p.numel() for chunk in policy.bare_chunks for p in chunk.parameters())
    return {"parameters": parameters, "save": vars(saved), "load": vars(loaded)}


def measure_stall(context: Any, *, hf_dir: Path, run_dir: Path, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds for which ``save`` keeps the training waiting, and until the checkpoint is complete; of each repeat."""
    from megatron_ktr.config.part_options import CheckpointOptions
    from megatron_ktr.run.checkpoint import Checkpoints

    policy = _policy(context, hf_dir=hf_dir, run_dir=run_dir, values=values)
    options = CheckpointOptions(resolved="", keep_checkpoints=1)
    checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=options)
    stalls, wholes = [], []
    for step in range(1, repeats + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        checkpoints.save(step)
        stalls.append(time.perf_counter() - start)
        checkpoints.close()
        wholes.append(time.perf_counter() - start)
    return {"stall_seconds": stalls, "complete_seconds": wholes}


def measure_waits(context: Any, *, hf_dir: Path, run_dir: Path, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """CPU seconds of a step (a pass without gradient over one group, and an optimizer step), and of what the main
    thread does for an asynchronous and this process for a synchronous save; of each repeat."""
    from megatron_ktr.config.part_options import CheckpointOptions
    from megatron_ktr.run.checkpoint import Checkpoints
    from tests.support.parity import make_group, pack

    policy = _policy(context, hf_dir=hf_dir, run_dir=run_dir, values=values)
    group = make_group(policy.model_config, media=(), response_lengths=(40, 30, 50), seed=0)
    options = CheckpointOptions(resolved="", keep_checkpoints=1)
    checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=options)
    found: dict[str, list[float]] = {"step": [], "asynchronous": [], "synchronous": []}
    for repeat in range(repeats):
        begin = time.process_time()
        policy.score([pack([group])])
        policy.optimizer.step()
        found["step"].append(time.process_time() - begin)
        begin = time.thread_time()
        checkpoints.save(2 * repeat + 1)
        found["asynchronous"].append(time.thread_time() - begin)
        checkpoints.close()
        begin = time.process_time()
        checkpoints.save(2 * repeat + 2)
        checkpoints.close()
        found["synchronous"].append(time.process_time() - begin)
    return found


def measure_loads(context: Any, *, hf_dir: Path, run_dir: Path, values: dict[str, Any], repeats: int) -> dict[str, Any]:
    """CPU seconds of loading the checkpoint in ``run_dir``, of each repeat. Where there is none, this layout saves it
    first."""
    from megatron_ktr.config.part_options import CheckpointOptions
    from megatron_ktr.distributed.groups import ParallelSizes
    from megatron_ktr.run.checkpoint import Checkpoints
    from megatron_ktr.run.checkpoint_state import load_sharded_state
    from megatron_ktr.run.directory import list_checkpoints

    sizes = ParallelSizes(
        tensor=values.get("tensor_model_parallel_size", 1), pipeline=values.get("pipeline_model_parallel_size", 1)
    )
    policy = _policy(context, hf_dir=hf_dir, run_dir=run_dir, values=values, sizes=sizes)
    torch.distributed.barrier()
    is_there = bool(list_checkpoints(run_dir))
    torch.distributed.barrier()
    if not is_there:
        options = CheckpointOptions(resolved="")
        checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=options)
        checkpoints.save_and_wait(1)
        checkpoints.close()
    ((_, checkpoint),) = list_checkpoints(run_dir)
    seconds = []
    for _ in range(repeats):
        torch.distributed.barrier()
        begin = time.process_time()
        load_sharded_state(policy, checkpoint)
        seconds.append(time.process_time() - begin)
    return {"load": seconds}
