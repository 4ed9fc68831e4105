"""T-GRPO (Video-R1, arXiv 2503.21776): GRPO that pays for answers which need the order of the frames.

    loss = that of GRPO, where the rewards of a group contain the bonus of ``bonuses/temporal.py``

For every prompt with a video, ``temporal_responses`` further responses (none = G // 2) are sampled for the same frames
in random order. They are rewarded and compared with; they are never trained on and are in no mean and no standard
deviation. The bonus is the option ``temporal_bonus``, which this objective sets to 0.3. With 0 the objective is GRPO,
and any other policy gradient gets the bonus by the same option.

With two-valued rewards the bonus changes hardly anything: in a group of mixed rewards the division by the standard
deviation takes it out again up to 1e-4 of an advantage, and in a group of equal rewards the mean does. It acts through
further parts of the reward (format, length, fractions of an accuracy), and through advantages without a division.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="t_grpo",
        title="T-GRPO",
        summary="the loss of GRPO, with a bonus for correct responses where shuffled frames are not answered better",
        build=build_policy_gradient,
        defaults={"temporal_bonus": 0.3},
    )
)
