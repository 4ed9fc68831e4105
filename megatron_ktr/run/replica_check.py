"""Compares the copies of the weights that ranks hold, every few steps, and ends the run where they differ.

Copies stay equal because every rank does the same arithmetic on the same numbers. If they differ, a bit has changed in
a memory or on a wire, or a processor has computed a wrong number: silent data corruption. Every later step would mix
the wrong copy into all others, so the run ends without saving.

A checkpoint and an export hold one copy. A start loads it into all ranks, after which no comparison would see the
damage. So the copies are also compared before anything of them is saved.
"""

from __future__ import annotations

from megatron_ktr.distributed.replica_checksums import Difference, find_differences
from megatron_ktr.policy.policy import Policy
from megatron_ktr.policy.replicated import replicated_tensors
from megatron_ktr.run.exports import ExportTimes
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.step_report import StepReport

MOST_NAMED = 5
"""Tensors that an incident names."""


class ReplicaCheck(StepHook):
    """The check; ``interval`` 0 means never. Collective over the world."""

    def __init__(self, interval: int, *, policy: Policy, incidents: Incidents, exports: ExportTimes) -> None:
        self._interval, self._policy, self._incidents, self._exports = interval, policy, incidents, exports
        self._compared_step = 0
        """The last step after which the copies were compared."""

    def after_step(self, report: StepReport) -> Stop | None:
        step = report.step
        if not self._interval or not (step % self._interval == 0 or self._exports.is_due(step)):
            return None
        differences = self._compare(step)
        report.values["replica_check/differences"] = float(len(differences))
        return self._stop(step, differences)

    def before_save(self, step: int) -> Stop | None:
        if not self._interval or step == self._compared_step:
            return None
        return self._stop(step, self._compare(step))

    def _compare(self, step: int) -> list[Difference]:
        self._compared_step = step
        return differences_of(self._policy)

    def _stop(self, step: int, differences: list[Difference]) -> Stop | None:
        if not differences:
            return None
        text = describe(differences)
        self._incidents.add(
            "replica_mismatch",
            text,
            step=step,
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
