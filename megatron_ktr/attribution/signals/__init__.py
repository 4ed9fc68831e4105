"""The scores of response tokens that select key tokens, without gradient; each signal is one file here.

A signal that does not apply to a prompt (nothing to hide, no order to lose) gives its tokens the score NaN, which
selection ignores. It is not the computed difference, because two forwards of the same input may differ in the last bit,
and such noise must not select tokens.

The release of Video-KTR gives some of these tokens the score 0, because both of its passes see the same input
(``scored_as_zero``). It computes in bf16: log-probs are rounded before they are subtracted, and the difference is
rounded once more (``dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.attribution.signals.base import Signal
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.signal_registry import signal_entry
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, Prompt, RolloutGroup, TokenScores


def build_signals(section: ObjectiveSection) -> tuple[Signal, ...]:
    """The signals that the options name, in their order.

    Raises:
        UserError: there is no signal of a name.
        ValueError: an option of a signal has no such value.
    """
    return tuple(signal_entry(name).build(section) for name in section.signals)


def signal_scores(
    signals: Sequence[Signal],
    scores: TokenScores,
    *,
    applies_R: Mapping[str, Tensor],
    zero_R: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The score of every response token, [R] by signal; NaN where the signal does not apply.

    Args:
        applies_R: bool [R] by signal (``signal_applies``).
        zero_R: bool [R] by signal; the score is 0 instead of NaN where it is True (``scored_as_zero``).
        dtype: the dtype of the result. bf16 also rounds the log-probs before they are subtracted.

    Raises:
        ValueError: ``scores`` lacks the entropy or the log-probs that a signal needs.
        UserError: a signal needs a KL that ``scores`` does not contain.
    """
    found: dict[str, Tensor] = {}
    for signal in signals:
        score_R = signal.score(scores, dtype).detach().to(dtype)
        score_R = score_R.masked_fill(~send(applies_R[signal.name], score_R.device), float("nan"))
        if zero_R is not None:
            score_R = score_R.masked_fill(send(zero_R[signal.name], score_R.device), 0.0)
        found[signal.name] = score_R
    return found


def signal_applies(signals: Sequence[Signal], batch: PackedBatch, groups: Sequence[RolloutGroup]) -> dict[str, Tensor]:
    """bool [R] by signal: whether the signal says anything about the token's prompt."""
    return {signal.name: _by_token(batch, groups, signal.applies) for signal in signals}


def scored_as_zero(signals: Sequence[Signal], batch: PackedBatch, groups: Sequence[RolloutGroup]) -> dict[str, Tensor]:
    """bool [R] by signal: whether the release scores the token although both of its passes see the same input."""
    return {signal.name: _by_token(batch, groups, signal.is_zero_in_release) for signal in signals}


def _by_token(batch: PackedBatch, groups: Sequence[RolloutGroup], test: Callable[[Prompt], bool]) -> Tensor:
    if len(groups) != len(batch.layout.groups):
        raise ValueError(f"the batch packs {len(batch.layout.groups)} groups, got {len(groups)}")
    marks = [test(group.prompt) for group in groups]
    return send(torch.tensor(marks), batch.group_R.device)[batch.group_R]
