"""Key tokens: the part of a policy gradient that decides which tokens carry the loss, from its signals' scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ktr.attribution.selection import check_ratio, select_key_tokens
from megatron_ktr.attribution.signals import VIEW_OF_SIGNAL, scored_as_zero, signal_applies, signal_scores
from megatron_ktr.config.words import SHIFTS, SIGNALS, Shift, Signal
from megatron_ktr.types import BatchFacts, ScoredBatch, Selection, View


@dataclass(frozen=True)
class KeyTokens:
    """The tokens that any of ``signals`` selects, each the top share of its scores within a prompt's group."""

    signals: tuple[Signal, ...] = SIGNALS
    selection_ratio: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(SIGNALS, 0.2))
    """The share of a group's tokens that each signal selects."""
    shift: Shift = "signed"
    scores_dtype: torch.dtype = torch.float32
    like_release: bool = False
    """Do as the release of Video-KTR with degenerate signals and infinite scores (``original_compat``)."""

    def __post_init__(self) -> None:
        if not self.signals or len(set(self.signals)) != len(self.signals) or set(self.signals) - set(SIGNALS):
            raise ValueError(f"signals must be one or more different ones of {SIGNALS}, got {self.signals}")
        if self.shift not in SHIFTS:
            raise ValueError(f"shift must be one of {SHIFTS}, got {self.shift!r}")
        for signal in self.signals:
            if signal not in self.selection_ratio:
                raise ValueError(f"selection_ratio lacks signal {signal!r}, got {dict(self.selection_ratio)}")
            check_ratio(self.selection_ratio[signal])

    @property
    def views(self) -> frozenset[View]:
        """The counterfactual views whose scores the signals read."""
        return frozenset(VIEW_OF_SIGNAL[signal] for signal in self.signals if signal in VIEW_OF_SIGNAL)

    @property
    def needs_kl(self) -> bool:
        """Whether the scores must hold the KL to those views."""
        return self.shift == "kl" and bool(self.views)

    def select(
        self,
        items: Sequence[ScoredBatch],
        facts: BatchFacts,
        *,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Selection]:
        """The selection of each item; arguments as ``Objective.select``."""
        return [self._select(item) for item in items]

    def _select(self, item: ScoredBatch) -> Selection:
        score_R_by_signal = signal_scores(
            item.scores,
            applies_R=signal_applies(item.batch, item.groups, signals=self.signals),
            shift=self.shift,
            zero_R=scored_as_zero(item.batch, item.groups, signals=self.signals) if self.like_release else None,
            dtype=self.scores_dtype,
        )
        selected = select_key_tokens(
            dict(score_R_by_signal.items()),
            self.selection_ratio,
            group_R=item.group_R,
            num_groups=item.num_groups,
            like_release=self.like_release,
        )
        return Selection.union(selected)
