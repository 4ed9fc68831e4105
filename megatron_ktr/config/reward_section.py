"""The options of rewards."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.words import AnswerProtocol


@dataclass(frozen=True)
class RewardSection:
    """Reward of a response = sum of its named parts + length bonus."""

    reward_functions: tuple[str, ...] = _option(
        (),
        "Reward parts by name (accuracy, format; soft_choice: accuracy that pays in part for some of several right "
        "letters), or own ones as module:function; empty = accuracy and format; recorded rollouts keep theirs",
    )
    answer_protocol: AnswerProtocol = _option(
        "standard",
        "How the built-in rewards read and judge an answer: official = the verdicts of the Video-KTR release, slips "
        "included; strict = one answer block only; standard = the first block; lenient = the right answer however it "
        "is worded (docs/rewards.md)",
    )
    length_bonus: float = _option(
        0.2,
        "Added to a correct response of length_bonus_min..length_bonus_max tokens where more than one response of "
        "the group is correct; 0 = off",
        low=0,
    )
    length_bonus_min: int = _option(320, "Shortest response that gets the length bonus, in tokens", low=0)
    length_bonus_max: int = _option(512, "Longest response that gets the length bonus, in tokens", low=0)
