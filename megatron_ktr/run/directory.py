"""The directory of one run, and how a stopped run is taken up again.

config.yaml                        the options the run started with
config_from_step_00000011.yaml     those of a part that was resumed at that step (the next such part: ..._2.yaml)
metrics.jsonl, tensorboard/        every step once
rollouts/step_00000010.jsonl       rollouts of some steps, with their key tokens
rollouts/step_00000010_replica_0001.jsonl  rollouts of further data-parallel replicas
rollouts/abandoned_after_step_00000010/    rollouts of later steps, which an earlier part did and a resumed part repeats
eval/step_00000010/                the answers of an evaluation between steps (docs/evaluation.md)
eval/step_00000010_2/              those to further sets, of which a resumed run made up for the evaluation
eval/settings.json                 what each set of held-out questions is, and how it is asked
eval/abandoned_after_step_00000010/    evaluations of later steps, as with rollouts; likewise in exports/
status/rank_00000.json             where each rank is, replaced every few seconds (run/status/heartbeat.py)
profile/rank_0.json                some steps as a Chrome trace (--profile-steps)
best.json                          the checkpoint that --keep-best keeps
checkpoints/step_00000010/         a complete checkpoint: the name appears by a rename, after everything is written
checkpoints/damaged_step_00000030/ a checkpoint whose files have changed since; a run set it aside and used an older one
checkpoints/.step_00000020         a checkpoint that was being written when the run stopped; ignored and later removed
exports/step_00000010/             the model of that step in Hugging Face format, with --export-interval
events.jsonl                       what went wrong and was survived (``incidents.py``)
finished.json                      the last step, which is done, and a checksum of its export (``finished.py``)
lease.json                         the run that is at work here now (``lease.py``)
export/                            the trained model in Hugging Face format
.export.partial-4711/              one that was being written when the run stopped; removed when the run is resumed
export_until_step_00000020/        the export of an earlier part, which ended at that step
abandoned_start/                   files of a start that came to no checkpoint, set aside when --auto-resume began anew;
                                   what no run writes stays where it is

A resumed run overwrites no file of an earlier part; a file that is in its way is renamed. The one exception is the file
of metrics: it is replaced as a whole, without the steps that are done again, so that every step appears once.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from megatron_ktr.config import OPTIONS, Config, read_saved, save_resolved
from megatron_ktr.errors import UserError, unreadable
from megatron_ktr.files.bounded import MOST_OPTIONS_BYTES, read_text
from megatron_ktr.files.intact_checkpoint import (
    CONFIG_FILE,
    Verify,
    checkpoint_damage,
    newest_intact,
    rename_path,
    set_aside,
    unused_path,
)
from megatron_ktr.files.json_files import read_json
from megatron_ktr.files.listing import paths_in
from megatron_ktr.run.lease import FILE as LEASE_FILE
from megatron_ktr.run.lease import Lease
from megatron_ktr.run.metrics import read_records

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
EVALUATIONS = "eval"
SIDE_FILES = "hf"
ROLLOUTS = "rollouts"
EXPORTS = "exports"
EXPORT = "export"
FINISHED_FILE = "finished.json"
ABANDONED_START = "abandoned_start"
STEP_NAME = re.compile(r"step_(\d{8,})")
STEP_ENTRY = re.compile(r"step_(\d{8,})(?:_replica_\d{4,}|_\d+)?(?:\.jsonl)?")
"""A file of rollouts, or a directory of an evaluation or an export."""

_FILES = r"config(_from_step_\d{8,}(_\d+)?)?\.yaml|(metrics|events)\.jsonl|(best|finished|wandb)\.json|" + re.escape(
    LEASE_FILE
)
_FOLDERS = (
    r"tensorboard|rollouts|eval|status|profile|checkpoints|exports|export(_until_step_\d{8,}(_\d+)?)?|dumps|hangs|"
    "wandb|server_weights"
)
RUN_ENTRY = re.compile(f"{_FILES}|{_FOLDERS}")
"""What a run writes at the top of its directory. Anything else there is the user's, and stays as it is."""

SCRATCH_FILE = re.compile(rf"\.({_FILES})\.(\d+|[0-9a-f]{{32}})")
"""What ``files/atomic.py`` and ``lease.py`` call a file before it has its name."""

MAY_CHANGE = frozenset(
    "model transformer_impl gradient_accumulation_fusion "
    "data_path media_root prompt_template chat_template record_store_dir max_skip_share media_cache_gb replay_path "
    "frame_cache_dir frame_cache_gb data_workers prefetch_steps data_timeout_seconds data_worker_memory_gb "
    "run_dir resume auto_resume train_steps train_epochs micro_batch_groups save_interval keep_checkpoints "
    "eval_interval log_interval rollout_log_interval platform distributed_timeout_minutes rollout_tensor_parallel_size "
    "dry_run dry_run_gpus dry_run_gpu_memory_gb "
    "rollout_memory_share rollout_kv_cache_gb rollout_max_num_seqs rollout_eager offload_during_rollout "
    "eval_data eval_loss_data eval_media_root eval_benchmark eval_benchmark_root eval_at_start eval_frames "
    "server_urls server_max_requests server_timeout_seconds server_max_retries server_wait_minutes server_token_env "
    "server_token_file weight_transfer weight_directory check_sampler sampler_gap_limit judge_url judge_key_env "
    "judge_retries judge_concurrency reward_workers reward_worker_memory_gb reward_timeout "
    "eval_max_items eval_max_tokens eval_temperature keep_best "
    "keep_every export_interval save_failure max_skipped_in_a_row alarm_action alarm_window alarm_grad_norm "
    "alarm_reward_drop alarm_entropy alarm_length alarm_kl replica_check_interval hang_timeout_minutes "
    "heartbeat_seconds metrics_port metrics_host wandb_project profile_steps".split()
)
"""The options that a resumed run may change, besides the parallel ones: where things are, how long and how fast it
runs, what is watched, and evaluation, which changes nothing in training. (A set of held-out questions must stay what it
was as long as it has the same name; ``evaluation/training/same_sets.py`` sees to that.) A change of any other option
would make it another run and is refused. A new option is refused until it is listed here."""


@dataclass(frozen=True)
class RunStart:
    """Where a run begins."""

    run_dir: Path
    checkpoint: Path | None = None
    """The checkpoint to continue from; None for a new run."""
    step: int = 0
    """The last step that is done already."""
    lease: Lease | None = None
    """What keeps other runs out of the directory; only rank 0 of ``train.py`` holds one."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def rollout_file(run_dir: Path, *, step: int, replica: int) -> Path:
    """Where data-parallel replica ``replica`` writes its rollouts of ``step``."""
    suffix = f"_replica_{replica:04d}" if replica else ""
    return run_dir / ROLLOUTS / f"{step_name(step)}{suffix}.jsonl"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, oldest first. ``files/intact_checkpoint.py`` tells which are intact.

    Raises:
        UserError: the directory of checkpoints cannot be listed: a run that takes it for empty begins anew.
            ``TransientError`` where that may pass.
    """
    found = []
    for path in paths_in(run_dir / CHECKPOINTS, "step_*"):
        match = STEP_NAME.fullmatch(path.name)
        if match and _is_directory(path):
            found.append((int(match[1]), path))
    return sorted(found)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error


class Agree(Protocol):
    """Runs an action on one rank and gives every rank its result or its error."""

    def __call__(self, action: Callable[[], T], /) -> T: ...


def _alone(action: Callable[[], T], /) -> T:
    return action()


def check_run_directory(config: Config) -> None:
    """Raises ``UserError`` if a run cannot begin in ``trainer.run_dir``: it is a file, it is not empty and the run is
    not resumed, or there is nothing to resume. Nothing is changed; which checkpoints are intact is not looked at."""
    trainer = config.trainer
    run_dir = Path(trainer.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file, expected a directory")
    if (trainer.resume or trainer.auto_resume) and list_checkpoints(run_dir):
        return
    if trainer.resume:
        raise _nothing_to_resume(run_dir)
    is_used = run_dir.exists() and any(path.name != LEASE_FILE for path in run_dir.iterdir())
    if is_used and not (trainer.auto_resume and _is_own_start(run_dir)):
        raise UserError(
            f"--run-dir {run_dir} is not empty: choose another, or continue that run with --auto-resume or --resume"
        )


def _nothing_to_resume(run_dir: Path) -> UserError:
    return UserError(f"--resume: no complete checkpoint in {run_dir / CHECKPOINTS} (is --run-dir right?)")


def find_checkpoint(
    config: Config,
    *,
    verify: Verify = checkpoint_damage,
    agree: Agree = _alone,
) -> Path | None:
    """The newest intact checkpoint of the run that ``config`` continues; None for a new run.

    With several ranks, ``verify`` and ``agree`` are those of ``distributed/shared_verification.py``; ``agree`` runs an
    action on one rank.

    Raises:
        UserError: there is nothing to resume, or no checkpoint is intact.
    """
    trainer = config.trainer
    run_dir = Path(trainer.run_dir)
    if not (trainer.resume or trainer.auto_resume):
        return None
    checkpoints = agree(lambda: [path for _, path in list_checkpoints(run_dir)])
    if not checkpoints and trainer.resume:
        raise _nothing_to_resume(run_dir)
    verdict = newest_intact(checkpoints, verify=verify)
    agree(lambda: set_aside(verdict))
    return verdict.intact


def open_run_directory(
    config: Config, *, checkpoint: Path | None = None, num_steps: int | None = None, notes: Sequence[str] = ()
) -> RunStart:
    """Creates ``trainer.run_dir`` for a new run, or prepares it for a run that continues from ``checkpoint``; saves the
    resolved config in it. By default ``checkpoint`` is what ``find_checkpoint`` finds.

    With ``auto_resume`` the run continues if there is a checkpoint, and is new otherwise; files of an earlier start
    without a checkpoint are then moved aside. ``num_steps`` is the length of a run with ``train_epochs``, in steps; it
    is None if the config has ``train_steps``. ``notes`` are written with the config (``save_resolved``).

    Raises:
        UserError: the directory is not empty and the run is not resumed, there is nothing to resume, an option that a
            resumed run cannot change has changed, or the directory cannot be written.
    """
    run_dir = Path(config.trainer.run_dir)
    checkpoint = checkpoint or (find_checkpoint(config) if run_dir.is_dir() else None)
    if checkpoint is not None:
        return _resume(config, run_dir, checkpoint, num_steps=num_steps, notes=notes)
    check_run_directory(config)
    if config.trainer.auto_resume and run_dir.is_dir() and _is_own_start(run_dir):
        _set_aside_start(run_dir)
        save_resolved(config, run_dir / CONFIG_FILE, notes=notes)
        return RunStart(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be created: {error.strerror}") from error
    save_resolved(config, run_dir / CONFIG_FILE, notes=notes)
    return RunStart(run_dir)


def _resume(
    config: Config, run_dir: Path, checkpoint: Path, *, num_steps: int | None, notes: Sequence[str]
) -> RunStart:
    step = step_of(checkpoint)
    check_same_run(config, checkpoint)
    trainer = config.trainer
    length = f"--train-steps {trainer.train_steps}"
    if trainer.train_epochs is not None:
        length = f"--train-epochs {trainer.train_epochs:g}, {num_steps} steps"
    last = trainer.train_steps or num_steps
    if last is not None and step > last:
        raise UserError(f"{length}: the run is at step {step} already ({checkpoint}); raise it")
    remove_scratch(run_dir)
    # The export was made after the last step that is recorded. That is a later one where its checkpoint is damaged.
    _set_aside_export(run_dir / EXPORT, max([step, *(record["step"] for record in read_records(run_dir))]))
    for folder in (ROLLOUTS, EVALUATIONS, EXPORTS):
        _set_aside_later(run_dir / folder, step)
    save_resolved(config, unused_path(run_dir / f"config_from_{step_name(step + 1)}.yaml"), notes=notes)
    return RunStart(run_dir, checkpoint, step)


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises ``UserError`` naming the first option by which ``config`` is not a continuation of ``checkpoint``."""
    require_same_options(config, checkpoint / CONFIG_FILE)
    ours = Path(config.model.model) / "config.json"
    if read_json(ours) != read_json(checkpoint / SIDE_FILES / "config.json"):
        raise UserError(f"--resume: {ours} differs from the one of the model in {checkpoint}")


def require_same_options(config: Config, saved_config: Path) -> None:
    """Raises ``UserError`` naming the first option that a resumed run may not change and that ``config`` has changed
    since ``saved_config`` was written."""
    saved, current = _flat(read_saved(saved_config)), _flat(config)
    for name, option in OPTIONS.items():
        if name not in MAY_CHANGE and option.section != "parallel" and saved[name] != current[name]:
            raise UserError(
                f"--resume: {option.flag} was {_show(saved[name])} when {saved_config.parent} was saved, now it is "
                f"{_show(current[name])}; a resumed run cannot change it"
            )


def _flat(config: Config) -> dict[str, Any]:
    return {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}


def _show(value: Any) -> str:
    return ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def remove_scratch(run_dir: Path) -> None:
    """Removes what an earlier part of the run had begun to write when it died: unfinished checkpoints and exports,
    which nothing reads. The caller holds the lease of the directory."""
    for pattern in (f"{CHECKPOINTS}/.step_*", f"{EXPORTS}/.step_*.partial-*", ".export.partial-*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in run_dir.glob(".*"):
        if SCRATCH_FILE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _set_aside_export(export: Path, step: int) -> None:
    """Renames the export of an earlier part, because the run will export again."""
    if export.exists():
        rename_path(export, unused_path(export.with_name(f"{export.name}_until_{step_name(step)}")))
    (export.parent / FINISHED_FILE).unlink(missing_ok=True)  # it speaks of that export


def _is_own_start(run_dir: Path) -> bool:
    """Whether a run of ours has begun here: it has left its ``config.yaml``, or died while it wrote that and has left
    no other file than such a run does. A user's own ``config.yaml`` is not taken for that of a run."""
    if (run_dir / CONFIG_FILE).is_file():
        return _is_saved_by_run(run_dir / CONFIG_FILE)
    return all(
        path.name.startswith((ABANDONED_START, LEASE_FILE))
        or (path.name.startswith(f".{CONFIG_FILE}.") and SCRATCH_FILE.fullmatch(path.name))
        for path in run_dir.iterdir()
    )


def _is_saved_by_run(path: Path) -> bool:
    """Whether ``save_resolved`` wrote the file: it names every option, also two of which a user gives one at most."""
    try:
        content = yaml.safe_load(read_text(path, most_bytes=MOST_OPTIONS_BYTES))
    except OSError as error:
        raise unreadable(path, error, option="--run-dir") from error
    except (yaml.YAMLError, UserError, ValueError, RecursionError):
        return False
    trainer = content.get("trainer") if isinstance(content, dict) else None
    return isinstance(trainer, dict) and trainer.keys() >= {"run_dir", "resume", "auto_resume"}


def _set_aside_start(run_dir: Path) -> None:
    """Moves the files of a start without a checkpoint aside. The caller knows that a run has begun here
    (``_is_own_start``); what no run writes stays, since a user may have put it there."""
    remove_scratch(run_dir)
    left = [path for path in sorted(run_dir.iterdir()) if RUN_ENTRY.fullmatch(path.name) and path.name != LEASE_FILE]
    # The mark of a run goes last: a start that dies between two moves is known as one.
    left.sort(key=lambda path: path.name == CONFIG_FILE)
    if left:
        _move_into(run_dir / ABANDONED_START, left)


def _set_aside_later(folder: Path, step: int) -> None:
    """Moves rollouts, evaluations or exports of steps after ``step`` aside. The resumed run does those steps again and
    may get different ones, while reports take everything in the folder for that of one run."""
    abandoned = [
        path
        for path in paths_in(folder, "step_*")
        if (match := STEP_ENTRY.fullmatch(path.name)) and int(match[1]) > step
    ]
    if abandoned:
        _move_into(folder / f"abandoned_after_{step_name(step)}", abandoned)


def _move_into(folder: Path, paths: Sequence[Path]) -> None:
    """Moves ``paths`` into a new directory called ``folder``, or into the next free name; nothing is overwritten."""
    folder = unused_path(folder)
    try:
        folder.mkdir()
    except OSError as error:
        raise UserError(f"--run-dir: cannot create {folder}: {error.strerror}") from error
    for path in paths:
        rename_path(path, folder / path.name)
