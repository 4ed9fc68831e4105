"""The options of the run itself. They are one section of ``sections.py``, whose docstring applies to all sections."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import (
    LARGEST_INTEGER,
    MOST_GB,
    MOST_MINUTES,
    MOST_PROMPTS,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_THRESHOLD,
)
from megatron_ktr.config.words import PlatformName
from megatron_ktr.errors import UserError

DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class TrainerSection:
    """The run: where it is written, how long it is, how it starts."""

    run_dir: str = _option("runs/train", "Directory of everything the run writes; must be empty unless --resume")
    resume: bool = _option(False, "Continue from the newest intact checkpoint in run_dir, in any layout")
    auto_resume: bool = _option(
        False,
        "Continue from the newest intact checkpoint in run_dir, or start anew where there is none: for schedulers, "
        "which start the same command again",
    )
    train_steps: int | None = _option(
        None,
        "Rollout steps of the whole run; none = what train_epochs comes to, without it 1000",
        low=1,
        high=MOST_STEPS,
    )
    train_epochs: float | None = _option(
        None,
        "In place of train_steps, how often every record is drawn: train_epochs x records / prompts_per_step steps, "
        "rounded up; skipped prompts are replaced and do not change that",
        above=0,
        high=1e6,
    )
    prompts_per_step: int = _option(
        32, "Prompts per step over all ranks (P x data-parallel size)", low=1, high=MOST_PROMPTS
    )
    micro_batch_groups: int = _option(
        1, "Prompt groups per micro-batch; a group is never split", low=1, high=MOST_PROMPTS
    )
    max_tokens_per_microbatch: int | None = _option(
        None,
        "In place of micro_batch_groups: as many groups as have this many tokens together (each prompt once, and its "
        "responses); a group of more is a micro-batch of its own, and counted",
        low=1,
        high=MOST_SAMPLES,
    )
    balance_replicas: bool = _option(
        True, "Whole groups change data-parallel replicas after the rollout, until all have nearly the same FLOPs"
    )
    save_interval: int = _option(
        0, "Steps between checkpoints, and one after the last step; 0 = none", low=0, high=MOST_STEPS
    )
    keep_checkpoints: int = _option(
        2,
        "Newest verified checkpoints to keep (read again after they were written, and intact); 0 = all",
        low=0,
        high=1_000_000,
    )
    eval_interval: int = _option(
        0,
        "Steps between evaluations (section evaluation), and one after the last step; 0 = none",
        low=0,
        high=MOST_STEPS,
    )
    rollout_log_interval: int = _option(
        10,
        "Steps between files of rollouts and key tokens in run_dir/rollouts, one per replica; 1 = all; 0 = none",
        low=0,
        high=MOST_STEPS,
    )
    log_interval: int = _option(1, "Steps between lines on the console", low=1, high=MOST_STEPS)
    peak_tflops: float | None = _option(
        None,
        "Dense peak of one device in TFLOP/s (H100 in bf16: 989), for the metric mfu; none = no metric",
        above=0,
        high=MOST_THRESHOLD,
    )
    seed: int = _option(0, "Seed of data order, shuffled views and sampling", low=0, high=LARGEST_INTEGER)
    platform: PlatformName = _option("auto", "Devices to run on; auto takes CUDA where it is found")
    distributed_timeout_minutes: int = _option(
        60,
        "How long a rank waits for the others, also while one of them generates, before it gives up",
        low=1,
        high=MOST_MINUTES,
    )
    dry_run: bool = _option(
        False,
        "Train nothing: build the model's shapes, check layout and data, and print memory, length and time; in one "
        "process, without GPUs or weights (docs/usage.md)",
    )
    dry_run_gpus: int | None = _option(
        None,
        "Read by dry_run alone: how many GPUs the run is to have; none = those of one replica (tensor x pipeline x "
        "context)",
        low=1,
        high=2**20,
    )
    dry_run_gpu_memory_gb: float = _option(
        80.0, "Read by dry_run alone: the memory of one of these GPUs, in 10^9 bytes", above=0, high=MOST_GB
    )

    def __post_init__(self) -> None:
        """Sets the default number of steps if neither steps nor epochs are given, so that a run always has a length.
        (``config/run_length.py`` converts epochs to steps once the records are known.)"""
        if self.train_steps is None and self.train_epochs is None:
            object.__setattr__(self, "train_steps", DEFAULT_STEPS)

    def prompts_per_replica(self, data_parallel_size: int) -> int:
        """P, the number of prompts of one data-parallel rank per step; they make a whole number of micro-batches."""
        unit = data_parallel_size * self.micro_batch_groups
        if self.prompts_per_step % unit:
            raise UserError(
                f"--prompts-per-step {self.prompts_per_step} must be a multiple of data-parallel size "
                f"{data_parallel_size} x --micro-batch-groups {self.micro_batch_groups} = {unit}"
            )
        return self.prompts_per_step // data_parallel_size
