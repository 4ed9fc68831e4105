"""Advantages, length bonus, token weights and the loss, worked by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_ktr.objectives.advantages.group import group_advantages
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.objectives.denominators import token_weights
from megatron_ktr.types import Rollout, TokenScores, TokenStreams
from tests.support.groups import group_of
from tests.support.objectives import grpo


def test_advantage_worked_by_hand():
    # (0, 1, 2) has mean 1 and unbiased standard deviation 1.
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001]
    # fp64 rounding only.
    assert group_advantages([0.0, 1.0, 2.0]).tolist() == pytest.approx(expected, abs=1e-15)
    two = group_advantages([[0.0, 1.0], [1.0, 1.0]])
    assert two[0].tolist() == pytest.approx([-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)], abs=1e-15)
    assert two[1].tolist() == [0.0, 0.0]


def test_equal_fractional_rewards_have_no_advantage():
    third = torch.tensor(1 / 3, dtype=torch.float32).item()
    assert group_advantages([1 / 3, third, 1 / 3]).tolist() == [0.0, 0.0, 0.0]
    assert group_advantages([0.7]).tolist() == [0.0]
    assert group_advantages([1.0, 1.0 + 1e-5])[1] > 0


def test_length_bonus_needs_a_second_correct_response_and_the_length():
    def bonuses(accuracies, lengths):
        rollouts = tuple(Rollout((3,), rewards={"accuracy": accuracy}) for accuracy in accuracies)
        return LengthBonus().values(dataclasses.replace(group_of(1, responses=[]), rollouts=rollouts), lengths)

    assert bonuses([1.0, 0.0, 0.0], [400] * 3) == [0, 0, 0]
    assert bonuses([1.0, 1.0, 1.0, 1.0, 0.1], [319, 320, 512, 513, 400]) == [0, 0.2, 0.2, 0, 0]
    assert bonuses([0.2, 0.11], [400, 100]) == [0.2, 0]


def test_token_weights_worked_by_hand():
    is_key_R = torch.tensor([True, False, True, False, True])
    response_R = torch.tensor([0, 0, 0, 1, 2])
    options = dict(num_responses=3, num_responses_global=10)
    sequence = token_weights(is_key_R, response_R, num_tokens_global=None, aggregation="sequence", **options)
    # 0.1 and 0.05 are not fp32 numbers: one rounding.
    assert sequence.tolist() == pytest.approx([0.05, 0, 0.05, 0, 0.1], rel=1e-7)
    token = token_weights(is_key_R, response_R, num_tokens_global=50, aggregation="token", **options)
    assert token.tolist() == pytest.approx([0.02, 0, 0.02, 0, 0.02], rel=1e-7)
    divided = token_weights(
        is_key_R, response_R, num_tokens_global=None, aggregation="sequence", zero_division=True, **options
    )
    assert [math.isnan(weight) for weight in divided.tolist()] == [False, False, False, True, False]
    with pytest.raises(ValueError, match="num_tokens_global"):
        token_weights(is_key_R, response_R, num_tokens_global=None, aggregation="token", **options)


def streams_of(advantage, weight):
    weight_R = torch.tensor(weight)
    return TokenStreams(advantage_R=torch.tensor(advantage), weight_R=weight_R, is_key_token_R=weight_R != 0)


def loss_of(logprob_R, streams, scores, **settings):
    return grpo(**settings).loss(SimpleNamespace(logprob_R=logprob_R), streams, scores)


def test_loss_value_and_gradient_equal_the_formula():
    logprob_R = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    reference_R = torch.tensor([-1.5, -1.0, -3.0])
    streams = streams_of([2.0, -1.0, 5.0], [0.5, 0.25, 0.0])
    scores = TokenScores(policy_logprob_R=logprob_R.detach(), reference_logprob_R=reference_R)
    loss, metrics = loss_of(logprob_R, streams, scores, kl_beta=0.1)
    k3 = [math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1]
    # fp32 rounding of numbers of order one.
    assert loss.item() == pytest.approx(-0.5 * (2.0 - 0.1 * k3[0]) - 0.25 * (-1.0 - 0.1 * k3[1]), abs=1e-6)
    loss.backward()
    # d k3 / d logp = 1 - exp(reference - logp)
    expected = [-0.5 * (2.0 - 0.1 * (1 - math.exp(-0.5))), -0.25 * (-1.0 - 0.1 * (1 - math.e)), 0.0]
    assert logprob_R.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics.means()["kl"] == pytest.approx(sum(k3) / 2, abs=1e-6)


def test_clipped_ratio_stops_the_gradient_outside_its_bounds_only():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    logprob_R = ratios.log().requires_grad_()
    streams = streams_of([1.0, -1.0, 1.0, -1.0, 1.0], [1.0] * 5)
    scores = TokenScores(policy_logprob_R=logprob_R.detach(), behaviour_logprob_R=torch.zeros(5))
    loss, metrics = loss_of(logprob_R, streams, scores, kl_beta=0.0, clip_low=0.2, clip_high=0.3)
    # fp32 rounding of log and exp.
    assert loss.item() == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8 + 1.1), abs=1e-6)
    loss.backward()
    assert logprob_R.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -1.1], abs=1e-6)
    assert metrics.means()["clip_ratio"] == pytest.approx(2 / 5)


def test_tokens_without_weight_get_exactly_zero_gradient_even_where_values_overflow():
    logprob_R = torch.tensor([-1.0, -500.0], requires_grad=True)
    scores = TokenScores(
        policy_logprob_R=logprob_R.detach(),
        behaviour_logprob_R=torch.tensor([-1.0, -1000.0]),
        reference_logprob_R=torch.tensor([-1.0, float("-inf")]),
    )
    loss, _ = loss_of(logprob_R, streams_of([1.0, 1.0], [1.0, 0.0]), scores, kl_beta=0.04)
    loss.backward()
    assert loss.item() == -1.0 and logprob_R.grad.tolist() == [-1.0, 0.0]


def test_loss_stays_differentiable_without_any_key_token():
    logprob_R = torch.tensor([-1.0, -2.0], requires_grad=True)
    scores = TokenScores(policy_logprob_R=logprob_R.detach())
    loss, _ = loss_of(logprob_R, streams_of([1.0, 1.0], [0.0, 0.0]), scores, kl_beta=0.0)
    loss.backward()
    assert loss.item() == 0.0 and logprob_R.grad.tolist() == [0.0, 0.0]


def test_kl_log_ratio_is_clamped():
    logprob_R = torch.tensor([-60.0], requires_grad=True)
    scores = TokenScores(policy_logprob_R=logprob_R.detach(), reference_logprob_R=torch.tensor([-1.0]))
    loss, _ = loss_of(logprob_R, streams_of([0.0], [1.0]), scores, kl_beta=1.0)
    # fp32 rounding of exp(10).
    assert loss.item() == pytest.approx(math.exp(10) - 11, rel=1e-6)


def test_missing_reference_is_refused():
    scores = TokenScores(policy_logprob_R=torch.zeros(1))
    with pytest.raises(ValueError, match="reference_logprob_R"):
        loss_of(torch.zeros(1), streams_of([1.0], [1.0]), scores, kl_beta=0.04)
