"""The loop over the steps of a run: train, let hooks look, record, save, evaluate, and leave when asked to.

``train.py`` builds what this file connects. A run that receives SIGUSR1 or SIGTERM saves after the current step and
ends with code 75 (``run/interruption.py``); one that a hook ends with a reason (``run/hook.py``) has code 76.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ktr.config.part_options import (
    CheckpointOptions,
    EvaluationTimes,
)
from megatron_ktr.config.run_length import num_steps_of
from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import (
    ParallelGroups,
)
from megatron_ktr.errors import EXIT_ALARM, EXIT_SAVED, StepAbandoned, UserError, printable, same_on_every_rank
from megatron_ktr.evaluation.training.between_steps import BetweenSteps, StepEvaluation
from megatron_ktr.report.console import selected_tokens_text
from megatron_ktr.rollout.check.sampler import check_line
from megatron_ktr.rollout.replay import write_rollouts
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import ROLLOUTS, RunStart, rollout_file
from megatron_ktr.run.dumps import replay_obstacle
from megatron_ktr.run.hook import StateUnsoundError, StepHook, Stop, look_at, require_sound
from megatron_ktr.run.hooks import Watched, build_hooks, closing_all
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.interruption import LeaveRequest
from megatron_ktr.run.kept import open_best
from megatron_ktr.run.metrics import MetricsWriter, step_line
from megatron_ktr.run.optional_writes import OptionalWrites
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.trainer import Trainer


@dataclass(frozen=True)
class End:
    """How the steps of a run have ended; the same on every rank."""

    code: int
    """The exit code."""
    unsaved: UserError | None = None
    """Why the checkpoint of the last step, which was due, is missing or damaged; None if it is there."""


def run_steps(
    trainer: Trainer,
    *,
    start: RunStart,
    resilience: ResilienceSection,
    checkpointing: CheckpointOptions,
    tokenizer: Tokenizer,
    evaluations: Sequence[StepEvaluation],
    times: EvaluationTimes,
    leave: LeaveRequest,
) -> End:
    """Runs all steps, from the checkpoint that the run starts at (if any) to the last, and writes metrics, rollouts and
    checkpoints on the way.

    The exit code is 0 after the last step, 75 if the run was asked to leave before it, and 76 if a hook has ended it.
    In the last case the state is saved only if every hook calls it sound (``Stop.is_state_sound``).
    """
    ranks, run_dir = trainer.policy.ranks, start.run_dir
    best = open_best(run_dir, metric=checkpointing.keep_best, start_step=start.step, ranks=ranks)
    incidents = Incidents(run_dir if ranks.rank == 0 else None)
    checkpoints = Checkpoints(
        run_dir,
        policy=trainer.policy,
        source=trainer,
        options=checkpointing,
        best=best,
        incidents=incidents,
        lease=start.lease,
    )
    if start.checkpoint is not None:
        checkpoints.load(start.checkpoint)
        if ranks.rank == 0:
            print(f"continues after step {start.step}, from {start.checkpoint}", flush=True)
    optional = OptionalWrites(incidents)
    writer = MetricsWriter(run_dir if ranks.rank == 0 else None, first_step=start.step + 1, optional=optional)
    hooks = _hooks(trainer, start=start, resilience=resilience, incidents=incidents, resolved=checkpointing.resolved)
    writer.listeners += [hook.on_record for hook in hooks]
    checkpoints.before_save = partial(require_sound, hooks=hooks)
    between = BetweenSteps(
        evaluations, times=times, trainer=trainer, writer=writer, checkpoints=checkpoints, leave=leave
    )
    record = partial(
        _record, trainer=trainer, writer=writer, run_dir=run_dir, decode=tokenizer.decode, optional=optional
    )
    with contextlib.closing(writer), closing_all(hooks):
        try:
            code = _each_step(
                trainer,
                start=start,
                hooks=hooks,
                checkpoints=checkpoints,
                between=between,
                record=record,
                leave=leave,
            )
        except StateUnsoundError as error:
            code = _stop(checkpoints, step=error.step, stops=error.stops)
    return End(code, unsaved=None if code else checkpoints.missing(num_steps_of(trainer.options.trainer)))


def _each_step(
    trainer: Trainer,
    *,
    start: RunStart,
    hooks: Sequence[StepHook],
    checkpoints: Checkpoints,
    between: BetweenSteps,
    record: Callable[[StepReport], None],
    leave: LeaveRequest,
) -> int:
    """The steps after ``start`` to the last, and the evaluation before them. Returns the exit code."""
    done, first = start.step, start.step + 1
    try:
        if asked_by := between.at_start(start):
            return _leave(checkpoints, step=done, is_new=False, asked_by=asked_by)
        for step in range(first, num_steps_of(trainer.options.trainer) + 1):
            if asked_by := leave.agreed(trainer.policy.ranks.world):
                return _leave(checkpoints, step=done, is_new=done >= first, asked_by=asked_by)
            for hook in hooks:
                hook.before_step(step)
            report = trainer.train_step(step)
            done = step
            report.values.update(checkpoints.counts())
            stops = look_at(report, hooks=hooks)
            record(report)
            if stops:
                return _stop(checkpoints, step=step, stops=stops)
            checkpoints.after_step(step)
            if asked_by := between.after(step):
                return _leave(checkpoints, step=step, is_new=True, asked_by=asked_by)
    except StepAbandoned as error:
        return _abandon(checkpoints, step=done, is_new=leave.can_save and done >= first, error=error)
    checkpoints.close()
    return 0


def _hooks(
    trainer: Trainer, *, start: RunStart, resilience: ResilienceSection, incidents: Incidents, resolved: str
) -> list[StepHook]:
    return build_hooks(
        Watched(
            options=resilience,
            run_dir=start.run_dir,
            first_step=start.step + 1,
            num_steps=num_steps_of(trainer.options.trainer),
            policy=trainer.policy,
            timer=trainer.timer,
            incidents=incidents,
            distributed_timeout_minutes=trainer.options.trainer.distributed_timeout_minutes,
            resolved=resolved,
            replay_obstacle=replay_obstacle(trainer.objective, options=trainer.options),
            lease=start.lease,
        )
    )


def _record(
    report: StepReport,
    *,
    trainer: Trainer,
    writer: MetricsWriter,
    run_dir: Path,
    decode: Callable[[Sequence[int]], str],
    optional: OptionalWrites,
) -> None:
    """Writes the step's metrics, its line on the console and, where they are due, its rollouts. Collective."""
    options, ranks, step = trainer.options.trainer, trainer.policy.ranks, report.step
    num_steps = num_steps_of(options)
    writer.write(step, report.values)
    if ranks.rank == 0 and (line := check_line(report.values)):
        print(line, flush=True)
    is_last = step == num_steps
    if is_last:
        _ = report.selections  # rank 0 shows one, and gathering them is collective: every rank takes part
    if ranks.rank == 0 and (step % options.log_interval == 0 or is_last):
        _show(report, num_steps=num_steps, decode=decode)
    if _is_due(step, options.rollout_log_interval):
        try:
            _log_rollouts(report, run_dir=run_dir, ranks=ranks, with_shuffled=trainer.options.num_shuffled > 0)
        except UserError as error:  # on every rank
            optional.fail(ROLLOUTS, error, step=step)


def _leave(checkpoints: Checkpoints, *, step: int, is_new: bool, asked_by: str) -> int:
    """Saves the state after ``step``, unless this run has done no step yet. Returns the exit code."""
    if is_new:
        checkpoints.save_and_wait(step)
    checkpoints.close(is_verifying=False)
    if checkpoints.ranks.rank == 0:
        done = f"saved after step {step}" if is_new else "nothing to save yet"
        print(f"{asked_by}: {done}; continue with --resume (exit code {EXIT_SAVED})", flush=True)
    return EXIT_SAVED


def _abandon(checkpoints: Checkpoints, *, step: int, is_new: bool, error: StepAbandoned) -> int:
    """Ends a run whose servers are gone, or that was asked to leave while it waited for them, in a step or in an
    evaluation: the state after ``step`` is all there is to save. Returns the exit code of a run that was asked to
    leave, and raises the error otherwise."""
    if error.asked_by is not None:
        if checkpoints.ranks.rank == 0:
            print(f"what came after step {step} is given up: {printable(str(error))}", file=sys.stderr, flush=True)
        return _leave(checkpoints, step=step, is_new=is_new, asked_by=error.asked_by)
    if is_new:
        checkpoints.save_and_wait(step)
    checkpoints.close()
    done = f"saved after step {step}, continue with --resume" if is_new else "no new step to save"
    with same_on_every_rank():
        raise StepAbandoned(f"{error}; {done}") from error


def _stop(checkpoints: Checkpoints, *, step: int, stops: Sequence[Stop]) -> int:
    """Ends the run for the reasons of its hooks. Returns the exit code."""
    is_sound = all(stop.is_state_sound for stop in stops)
    if is_sound:
        checkpoints.save_and_wait(step)
    checkpoints.close(is_verifying=False)
    if checkpoints.ranks.rank == 0:
        done = f"saved after step {step}" if is_sound else f"not saved after step {step}, older checkpoints stay"
        reasons = "; ".join(stop.reason for stop in stops)
        print(f"error: {printable(reasons)}: {done} (exit code {EXIT_ALARM})", file=sys.stderr, flush=True)
    return EXIT_ALARM


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and (step == 1 or step % interval == 0)


def _log_rollouts(report: StepReport, *, run_dir: Path, ranks: ParallelGroups, with_shuffled: bool) -> None:
    """Writes the step's groups: the reading rank of each replica writes a file of its own. ``with_shuffled`` says that
    videos were asked twice."""
    selections = report.selections  # collective: every rank takes part

    def write() -> None:
        if ranks.is_source:
            path = rollout_file(run_dir, step=report.step, replica=ranks.data_rank)
            write_rollouts(path, report.groups, selections=selections, append=False, with_shuffled=with_shuffled)

    on_every_rank(write, ranks=ranks)


def _show(report: StepReport, *, num_steps: int, decode: Callable[[Sequence[int]], str]) -> None:
    """Prints the step's line and, on the last step, one response with its key tokens."""
    print(step_line(report.step, num_steps, report.values), flush=True)
    if report.step < num_steps or not report.selections:
        return
    group, selections = report.groups[0], report.selections[0]
    text = selected_tokens_text(group.rollouts[0], selections[0], decode=decode)
    reward = group.rollouts[0].reward
    print(f"problem {group.prompt.problem_id}, response 1 (reward {reward:g}), key tokens as [token|signals' letters]:")
    print(text, flush=True)
