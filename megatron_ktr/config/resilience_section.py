"""The options of what a run does when something fails, and of how it can be watched. They are one section of
``sections.py``, whose docstring applies to all sections."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import MOST_MINUTES, MOST_STEPS, MOST_THRESHOLD
from megatron_ktr.config.words import AlarmAction, SaveFailure


@dataclass(frozen=True)
class ResilienceSection:
    """What is kept, when a run is warned of or stopped, and what it tells about itself."""

    keep_every: int = _option(
        0,
        "Checkpoints of steps that are a multiple of this are never removed; 0 = none is kept for that",
        low=0,
        high=MOST_STEPS,
    )
    export_interval: int = _option(
        0,
        "Steps between Hugging Face exports to run_dir/exports; 0 = only the export at the end (run_dir/export)",
        low=0,
        high=MOST_STEPS,
    )
    save_failure: SaveFailure = _option(
        "stop",
        "What a run does when a checkpoint or an export of export_interval cannot be written (a full disk): end, or "
        "train on and try again when the next one is due",
    )
    max_skipped_in_a_row: int = _option(
        3,
        "Updates in a row that may be skipped because log-probs, loss or gradient are not finite; one more ends the "
        "run; 0 = the first one ends it",
        low=0,
        high=1_000_000,
    )
    alarm_action: AlarmAction = _option(
        "warn", "What an alarm does: warn, or also save a checkpoint and end the run with exit code 76"
    )
    alarm_window: int = _option(20, "Steps that alarms compare a step with", low=2, high=1_000_000)
    alarm_grad_norm: float | None = _option(
        10.0,
        "Alarm when the gradient norm is above this many times the window's median; none = no alarm",
        above=1,
        high=MOST_THRESHOLD,
    )
    alarm_reward_drop: float | None = _option(
        None,
        "Alarm when the window's mean reward has fallen by this share of the run's best; none = no alarm",
        above=0,
        high=1,
    )
    alarm_entropy: float | None = _option(
        None,
        "Alarm when the policy's mean entropy is below this, in nats (median of 5 steps); none = no alarm",
        above=0,
        high=MOST_THRESHOLD,
    )
    alarm_length: float | None = _option(
        None,
        "Alarm when responses are this many times as long as the window's median; none = no alarm",
        above=1,
        high=MOST_THRESHOLD,
    )
    alarm_kl: float | None = _option(
        None,
        "Alarm when the KL divergence to the reference model is above this, in nats (median of 5 steps); none = no "
        "alarm",
        above=0,
        high=MOST_THRESHOLD,
    )
    replica_check_interval: int = _option(
        0,
        "Steps between comparisons of the weights that ranks hold alike, which also come before every checkpoint and "
        "export (docs/guards.md); 0 = never",
        low=0,
        high=MOST_STEPS,
    )
    hang_timeout_minutes: float | None = _option(
        None,
        "A rank that stays in one phase of a step for longer ends, with its stack; none = distributed_timeout_minutes",
        above=0,
        high=MOST_MINUTES,
    )
    heartbeat_seconds: float = _option(
        10.0, "Seconds between the files in which each rank says where it is (run_dir/status)", low=0.1, high=3600
    )
    metrics_port: int | None = _option(
        None, "Port of rank 0's machine at which Prometheus reads its metrics; none = no port", low=1, high=65535
    )
    metrics_host: str = _option(
        "127.0.0.1", "Address of that port; whoever reaches it reads the metrics. 0.0.0.0 = every network"
    )
    wandb_project: str | None = _option(
        None,
        "Project of Weights & Biases that metrics also go to (package wandb); none = TensorBoard and metrics.jsonl",
    )
    profile_steps: tuple[int, ...] = _option(
        (),
        "First and last step that are written as Chrome traces (run_dir/profile), one file per rank; empty = none",
        high=MOST_STEPS,
    )
