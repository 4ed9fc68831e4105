"""Ratios and their gradients, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ktr.objectives.surrogates.cispo import Cispo
from megatron_ktr.objectives.surrogates.clipped import Clipped
from megatron_ktr.objectives.surrogates.sequence import SequenceRatio
from megatron_ktr.types import TokenScores, TokenStreams

DIFFERENCES = (0.1, -0.05, 0.3)
RATIOS = tuple(math.exp(d) for d in DIFFERENCES)  # 1.10517 0.95123 1.34986
SEQUENCE = math.exp(sum(DIFFERENCES) / 3)  # 1.123745


def term_of(surrogate, advantage, *, differences=DIFFERENCES, old=True, lengths=None):
    """The term, its gradient and what it counts, of responses whose log-probs are ``differences`` above the old
    policy's 0."""
    logprob_R = torch.tensor(differences, requires_grad=True)
    lengths = lengths or (len(differences),)
    response_R = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage_R = torch.full((len(differences),), advantage)
    streams = TokenStreams(
        advantage_R=advantage_R,
        weight_R=torch.ones(len(differences)),
        is_key_token_R=torch.ones(len(differences), dtype=torch.bool),
        response_R=response_R,
        num_responses=len(lengths),
    )
    scores = TokenScores(
        policy_logprob_R=logprob_R.detach(), behaviour_logprob_R=torch.zeros(len(differences)) if old else None
    )
    term_R, counted = surrogate(logprob_R, streams, scores)
    (gradient_R,) = torch.autograd.grad(term_R.sum(), logprob_R)
    return term_R.tolist(), gradient_R.tolist(), {name: values.tolist() for name, values in counted.items()}


CASES = {
    "clip": (Clipped(0.2, 0.2), 1.0, (RATIOS[0], RATIOS[1], 1.2), (RATIOS[0], RATIOS[1], 0), (0, 0, 1)),
    "clip-higher": (Clipped(0.2, 0.28), 1.0, (RATIOS[0], RATIOS[1], 1.28), (RATIOS[0], RATIOS[1], 0), (0, 0, 1)),
    "clip, bad": (Clipped(0.2, 0.2), -1.0, [-r for r in RATIOS], [-r for r in RATIOS], (0, 0, 0)),
    "dual clip": (Clipped(0.2, 0.2, dual=1.2), 1.0, (RATIOS[0], RATIOS[1], 1.2), (RATIOS[0], RATIOS[1], 0), (0, 0, 1)),
    "dual clip, bad": (
        Clipped(0.2, 0.2, dual=1.2),
        -1.0,
        (-RATIOS[0], -RATIOS[1], -1.2),
        (-RATIOS[0], -RATIOS[1], 0),
        (0, 0, 1),
    ),
    "sequence": (SequenceRatio(0.2, 0.2), 1.0, [SEQUENCE] * 3, [SEQUENCE] * 3, (0, 0, 0)),
    "sequence, clipped": (SequenceRatio(3e-4, 4e-4), 1.0, [1.0004] * 3, [0] * 3, (1, 1, 1)),
    "sequence, bad": (SequenceRatio(3e-4, 4e-4), -1.0, [-SEQUENCE] * 3, [-SEQUENCE] * 3, (0, 0, 0)),
    "sequence_token": (SequenceRatio(0.2, 0.2, is_by_token=True), 1.0, [SEQUENCE] * 3, [SEQUENCE] * 3, (0, 0, 0)),
    "cispo": (
        Cispo(1.28),
        1.0,
        [r * d for r, d in zip((*RATIOS[:2], 1.28), DIFFERENCES, strict=True)],
        (RATIOS[0], RATIOS[1], 1.28),
        (0, 0, 1),
    ),
    "cispo, bad": (
        Cispo(1.28),
        -1.0,
        [-r * d for r, d in zip((*RATIOS[:2], 1.28), DIFFERENCES, strict=True)],
        (-RATIOS[0], -RATIOS[1], -1.28),
        (0, 0, 1),
    ),
}
"""Surrogate, advantage; then by token: the term, the gradient of the terms' sum, whether the clip acts."""


@pytest.mark.parametrize("name", CASES)
def test_terms_worked_by_hand(name):
    surrogate, advantage, terms, gradients, clipped = CASES[name]
    found = term_of(surrogate, advantage)
    # fp32 rounding of exp and products.
    assert found[0] == pytest.approx(list(terms), abs=1e-6)
    assert found[1] == pytest.approx(list(gradients), abs=1e-6)
    assert found[2]["clip_ratio"] == [bool(mark) for mark in clipped]


@pytest.mark.parametrize("name", CASES)
def test_one_update_per_rollout_has_the_gradient_of_grpo_whatever_the_ratio(name):
    """The ratio is 1 everywhere. (A sequence ratio spreads its gradient evenly over tokens that weigh the same.)"""
    surrogate = CASES[name][0]
    lengths, differences = (3, 1, 2), (-1.0, -0.5, -2.0, -0.1, -3.0, -0.7)
    expected = term_of(Clipped(), -0.7, differences=differences, old=False, lengths=lengths)
    found = term_of(surrogate, -0.7, differences=differences, old=False, lengths=lengths)
    # fp32 rounding of a mean.
    assert found[1] == pytest.approx(expected[1], abs=1e-6) and found[2] == {}


def test_sequence_ratio_keeps_to_its_own_response():
    differences = (*DIFFERENCES, -0.4)
    for is_by_token in (False, True):
        found, gradient, _ = term_of(SequenceRatio(0.9, 0.9, is_by_token), 1.0, differences=differences, lengths=(3, 1))
        assert found == pytest.approx([SEQUENCE] * 3 + [math.exp(-0.4)], abs=1e-6)
        assert gradient == pytest.approx([SEQUENCE] * 3 + [math.exp(-0.4)], abs=1e-6)


def test_a_ratio_that_overflows_is_the_cap_and_not_infinite():
    term, gradient, counted = term_of(Cispo(5.0), 1.0, differences=(200.0,))
    assert term == [1000.0] and gradient == [5.0] and counted["clip_ratio"] == [True]
    term, _, _ = term_of(SequenceRatio(), -1.0, differences=(200.0,))
    assert math.isfinite(term[0])


def test_bounds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="clip_low"):
        SequenceRatio(low=-0.1)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        Clipped(dual=1.0)
    with pytest.raises(ValueError, match="ratio_cap"):
        Cispo(0.0)
