"""The directory of one run, and how a stopped run is taken up again; nothing of an earlier part is overwritten.

config.yaml                        the options the run started with
config_from_step_00000011.yaml     those of a part that was resumed at that step
metrics.jsonl, tensorboard/        every step once
checkpoints/step_00000010/         a complete checkpoint: the name appears by a rename, after everything is written
checkpoints/.step_00000020         one that was being written when the run stopped; ignored, later removed
export/                            the trained model in Hugging Face format
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.config import OPTIONS, Config, load_config, save_resolved
from megatron_ktr.errors import UserError

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
SIDE_FILES = "hf"
STEP_NAME = re.compile(r"step_(\d{8,})")
REQUIRED_FILES = ("metadata.json", ".metadata", "common.pt", "training.json", CONFIG_FILE)

MAY_CHANGE = frozenset(
    "model transformer_impl data_path media_root prompt_template max_skip_share media_cache_gb replay_path "
    "run_dir resume train_steps micro_batch_groups save_interval keep_checkpoints eval_interval log_interval "
    "rollout_log_interval platform distributed_timeout_minutes".split()
)
"""Options a resumed run may set anew, besides the parallel ones: where things are, how long and how fast it runs.
Whatever else differs would make it another run; an option added later is refused until it is named here."""


@dataclass(frozen=True)
class RunStart:
    """Where a run begins."""

    run_dir: Path
    checkpoint: Path | None = None
    """The one to continue from; None: a new run."""
    step: int = 0
    """The last step done."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, oldest first."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        match = STEP_NAME.fullmatch(path.name)
        if match and all((path / name).is_file() for name in REQUIRED_FILES):
            found.append((int(match[1]), path))
    return sorted(found)


def open_run_directory(config: Config) -> RunStart:
    """Creates ``trainer.run_dir`` and saves the resolved config in it; with ``resume``, finds where to go on.

    Raises UserError if it holds anything and the run is not a resumed one, if there is nothing to resume, if an option
    that makes the run what it is has changed, or if it cannot be written.
    """
    run_dir = Path(config.trainer.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file, expected a directory")
    if config.trainer.resume:
        return _resume(config, run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--run-dir {run_dir} is not empty: choose another, or continue that run with --resume")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be created: {error.strerror}") from error
    save_resolved(config, run_dir / CONFIG_FILE)
    return RunStart(run_dir)


def _resume(config: Config, run_dir: Path) -> RunStart:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"--resume: no complete checkpoint in {run_dir / CHECKPOINTS} (is --run-dir right?)")
    step, checkpoint = checkpoints[-1]
    check_same_run(config, checkpoint)
    if step > config.trainer.train_steps:
        raise UserError(
            f"--train-steps {config.trainer.train_steps}: the run is at step {step} already ({checkpoint}); raise it"
        )
    save_resolved(config, run_dir / f"config_from_{step_name(step + 1)}.yaml")
    _set_aside(run_dir / "export", step)
    return RunStart(run_dir, checkpoint, step)


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises ``UserError`` naming the first option by which ``config`` is not a continuation of ``checkpoint``."""
    saved, current = _flat(load_config(["--config", str(checkpoint / CONFIG_FILE)])), _flat(config)
    for name, option in OPTIONS.items():
        if name not in MAY_CHANGE and option.section != "parallel" and saved[name] != current[name]:
            raise UserError(
                f"--resume: {option.flag} was {_show(saved[name])} when {checkpoint} was saved, now it is "
                f"{_show(current[name])}; a resumed run cannot change it"
            )
    ours = Path(config.model.model) / "config.json"
    if _read_json(ours) != _read_json(checkpoint / SIDE_FILES / "config.json"):
        raise UserError(f"--resume: {ours} differs from the one of the model in {checkpoint}")


def _flat(config: Config) -> dict[str, Any]:
    return {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}


def _show(value: Any) -> str:
    return ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _set_aside(export: Path, step: int) -> None:
    """The run will export again; what the part before it exported stays, under another name."""
    if not export.exists():
        return
    target = export.with_name(f"{export.name}_until_{step_name(step)}")
    number = 1
    while target.exists():
        number += 1
        target = export.with_name(f"{export.name}_until_{step_name(step)}_{number}")
    try:
        export.rename(target)
    except OSError as error:
        raise UserError(f"--run-dir: cannot rename {export} to {target.name}: {error.strerror}") from error
