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

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.config.part_options import CheckpointOptions
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.checkpoint_writer import BackgroundSave, Written
from megatron_ktr.distributed.random_states import RANDOM_STATES, random_states_to_json, read_random_states
from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import Digest, sync, write_hashed, write_manifest
from megatron_ktr.files.hf_files import copy_side_files
from megatron_ktr.files.intact_checkpoint import CONFIG_FILE, TRAINING_FILE
from megatron_ktr.files.torch_dist_checks import COMMON_FILE
from megatron_ktr.files.torch_dist_files import torch_saved
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.step_source import ResumableSource
from megatron_ktr.run.checkpoint_state import (
    as_user_error,
    check_tensors,
    gather_random_states,
    layout_of,
    load_sharded_state,
    read_training_state,
    state_to_save,
    training_state,
)
from megatron_ktr.run.directory import CHECKPOINTS, SIDE_FILES, list_checkpoints, step_name
from megatron_ktr.run.kept import BestCheckpoint, remove_checkpoint, remove_oldest

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
        training = training_state(self.policy, self.source, step=step)
        random_states = gather_random_states(self.policy)
        sharded, common = state_to_save(self.policy)
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
        training = self._on_each_rank("read", lambda: read_training_state(checkpoint))
        with as_user_error(checkpoint / TRAINING_FILE):
            # The source comes before the weights, so that a checkpoint of other data is refused early.
            ranks = self.ranks
            position = reshard_states(training["sources"], rank=ranks.data_rank, size=ranks.data_size)
            self.source.load_state_dict(position)
        self._on_each_rank("read", lambda: check_tensors(self.policy, checkpoint))
        load_sharded_state(self.policy, checkpoint)
        scheduler = self.policy.scheduler
        scheduler.num_steps = 0
        scheduler.step(increment=training["scheduler_steps"])
        if training["layout"] == layout_of(self.policy):
            states = self._on_each_rank("read", lambda: read_random_states(checkpoint))
            self._on_each_rank("read", lambda: self._set_random_state(states, checkpoint / RANDOM_STATES))
        elif ranks.rank == 0:
            _log.info("the layout changed since %s was saved: random states start from the seed", checkpoint)
        self._complete_step = int(training["step"])
        return self._complete_step

    def _set_random_state(self, states: list[dict[str, Any]], path: Path) -> None:
        with as_user_error(path):
            try:
                self.policy.platform.set_rng_state(states[self.ranks.rank])
            except RuntimeError as error:  # torch raises it for a state of another length
                raise ValueError(str(error)) from error

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


def _require_shared(scratch: Path) -> None:
    if not scratch.is_dir():
        raise UserError(f"--run-dir: {scratch} is not seen by every rank; it must be on a shared file system")


def _raise_error(error: Exception | None) -> None:
    if error is not None:
        raise error
