"""The hooks of a run, in the order in which they are called. A new one is a file and a line here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.distributed.rendezvous import connect_again
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import PhaseTimer
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


def build_hooks(watched: Watched) -> list[StepHook]:
    """All hooks of a run; every rank builds the same list."""
    return [_watchdog(watched)]


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
