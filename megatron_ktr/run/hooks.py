"""The hooks of a run, in the order in which they are called. A new one is a file and a line here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.exports import ExportHook
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.lease import Lease, LeaseHook
from megatron_ktr.run.metrics import PhaseTimer


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
    lease: Lease | None = None
    """What rank 0 holds while no other run has taken the directory over."""


def build_hooks(watched: Watched) -> list[StepHook]:
    """All hooks of a run; every rank builds the same list. (That of rank 0 has ``LeaseHook`` too, which is not
    collective.)"""
    hooks: list[StepHook] = []
    if watched.lease is not None:
        hooks.append(LeaseHook(watched.lease))
    if watched.options.export_interval:
        hooks.append(_export_hook(watched))
    return hooks


def _export_hook(watched: Watched) -> ExportHook:
    return ExportHook(
        watched.run_dir,
        policy=watched.policy,
        interval=watched.options.export_interval,
        num_steps=watched.num_steps,
        on_failure=watched.options.save_failure,
        incidents=watched.incidents,
    )


@contextlib.contextmanager
def closing_all(hooks: Sequence[StepHook]) -> Iterator[None]:
    """Closes the hooks at the end, the last one first, also after an error."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
        yield
