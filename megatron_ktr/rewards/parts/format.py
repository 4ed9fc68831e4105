"""``format``: 1 if the whole response is a reasoning block and an answer block."""

from __future__ import annotations

from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.registry import RewardEntry, each, register

register(
    RewardEntry(
        "format",
        each(lambda given, options: float(PROTOCOLS[options.section.answer_protocol].has_format(given.response))),
    )
)
