"""The hooks of a run, in the order in which they are called. A new one is a file and a line here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.alarms import Alarms
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.replica_check import ReplicaCheck
from megatron_ktr.run.skipped_updates import SkippedUpdates


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
    resolved: str = ""
    """Every option of the run, as YAML."""


def build_hooks(watched: Watched) -> list[StepHook]:
    """All hooks of a run; every rank builds the same list."""
    options, ranks, incidents = watched.options, watched.policy.ranks, watched.incidents
    return [
        SkippedUpdates(
            options,
            run_dir=watched.run_dir,
            policy=watched.policy,
            incidents=incidents,
            resolved=watched.resolved,
            first_step=watched.first_step,
        ),
        ReplicaCheck(options.replica_check_interval, policy=watched.policy, incidents=incidents),
        Alarms(options, run_dir=watched.run_dir, first_step=watched.first_step, ranks=ranks, incidents=incidents),
    ]


@contextlib.contextmanager
def closing_all(hooks: Sequence[StepHook]) -> Iterator[None]:
    """Closes the hooks at the end, the last one first, also after an error."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
        yield
