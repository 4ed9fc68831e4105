"""The noise of signals: which scores rounding alone explains.

A visual or temporal score is the difference of two passes. Two passes over the *same* input differ as well, because
kernels round differently where a pass has other rows around it. The noise of a token is the score that its signal would
give it if the counterfactual view were the intact one once more: the same measure (signed, absolute, KL, ...), applied
to two intact passes. The noise of a signal without a view, such as entropy, is the difference of its two scores.

    floor            = the 0.99 quantile of |noise| over all tokens to which the signal applies, of the global batch
    signal to noise  = mean |score| / mean |noise| over the same tokens

Why 0.99: of a hundred tokens that owe nothing to what the view takes away, one has a score above the floor by rounding
alone. (Of a signed score half of that, since the noise has both signs.) A signal that takes a fifth of the tokens then
owes at most a twentieth of its choice to rounding. A higher quantile would follow single tokens: of 1,000 tokens, ten
are above this one.

``min_shift: auto`` drops every selected token whose score is below its signal's floor; ``min_shift: x`` does so below
x. It acts on signals that compare two views. An entropy is a property of one pass, and its noise is only reported. The
floor is measured with one pass of each kind. The mean over several draws (``num_shuffles``) has less noise than that,
so the floor is then an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.attribution.signals import signal_applies, signal_scores
from megatron_ktr.attribution.signals.base import Signal
from megatron_ktr.config.objective_section import AUTO
from megatron_ktr.types import ScoredBatch, TokenScores, View

AGAIN: View = "intact again"
"""Under this name ``ScoredBatch.scores`` holds the second intact pass, as if it were a counterfactual view."""
FLOOR_QUANTILE = 0.99


@dataclass(frozen=True)
class SignalNoise:
    """One signal on the tokens to which it applies, n of them: fp32 [n]."""

    score: Tensor
    """The magnitudes of its scores."""
    noise: Tensor
    """The magnitudes of the scores that two intact passes would give."""


@dataclass(frozen=True)
class Floor:
    """The noise of one signal over the global batch; numbers in the signal's unit (nats)."""

    floor: float
    signal_to_noise: float | None
    """None if there is no noise at all."""


def measure_noise(
    signals: Sequence[Signal], item: ScoredBatch, again: TokenScores, *, dtype: torch.dtype = torch.float32
) -> dict[str, SignalNoise]:
    """The scores of each signal and their noise.

    Args:
        item: a micro-batch with its scores, the view ``AGAIN`` among them.
        again: the second intact pass over the same tokens, for signals that read no view.
        dtype: as in ``signal_scores``.
    """
    applies_R = signal_applies(signals, item.batch, item.groups)
    found = {}
    for signal in signals:

        def score(scores: TokenScores, signal: Signal = signal) -> Tensor:
            return signal_scores([signal], scores, applies_R=applies_R, dtype=dtype)[signal.name].float()

        score_R = score(item.scores)
        noise_R = score(again) - score_R if signal.view is None else score(_as_if_intact(item.scores, signal.view))
        is_known_R = score_R.isfinite() & noise_R.isfinite()
        found[signal.name] = SignalNoise(score_R[is_known_R].abs(), noise_R[is_known_R].abs())
    return found


def _as_if_intact(scores: TokenScores, view: View) -> TokenScores:
    """The scores with the second intact pass in the place of ``view``."""
    logprobs, kls = scores.logprob_of_view, scores.kl_of_view
    return dataclasses.replace(
        scores,
        logprob_of_view={view: logprobs[AGAIN]} if AGAIN in logprobs else {},
        kl_of_view={view: kls[AGAIN]} if AGAIN in kls else {},
    )


def floor_of(found: SignalNoise) -> Floor | None:
    """The floor of a signal; None if it applies to no token."""
    if not len(found.noise):
        return None
    ordered = found.noise.double().sort().values
    floor = float(ordered[math.ceil(FLOOR_QUANTILE * len(ordered)) - 1])
    noise, score = float(ordered.mean()), float(found.score.double().mean())
    return Floor(floor, score / noise if noise else None)


def least_scores(
    signals: Sequence[Signal], *, min_shift: float | str, noise_floor: Mapping[str, float]
) -> dict[str, float]:
    """By signal, the smallest score that it may select; empty if there is no limit.

    Args:
        min_shift: a number, 0 for no limit, or ``AUTO`` for each signal's own floor.
        noise_floor: by signal, for ``AUTO``. A floor is missing only as long as the signal has applied to no token
            (``step/noise.py``); it then selects nothing.
    """
    if not min_shift:
        return {}
    compared = [signal.name for signal in signals if signal.view is not None]
    if min_shift == AUTO:
        return {name: noise_floor.get(name, math.inf) for name in compared}
    return dict.fromkeys(compared, float(min_shift))
