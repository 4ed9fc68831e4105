"""The hooks of a run, in the order in which they are called. A new one is a class in a file of its own and a line in
one of the lists here: ``_guards``, ``_watches`` or ``_displays``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.distributed.rendezvous import connect_again
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.alarms import Alarms
from megatron_ktr.run.exports import ExportHook, ExportTimes
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.lease import Lease, LeaseHook
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.profile import StepTrace
from megatron_ktr.run.rank_monitor import build_rank_monitor
from megatron_ktr.run.replica_check import ReplicaCheck
from megatron_ktr.run.skipped_updates import SkippedUpdates
from megatron_ktr.run.status.heartbeat import Heartbeat, oldest_heartbeat
from megatron_ktr.run.status.prometheus import Endpoint
from megatron_ktr.run.status.rank_figures import RankFigures
from megatron_ktr.run.status.wandb_writer import WandbWriter
from megatron_ktr.run.watchdog import Watchdog


@dataclass(frozen=True)
class Watched:
    """What hooks may look at."""

    options: ResilienceSection
    run_dir: Path
    first_step: int
    """The first step of this part of the run."""
    num_steps: int
    policy: Policy
    timer: PhaseTimer
    incidents: Incidents
    distributed_timeout_minutes: float
    """How long a rank waits for others in a collective."""
    resolved: str = ""
    """Every option of the run, as YAML."""
    replay_obstacle: str | None = None
    """Why a dump of a step cannot be run again, if it cannot."""
    lease: Lease | None = None
    """What rank 0 holds while no other run has taken the directory over."""


def build_hooks(watched: Watched) -> list[StepHook]:
    """All hooks of this rank, in the same order on every rank. Rank 0 alone has the lease, the port of Prometheus and
    wandb; all other hooks are on every rank."""
    lease = [] if watched.lease is None else [LeaseHook(watched.lease)]
    exports = [_export_hook(watched)] if watched.options.export_interval else []
    watches = [_watchdog(watched), *build_rank_monitor(), *_watches(watched)]
    return [*lease, *watches, *_guards(watched), *exports, *_displays(watched)]


def _guards(watched: Watched) -> list[StepHook]:
    """What may end the run because of a step's numbers. It comes before exports, which must not hold wrong weights."""
    options, ranks, incidents = watched.options, watched.policy.ranks, watched.incidents
    return [
        SkippedUpdates(
            options,
            run_dir=watched.run_dir,
            policy=watched.policy,
            incidents=incidents,
            resolved=watched.resolved,
            replay_obstacle=watched.replay_obstacle,
            first_step=watched.first_step,
        ),
        ReplicaCheck(
            options.replica_check_interval,
            policy=watched.policy,
            incidents=incidents,
            exports=_export_times(watched),
        ),
        Alarms(options, run_dir=watched.run_dir, first_step=watched.first_step, ranks=ranks, incidents=incidents),
    ]


def _export_times(watched: Watched) -> ExportTimes:
    return ExportTimes(watched.options.export_interval, num_steps=watched.num_steps)


def _export_hook(watched: Watched) -> ExportHook:
    return ExportHook(
        watched.run_dir,
        policy=watched.policy,
        times=_export_times(watched),
        on_failure=watched.options.save_failure,
        incidents=watched.incidents,
    )


def _watches(watched: Watched) -> list[StepHook]:
    """What says where the run is, and adds metrics over ranks."""
    policy, options = watched.policy, watched.options
    heartbeat = Heartbeat(
        watched.run_dir,
        ranks=policy.ranks,
        platform=policy.platform,
        timer=watched.timer,
        every_seconds=options.heartbeat_seconds,
        first_step=watched.first_step,
        num_steps=watched.num_steps,
    )
    return [heartbeat, RankFigures(ranks=policy.ranks, platform=policy.platform)]


def _displays(watched: Watched) -> list[StepHook]:
    """What shows a step to people: traces of its time, and its record of metrics in Prometheus and wandb."""
    options, rank = watched.options, watched.policy.ranks.rank
    found: list[StepHook] = []
    if options.profile_steps:
        first, last = options.profile_steps
        # Each rank writes a file of its own, so each says itself what went wrong with it.
        incidents = watched.incidents if rank == 0 else Incidents(watched.run_dir)
        found.append(
            StepTrace(watched.run_dir, first=first, last=last, rank=rank, timer=watched.timer, incidents=incidents)
        )
    if rank == 0 and options.metrics_port is not None:
        found.append(
            Endpoint(
                options.metrics_host,
                options.metrics_port,
                num_steps=watched.num_steps,
                first_step=watched.first_step,
                incidents=watched.incidents,
                oldest_heartbeat=partial(oldest_heartbeat, watched.run_dir),
            )
        )
    if rank == 0 and options.wandb_project is not None:
        found.append(WandbWriter(watched.run_dir, project=options.wandb_project, incidents=watched.incidents))
    return found


def _watchdog(watched: Watched) -> Watchdog:
    ranks, minutes = watched.policy.ranks, watched.options.hang_timeout_minutes
    return Watchdog(
        watched.run_dir,
        rank=ranks.rank,
        world_size=ranks.world_size,
        limit_minutes=watched.distributed_timeout_minutes if minutes is None else minutes,
        timer=watched.timer,
        connect=partial(connect_again, timeout_seconds=10.0),
    )


@contextlib.contextmanager
def closing_all(hooks: Sequence[StepHook]) -> Iterator[None]:
    """Closes the hooks at the end, the last one first, also after an error."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
        yield
