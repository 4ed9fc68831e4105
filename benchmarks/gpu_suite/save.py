"""Part ``save`` of ``run.py``: one checkpoint of a training run, with the memory it takes and the time it costs.

A 3B-shaped model of a few layers takes one step, so that its optimizer has moments, and is saved. ``stall_seconds`` is
what training waits; the rest is written in the background. Then a weight is spoilt and the checkpoint loaded: weights
must come back to the bit.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.common import Part, group_of, leave_kernels_untuned, model_directory, published_shape
from benchmarks.gpu_suite.smoke import checked
from benchmarks.gpu_suite.step import build_trainer
from megatron_ktr.config.part_options import CheckpointOptions
from megatron_ktr.data.random_groups import FixedSource
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.distributed.platform import host_peak_bytes, reset_host_peak
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.checkpoint_state import load_sharded_state

NUM_LAYERS, VISION_DEPTH = 4, 4


class _SavedSource(FixedSource):
    def state_dict(self) -> dict[str, Any]:
        return {}


def run_save(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    ranks = init_parallel(ParallelSizes(), platform=part.platform)
    part.entry("one checkpoint", lambda: _save(part, ranks))
    destroy_parallel()


def _save(part: Part, ranks: ParallelGroups) -> dict[str, Any]:
    config = published_shape("3B", num_layers=NUM_LAYERS, is_tiny=part.is_tiny)
    depth = min(VISION_DEPTH, config.vision.depth)
    vision = dataclasses.replace(config.vision, depth=depth, fullatt_block_indexes=(depth - 1,))
    config = dataclasses.replace(config, vision=vision)
    with tempfile.TemporaryDirectory() as directory:
        hf_dir = model_directory(config, Path(directory) / "model")
        trainer = build_trainer(part, ranks, hf_dir, train_steps=2, keep_checkpoints=1)
        trainer.source.groups = [group_of(config, frames=4, is_tiny=part.is_tiny)]
        trainer.train_step(1)
        policy = trainer.policy
        num_parameters = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
        checkpoints = Checkpoints(
            Path(directory) / "run",
            policy=policy,
            source=_SavedSource([]),
            options=CheckpointOptions(resolved="", keep_checkpoints=1),
        )
        part.platform.synchronize()
        part.platform.reset_peak_memory()
        reset_host_peak()
        device_before, host_before = _allocated(part), host_peak_bytes()
        begin = time.monotonic()
        checkpoints.save(1)
        part.platform.synchronize()
        stall = time.monotonic() - begin
        device_peak = part.platform.peak_memory_bytes() - device_before
        checkpoints.close()
        seconds, host_peak = time.monotonic() - begin, host_peak_bytes() - host_before
        (saved,) = (Path(directory) / "run").glob("*/step_*")
        weight = next(p for p in policy.chunks[0].parameters() if p.dim() > 1)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        load_sharded_state(policy, saved)
        num_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        return checked(
            {
                "parameters": num_parameters,
                "checkpoint_bytes_per_parameter": num_bytes / num_parameters,
                "device_peak_bytes_per_parameter": device_peak / num_parameters if device_before else None,
                "host_peak_bytes_per_parameter": host_peak / num_parameters,
                "stall_seconds": stall,
                "seconds": seconds,
                "within": torch.equal(before, weight.detach()),
            }
        )


def _allocated(part: Part) -> int:
    """Bytes of tensors on the device; 0 on CPU, whose peak is the host's."""
    return 0 if part.platform.name == "cpu" else torch.get_device_module(part.platform.device).memory_allocated()
