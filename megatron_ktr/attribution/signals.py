"""The three scores of Video-KTR (arXiv 2601.19686), per response token, without gradient:

    entropy   H_t = -sum_v p(v) log p(v)                   policy, intact view, full vocabulary
    visual    s_t = logp_t(intact) - logp_t(hidden)        how much the answer token owes to seeing the video
    temporal  s_t = logp_t(intact) - logp_t(shuffled)      how much it owes to the order of the frames

``shift`` says how the last two measure the difference: ``signed`` is s_t as above, ``absolute`` is |s_t|, and ``kl`` is
KL(p_intact || p_counterfactual) over the whole vocabulary.

The visual signal does not apply to tokens whose prompt has nothing to hide (text only). The temporal signal does not
apply where there is nothing to shuffle (images, a single temporal patch, frames all alike). The score is then NaN,
which selection ignores. It is not the computed difference, because two forwards of the same input may differ in the
last bit, and such noise must not select tokens.

The release of Video-KTR gives such tokens the score 0, because both of its passes see the same input
(``scored_as_zero``). It computes in bf16: log-probs are rounded before they are subtracted, and the difference is
rounded once more (``dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.attribution.counterfactuals import can_hide, can_shuffle
from megatron_ktr.config.words import SHIFTS, SIGNALS, Shift, Signal
from megatron_ktr.errors import UserError
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, Prompt, RolloutGroup, TokenScores, View

VIEW_OF_SIGNAL: dict[Signal, View] = {"visual": "hidden", "temporal": "shuffled"}


def signal_scores(
    scores: TokenScores,
    *,
    applies_R: dict[Signal, Tensor],
    shift: Shift = "signed",
    zero_R: Mapping[Signal, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[Signal, Tensor]:
    """The score of every response token, [R] by signal; NaN where the signal does not apply.

    Args:
        applies_R: bool [R] for each signal wanted (``signal_applies``).
        zero_R: bool [R] by signal; the score is 0 instead of NaN where it is True (``scored_as_zero``).
        dtype: the dtype of the result. bf16 also rounds the log-probs before they are subtracted.

    Raises:
        ValueError: ``scores`` lacks the entropy or the log-probs that a wanted signal needs.
        UserError: ``shift`` is ``kl`` and ``scores`` contains no KL.
    """
    if shift not in SHIFTS:
        raise ValueError(f"shift must be one of {SHIFTS}, got {shift!r}")
    found: dict[Signal, Tensor] = {}
    for signal, is_applicable_R in applies_R.items():
        if signal == "entropy":
            score_R = _present(scores.entropy_R, "entropy_R", signal)
        elif shift == "kl":
            score_R = _kl(scores, signal)
        else:
            view = VIEW_OF_SIGNAL[signal]
            counterfactual_R = _present(scores.logprob_of_view.get(view), f"logprob_of_view[{view!r}]", signal)
            score_R = _rounded(scores.policy_logprob_R, dtype) - _rounded(counterfactual_R, dtype)
            score_R = score_R.abs() if shift == "absolute" else score_R
        score_R = score_R.detach().to(dtype)
        score_R = score_R.masked_fill(~send(is_applicable_R, score_R.device), float("nan"))
        if zero_R is not None:
            score_R = score_R.masked_fill(send(zero_R[signal], score_R.device), 0.0)
        found[signal] = score_R
    return found


def signal_applies(
    batch: PackedBatch, groups: Sequence[RolloutGroup], *, signals: Sequence[Signal]
) -> dict[Signal, Tensor]:
    """bool [R] for each of ``signals``: whether the token's prompt has something to hide or to shuffle."""
    tests = {"entropy": lambda prompt: True, "visual": can_hide, "temporal": can_shuffle}
    unknown = [signal for signal in signals if signal not in tests]
    if unknown:
        raise ValueError(f"unknown signals {unknown}, expected some of {SIGNALS}")
    return {signal: _by_token(batch, groups, tests[signal]) for signal in signals}


def scored_as_zero(
    batch: PackedBatch, groups: Sequence[RolloutGroup], *, signals: Sequence[Signal]
) -> dict[Signal, Tensor]:
    """bool [R] for each of ``signals``: whether the release scores the token although both of its passes see the same
    input.

    For the visual signal these are the tokens of prompts without media. For the temporal signal they are those of
    prompts with a video that shuffling does not change; prompts with images only get no temporal score in the release.
    """

    def has_fixed_video(prompt: Prompt) -> bool:
        return any(medium.kind == "video" for medium in prompt.media) and not can_shuffle(prompt)

    tests = {
        "entropy": lambda prompt: False,
        "visual": lambda prompt: not can_hide(prompt),
        "temporal": has_fixed_video,
    }
    return {signal: _by_token(batch, groups, tests[signal]) for signal in signals}


def _by_token(batch: PackedBatch, groups: Sequence[RolloutGroup], test: Callable[[Prompt], bool]) -> Tensor:
    if len(groups) != len(batch.layout.groups):
        raise ValueError(f"the batch packs {len(batch.layout.groups)} groups, got {len(groups)}")
    marks = [test(group.prompt) for group in groups]
    return send(torch.tensor(marks), batch.group_R.device)[batch.group_R]


def _rounded(logprob_R: Tensor, dtype: torch.dtype) -> Tensor:
    return logprob_R.to(dtype) if dtype == torch.bfloat16 else logprob_R


def _kl(scores: TokenScores, signal: Signal) -> Tensor:
    kl_R = scores.kl_of_view.get(VIEW_OF_SIGNAL[signal])
    if kl_R is None:
        raise UserError(
            f"shift: kl needs the {signal} scores' KL over the whole vocabulary, which this run does not compute; "
            "choose shift signed or absolute"
        )
    return kl_R


def _present(values_R: Tensor | None, field: str, signal: Signal) -> Tensor:
    if values_R is None:
        raise ValueError(f"signal {signal!r} needs TokenScores.{field}, which was not computed")
    return values_R
