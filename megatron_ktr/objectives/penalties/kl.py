"""The KL divergence from the policy to the frozen reference model.

    x       = clamp(logp_reference - logp, -10, 10)        of the sampled token
    k1      = -x
    k2      = x^2 / 2
    k3      = exp(x) - x - 1                               Schulman's estimators (joschu.net/blog/kl-approx.html)
    k3_plus = k2 - stopgrad(k2) + stopgrad(k3)             the value of k3 with the gradient of k2 (verl's "k3+")
    full    = sum_v p(v) (log p(v) - log q(v))             over the whole vocabulary (``ops/token_statistics.py``)

Values: k1 and k3 are unbiased estimates of KL(p || q), with p the policy and q the reference model. k2 is biased (its
error is of third order in x), and k3 varies least.

Gradients: what a loss follows is the expected gradient of the term, and that of an unbiased estimate need not be the
gradient of what it estimates, because the tokens were sampled from p as well. In expectation over tokens from p, the
gradient of k1 is zero, that of k2 is exactly the gradient of KL(p || q), and that of k3 is the gradient of KL(q || p).
So as a loss k3_plus and full pull towards the reference by KL(p || q) and k3 by KL(q || p), as GRPO does; k1 belongs
into the reward (``kl_in_reward``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ktr.config.words import KL_KINDS, KlKind, TokenSet
from megatron_ktr.types import TokenScores

MAX_LOG_RATIO = 10.0


@dataclass(frozen=True)
class KL:
    """``weight`` times the divergence; the weight is ``--kl-beta``."""

    weight: float
    kind: KlKind = "k3"
    over: TokenSet = "key"
    """The tokens whose mean is taken: those that carry the policy gradient, or all of the responses."""

    name = "kl"
    needs_reference = True

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"kl_beta must not be negative, got {self.weight}")
        if self.kind not in KL_KINDS:
            raise ValueError(f"kl_kind must be one of {KL_KINDS}, got {self.kind!r}")

    @property
    def needs_reference_kl(self) -> bool:
        """Whether the scores must hold the divergence over the whole vocabulary, with its gradient."""
        return self.kind == "full"

    def __call__(self, logprob_R: Tensor, statistics: Any, scores: TokenScores) -> Tensor:
        return kl_values(logprob_R, scores, kind=self.kind)

    def is_pulling(self, scores: TokenScores) -> Tensor:
        """bool [R]: the tokens whose log-prob differs from the reference model's. (k1 pulls on every token, but only
        by noise where the two models are one.)"""
        assert scores.reference_logprob_R is not None, "the loss was computed with it"
        return scores.reference_logprob_R != scores.policy_logprob_R


def kl_values(logprob_R: Tensor, scores: TokenScores, *, kind: KlKind) -> Tensor:
    """The divergence of each token, fp32 [R], by the formula ``kind``; differentiable in ``logprob_R``, or for ``full``
    in ``scores.reference_kl_R``.

    Raises:
        ValueError: the scores lack what the formula compares with.
    """
    if kind == "full":
        if scores.reference_kl_R is None:
            raise ValueError("kl_kind full needs TokenScores.reference_kl_R, which was not computed")
        return scores.reference_kl_R
    if scores.reference_logprob_R is None:
        raise ValueError("kl_beta > 0 needs TokenScores.reference_logprob_R, which was not computed")
    x_R = (scores.reference_logprob_R.float() - logprob_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -x_R
    if kind == "k2":
        return x_R.square() / 2
    k3_R = x_R.exp() - x_R - 1
    if kind == "k3":
        return k3_R
    k2_R = x_R.square() / 2
    return k2_R - k2_R.detach() + k3_R.detach()
