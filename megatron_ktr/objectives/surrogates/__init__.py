"""Surrogates: the term of the loss whose gradient is the policy gradient. One file each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_ktr.types import TokenScores, TokenStreams


class Surrogate(Protocol):
    """One form of the policy-gradient term."""

    def __call__(
        self, logprob_R: Tensor, streams: TokenStreams, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term of each token, fp32 [R], to be maximised, differentiable in ``logprob_R``; and values [R] whose
        means over key tokens are metrics, by name."""
        ...
