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
directory (a shared file system). A complete checkpoint is then read again in the background; only when it is what was
written (it is verified) may it cost an older one its place (``kept.py``). Files may still be damaged later; they are
checked again before a checkpoint is used (``files/intact_checkpoint.py``).

A run that resumes in the layout that saved continues bit for bit. In another layout, weights, optimizer and schedule
are the same, data-parallel ranks divide the remaining data anew, and random states start from the seed. No part of a
training step depends on these random states: rollouts and shuffles are seeded by step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.config.part_options import CheckpointOptions
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.checkpoint_writer import BackgroundSave, Written
from megatron_ktr.distributed.random_states import RANDOM_STATES, random_states_to_json
from megatron_ktr.errors import TransientError, UserError
from megatron_ktr.files.background_check import BackgroundCheck
from megatron_ktr.files.checksums import Digest, sync, write_hashed, write_manifest
from megatron_ktr.files.hf_files import copy_side_files
from megatron_ktr.files.intact_checkpoint import CONFIG_FILE, TRAINING_FILE
from megatron_ktr.files.torch_dist_checks import COMMON_FILE
from megatron_ktr.files.torch_dist_files import torch_saved
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.step_source import ResumableSource
from megatron_ktr.run.checkpoint_actions import CheckpointActions
from megatron_ktr.run.checkpoint_state import gather_random_states, restore, state_to_save, training_state
from megatron_ktr.run.directory import CHECKPOINTS, SIDE_FILES, list_checkpoints, step_name
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.kept import BestCheckpoint, remove_checkpoint, steps_to_remove
from megatron_ktr.run.lease import Lease


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
        incidents: Incidents | None = None,
        lease: Lease | None = None,
    ) -> None:
        """``incidents`` takes note of saves that failed and of checkpoints that are damaged. With a ``lease``, nothing
        is written once another run has taken the run directory over; only rank 0 needs either."""
        self.directory = run_dir / CHECKPOINTS
        self.best = best
        self.options = options
        self.policy = policy
        self.source = source
        self.ranks = policy.ranks
        self.before_save: Callable[[int], None] = lambda step: None
        """Called with the step whose state is about to be saved; what it raises ends the save. Collective."""
        self.num_failures = 0
        """Checkpoints that could not be written, since the process began."""
        self.num_damaged = 0
        """Checkpoints that were not what had been written when they were read again."""
        self._incidents = incidents or Incidents(None)
        self._lease = lease
        self._actions = CheckpointActions(self.directory, ranks=self.ranks)
        self._pending: tuple[int, BackgroundSave] | None = None
        self._complete_step: int | None = None
        """The step of the newest complete checkpoint; None, too, if that is damaged or cannot be read again."""
        self._checks: list[tuple[int, BackgroundCheck]] = []
        """Complete checkpoints that are being read again, oldest first."""
        self._verified: set[int] = set()
        """The steps of checkpoints that are verified; the same on every rank."""
        self._failure: UserError | None = None
        """Why the newest save that came to nothing did; the same on every rank."""
        self._digests: dict[str, Digest] = {}
        """The checksums of the files that ``_prepare`` wrote, by name."""

    def counts(self) -> dict[str, float]:
        """The metrics of what went wrong so far; empty if nothing did."""
        found = {"save_failures": self.num_failures, "damaged_checkpoints": self.num_damaged}
        return {name: float(value) for name, value in found.items() if value}

    def missing(self, step: int) -> UserError | None:
        """Why there is no intact checkpoint of ``step``, the last one, after ``close``; None if there is one, or none
        was due."""
        is_there = self._complete_step == step
        return None if is_there or not self.options.save_interval else self._failure

    def after_step(self, step: int) -> None:
        """Completes the pending save if its files are written, and takes note of what was verified. Starts a save every
        ``save_interval`` steps and after the last step.

        Raises:
            UserError: on every rank, if a checkpoint cannot be written and ``save_failure`` is "stop".
        """
        if self._pending is not None and self._all_ranks(self._pending[1].is_written):
            self._finish_pending()
        self._conclude_checks()
        interval = self.options.save_interval
        if interval and (step % interval == 0 or step == self.options.num_steps):
            self._try_save(step)

    def after_evaluation(self, step: int) -> None:
        """Starts a save of ``step`` if it is the best one so far and is not saved yet."""
        if self.best is None or not self.best.is_candidate(step):
            return
        if step in self._verified:
            self._accept(step)
        elif step != self._complete_step and (self._pending is None or self._pending[0] != step):
            self._try_save(step)

    def save(self, step: int) -> None:
        """Starts a checkpoint of the state after ``step``. A checkpoint that is still being written is completed first.

        Raises:
            UserError: on every rank, if the disk is full or cannot be written; older checkpoints stay as they are.
        """
        self._finish_pending()
        self.before_save(step)
        scratch = self.directory / f".{step_name(step)}"
        training = training_state(self.policy, self.source, step=step)
        random_states = gather_random_states(self.policy)
        sharded, common = state_to_save(self.policy)
        what = f"save step {step} to"
        try:
            self._actions.on_rank_zero(what, lambda: self._prepare(scratch, training, random_states, common))
            self._actions.on_each_rank(what, lambda: _require_shared(scratch))
        except UserError:
            self._discard(scratch)
            raise
        self._pending = (step, BackgroundSave(sharded, scratch, data_group=self.ranks.data_context))

    def save_and_wait(self, step: int) -> None:
        """Saves the state after ``step`` and waits until the checkpoint is complete, even if no checkpoint is due.

        Raises:
            UserError: on every rank, if it cannot be written, whatever ``save_failure`` says: the run is about to end.
        """
        self._conclude_checks()
        if step == self._complete_step:
            return
        if self._pending is None or self._pending[0] != step:
            self.save(step)
        self._complete()

    def close(self, *, is_verifying: bool = True) -> None:
        """Completes the pending checkpoint, if any, and waits until every checkpoint is verified. Without
        ``is_verifying`` it does not wait for that: nothing is removed, and a resumed run verifies what it uses."""
        self._finish_pending()
        if is_verifying:
            self._conclude_checks(is_waiting=True)

    def load(self, checkpoint: Path) -> int:
        """Restores everything from an intact checkpoint, saved in any layout; returns its step.

        Raises:
            UserError: the checkpoint is of another model or of other data, or holds something else than a run writes.
        """
        step = self._complete_step = restore(checkpoint, policy=self.policy, source=self.source, actions=self._actions)
        self._verified.add(step)
        return step

    # Files

    def _prepare(self, scratch: Path, training: dict[str, Any], random_states: Any, common: dict[str, Any]) -> None:
        self._require_lease()
        for left in self.directory.glob(".step_*"):  # also of a save that failed, and could not be removed then
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir(parents=True)
        copy_side_files(self.policy.hf_dir, scratch / SIDE_FILES, chat_template=self.policy.options.chat_template)
        texts = {
            CONFIG_FILE: self.options.resolved,
            TRAINING_FILE: json.dumps(training, indent=1) + "\n",
            RANDOM_STATES: random_states_to_json(random_states),
        }
        contents = {name: text.encode() for name, text in texts.items()} | {COMMON_FILE: torch_saved(common)}
        self._digests = {name: write_hashed(scratch / name, content) for name, content in contents.items()}

    def _all_ranks(self, is_so: bool) -> bool:
        is_not = torch.tensor(0 if is_so else 1, device=self.policy.platform.device)
        torch.distributed.all_reduce(is_not)
        return int(is_not) == 0

    def _try_save(self, step: int) -> None:
        try:
            self.save(step)
        except UserError as error:
            self._take_failure(step, error)

    def _finish_pending(self) -> None:
        step = None if self._pending is None else self._pending[0]
        try:
            self._complete()
        except UserError as error:
            self._take_failure(step, error)

    def _take_failure(self, step: int | None, error: UserError) -> None:
        """A checkpoint could not be written: the run ends, or remembers it and tries again when the next one is due."""
        if self.options.save_failure == "stop":
            raise error
        self._actions.on_rank_zero("look after", self._require_lease)  # who has lost it does not go on
        self.num_failures += 1
        self._failure = error
        if self.best is not None and step is not None:
            self.best.drop(step)  # or no later step could be the best one that is worse than this one
        self._incidents.add("save_failure", str(error), step=step)

    def _complete(self) -> None:
        """Waits for the files of all ranks. Rank 0 then writes the metadata and renames the directory, and all ranks
        begin to read it again."""
        if self._pending is None:
            return
        (step, save), self._pending = self._pending, None
        save.wait()
        what = f"save step {step} to"
        try:
            self._actions.on_each_rank(what, lambda: _raise_error(save.error))
            results = save.gather_results()
            self._actions.on_rank_zero(what, lambda: self._publish(step, save, results))
        except UserError:
            self._discard(save.directory)
            raise
        self._complete_step = step
        share = dict(share=self.ranks.rank, num_shares=self.ranks.world_size)
        self._checks.append((step, BackgroundCheck(self.directory / step_name(step), **share)))

    def _discard(self, scratch: Path) -> None:
        if self.ranks.rank == 0 and (self._lease is None or self._lease.is_held()):
            shutil.rmtree(scratch, ignore_errors=True)

    def _conclude_checks(self, *, is_waiting: bool = False) -> None:
        """Takes note of the checkpoints that all ranks have read again."""
        while self._checks:
            step, check = self._checks[0]
            if is_waiting:
                check.wait()
            elif not self._all_ranks(check.is_done):
                return
            del self._checks[0]
            results = gather_objects(check.result, group=self.ranks.world)
            damage = [one for result in results for one in result.damage]
            failed = [result for result in results if result.error is not None]
            if not damage and not failed:
                self._accept(step)
                if self.ranks.rank == 0:
                    print(f"saved and verified {self.directory / step_name(step)}", flush=True)
                continue
            if self.best is not None:
                self.best.drop(step)
            if step == self._complete_step:
                self._complete_step = None  # a run that leaves now saves the step again
            self.num_damaged += bool(damage)
            what = f"is damaged: {damage[0]}" if damage else f"could not be verified: {failed[0].error}"
            text = f"checkpoint {step_name(step)} {what}; older checkpoints stay"
            # What is saved anew instead of a damaged one may be intact.
            may_pass = bool(damage) or all(one.may_pass for one in failed)
            self._failure = TransientError(text) if may_pass else UserError(text)
            if damage:
                self._incidents.add("damaged_checkpoint", text, step=step)
            else:
                self._incidents.add("unverified_checkpoint", text, step=step)

    def _accept(self, step: int) -> None:
        """The checkpoint of ``step`` is verified: if it is the best one, the run says so. Others may have to go."""
        self._verified.add(step)
        best, run_dir = self.best, self.directory.parent
        if best is not None:
            best.publish(step)

        def settle() -> None:
            self._require_lease()
            failure = None
            if best is not None and best.named != best.kept:
                try:
                    best.write(run_dir)
                except UserError as error:  # what goes may be what makes room for it
                    failure = error
            found = dict(list_checkpoints(run_dir))
            for old in steps_to_remove(
                list(found),
                verified=self._verified,
                number=self.options.keep_checkpoints,
                keep_every=self.options.keep_every,
                best=() if best is None else best.steps,
            ):
                remove_checkpoint(found[old])
            if failure is not None:
                raise failure

        try:
            self._actions.on_rank_zero("tidy", settle)
        except UserError as error:
            self._take_failure(step, error)

    def _require_lease(self) -> None:
        if self._lease is not None:
            self._lease.require_held()

    def _publish(self, step: int, save: BackgroundSave, written: list[Written]) -> None:
        self._require_lease()
        digests = save.finish(written)
        write_manifest(save.directory, known=self._digests | digests, is_known_synced=True)
        target = self.directory / step_name(step)
        if target.exists():
            # Nobody needs it: a run resumes from the newest intact checkpoint, so no intact one is ahead of this run.
            remove_checkpoint(target)
        os.rename(save.directory, target)
        # Makes sure that the rename itself reaches the disk.
        sync(self.directory)


def _require_shared(scratch: Path) -> None:
    if not scratch.is_dir():
        raise UserError(f"--run-dir: {scratch} is not seen by every rank; it must be on a shared file system")


def _raise_error(error: Exception | None) -> None:
    if error is not None:
        raise error
