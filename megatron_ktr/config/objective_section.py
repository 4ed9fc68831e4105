"""The options of what is optimised, and of which tokens carry it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.objective_registry import available_objectives, objective_entry
from megatron_ktr.config.words import (
    SIGNALS,
    ImportanceLevel,
    LossAggregation,
    ScoresDtype,
    ScoringPrecision,
    Shift,
    ShuffleUnit,
    Signal,
)


@dataclass(frozen=True)
class ObjectiveSection:
    """What is optimised, and which tokens carry it."""

    objective: str = _option(
        "video_ktr",
        "Training objective (see the table below)",
        choices=available_objectives,
    )
    signals: tuple[Signal, ...] = _option(SIGNALS, "Signals whose selected tokens, together, are the key tokens")
    selection_ratio: tuple[float, ...] = _option(
        (0.2,), "Share of response tokens each signal selects: one for all, or one per signal", above=0, high=1
    )
    shift: Shift = _option(
        "signed",
        "Visual and temporal score: log-prob difference, its magnitude, or KL over the whole vocabulary",
    )
    shuffle_unit: ShuffleUnit = _option(
        "frame", "What the temporal counterfactual permutes: decoded frames, or pairs of frames already encoded"
    )
    num_shuffles: int = _option(1, "Random orders whose scores are averaged", low=1)
    scoring_precision: ScoringPrecision = _option(
        "same",
        "Products of the counterfactual passes: as in training, in bf16 (under an fp32 model, or one that trains in "
        "FP8), or in FP8 by fp8_recipe",
    )
    kl_beta: float = _option(0.04, "Weight of the KL term to the reference model; 0 = no reference model", low=0)
    clip_low: float = _option(0.2, "Probability ratio is clipped below at 1 - clip_low", low=0, high=1)
    clip_high: float = _option(0.2, "Probability ratio is clipped above at 1 + clip_high", low=0)
    updates_per_rollout: int = _option(1, "Optimizer steps on the same responses; clipping acts from 2 on", low=1)
    importance_sampling: ImportanceLevel = _option(
        "none",
        "Weigh each token's policy gradient by trainer / sampler probability, of the token or of its whole response, "
        "truncated at importance_cap",
    )
    importance_cap: float = _option(2.0, "Largest importance weight", above=0)
    importance_mask: tuple[float, ...] = _option(
        (), "Two bounds, e.g. 0.5,5: tokens whose trainer / sampler probability lies outside carry no loss; empty = off"
    )
    loss_aggregation: LossAggregation = _option(
        "sequence", "Mean over tokens then responses, or mean over all tokens of the global batch"
    )
    tw_alpha: float = _option(
        1.7, "tw_grpo: weight of the position where a group's responses differ most; where least, it is 1", low=1
    )
    tw_weight_gradient: bool = _option(
        False,
        "tw_grpo: let the gradient flow through the weights of positions too, as its release does; they are constants "
        "otherwise",
    )
    original_compat: bool = _option(
        False,
        "Do as the release of Video-KTR where we deviate: 1.0 s per temporal patch of every video in every pass, a "
        "signal whose scores are all equal selects all tokens, +inf is selected, length and length bonus count key "
        "tokens, a response without any makes the loss NaN (the step is skipped); see deviations.md",
    )
    scores_dtype: ScoresDtype = _option(
        "fp32",
        "With original_compat: bf16 rounds log-probs, entropies, scores and thresholds as the release's precision "
        "does, so that scores tie and more tokens are selected",
    )

    @property
    def is_supervised(self) -> bool:
        """Whether the responses are given in ``data_path``, so that nothing is sampled and nothing is rewarded."""
        return objective_entry(self.objective).is_supervised

    @property
    def fixed_seconds_per_grid(self) -> float | None:
        """The ``seconds_per_grid`` of every video in every pass, sampling included; None = each video's own value."""
        return 1.0 if self.original_compat else None

    @property
    def importance_bounds(self) -> tuple[float, float] | None:
        """``importance_mask`` as its two bounds; None = off."""
        if not self.importance_mask:
            return None
        low, high = self.importance_mask
        return low, high

    @property
    def ratio_of_signal(self) -> dict[str, float]:
        """The share of tokens that each signal selects. A single ``selection_ratio`` applies to every signal."""
        ratios = self.selection_ratio * (len(self.signals) if len(self.selection_ratio) == 1 else 1)
        return dict(zip(self.signals, ratios, strict=True))
