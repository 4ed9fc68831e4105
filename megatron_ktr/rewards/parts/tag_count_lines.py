"""``tag_count_lines``: open-r1's tag count. 1/4 for each tag that occurs exactly once with its line breaks:
``<think>\\n``, ``\\n</think>\\n``, ``\\n<answer>\\n``, ``\\n</answer>``.

A response without line breaks, ``<think>x</think><answer>A</answer>``, is worth 0.
"""

from __future__ import annotations

from megatron_ktr.rewards.registry import RewardEntry, each, register

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")

register(
    RewardEntry(
        "tag_count_lines", each(lambda given, options: sum(given.response.count(tag) == 1 for tag in TAGS) / len(TAGS))
    )
)
