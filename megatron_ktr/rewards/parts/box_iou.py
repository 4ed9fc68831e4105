"""``box_iou``: ``accuracy`` of questions of the type "spatial grounding", which is the IoU (``grounding.py``).
It does not apply to others."""

from __future__ import annotations

from megatron_ktr.rewards.accuracy import accuracy_of_record
from megatron_ktr.rewards.grounding import SPATIAL
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.registry import RewardEntry, each, register


def value_of(given: RewardInput, options: RewardOptions) -> float | None:
    """None for questions of other types."""
    if given.record.get("problem_type") != SPATIAL:
        return None
    return accuracy_of_record(given.response, given.record, protocol=PROTOCOLS[options.section.answer_protocol])


register(RewardEntry("box_iou", each(value_of), reads_solution=True))
