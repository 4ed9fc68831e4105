"""Checkpoints of a running training: everything a run needs to go on, loadable in any layout.

    step_00000010/
        __<rank>_0.distcp, .metadata, metadata.json   weights (or adapters) and optimizer state, megatron-core's
                                                      distributed format
        common.pt                                     optimizer settings, count of optimizer steps, loss scale
        training.json                                 step, layout, learning-rate schedule, data positions
        rng.pt                                        random states of each rank
        config.yaml, hf/                              resolved options; config, tokenizer, ... of the model

Saving is asynchronous: ``save`` copies to host memory, a thread writes, and a later step boundary (or ``close``)
completes the checkpoint by renaming its directory. So a directory ``step_*`` is always complete, and a run that dies
while saving leaves the older ones as they were. Every rank must see the run directory (a shared file system).

Resuming in the layout that saved continues bit for bit. In another layout weights, optimizer and schedule are the
same, data-parallel ranks share the remaining data anew, and random states start from the seed (no part of a training
step depends on them: rollouts and shuffles are seeded by step).
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from megatron_ktr.config import save_resolved
from megatron_ktr.data.dataset import reshard_states
from megatron_ktr.distributed.checkpoint_writer import BackgroundSave
from megatron_ktr.distributed.optimizer_checkpoint import load_optimizer_state, optimizer_sharded_state
from megatron_ktr.errors import UserError
from megatron_ktr.hf_files import copy_side_files
from megatron_ktr.policy import Policy
from megatron_ktr.rollout.source import ReplicaSource, on_every_rank
from megatron_ktr.run_directory import CHECKPOINTS, CONFIG_FILE, SIDE_FILES, list_checkpoints, step_name
from megatron_ktr.torch_dist_files import TorchDistReader
from models.qwen2_5_vl.dist_checkpoint import locate_tensors
from models.qwen2_5_vl.dist_weights import model_sharded_state_dict
from models.qwen2_5_vl.lora import is_adapter

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and resumes one run; every method is collective over the world.

    Example, in a training loop::

        checkpoints = Checkpoints(run_dir, policy=policy, source=source)
        if start.checkpoint:
            checkpoints.load(start.checkpoint)
        for step in range(start.step + 1, num_steps + 1):
            ...
            checkpoints.after_step(step)
        checkpoints.close()
    """

    def __init__(self, run_dir: Path, *, policy: Policy, source: ReplicaSource) -> None:
        self.directory = run_dir / CHECKPOINTS
        self.policy = policy
        self.source = source
        self.groups = policy.groups
        self._pending: tuple[int, BackgroundSave] | None = None
        self._on_rank_zero("clear", self._remove_leftovers)

    def after_step(self, step: int) -> None:
        """Completes a save whose files are written; starts one every ``save_interval`` steps and after the last."""
        if self._pending is not None and self._is_written_everywhere():
            self._complete()
        trainer = self.policy.config.trainer
        if trainer.save_interval and (step % trainer.save_interval == 0 or step == trainer.train_steps):
            self.save(step)

    def save(self, step: int) -> None:
        """Starts a checkpoint of the state after ``step``; one that is still being written is completed first.

        Raises:
            UserError: on every rank, if the disk is full or cannot be written; older checkpoints stay as they are.
        """
        self._complete()
        scratch = self.directory / f".{step_name(step)}"
        training = self._training_state(step)
        random_states = self._gather_random_states()
        state = sharded_state(self.policy)
        # After the optimizer's state was found by its parameters: weights kept in FP8 are written as plain numbers.
        force_all_tensors_to_non_fp8(state)
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        self._on_rank_zero(f"save step {step} to", lambda: self._prepare(scratch, training, random_states, common))
        self._on_each_rank(f"save step {step} to", lambda: _require_shared(scratch))
        self._pending = (step, BackgroundSave(sharded, scratch, data_group=self.groups.data_context))

    def save_and_wait(self, step: int) -> None:
        """A complete checkpoint of the state after ``step``, also where none is due."""
        if self._pending is None or self._pending[0] != step:
            self.save(step)
        self._complete()

    def close(self) -> None:
        """Waits for the checkpoint under way and completes it."""
        self._complete()

    def load(self, checkpoint: Path) -> int:
        """Restores everything from a complete checkpoint, saved in any layout; returns its step.

        Raises:
            UserError: damaged, or of another model or other data.
        """
        training = self._on_each_rank("read", lambda: _read_training_state(checkpoint))
        config = self.policy.model_config
        if self.policy.lora is None:
            self._on_each_rank("read", lambda: locate_tensors(TorchDistReader(checkpoint), config=config))
        load_sharded_state(self.policy, checkpoint)
        scheduler = self.policy.scheduler
        scheduler.num_steps = 0
        scheduler.step(increment=training["scheduler_steps"])
        groups = self.groups
        position = reshard_states(training["sources"], rank=groups.data_rank, size=groups.data_size)
        self.source.load_state_dict(position)
        if training["layout"] == self._layout():
            states = self._on_each_rank("read", lambda: _read_random_states(checkpoint / "rng.pt"))
            self.policy.platform.set_rng_state(states[groups.rank])
        elif groups.rank == 0:
            _log.info("the layout changed since %s was saved: random states start from the seed", checkpoint)
        return int(training["step"])

    # State

    def _layout(self) -> dict[str, Any]:
        layout = dataclasses.asdict(self.groups.sizes)
        return {**layout, "world": self.groups.world_size, "platform": self.policy.platform.name}

    def _training_state(self, step: int) -> dict[str, Any]:
        sources: list[Any] = [None] * self.groups.data_size
        torch.distributed.all_gather_object(sources, self.source.state_dict(), group=self.groups.data)
        return {
            "step": step,
            "layout": self._layout(),
            "scheduler_steps": self.policy.scheduler.num_steps,
            "sources": sources,
        }

    def _gather_random_states(self) -> list[Any] | None:
        states = [None] * self.groups.world_size if self.groups.rank == 0 else None
        torch.distributed.gather_object(self.policy.platform.rng_state(), states, dst=0)
        return states

    # Files

    def _prepare(self, scratch: Path, training: dict[str, Any], random_states: Any, common: dict[str, Any]) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        copy_side_files(self.policy.hf_dir, scratch / SIDE_FILES)
        save_resolved(self.policy.config, scratch / CONFIG_FILE)
        (scratch / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        _write_object(scratch / "rng.pt", random_states)
        _write_object(scratch / "common.pt", common)

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(".step_*"):
            shutil.rmtree(path)

    def _is_written_everywhere(self) -> bool:
        assert self._pending is not None
        is_waiting = torch.tensor(0 if self._pending[1].is_written else 1, device=self.policy.platform.device)
        torch.distributed.all_reduce(is_waiting)
        return int(is_waiting) == 0

    def _complete(self) -> None:
        """Waits for the files of all ranks; metadata, rename, then the oldest ones go."""
        if self._pending is None:
            return
        (step, save), self._pending = self._pending, None
        save.wait()
        what = f"save step {step} to"
        try:
            self._on_each_rank(what, lambda: _raise_error(save.error))
            results = save.gather_results()
            self._on_rank_zero(what, lambda: self._publish(step, save, results))
        except UserError:
            if self.groups.rank == 0:
                shutil.rmtree(save.directory, ignore_errors=True)
            raise

    def _publish(self, step: int, save: BackgroundSave, results: list[Any]) -> None:
        save.finish(results)
        target = self.directory / step_name(step)
        if target.exists():
            # An incomplete one would not have been resumed from; a complete one cannot be ahead of this run.
            _remove(target)
        os.rename(save.directory, target)
        _sync_directory(self.directory)
        keep = self.policy.config.trainer.keep_checkpoints
        for _, path in list_checkpoints(self.directory.parent)[: -keep if keep else 0]:
            _remove(path)

    # Errors

    def _on_rank_zero(self, what: str, action: Callable[[], Any]) -> None:
        self._on_each_rank(what, lambda: action() if self.groups.rank == 0 else None)

    def _on_each_rank(self, what: str, action: Callable[[], Any]) -> Any:
        """``on_every_rank`` with errors of the file system as one line for the user."""

        def guarded() -> Any:
            try:
                return action()
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    reason = "disk full"
                kept = list_checkpoints(self.directory.parent)
                intact = f"the last complete checkpoint is {kept[-1][1]}" if kept else "there is no older checkpoint"
                raise UserError(f"checkpoints: cannot {what} {self.directory}: {reason}; {intact}") from error

        return on_every_rank(guarded, groups=self.groups)


def sharded_state(policy: Policy, *, is_loading: bool = False) -> dict[str, Any]:
    """Weights and optimizer state as megatron-core's sharded state, the same tensors whatever the layout.

    Collective over data-parallel ranks: their parts of the optimizer state are put together. Of a model with adapters
    only these are in it: the rest is what the run started from.
    """
    policy.wait_for_parameters()
    state = model_sharded_state_dict(policy.chunks)
    has_optimizer_state = policy.config.optimizer.optimizer != "sgd"
    if has_optimizer_state and not policy.optimizer.is_stub_optimizer:
        state["optimizer"] = optimizer_sharded_state(policy.optimizer, dict(state), is_loading=is_loading)
    for part in [name for name in state if name.startswith("model")]:
        # Objects are empty on plain torch layers, histories of FP8 on Transformer Engine's: not needed.
        state[part] = {
            name: value
            for name, value in state[part].items()
            if not isinstance(value, ShardedObject) and (policy.lora is None or is_adapter(name))
        }
    return state


@torch.no_grad()
def load_sharded_state(policy: Policy, checkpoint: Path) -> None:
    """Fills weights and optimizer from a checkpoint of any layout; data-parallel ranks read a part each."""
    state = sharded_state(policy, is_loading=True)
    parts = [name for name in state if name.startswith("model")]
    try:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(checkpoint)), policy.groups.data_context
        )
        loaded = dist_checkpointing.load(state, str(checkpoint), sharded_strategy=strategy)
    except (CheckpointingException, KeyError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"--resume: {checkpoint} cannot be loaded: {error}") from error
    for chunk, name in zip(policy.bare_chunks, parts, strict=True):
        result = chunk.load_state_dict(loaded[name], strict=False)
        missing = [key for key in result.missing_keys if policy.lora is None or is_adapter(key)]
        lost = [key for key in missing if not key.endswith("_extra_state")] + result.unexpected_keys
        if lost:
            raise RuntimeError(f"parameters that the sharded state does not cover: {', '.join(lost)}")
    policy.vision.forget()
    if "optimizer" in state:
        load_optimizer_state(policy.optimizer, loaded["optimizer"])


def _read_training_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "training.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged: {error}") from error
    missing = {"step", "layout", "scheduler_steps", "sources"} - state.keys()
    if missing:
        raise UserError(f"--resume: {path} lacks {', '.join(sorted(missing))}")
    return state


def _read_random_states(path: Path) -> list[Any]:
    # Python's and numpy's states are not tensors; the file is as trusted as the rest of the checkpoint.
    return torch.load(path, map_location="cpu", weights_only=False)


def _write_object(path: Path, value: Any) -> None:
    """``torch.save`` by way of memory: writing to a file itself, it turns a full disk into a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _require_shared(scratch: Path) -> None:
    if not scratch.is_dir():
        raise UserError(f"--run-dir: {scratch} is not seen by every rank; it must be on a shared file system")


def _raise_error(error: Exception | None) -> None:
    if error is not None:
        raise error


def _remove(checkpoint: Path) -> None:
    """Takes the name away first, so that a checkpoint is never half there."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    """The rename itself reaches the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
