"""REINFORCE++'s advantages (arXiv 2501.03262): rewards normalised over the global batch.

    batch             A_i = (r_i - mean_B(r)) / (std_B(r) + 1e-4)              no baseline of the prompt
    batch_baseline    A_i = (c_i - mean_B(c)) / (std_B(c) + 1e-4),             c_i = r_i - mean of i's group

B is the rollout: every response of every replica, also where it is trained on in several mini-batches. Its mean and its
unbiased standard deviation are taken over responses, or over tokens, where a response counts once per token.

Mean and deviation are rounded once, from exact sums. They have the same bits in any order of the responses, and so for
any number of replicas and micro-batches.

Deviations:
1. The default is the mean over responses. The authors' code (OpenRLHF) and verl normalise over tokens, so that the mean
   leans towards long responses: ``advantage_over: tokens``.
2. The deviation is unbiased and 1e-4 is added to it, as in GRPO's advantage. OpenRLHF divides by sqrt(var + 1e-8) with
   the biased variance, verl with the unbiased one. With 256 responses the factor between them is 1.002.
3. A is exactly 0 if all rewards of the batch (for ``batch_baseline``: all c) differ by at most 1e-6.
4. The reward of a response is one number, which all of its tokens share. With ``kl_in_reward`` it contains the KL of
   the whole response; the paper's per-token return subtracts, at token t, the KL from t on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.words import AdvantageOver
from megatron_ktr.objectives.advantages.group import EQUAL_REWARDS, STD_FLOOR
from megatron_ktr.objectives.advantages.group_mean import centred
from megatron_ktr.types import BatchFacts


@dataclass(frozen=True)
class BatchNormalised:
    """The advantage ``batch``, or ``batch_baseline`` if the mean of the prompt's group is subtracted first."""

    over: AdvantageOver = "responses"
    has_group_baseline: bool = False

    needs_batch = True

    def __call__(self, rewards: Sequence[Sequence[float]], facts: BatchFacts) -> Tensor:
        """The advantages of every response, float64 [responses]; ``rewards`` has one list per group.

        ``facts.rewards`` must have the rewards of the global batch, bonuses included, by group; with ``over`` tokens
        ``facts.lengths`` must have the responses' lengths, likewise.
        """
        assert facts.rewards is not None and facts.lengths is not None, "the objective asked for them (needs_batch)"
        of_batch = self._compared(facts.rewards)
        lengths = [length for of_group in facts.lengths for length in of_group]
        mean, std = moments(of_batch, lengths if self.over == "tokens" else [1] * len(of_batch))
        value = torch.tensor(self._compared(rewards), dtype=torch.float64)
        if max(of_batch) - min(of_batch) <= EQUAL_REWARDS:
            return torch.zeros_like(value)
        return (value - mean) / (std + STD_FLOOR)

    def _compared(self, rewards: Sequence[Sequence[float]]) -> list[float]:
        """What is normalised: one number per response, group after group."""
        if not self.has_group_baseline:
            return [reward for of_group in rewards for reward in of_group]
        return [value for of_group in rewards for value in centred(of_group).tolist()]


def moments(values: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean and unbiased standard deviation of ``values``, the i-th of which counts ``counts[i]`` times. They have the
    same bits in any order. The deviation of a single value is 0."""
    total = sum(counts)
    mean = math.fsum(value * count for value, count in zip(values, counts, strict=True)) / total
    squares = math.fsum(count * (value - mean) ** 2 for value, count in zip(values, counts, strict=True))
    return mean, math.sqrt(squares / max(total - 1, 1))


def build(section: ObjectiveSection) -> BatchNormalised:
    return BatchNormalised(section.advantage_over)


def build_with_group_baseline(section: ObjectiveSection) -> BatchNormalised:
    return BatchNormalised(section.advantage_over, has_group_baseline=True)
