"""Checkpoints of a running training. They hold everything a run needs to continue, and load in any parallel layout.

    step_00000010/
        __<rank>_0.distcp, .metadata, metadata.json   weights (or adapters) and optimizer state, megatron-core's
                                                      distributed format
        common.pt                                     optimizer settings, count of optimizer steps, loss scale
        training.json                                 step, layout, learning-rate schedule, data positions
        rng.json                                      random states of each rank
        config.yaml, hf/                              resolved options; config, tokenizer, ... of the model
        checksums.json                                checksums of all other files (``files/checksums.py``)

Saving is asynchronous. ``save`` copies each rank's part to host memory, a thread writes the files, and a later step
boundary (or ``close``) completes the checkpoint by renaming its directory. So a directory ``step_*`` is always
complete, and a run that dies while saving leaves the older checkpoints as they were. Every rank must see the run
directory (a shared file system). Files may still be damaged after they were written; they are checked before a
checkpoint is used (``files/intact_checkpoint.py``).

A run that resumes in the layout that saved continues bit for bit. In another layout, weights, optimizer and schedule
are the same, data-parallel ranks divide the remaining data anew, and random states start from the seed. No part of a
training step depends on these random states: rollouts and shuffles are seeded by step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ktr.config.part_options import CheckpointOptions
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.checkpoint_writer import BackgroundSave, Written
from megatron_ktr.distributed.optimizer_checkpoint import (
    agreed_steps,
    load_optimizer_state,
    optimizer_sharded_state,
    optimizer_shards,
)
from megatron_ktr.distributed.optimizer_shards import stored_keys
from megatron_ktr.distributed.random_states import RANDOM_STATES, random_states_to_json, read_random_states
from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import Digest, sync, write_hashed, write_manifest
from megatron_ktr.files.hf_files import copy_side_files
from megatron_ktr.files.intact_checkpoint import CONFIG_FILE, FORMAT_VERSION, TRAINING_FILE
from megatron_ktr.files.safe_pickle import UNREADABLE
from megatron_ktr.files.torch_dist_checks import COMMON_FILE, check_chunks, require_tensors
from megatron_ktr.files.torch_dist_files import TorchDistReader, torch_saved
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.step_source import ResumableSource
from megatron_ktr.run.directory import CHECKPOINTS, SIDE_FILES, list_checkpoints, step_name
from megatron_ktr.run.kept import BestCheckpoint, remove_checkpoint, remove_oldest
from megatron_ktr.stack import load_strategy
from models.qwen2_5_vl.dist_checkpoint import locate_tensors
from models.qwen2_5_vl.dist_weights import model_sharded_state_dict, require_plain_tensors
from models.qwen2_5_vl.lora import is_adapter

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and resumes one run. Every method is collective over the world.

    A run calls ``load`` where it continues, ``after_step`` and ``after_evaluation`` in this order, and ``close``.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        policy: Policy,
        source: ResumableSource,
        options: CheckpointOptions,
        best: BestCheckpoint | None = None,
    ) -> None:
        self.directory = run_dir / CHECKPOINTS
        self.best = best
        self.options = options
        self.policy = policy
        self.source = source
        self.ranks = policy.ranks
        self._pending: tuple[int, BackgroundSave] | None = None
        self._complete_step: int | None = None
        """The step of the newest complete checkpoint."""
        self._digests: dict[str, Digest] = {}
        """The checksums of the files that ``_prepare`` wrote, by name."""
        self._on_rank_zero("clear", self._remove_leftovers)

    def after_step(self, step: int) -> None:
        """Completes the pending save if its files are written. Starts a save every ``save_interval`` steps and after
        the last step."""
        if self._pending is not None and self._is_written_everywhere():
            self._complete()
        interval = self.options.save_interval
        if interval and (step % interval == 0 or step == self.options.num_steps):
            self.save(step)

    def after_evaluation(self, step: int) -> None:
        """Starts a save of ``step`` if it is the best one so far and is not saved yet."""
        if self.best is None or not self.best.is_candidate(step):
            return
        if step == self._complete_step:
            self._settle(step)
        elif self._pending is None or self._pending[0] != step:
            self.save(step)

    def save(self, step: int) -> None:
        """Starts a checkpoint of the state after ``step``. A checkpoint that is still being written is completed first.

        Raises:
            UserError: on every rank, if the disk is full or cannot be written; older checkpoints stay as they are.
        """
        self._complete()
        scratch = self.directory / f".{step_name(step)}"
        training = self._training_state(step)
        random_states = self._gather_random_states()
        state = sharded_state(self.policy)
        # Weights kept in FP8 are written as plain numbers. Replacing them must come after ``sharded_state``, which
        # finds the optimizer's state by the parameters themselves.
        force_all_tensors_to_non_fp8(state)
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        assert isinstance(sharded, dict), type(sharded)  # as the state that it is made of
        common = self._common_of_all(common)
        self._on_rank_zero(f"save step {step} to", lambda: self._prepare(scratch, training, random_states, common))
        self._on_each_rank(f"save step {step} to", lambda: _require_shared(scratch))
        self._pending = (step, BackgroundSave(sharded, scratch, data_group=self.ranks.data_context))

    def save_and_wait(self, step: int) -> None:
        """Saves the state after ``step`` and waits until the checkpoint is complete, even if no checkpoint is due."""
        if self._pending is None or self._pending[0] != step:
            self.save(step)
        self._complete()

    def close(self) -> None:
        """Waits for the pending checkpoint, if any, and completes it."""
        self._complete()

    def load(self, checkpoint: Path) -> int:
        """Restores everything from an intact checkpoint, saved in any layout; returns its step.

        Raises:
            UserError: the checkpoint is of another model or of other data, or holds something else than a run writes.
        """
        training = self._on_each_rank("read", lambda: _read_training_state(checkpoint))
        with _as_user_error(checkpoint / TRAINING_FILE):
            # The source comes before the weights, so that a checkpoint of other data is refused early.
            ranks = self.ranks
            position = reshard_states(training["sources"], rank=ranks.data_rank, size=ranks.data_size)
            self.source.load_state_dict(position)
        self._on_each_rank("read", lambda: self._check_tensors(checkpoint))
        load_sharded_state(self.policy, checkpoint)
        scheduler = self.policy.scheduler
        scheduler.num_steps = 0
        scheduler.step(increment=training["scheduler_steps"])
        if training["layout"] == self._layout():
            states = self._on_each_rank("read", lambda: read_random_states(checkpoint))
            self._on_each_rank("read", lambda: self._set_random_state(states, checkpoint / RANDOM_STATES))
        elif ranks.rank == 0:
            _log.info("the layout changed since %s was saved: random states start from the seed", checkpoint)
        self._complete_step = int(training["step"])
        return self._complete_step

    def _set_random_state(self, states: list[dict[str, Any]], path: Path) -> None:
        with _as_user_error(path):
            try:
                self.policy.platform.set_rng_state(states[self.ranks.rank])
            except RuntimeError as error:  # torch raises it for a state of another length
                raise ValueError(str(error)) from error

    def _check_tensors(self, checkpoint: Path) -> None:
        reader = TorchDistReader(checkpoint)
        files = sorted(path.name for path in checkpoint.glob("*.distcp"))
        check_chunks(checkpoint, files=files[self.ranks.rank :: self.ranks.world_size])
        if self.policy.lora is None:
            locate_tensors(reader, config=self.policy.model_config)

    # State

    def _layout(self) -> dict[str, Any]:
        layout = dataclasses.asdict(self.ranks.sizes)
        return {**layout, "world": self.ranks.world_size, "platform": self.policy.platform.name}

    def _training_state(self, step: int) -> dict[str, Any]:
        sources: list[Any] = [None] * self.ranks.data_size
        torch.distributed.all_gather_object(sources, self.source.state_dict(), group=self.ranks.data)
        return {
            "version": FORMAT_VERSION,
            "step": step,
            "layout": self._layout(),
            "scheduler_steps": self.policy.scheduler.num_steps,
            "sources": sources,
        }

    def _common_of_all(self, common: dict[str, Any]) -> dict[str, Any]:
        """The common state for rank 0 to write. Its optimizer settings come from the first rank that trains something,
        because ranks that train nothing have none to save."""
        settings = [None] * self.ranks.world_size if self.ranks.rank == 0 else None
        trains = any(p.requires_grad for chunk in self.policy.chunks for p in chunk.parameters())
        torch.distributed.gather_object(common.get("optimizer") if trains else None, settings, dst=0)
        found = next((one for one in settings or [] if one is not None), None)
        return common if found is None else common | {"optimizer": found}

    def _gather_random_states(self) -> list[Any] | None:
        states = [None] * self.ranks.world_size if self.ranks.rank == 0 else None
        torch.distributed.gather_object(self.policy.platform.rng_state(), states, dst=0)
        return states

    # Files

    def _prepare(self, scratch: Path, training: dict[str, Any], random_states: Any, common: dict[str, Any]) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        copy_side_files(self.policy.hf_dir, scratch / SIDE_FILES, chat_template=self.policy.options.chat_template)
        texts = {
            CONFIG_FILE: self.options.resolved,
            TRAINING_FILE: json.dumps(training, indent=1) + "\n",
            RANDOM_STATES: random_states_to_json(random_states),
        }
        contents = {name: text.encode() for name, text in texts.items()} | {COMMON_FILE: torch_saved(common)}
        self._digests = {name: write_hashed(scratch / name, content) for name, content in contents.items()}

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(".step_*"):
            shutil.rmtree(path)

    def _is_written_everywhere(self) -> bool:
        assert self._pending is not None
        is_waiting = torch.tensor(0 if self._pending[1].is_written else 1, device=self.policy.platform.device)
        torch.distributed.all_reduce(is_waiting)
        return int(is_waiting) == 0

    def _complete(self) -> None:
        """Waits for the files of all ranks. Rank 0 then writes the metadata, renames the directory and removes the
        oldest checkpoints, except the best one."""
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
            if self.ranks.rank == 0:
                shutil.rmtree(save.directory, ignore_errors=True)
            raise
        self._settle(step)

    def _settle(self, step: int) -> None:
        """The checkpoint of ``step`` is complete: if it is the best one, the run says so. Others may have to go."""
        self._complete_step = step
        best, run_dir = self.best, self.directory.parent
        is_best = best is not None and best.publish(step)

        def settle() -> None:
            if best is not None and is_best:
                best.write(run_dir)
            remove_oldest(run_dir, number=self.options.keep_checkpoints, best=best)

        self._on_rank_zero("tidy", settle)

    def _publish(self, step: int, save: BackgroundSave, written: list[Written]) -> None:
        digests = save.finish(written)
        write_manifest(save.directory, known=self._digests | digests, is_known_synced=True)
        target = self.directory / step_name(step)
        if target.exists():
            # Nobody needs it: a run resumes from the newest intact checkpoint, so no intact one is ahead of this run.
            remove_checkpoint(target)
        os.rename(save.directory, target)
        # Makes sure that the rename itself reaches the disk.
        sync(self.directory)

    # Errors

    def _on_rank_zero(self, what: str, action: Callable[[], Any]) -> None:
        self._on_each_rank(what, lambda: action() if self.ranks.rank == 0 else None)

    def _on_each_rank(self, what: str, action: Callable[[], Any]) -> Any:
        """Runs ``on_every_rank``, and turns errors of the file system into one line for the user."""

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

        return on_every_rank(guarded, ranks=self.ranks)


def sharded_state(policy: Policy, *, is_loading: bool = False) -> dict[str, Any]:
    """This rank's part of weights and optimizer state, as megatron-core's sharded state; nothing is copied. All ranks
    together describe the same tensors in every layout.

    If the model has adapters, only the adapters are included; the other weights are those that the run started from.
    """
    policy.wait_for_parameters()
    state = model_sharded_state_dict(policy.chunks)
    has_optimizer_state = policy.options.optimizer.optimizer != "sgd"
    # ``agreed_steps`` is collective: a rank with nothing to train calls it, too.
    num_steps = agreed_steps(policy.optimizer) if has_optimizer_state else None
    if has_optimizer_state and not getattr(policy.optimizer, "is_stub_optimizer", False):
        state["optimizer"] = optimizer_sharded_state(
            policy.optimizer, dict(state), num_steps=num_steps, is_loading=is_loading
        )
    for part in [name for name in state if name.startswith("model")]:
        # Sharded objects are not needed: they are empty on plain torch layers, and on those of Transformer Engine they
        # hold the history of FP8 scales.
        state[part] = {
            name: value
            for name, value in state[part].items()
            if not isinstance(value, ShardedObject) and (policy.lora is None or is_adapter(name))
        }
    return state


@torch.no_grad()
def load_sharded_state(policy: Policy, checkpoint: Path) -> None:
    """Fills weights and optimizer from a checkpoint of any layout. Each data-parallel rank reads a part of it."""
    state = sharded_state(policy, is_loading=True)
    parts = [name for name in state if name.startswith("model")]
    shards = optimizer_shards(policy.optimizer, {name: state[name] for name in parts}) if "optimizer" in state else []

    def require_plain() -> None:
        require_plain_tensors(state, checkpoint)
        require_tensors(checkpoint, {key for part in shards for key in stored_keys(part)})

    on_every_rank(require_plain, ranks=policy.ranks)
    try:
        strategy = FullyParallelLoadStrategyWrapper(load_strategy(str(checkpoint)), policy.ranks.data_context)
        loaded: Any = dist_checkpointing.load(state, str(checkpoint), sharded_strategy=strategy)
    except (CheckpointingException, CheckpointException, OSError, *UNREADABLE) as error:
        raise UserError(f"--resume: {checkpoint} cannot be loaded: {error}") from error
    for chunk, name in zip(policy.bare_chunks, parts, strict=True):
        result = chunk.load_state_dict(loaded[name], strict=False)
        missing = [key for key in result.missing_keys if policy.lora is None or is_adapter(key)]
        lost = [key for key in missing if not key.endswith("_extra_state")] + result.unexpected_keys
        if lost:
            raise RuntimeError(f"parameters that the sharded state does not cover: {', '.join(lost)}")
    policy.vision.forget()
    optimizer = policy.optimizer

    def load_optimizer() -> None:
        # A rank that has nothing to train has no optimizer state.
        if "optimizer" in state:
            with _as_user_error(checkpoint / COMMON_FILE):
                load_optimizer_state(optimizer, loaded["optimizer"], shards=shards, checkpoint=checkpoint)

    on_every_rank(load_optimizer, ranks=policy.ranks)


def _read_training_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / TRAINING_FILE
    with _as_user_error(path):
        state = json.loads(path.read_text(encoding="utf-8"))
        missing = {"step", "layout", "scheduler_steps", "sources"} - state.keys()
        if missing:
            raise UserError(f"--resume: {path} lacks {', '.join(sorted(missing))}")
        if int(state.get("version", 1)) > FORMAT_VERSION:
            raise UserError(f"--resume: {path} was written by a later version of this program")
    return state


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turns errors of reading ``path`` into ``UserError``. A file that matches its checksum may still hold anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {path} does not hold what a run writes there: {error!r}") from error


def _require_shared(scratch: Path) -> None:
    if not scratch.is_dir():
        raise UserError(f"--run-dir: {scratch} is not seen by every rank; it must be on a shared file system")


def _raise_error(error: Exception | None) -> None:
    if error is not None:
        raise error
