"""``judge``: how right the answer is in the eyes of a model behind ``judge_url`` (``judging.py``), in [0, 1]."""

from __future__ import annotations

from megatron_ktr.rewards import judging
from megatron_ktr.rewards.registry import RewardEntry, register

register(
    RewardEntry(
        "judge",
        lambda inputs, options: judging.judge(inputs, options.section),
        check=lambda options: judging.check(options.section),
        prepare=lambda options: judging.connect(options.section),
        close=lambda options: judging.close(options.section),
    )
)
