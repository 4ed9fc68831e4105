"""KL and entropy terms: values worked by hand, and their expected gradients over a vocabulary of three words."""

from __future__ import annotations

import math
import types

import pytest
import torch

from megatron_ktr.objectives.penalties.entropy import EntropyBonus, SampledEntropy
from megatron_ktr.objectives.penalties.kl import KL, kl_values
from megatron_ktr.types import TokenScores

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
KL_P_Q = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)  # 0.0252672
# d KL(p || q) / d z_v = p_v (log p_v - log q_v - KL);  d KL(q || p) / d z_v = p_v - q_v
TOWARDS_P_Q = [p * (math.log(p / q) - KL_P_Q) for p, q in ((0.5, 0.4), (0.3, 0.4), (0.2, 0.2))]
TOWARDS_Q_P = [0.1, -0.1, 0.0]
EXPECTED = {
    "k1": ([0.2231436, -0.2876821, 0.0], KL_P_Q, [0.0, 0.0, 0.0]),
    "k2": ([0.0248965, 0.0413805, 0.0], 0.0248624, TOWARDS_P_Q),
    "k3": ([0.0231436, 0.0456513, 0.0], KL_P_Q, TOWARDS_Q_P),
    "k3_plus": ([0.0231436, 0.0456513, 0.0], KL_P_Q, TOWARDS_P_Q),
    "full": ([KL_P_Q] * 3, KL_P_Q, TOWARDS_P_Q),
}
"""By kind: the value of each word as the sampled token, the expected value, the expected gradient in the logits."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_expected_value_and_gradient_by_enumerating_the_vocabulary(kind):
    values, expected_value, expected_gradient = EXPECTED[kind]
    logits = POLICY.log().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    full = (logp.exp() * (logp - REFERENCE.log())).sum().expand(3)
    # Each word once, as if it had been sampled; fp64 in place of fp32, to see the formula and not the rounding.
    scores = TokenScores(
        policy_logprob_R=logp.detach(), reference_logprob_R=_Exact(REFERENCE.log()), reference_kl_R=full
    )
    value_R = kl_values(logp, scores, kind=kind)
    assert value_R.tolist() == pytest.approx(values, abs=1e-7)
    assert float((POLICY * value_R).sum()) == pytest.approx(expected_value, abs=1e-7)
    gradient = torch.zeros(3, dtype=torch.float64)
    for word in range(3):
        gradient += POLICY[word] * torch.autograd.grad(value_R[word], logits, retain_graph=True)[0]
    # The tables are worked to seven digits or exactly.
    assert gradient.tolist() == pytest.approx(expected_gradient, abs=1e-7)


class _Exact(torch.Tensor):
    """fp64 numbers that stay so."""

    def float(self):
        return self.as_subclass(torch.Tensor)


def test_log_ratio_is_clamped_in_every_kind_of_estimate():
    scores = TokenScores(policy_logprob_R=torch.zeros(1), reference_logprob_R=torch.tensor([-1.0]))
    far = torch.tensor([-60.0])
    found = {kind: float(kl_values(far, scores, kind=kind)) for kind in ("k1", "k2", "k3", "k3_plus")}
    # fp32 rounding of exp(10).
    assert found == pytest.approx(
        {"k1": -10, "k2": 50, "k3": math.exp(10) - 11, "k3_plus": math.exp(10) - 11}, rel=1e-6
    )


def test_missing_scores_are_refused():
    scores = TokenScores(policy_logprob_R=torch.zeros(1))
    with pytest.raises(ValueError, match="reference_logprob_R"):
        kl_values(torch.zeros(1), scores, kind="k2")
    with pytest.raises(ValueError, match="reference_kl_R"):
        kl_values(torch.zeros(1), scores, kind="full")
    with pytest.raises(ValueError, match="kl_kind"):
        KL(0.1, kind="k4")


def test_entropy_terms_pull_everywhere_and_have_the_sign_of_their_names():
    entropy_R = torch.tensor([0.5, 1.5], requires_grad=True)
    logprob_R = torch.tensor([-1.0, -2.0], requires_grad=True)
    statistics = types.SimpleNamespace(entropy_R=entropy_R, logprob_R=logprob_R)
    scores = TokenScores(policy_logprob_R=logprob_R.detach(), entropy_R=entropy_R.detach())
    bonus, penalty = EntropyBonus(0.01), SampledEntropy(0.06)
    assert bonus(logprob_R, statistics, scores).tolist() == [-0.5, -1.5]
    assert penalty(logprob_R, statistics, scores).tolist() == [1.0, 2.0]
    assert bonus.is_pulling(scores).all() and penalty.is_pulling(scores).all()
    assert (bonus.over, penalty.over) == ("key", "all")
