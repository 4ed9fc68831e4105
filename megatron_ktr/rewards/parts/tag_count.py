"""``tag_count``: 1/4 for each of ``<think>``, ``</think>``, ``<answer>`` and ``</answer>`` that occurs exactly once,
in whatever order. ``tag_count_lines`` wants open-r1's line breaks, too."""

from __future__ import annotations

from megatron_ktr.rewards.registry import RewardEntry, each, register
from megatron_ktr.rewards.text import TAGS

register(
    RewardEntry(
        "tag_count", each(lambda given, options: sum(given.response.count(tag) == 1 for tag in TAGS) / len(TAGS))
    )
)
