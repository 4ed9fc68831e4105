"""``accuracy``: whether the answer is right, by the record's problem type, under ``answer_protocol``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ktr.rewards.accuracy import accuracy_of_record
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.registry import RewardEntry, register


def score(inputs: Sequence[RewardInput], options: RewardOptions) -> list[float]:
    """``accuracy`` on the record's ``solution``, ``problem_type`` and ``options``."""
    protocol = PROTOCOLS[options.section.answer_protocol]
    return [accuracy_of_record(given.response, given.record, protocol=protocol) for given in inputs]


register(RewardEntry("accuracy", score, reads_problem_type=True, reads_solution=True))
