"""``math``: 1 if the answer is mathematically the same as the record's solution, whatever its problem type
(``math_answers.py``)."""

from __future__ import annotations

from megatron_ktr.rewards import math_answers
from megatron_ktr.rewards.accuracy import accuracy
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.registry import RewardEntry, each, register


def value_of(given: RewardInput, options: RewardOptions) -> float | None:
    """None without a solution."""
    solution = given.record.get("solution")
    if solution is None:
        return None
    protocol = PROTOCOLS[options.section.answer_protocol]
    return accuracy(given.response, solution=solution, problem_type="math", protocol=protocol)


register(
    RewardEntry("math", each(value_of), check=lambda options: math_answers.require_installed("--reward-functions math"))
)
