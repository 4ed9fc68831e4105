"""What a signal is: a score for every response token, and what must be computed for it.

A signal is one small file here that calls ``register_signal`` (``config/signal_registry.py``), with its name in
``BUILT_IN_SIGNALS``. No other code refers to a signal by name.

Most signals compare the policy's distribution on the intact view with that on a counterfactual view. The measures of
this comparison, for a token y with p = the policy's distribution and q = that of the view, both at y's position:

    signed     log p(y) - log q(y)
    absolute   |log p(y) - log q(y)|
    kl         KL(p || q) over the whole vocabulary
    k3         clamp(e^d - d - 1, 0, 10), d = clamp(log q(y) - log p(y), -20, 20): the KL estimated by the sampled token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.view_registry import load_view
from megatron_ktr.config.words import SHIFTS
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, TokenScores, View

_Measure = Callable[[TokenScores, View, torch.dtype], Tensor]

MAX_LOG_RATIO, MAX_K3 = 20.0, 10.0


def everywhere(prompt: Prompt) -> bool:
    return True


def nowhere(prompt: Prompt) -> bool:
    return False


@dataclass(frozen=True)
class Signal:
    """A signal as a run uses it."""

    name: str
    score: Callable[[TokenScores, torch.dtype], Tensor]
    """The score of every response token [R]; tokens with high scores are key tokens. The dtype is fp32, or bf16 where
    log-probs are to be rounded before they are compared (``scores_dtype``)."""
    view: View | None = None
    """The counterfactual view whose scores it reads; None if the intact view is enough."""
    needs_kl: bool = False
    """Whether it reads KL(intact || view) over the whole vocabulary."""
    applies: Callable[[Prompt], bool] = everywhere
    """Whether the signal says anything about the responses to a prompt."""
    is_zero_in_release: Callable[[Prompt], bool] = nowhere
    """Whether the release of Video-KTR scores the responses with 0 although both of its passes see the same input."""


@dataclass(frozen=True)
class Comparison:
    """A score that compares the intact view with ``view`` by ``measure``, one of the four above."""

    measure: str
    view: View

    def __post_init__(self) -> None:
        if self.measure not in _MEASURES:
            raise ValueError(f"shift must be one of {SHIFTS}, got {self.measure!r}")

    def __call__(self, scores: TokenScores, dtype: torch.dtype) -> Tensor:
        return _MEASURES[self.measure](scores, self.view, dtype)


def comparing(name: str, *, measure: str, view: View, is_zero_in_release: Callable[[Prompt], bool] = nowhere) -> Signal:
    """The signal that compares with ``view`` by ``measure``. It says nothing where the view does not apply."""
    return Signal(
        name,
        Comparison(measure, view),
        view=view,
        needs_kl=measure == "kl",
        applies=load_view(view).applies,
        is_zero_in_release=is_zero_in_release,
    )


def _signed(scores: TokenScores, view: View, dtype: torch.dtype) -> Tensor:
    return _rounded(scores.policy_logprob_R, dtype) - _rounded(_logprob(scores, view), dtype)


def _absolute(scores: TokenScores, view: View, dtype: torch.dtype) -> Tensor:
    return _signed(scores, view, dtype).abs()


def _kl(scores: TokenScores, view: View, dtype: torch.dtype) -> Tensor:
    kl_R = scores.kl_of_view.get(view)
    if kl_R is None:
        raise UserError(
            f"shift: kl needs the KL over the whole vocabulary to the view {view}, which this run does not compute; "
            "choose shift signed or absolute"
        )
    return kl_R


def _k3(scores: TokenScores, view: View, dtype: torch.dtype) -> Tensor:
    log_ratio_R = (_logprob(scores, view) - scores.policy_logprob_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio_R.exp() - log_ratio_R - 1).clamp(0, MAX_K3)


_MEASURES: dict[str, _Measure] = {"signed": _signed, "absolute": _absolute, "kl": _kl, "k3": _k3}


def _logprob(scores: TokenScores, view: View) -> Tensor:
    logprob_R = scores.logprob_of_view.get(view)
    if logprob_R is None:
        raise ValueError(f"a signal needs the log-probs of the view {view!r}, which were not computed")
    return logprob_R


def _rounded(logprob_R: Tensor, dtype: torch.dtype) -> Tensor:
    return logprob_R.to(dtype) if dtype == torch.bfloat16 else logprob_R
