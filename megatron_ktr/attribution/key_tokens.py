"""The part of a policy gradient that decides which tokens carry the loss, and how much, from the scores of signals.

It is composed of: signals (``signals/``), the scope in which their scores are compared (``scopes.py``,
``batch_scope.py``), the rule and the combination (``selection.py``, ``combine.py``), hard or soft weights
(``soft_weights.py``), a control in place of the signals' choice (``controls.py``), and the shaping of advantages by
dependence (``shaping.py``).

The scopes ``response`` and ``prompt`` and all controls work on one micro-batch at a time, without waiting for the
device. The scope ``batch`` and shaping compare all responses of the step. They therefore need every score before the
first update begins (``needs_batch``), which costs one more intact pass without gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.attribution.batch_scope import choose_in_batch
from megatron_ktr.attribution.combine import Choice, ChoiceRules
from megatron_ktr.attribution.controls import random_tokens
from megatron_ktr.attribution.noise_floor import SignalNoise, least_scores, measure_noise
from megatron_ktr.attribution.shaping import DependenceShaping, mean_by_response
from megatron_ktr.attribution.signals import build_signals, scored_as_zero, signal_applies, signal_scores
from megatron_ktr.attribution.signals.base import Signal
from megatron_ktr.attribution.signals.dependence import build_dependence
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.words import SELECTIONS, Scope
from megatron_ktr.config.words import Selection as SelectionWord
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, ScoredBatch, Selection, TokenScores, View


@dataclass(frozen=True)
class KeyTokens:
    """Which tokens carry the loss, and how much of it."""

    signals: tuple[Signal, ...]
    rules: ChoiceRules | None
    """How the signals choose; None if nothing is chosen (``mode`` all)."""
    mode: SelectionWord = "signals"
    scope: Scope = "prompt"
    scores_dtype: torch.dtype = torch.float32
    min_shift: float | str = 0.0
    """The smallest score of signals that compare two views; ``AUTO``: their noise (``noise_floor.py``)."""
    shaping: DependenceShaping | None = None
    dependence: Signal | None = None
    """The signal that ``shaping`` reads."""

    def __post_init__(self) -> None:
        names = [signal.name for signal in self.signals]
        if len(set(names)) != len(names):
            raise ValueError(f"signals must be different ones, got {', '.join(names)}")
        if self.mode not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {self.mode!r}")
        if (self.rules is None) != (self.mode == "all"):
            raise ValueError("rules are needed exactly where tokens are chosen")
        if self.mode in ("random", "complement") and self.rules is not None and self.rules.token_weights != "hard":
            raise ValueError(f"selection {self.mode!r} has no soft weights")
        if (self.shaping is None) != (self.dependence is None):
            raise ValueError("shaping needs the signal of dependence, and only shaping reads it")

    @property
    def _read_signals(self) -> tuple[Signal, ...]:
        chosen = () if self.mode == "all" else self.signals
        return chosen if self.dependence is None else (*chosen, self.dependence)

    @property
    def views(self) -> frozenset[View]:
        """The counterfactual views whose scores are read."""
        return frozenset(signal.view for signal in self._read_signals if signal.view is not None)

    @property
    def needs_kl(self) -> bool:
        """Whether the scores must hold the KL to those views."""
        return any(signal.needs_kl for signal in self._read_signals)

    @property
    def needs_batch(self) -> bool:
        """Whether the selection of a token depends on the scores of all micro-batches and replicas."""
        return self.shaping is not None or (self.scope == "batch" and self.mode != "all")

    def select(
        self,
        items: Sequence[ScoredBatch],
        facts: BatchFacts,
        *,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Selection]:
        """The selection of each of ``items`` (``Objective.select``)."""
        choices = self._choices(items, facts, gather=gather)
        factors = self._advantage_factors(items, gather=gather)
        found = []
        for item, choice, (factor_R, dependence_R) in zip(items, choices, factors, strict=True):
            controlled = self._controlled(item, choice, facts)
            found.append(
                Selection(
                    is_key_R=controlled.is_selected_R,
                    by_signal=controlled.by_signal,
                    weight_R=controlled.weight_R,
                    advantage_factor_R=factor_R,
                    metrics=_metrics(factor_R, dependence_R),
                )
            )
        return found

    def noise(self, item: ScoredBatch, again: TokenScores) -> Mapping[str, SignalNoise]:
        """By signal: its scores, and how much of them rounding alone explains (``Objective.signal_noise``)."""
        return measure_noise(self.signals, item, again, dtype=self.scores_dtype)

    def _choices(
        self, items: Sequence[ScoredBatch], facts: BatchFacts, *, gather: Callable[[Tensor], Tensor] | None
    ) -> list[Choice]:
        """What the signals choose, before any control."""
        rules = self.rules
        if rules is None:
            return [Choice(torch.ones_like(item.scores.policy_logprob_R, dtype=torch.bool)) for item in items]
        if least := least_scores(self.signals, min_shift=self.min_shift, noise_floor=facts.noise_floor):
            rules = dataclasses.replace(rules, least_of=least)
        scores = [self._scores(self.signals, item) for item in items]
        if self.scope == "batch":
            return choose_in_batch(rules, scores, [item.groups for item in items], gather=gather)
        found = []
        for item, score_R_by_signal in zip(items, scores, strict=True):
            scope_R, num_scopes = self._scope(item)
            found.append(rules.choose(score_R_by_signal, scope_R, num_scopes=num_scopes))
        return found

    def _scores(self, signals: Sequence[Signal], item: ScoredBatch) -> Mapping[str, Tensor]:
        is_compat = self.rules is not None and self.rules.like_release
        return signal_scores(
            signals,
            item.scores,
            applies_R=signal_applies(signals, item.batch, item.groups),
            zero_R=scored_as_zero(signals, item.batch, item.groups) if is_compat else None,
            dtype=self.scores_dtype,
        )

    def _scope(self, item: ScoredBatch) -> tuple[Tensor, int]:
        if self.scope == "response":
            return item.response_R, item.batch.num_responses
        return item.group_R, item.num_groups

    def _controlled(self, item: ScoredBatch, choice: Choice, facts: BatchFacts) -> Choice:
        """The choice with a control in its place, if one is asked for."""
        if self.mode == "random":
            scope_R, num_scopes = self._scope(item)
            mask_R = random_tokens(
                choice.is_selected_R,
                item.groups,
                scope_R=scope_R,
                num_scopes=num_scopes,
                seed=facts.seed,
                step=facts.step,
            )
        elif self.mode == "complement":
            mask_R = ~choice.is_selected_R
        else:
            return choice
        return Choice(mask_R, {self.mode: mask_R})

    def _advantage_factors(
        self, items: Sequence[ScoredBatch], *, gather: Callable[[Tensor], Tensor] | None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """alpha and the dependence of each token, by item; both None without shaping."""
        if self.shaping is None or self.dependence is None:
            return [(None, None)] * len(items)
        signal = self.dependence
        scores = [self._scores((signal,), item)[signal.name] for item in items]
        means = [
            mean_by_response(score_R, item.response_R, num_responses=item.batch.num_responses)
            for item, score_R in zip(items, scores, strict=True)
        ]
        alpha = self.shaping.factors(torch.cat(means), gather=gather).split([len(mean) for mean in means])
        return [
            (of_item[item.response_R], score_R) for of_item, item, score_R in zip(alpha, items, scores, strict=True)
        ]


def build_key_tokens(section: ObjectiveSection) -> KeyTokens | None:
    """The selection that the options describe; None if every token carries the loss alike.

    Raises:
        ValueError: options contradict one another.
    """
    mode, is_shaped = section.selection_mode, section.advantage_shaping == "dependence"
    if mode == "all" and not is_shaped:
        return None
    rules = None
    if mode != "all":
        rules = ChoiceRules(
            ratio_of=section.ratio_of_signal,
            count_of=section.count_of_signal,
            rule=section.selection_rule,
            combine=section.combine,
            signal_weights=section.weight_of_signal,
            token_weights=section.token_weights,
            temperature=section.weight_temperature,
            like_release=section.original_compat,
        )
    return KeyTokens(
        signals=() if rules is None else build_signals(section),
        rules=rules,
        mode=mode,
        scope=section.selection_scope,
        scores_dtype=torch.bfloat16 if section.scores_dtype == "bf16" else torch.float32,
        min_shift=section.min_shift,
        shaping=DependenceShaping(section.shaping_min, section.shaping_max) if is_shaped else None,
        dependence=build_dependence(section) if is_shaped else None,
    )


def overlaps(by_signal: Mapping[str, Tensor]) -> Metrics:
    """How much the signals agree, as metrics ``selection_overlap/ONE+OTHER``: of the tokens that either of two signals
    selects, the share that both do."""
    metrics = Metrics()
    for (one, mask_R), (other, other_R) in itertools.combinations(by_signal.items(), 2):
        either = (mask_R | other_R).sum()
        metrics.add_later([f"selection_overlap/{one}+{other}"], (mask_R & other_R).sum(), count=either)
    return metrics


def _metrics(factor_R: Tensor | None, dependence_R: Tensor | None) -> Metrics:
    """With shaping: the mean dependence in nats and the largest factor of an advantage."""
    metrics = Metrics()
    if factor_R is not None and dependence_R is not None and len(factor_R):
        is_known_R = dependence_R.isfinite()
        total = dependence_R.masked_fill(~is_known_R, 0.0).sum()
        metrics.add_later(["dependence"], total, count=is_known_R.sum())
        metrics.add_later(["advantage_factor_max"], factor_R.max(), are_maxima=True)
    return metrics
