"""Penalties: terms that the loss adds to the policy gradient, such as the KL to the reference model. One file each."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megatron_ktr.config.words import TokenSet
from megatron_ktr.types import TokenScores


class Penalty(Protocol):
    """One term of the loss, ``weight * value`` of each token."""

    @property
    def name(self) -> str | None:
        """The metric of its mean over its tokens; None for no metric."""
        ...

    @property
    def weight(self) -> float: ...

    @property
    def over(self) -> TokenSet:
        """The tokens that have this term: those that carry the policy gradient, or all of the responses."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference model's log-probs."""
        ...

    @property
    def needs_reference_kl(self) -> bool:
        """Whether it differentiates the KL to the reference model over the whole vocabulary."""
        ...

    def __call__(self, logprob_R: Tensor, statistics: Any, scores: TokenScores) -> Tensor:
        """Its value for each token, fp32 [R], to be minimised, differentiable in ``logprob_R`` or ``statistics``."""
        ...

    def is_pulling(self, scores: TokenScores) -> Tensor:
        """bool [R]: the tokens that it may give a gradient."""
        ...
