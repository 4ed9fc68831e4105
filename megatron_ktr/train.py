"""Entry point of training: ``torchrun ... -m megatron_ktr.train --config FILE [flags]``.

Parses the config, starts platform and process groups, builds policy, objective and source of groups, runs the
steps, and ends with a Hugging Face export that vLLM and transformers load. A run that receives SIGUSR1 or SIGTERM
saves a checkpoint after the current step instead and exits with code 75 (``run/interruption.py``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_ktr.config import Config, load_config, policy_gradient_rules
from megatron_ktr.config.part_options import (
    CheckpointOptions,
    EvaluationTimes,
    PolicyOptions,
    StepOptions,
)
from megatron_ktr.config.run_length import length_line, num_steps_of, with_steps
from megatron_ktr.config.schedule import schedule_length
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.source import DatasetSource
from megatron_ktr.data.template import check_vocabulary, load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed import platform as platforms
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import (
    ParallelGroups,
    ParallelSizes,
    destroy_parallel,
    init_parallel,
    world_size_from_environment,
)
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.distributed.shared_verification import SharedVerification
from megatron_ktr.errors import UserError, run_cli, same_on_every_rank, told_to_every_rank
from megatron_ktr.evaluation.training.build import RunSets, sets_to_make_up_for
from megatron_ktr.evaluation.training.dry_run import find_held_out
from megatron_ktr.files.checksums import require_intact
from megatron_ktr.loop import run_steps
from megatron_ktr.objectives import Objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.build import (
    build_local_source,
    build_sampler,
    build_sampler_check,
    replica_source,
    require_same_questions,
)
from megatron_ktr.rollout.features import build_feature_sender
from megatron_ktr.run.checkpoint_state import require_same_data
from megatron_ktr.run.directory import (
    EXPORT,
    RunStart,
    check_run_directory,
    find_checkpoint,
    open_run_directory,
    remove_scratch,
)
from megatron_ktr.run.dry_run.command import dry_run
from megatron_ktr.run.finished import finished_line, write_finished
from megatron_ktr.run.interruption import LEAVE_SIGNALS, LeaveRequest
from megatron_ktr.run.lease import Lease, acquire, patience_of_launch
from megatron_ktr.run.preflight import check_files, check_layout, restart_notes
from megatron_ktr.terminal import log_to_errors
from megatron_ktr.trainer import Trainer
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec


def train(config: Config) -> int:
    """Trains; every rank calls it. Returns the exit code: 0, also of a run that was finished already, ``EXIT_SAVED`` if
    the run was asked to leave early, or ``EXIT_ALARM`` if a guard has ended it."""
    with same_on_every_rank():
        # Before anything touches a device. The sizes need only config.json. All ranks together verify the model's other
        # files below.
        require_intact(config.model.model, option="--model", names=("config.json",))
        world_size = world_size_from_environment()
        sizes, objective = check_files(config, world_size=world_size)
    platform = platforms.start(config.trainer.platform)
    with same_on_every_rank():  # what only the platform knows: kernels and precisions
        check_layout(config, Qwen2_5_VLConfig.from_hf(config.model.model), world_size=world_size)
    # Plain SGD below fp32 has state that no checkpoint holds (config/checks.py). Such a run cannot save, so signals end
    # it as they end any process.
    can_save = config.optimizer.optimizer != "sgd" or config.model.params_dtype == "fp32"
    with LeaveRequest(LEAVE_SIGNALS if can_save else (), device=platform.device) as leave:
        with contextlib.ExitStack() as at_end:
            return _train(config, sizes=sizes, objective=objective, platform=platform, leave=leave, at_end=at_end)


def _train(
    config: Config,
    *,
    sizes: ParallelSizes,
    objective: Objective,
    platform: Platform,
    leave: LeaveRequest,
    at_end: contextlib.ExitStack,
) -> int:
    with same_on_every_rank():
        model_config = Qwen2_5_VLConfig.from_hf(config.model.model)
    ranks = _join(config, sizes=sizes, platform=platform)
    shared = SharedVerification(ranks)
    if _is_finished(config, ranks=ranks, at_end=at_end):
        return 0
    shared.require_intact(Path(config.model.model), option="--model")
    vocab_size = model_config.text.vocab_size
    tokenizer = on_every_rank(
        lambda: load_tokenizer(config.model.model, chat_template=config.data.chat_template), ranks=ranks
    )
    with same_on_every_rank():
        check_vocabulary(tokenizer, vocab_size=vocab_size)
    local_source = on_every_rank(
        lambda: build_local_source(config, ranks=ranks, tokenizer=tokenizer, vocab_size=vocab_size), ranks=ranks
    )
    require_same_questions(local_source, ranks=ranks)
    given, config = config, _with_steps(config, local_source, ranks)
    if config is not given and _is_finished(config, ranks=ranks, at_end=at_end):
        return 0
    held_out = RunSets.read(config, ranks=ranks, tokenizer=tokenizer)
    notes = [] if local_source is None else [f"wording: {line}" for line in local_source.dataset.wordings]
    notes += held_out.lines
    notes += [f"objective: {line}" for line in policy_gradient_rules.notes(config)]
    notes += restart_notes(resumes=config.trainer.resume or config.trainer.auto_resume)
    lease = _take_lease(config, ranks=ranks, at_end=at_end)
    start = _open_run_directory(
        given, ranks, local_source, num_steps=num_steps_of(config.trainer), notes=notes, held_out=held_out
    )
    trainer = build_trainer(
        config, ranks=ranks, platform=platform, objective=objective, tokenizer=tokenizer, local_source=local_source
    )
    # The source is closed also when a step fails: an engine may hold processes and devices that outlive this process.
    with contextlib.closing(trainer.source):
        end = run_steps(
            trainer,
            start=replace(start, lease=lease),
            resilience=config.resilience,
            checkpointing=CheckpointOptions.of(config),
            tokenizer=tokenizer,
            evaluations=held_out.evaluations(config, trainer=trainer, tokenizer=tokenizer),
            times=EvaluationTimes.of(config, num_steps=num_steps_of(config.trainer)),
            leave=leave,
        )
    if not end.code:
        _finish(trainer.policy, start.run_dir, step=num_steps_of(config.trainer), unsaved=end.unsaved)
    return end.code


def _is_finished(config: Config, *, ranks: ParallelGroups, at_end: contextlib.ExitStack) -> bool:
    """Whether the run that ``config`` resumes has nothing left to do, which rank 0 then says. Collective."""
    shared = SharedVerification(ranks)
    line = finished_line(
        config,
        verify=shared.find_damage,
        agree=shared.agree,
        lacking_sets=partial(sets_to_make_up_for, config=config, ranks=ranks),
    )
    if line is None:
        return False
    _take_lease(config, ranks=ranks, at_end=at_end)
    shared.agree(lambda: remove_scratch(Path(config.trainer.run_dir)))  # what the part before could not remove
    if ranks.rank == 0:
        print(line, flush=True)
    return True


def _finish(policy: Policy, run_dir: Path, *, step: int, unsaved: UserError | None) -> None:
    """Exports the trained model, and notes that the run, of ``step`` steps, is finished.

    Raises:
        UserError: on every rank, if the checkpoint of the last step is ``unsaved``. The export is there then.
    """
    export = run_dir / EXPORT
    policy.save_hf(export)
    if policy.ranks.rank == 0:
        print(f"exported the trained model to {export}", flush=True)
    if unsaved is not None:
        with told_to_every_rank():
            raise UserError(
                f"the trained model is in {export}, but the checkpoint of the last step is missing: {unsaved}"
            ) from unsaved
    if policy.ranks.rank == 0:
        write_finished(run_dir, step=step)


def _join(config: Config, *, sizes: ParallelSizes, platform: Platform) -> ParallelGroups:
    ranks = init_parallel(
        sizes,
        platform=platform,
        seed=config.trainer.seed,
        timeout_minutes=config.trainer.distributed_timeout_minutes,
    )
    platform.seed(config.trainer.seed)
    return ranks


def _take_lease(config: Config, *, ranks: ParallelGroups, at_end: contextlib.ExitStack) -> Lease | None:
    """What keeps other runs out of the run directory, on rank 0; it is given back ``at_end``."""
    on_every_rank(lambda: check_run_directory(config), ranks=ranks)

    def acquire_on_rank_zero() -> Lease | None:
        if ranks.rank:
            return None
        return acquire(Path(config.trainer.run_dir), patience_seconds=patience_of_launch())

    lease = on_every_rank(acquire_on_rank_zero, ranks=ranks)
    if lease is not None:
        at_end.callback(lease.release)
    return lease


def _with_steps(config: Config, local_source: DatasetSource | None, ranks: ParallelGroups) -> Config:
    """``config`` with its length given in steps, the same on every rank. If the length was given in epochs, rank 0
    prints how many steps they are."""
    num_records = None if local_source is None else local_source.dataset.num_kept
    num_records = broadcast_object(num_records, group=ranks.world, source=0)
    if ranks.rank == 0 and (line := length_line(config, num_records=num_records)):
        print(line, flush=True)
    with same_on_every_rank():
        return with_steps(config, num_records=num_records)


def build_trainer(
    config: Config,
    *,
    ranks: ParallelGroups,
    platform: Platform,
    objective: Objective,
    tokenizer: Tokenizer,
    local_source: DatasetSource | None,
) -> Trainer:
    """Builds policy, sampler, sampler check and source, and connects them in a trainer. If building the sampler fails
    on one rank, every rank raises the error."""
    model_config = Qwen2_5_VLConfig.from_hf(config.model.model)
    media = media_spec(model_config, patchify=PreprocessSettings.from_model(config.model.model).patchify)
    sampler = on_every_rank(lambda: build_sampler(config, ranks=ranks, tokenizer=tokenizer, media=media), ranks=ranks)
    options = PolicyOptions.of(config)
    if config.data.chat_template is not None:
        options = replace(options, chat_template=tokenizer.chat_template)
    policy = Policy(
        config.model.model, options=options, ranks=ranks, platform=platform, num_steps=round(schedule_length(config))
    )
    if objective.needs_reference:
        policy.add_reference()
    source = replica_source(
        config,
        local_source,
        ranks=ranks,
        sampler=sampler,
        prepare=build_feature_sender(config.rollout, policy=policy, media=media),
    )
    trainer = Trainer(options=StepOptions.of(config), policy=policy, source=source, objective=objective, media=media)
    with same_on_every_rank():
        trainer.sampler_check = build_sampler_check(
            config, policy=policy, source=source, media=media, tokenizer=tokenizer, send_weights=trainer.send_weights
        )
    return trainer


def _open_run_directory(
    config: Config,
    ranks: ParallelGroups,
    local_source: DatasetSource | None,
    *,
    num_steps: int,
    notes: Sequence[str],
    held_out: RunSets,
) -> RunStart:
    """Rank 0, which reads questions, prints ``notes`` and writes them into the run directory. A run that is refused
    because its data have changed leaves the directory as it is."""
    shared = SharedVerification(ranks)
    with same_on_every_rank():
        checkpoint = find_checkpoint(config, verify=shared.verify, agree=shared.agree)

    def open_directory() -> RunStart:
        if checkpoint is not None:
            held_out.require_unchanged(config)
        if checkpoint is not None and local_source is not None:
            require_same_data(checkpoint, local_source, ranks=ranks)
        start = open_run_directory(config, checkpoint=checkpoint, num_steps=num_steps, notes=notes)
        held_out.write(start.run_dir)
        return start

    start = shared.agree(open_directory)
    if ranks.rank == 0 and notes:
        print("\n".join(notes), flush=True)
    return start


def main(argv: Sequence[str] | None = None) -> int:
    log_to_errors()
    with same_on_every_rank():
        config = load_config(sys.argv[1:] if argv is None else argv)
        if config.trainer.dry_run:
            print(dry_run(config, find_held_out=find_held_out), flush=True)
            return 0
    code = train(config)
    destroy_parallel()
    return code


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
