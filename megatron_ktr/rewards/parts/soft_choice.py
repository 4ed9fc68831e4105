"""``soft_choice``: ``accuracy``, but several right letters pay in parts (TW-GRPO, ``standard.soft_choice``)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ktr.rewards.accuracy import accuracy_of_record, with_soft_choice
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.registry import RewardEntry, register


def score(inputs: Sequence[RewardInput], options: RewardOptions) -> list[float]:
    """``accuracy`` with ``standard.soft_choice`` for multiple choice."""
    protocol = with_soft_choice(PROTOCOLS[options.section.answer_protocol])
    return [accuracy_of_record(given.response, given.record, protocol=protocol) for given in inputs]


register(RewardEntry("soft_choice", score, reads_problem_type=True, reads_solution=True))
