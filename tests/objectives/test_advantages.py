"""Advantages worked by hand, and the bits of those that are normalised over the global batch."""

from __future__ import annotations

import math
import random

import pytest

from megatron_ktr.objectives.advantages.batch import BatchNormalised, moments
from megatron_ktr.objectives.advantages.group import group_relative
from megatron_ktr.objectives.advantages.group_mean import group_mean
from megatron_ktr.objectives.advantages.leave_one_out import leave_one_out
from megatron_ktr.types import BatchFacts

REWARDS = ((1.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 0.0))
LENGTHS = ((2, 4, 2, 4), (1, 3, 2, 2))
FACTS = BatchFacts(num_responses=8, rewards=REWARDS, lengths=LENGTHS)

# Over responses: mean 5/8; squares (5 * (3/8)^2 + 3 * (5/8)^2) / 7 = 1.875 / 7.
# Over tokens: 12 of 20 tokens are rewarded, mean 3/5; squares (12 * 0.16 + 8 * 0.36) / 19 = 4.8 / 19.
# Rewards less the group's mean: 1/2 and -1/2 twice each, 1/4 three times, -3/4; mean 0, squares 1.75 / 7 = 1/4.
_ROOT_THIRD = math.sqrt(1 / 3)
_BATCH = (math.sqrt(1.875 / 7) + 1e-4, math.sqrt(4.8 / 19) + 1e-4)
EXPECTED = {
    "group": [0.5 / (_ROOT_THIRD + 1e-4) * s for s in (1, -1, -1, 1)] + [0.25 / 0.5001] * 3 + [-0.75 / 0.5001],
    "group_mean": [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75],
    "leave_one_out": [2 / 3, -2 / 3, -2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, -1],
    "batch": [(0.375 if r else -0.625) / _BATCH[0] for r in (1, 0, 0, 1, 1, 1, 1, 0)],
    "batch over tokens": [(0.4 if r else -0.6) / _BATCH[1] for r in (1, 0, 0, 1, 1, 1, 1, 0)],
    "batch_baseline": [s / 0.5001 for s in (0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75)],
}
ADVANTAGES = {
    "group": group_relative,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch": BatchNormalised(),
    "batch over tokens": BatchNormalised(over="tokens"),
    "batch_baseline": BatchNormalised(has_group_baseline=True),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_advantages_worked_by_hand(name):
    # fp64 rounding only.
    assert ADVANTAGES[name](REWARDS, FACTS).tolist() == pytest.approx(EXPECTED[name], abs=1e-12)


def test_normalisation_over_tokens_is_the_whitening_of_every_tokens_return():
    """As verl computes it: each token of a response has the response's reward, and all tokens are whitened together.
    Its numbers for this batch are 0.795822 and -1.193734; they differ from ours by the 1e-4 beside the deviation."""
    tokens = [
        r for group, n in zip(REWARDS, LENGTHS, strict=True) for r, k in zip(group, n, strict=True) for _ in range(k)
    ]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((value - mean) ** 2 for value in tokens) / (len(tokens) - 1))
    found = BatchNormalised(over="tokens")(REWARDS, FACTS)
    assert found.tolist()[:2] == pytest.approx([(1 - mean) / (std + 1e-4), -mean / (std + 1e-4)], abs=1e-12)
    assert found.tolist()[:2] == pytest.approx([0.795822, -1.193734], rel=2.1e-4)


@pytest.mark.parametrize("over", ["responses", "tokens"])
@pytest.mark.parametrize("has_group_baseline", [False, True])
def test_batch_advantages_have_the_same_bits_in_any_order_and_on_any_number_of_replicas(over, has_group_baseline):
    generator = random.Random(1)
    rewards = [[generator.gauss(0, 1) for _ in range(3)] for _ in range(8)]
    lengths = [[generator.randint(1, 900) for _ in range(3)] for _ in range(8)]
    advantage = BatchNormalised(over=over, has_group_baseline=has_group_baseline)
    facts = BatchFacts(num_responses=24, rewards=rewards, lengths=lengths)
    whole = advantage(rewards, facts).view(8, 3)
    for num_replicas in (1, 2, 4):
        order = generator.sample(range(8), 8)
        of_order = BatchFacts(
            num_responses=24, rewards=[rewards[i] for i in order], lengths=[lengths[i] for i in order]
        )
        for replica in range(num_replicas):
            own = order[replica::num_replicas]
            assert advantage([rewards[i] for i in own], of_order).view(-1, 3).tolist() == whole[own].tolist()


def test_equal_rewards_have_no_advantage_and_equal_groups_have_one_only_where_the_batch_differs():
    third = 1 / 3 + 1e-8  # as an fp32 number of the same value would differ
    equal = ((1 / 3, third), (third, 1 / 3))
    facts = BatchFacts(num_responses=4, rewards=equal, lengths=((1, 2), (3, 4)))
    for name, advantage in ADVANTAGES.items():
        assert advantage(equal, facts).tolist() == [0, 0, 0, 0], name
    each_equal = ((1.0, 1.0), (0.0, 0.0))
    facts = BatchFacts(num_responses=4, rewards=each_equal, lengths=((1, 1), (1, 1)))
    for name, advantage in ADVANTAGES.items():
        found = advantage(each_equal, facts).tolist()
        if name in ("batch", "batch over tokens"):
            assert found == pytest.approx([0.5 / (_ROOT_THIRD + 1e-4)] * 2 + [-0.5 / (_ROOT_THIRD + 1e-4)] * 2)
        else:
            assert found == [0, 0, 0, 0], name


def test_moments_of_a_single_response_divide_by_nothing():
    assert moments([0.7], [1]) == (0.7, 0.0)
    facts = BatchFacts(num_responses=1, rewards=((0.7,),), lengths=((5,),))
    assert BatchNormalised()(((0.7,),), facts).tolist() == [0.0]
