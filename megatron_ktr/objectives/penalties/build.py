"""The terms of the loss and of the reward that the options turn on. A new term is a file here and two lines below."""

from __future__ import annotations

from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.objectives.penalties import Penalty
from megatron_ktr.objectives.penalties.entropy import EntropyBonus, SampledEntropy
from megatron_ktr.objectives.penalties.kl import KL
from megatron_ktr.objectives.penalties.kl_in_reward import KLInReward


def build_penalties(section: ObjectiveSection) -> tuple[Penalty, ...]:
    """The terms of the loss, in the order in which they are added."""
    found: list[Penalty] = []
    if section.kl_beta and not section.kl_in_reward:
        found.append(KL(section.kl_beta, kind=section.kl_kind, over=section.kl_on))
    if section.entropy_bonus:
        found.append(EntropyBonus(section.entropy_bonus))
    if section.sampled_entropy_penalty:
        found.append(SampledEntropy(section.sampled_entropy_penalty))
    return tuple(found)


def build_reward_kl(section: ObjectiveSection) -> KLInReward | None:
    """The KL that is subtracted from rewards; None if it is a term of the loss or there is none."""
    return KLInReward(section.kl_beta, section.kl_kind) if section.kl_in_reward and section.kl_beta else None
