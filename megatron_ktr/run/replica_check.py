"""Compares the copies of the weights that ranks hold, every few steps, and ends the run where they differ.

Copies stay equal because every rank does the same arithmetic on the same numbers. If they differ, a bit has changed in
a memory or on a wire, or a processor has computed a wrong number: silent data corruption. Every later step would mix
the wrong copy into all others, so the run ends without saving; the checkpoints of the steps up to the last comparison
are sound.
"""

from __future__ import annotations

from megatron_ktr.distributed.replica_checksums import Difference, find_differences
from megatron_ktr.policy.policy import Policy
from megatron_ktr.policy.replicated import replicated_tensors
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.step_report import StepReport

MOST_NAMED = 5
"""Tensors that an incident names."""


class ReplicaCheck(StepHook):
    """The check; ``interval`` 0 means never. Collective over the world."""

    def __init__(self, interval: int, *, policy: Policy, incidents: Incidents) -> None:
        self._interval, self._policy, self._incidents = interval, policy, incidents

    def after_step(self, report: StepReport) -> Stop | None:
        if not self._interval or report.step % self._interval:
            return None
        differences = differences_of(self._policy)
        report.values["replica_check/differences"] = float(len(differences))
        if not differences:
            return None
        # Named because a start loads one copy into all ranks: no later comparison would see the damage.
        text = f"{describe(differences)}; checkpoints of steps after {report.step - self._interval} may hold the damage"
        self._incidents.add(
            "replica_mismatch",
            text,
            step=report.step,
            tensors=[one.name for one in differences[:MOST_NAMED]],
            num_tensors=len(differences),
            ranks=sorted({rank for one in differences for rank in one.suspects}),
            is_certain=all(one.is_certain for one in differences),
        )
        return Stop(text, is_state_sound=False)


def differences_of(policy: Policy) -> list[Difference]:
    """The tensors of the policy whose copies differ, the same on every rank. Collective over the world."""
    policy.wait_for_parameters()
    return find_differences(replicated_tensors(policy), world=policy.ranks.world)


def describe(differences: list[Difference]) -> str:
    """One line: which ranks hold which tensors otherwise than the others."""
    ranks = sorted({rank for one in differences for rank in one.suspects})
    named = ", ".join(one.name for one in differences[:MOST_NAMED])
    more = f" and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
    listed = ", ".join(map(str, ranks))
    if not all(one.is_certain for one in differences):
        who = f"one of the ranks {listed} holds"
    else:
        who = f"rank {listed} holds" if len(ranks) == 1 else f"ranks {listed} hold"
    return f"the copies of the weights differ: {who} another {named}{more}; look for a failing memory or device there"
