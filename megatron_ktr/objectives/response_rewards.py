"""The reward of each response, as responses are compared by it: reward parts, bonuses and the KL of ``kl_in_reward``.

Rewards are lists by group. For the replicas to gather them, they become rows of three fp64 numbers: the reward of a
response, its length in tokens, and 1 if it is the first of its group, else 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.objectives.bonuses import Bonus
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, RolloutGroup

Rewards = list[list[float]]


def lengths_of(groups: Sequence[RolloutGroup]) -> list[int]:
    """The length of each response in tokens, group after group."""
    return [len(rollout.token_ids) for group in groups for rollout in group.rollouts]


def with_bonuses(
    groups: Sequence[RolloutGroup], lengths: Sequence[int], *, bonuses: Sequence[Bonus], metrics: Metrics
) -> Rewards:
    """The rewards of the responses with their bonuses. The means of the bonuses are added to ``metrics``."""
    remaining = iter(lengths)
    found: Rewards = []
    paid: dict[str, list[float]] = {bonus.name: [] for bonus in bonuses}
    for group in groups:
        own = [next(remaining) for _ in group.rollouts]
        parts = [[rollout.reward for rollout in group.rollouts]]
        for bonus in bonuses:
            values = bonus.values(group, own)
            paid[bonus.name] += values
            parts.append(values)
            for name, share in bonus.shares(group).items():
                metrics.add(name, share)
        found.append([sum(of_response) for of_response in zip(*parts, strict=True)])
    for name, values in paid.items():
        metrics.add(f"reward/{name}", sum(values), len(values))
    return found


def less_kl(rewards: Rewards, kls: Sequence[float], *, weight: float) -> Rewards:
    """``rewards`` less ``weight`` times the KL of each response; ``kls`` has one number per response."""
    remaining = iter(kls)
    return [[reward - weight * next(remaining) for reward in of_group] for of_group in rewards]


def reward_rows(rewards: Rewards, lengths: Sequence[int], *, device: torch.device) -> Tensor:
    """The rows of responses, fp64 [responses, 3]; ``lengths`` has one number per response, group after group."""
    marked = [(reward, place == 0) for of_group in rewards for place, reward in enumerate(of_group)]
    rows = [(reward, length, is_first) for (reward, is_first), length in zip(marked, lengths, strict=True)]
    return torch.tensor(rows, dtype=torch.float64, device=device).reshape(-1, 3)


def with_rewards(facts: BatchFacts, rows: Tensor) -> BatchFacts:
    """``facts`` with the rewards and lengths of ``rows``, which are those of every replica."""
    rewards: Rewards = []
    lengths: list[list[int]] = []
    for reward, length, is_first in rows.tolist():
        if is_first:
            rewards.append([])
            lengths.append([])
        rewards[-1].append(reward)
        lengths[-1].append(int(length))
    return dataclasses.replace(facts, rewards=rewards, lengths=lengths)
