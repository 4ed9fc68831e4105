"""The options of what is optimised, and of which tokens carry it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_ktr.config.cli import LARGEST_NUMBER
from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import MOST_PROMPTS, MOST_STEPS, MOST_THRESHOLD, MOST_TOKENS, MOST_WEIGHT
from megatron_ktr.config.loss_parts import advantage_names, ratio_names
from megatron_ktr.config.objective_registry import available_objectives, objective_entry
from megatron_ktr.config.signal_registry import available_signals
from megatron_ktr.config.view_registry import temporal_views, visual_views
from megatron_ktr.config.words import (
    SIGNALS,
    AdvantageOver,
    AdvantageShaping,
    Combine,
    Dependence,
    ImportanceLevel,
    KlKind,
    LossAggregation,
    PatchUnit,
    Scope,
    ScoresDtype,
    ScoringPrecision,
    Selection,
    SelectionRule,
    Shift,
    ShuffleUnit,
    TokenSet,
    TokenWeights,
)
from megatron_ktr.config.yaml_values import shorten

AUTO = "auto"


def parse_min_shift(value: Any) -> float | str:
    """The value of ``min_shift``: a number of at least 0, or ``AUTO``. Raises ``ValueError`` for anything else."""
    if value == AUTO:
        return AUTO
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):  # no number, or a whole one that no float holds
        number = math.nan
    if not 0 <= number < LARGEST_NUMBER:
        raise ValueError(f"expected a number >= 0, or {AUTO}, got {shorten(value)}")
    return number


@dataclass(frozen=True)
class ObjectiveSection:
    """What is optimised, and which tokens carry it."""

    objective: str = _option(
        "video_ktr",
        "Training objective (see the table below)",
        choices=available_objectives,
    )
    selection: Selection | None = _option(
        None,
        "Which tokens carry the loss: those that the signals select, or a control: random = as many, drawn by chance; "
        "complement = the others; all = every token (the options of selection are then passed over); none = what the "
        "objective says, signals or all",
    )
    signals: tuple[str, ...] = _option(
        SIGNALS, "Signals whose selected tokens, together, are the key tokens", choices=available_signals
    )
    selection_ratio: tuple[float, ...] = _option(
        (0.2,), "Share of response tokens each signal selects: one for all, or one per signal", above=0, high=1
    )
    selection_count: tuple[int, ...] = _option(
        (),
        "Number of tokens each signal selects in every scope, in place of a share: one for all, or one per signal; "
        "empty = selection_ratio",
        low=1,
        high=MOST_TOKENS,
    )
    selection_rule: SelectionRule = _option(
        "quantile",
        "How a share is taken: every score at or above the scope's quantile, ties included, or exactly "
        "ceil(share x tokens) by rank",
    )
    selection_scope: Scope = _option(
        "prompt",
        "Tokens whose scores are compared: those of one response, of a prompt's responses, or of the global batch (one "
        "more pass without gradient)",
    )
    combine: Combine = _option(
        "union",
        "Key tokens: those that any signal selects, those that every signal selects, or the top share of the weighted "
        "sum of the signals' ranks",
    )
    signal_weights: tuple[float, ...] = _option(
        (), "combine weighted: the weight of each signal; empty = all alike", above=0, high=MOST_WEIGHT
    )
    token_weights: TokenWeights = _option(
        "hard",
        "hard = key tokens alone carry the loss; otherwise every token does, weighted by the rank of its score in the "
        "scope (rank = linear; sigmoid = the release's form), by softmax of the score, or by VPPO's soft mask, whose "
        "mean is selection_ratio; the first three have mean 1",
    )
    weight_temperature: float = _option(
        1.0, "token_weights softmax: the scores are divided by it", above=0, high=MOST_WEIGHT
    )
    dependence: Dependence = _option(
        "kl",
        "The signal dependence, and shaping by it: KL from the intact to the visual view over the whole vocabulary, or "
        "its estimate from the sampled token, clamped to [0, 10] (the release of VPPO)",
    )
    advantage_shaping: AdvantageShaping = _option(
        "none",
        "dependence = multiply advantages by a factor that grows with the response's mean dependence (VPPO)",
    )
    shaping_min: float = _option(
        0.9, "Factor of the response of the global batch that depends least on what it saw", low=0, high=MOST_WEIGHT
    )
    shaping_max: float | None = _option(
        None,
        "Factor of the one that depends most; none = such that the mean over the batch is 1",
        low=0,
        high=MOST_WEIGHT,
    )
    shift: Shift = _option(
        "signed",
        "Visual and temporal score: log-prob difference, its magnitude, or KL over the whole vocabulary",
    )
    shuffle_unit: ShuffleUnit = _option(
        "frame", "What the temporal counterfactual permutes: decoded frames, or pairs of frames already encoded"
    )
    num_shuffles: int = _option(
        1,
        "Draws of each random view (orders of frames, black patches, noise) whose scores are averaged",
        low=1,
        high=1000,
    )
    visual_view: str = _option(
        "hidden",
        "What the visual signal compares with: the media hidden, a random part of each picture black, noise on every "
        "pixel, or another question's media",
        choices=visual_views,
    )
    temporal_view: str = _option(
        "shuffled",
        "What the temporal signal compares with: the videos' frames in random order, or in reverse order",
        choices=temporal_views,
    )
    patch_share: float = _option(0.5, "visual_view patches: share of a medium's patches that is black", above=0, high=1)
    patch_unit: PatchUnit = _option(
        "merged", "visual_view patches: what is black as a whole, a visual token's square or a patch of the encoder"
    )
    noise_std: float = _option(
        2.0,
        "visual_view noise: standard deviation, in those of natural pictures (normalised pixels)",
        above=0,
        high=MOST_WEIGHT,
    )
    noise_every: int = _option(
        0,
        "Steps between two measurements of how much the scores of signals change by rounding alone, each two more "
        "intact passes without gradient; 0 = never",
        low=0,
        high=MOST_STEPS,
    )
    min_shift: float | str = _option(
        0.0,
        "Smallest visual and temporal score (nats) that is selected: 0 = no limit (the paper), a number, or auto = "
        "the noise that noise_every measured",
        parse=parse_min_shift,
    )
    scoring_precision: ScoringPrecision = _option(
        "same",
        "Products of the counterfactual passes: as in training, in bf16 (under an fp32 model, or one that trains in "
        "FP8), or in FP8 by fp8_recipe",
    )
    kl_beta: float = _option(
        0.04, "Weight of the KL term to the reference model; 0 = no reference model", low=0, high=MOST_WEIGHT
    )
    clip_low: float = _option(0.2, "Probability ratio is clipped below at 1 - clip_low", low=0, high=1)
    clip_high: float = _option(0.2, "Probability ratio is clipped above at 1 + clip_high", low=0, high=MOST_WEIGHT)
    updates_per_rollout: int = _option(
        1,
        "How often a step's responses are trained on; clipping acts from 2 optimizer steps on (see mini_batches)",
        low=1,
        high=1000,
    )
    importance_sampling: ImportanceLevel = _option(
        "none",
        "Weigh each token's policy gradient by trainer / sampler probability, of the token or of its whole response, "
        "truncated at importance_cap",
    )
    importance_cap: float = _option(2.0, "Largest importance weight", above=0, high=MOST_THRESHOLD)
    importance_mask: tuple[float, ...] = _option(
        (),
        "Two bounds, e.g. 0.5,5: tokens whose trainer / sampler probability lies outside carry no loss; empty = off",
        low=0,
        high=MOST_THRESHOLD,
    )
    loss_aggregation: LossAggregation = _option(
        "sequence",
        "Mean over tokens then responses; mean over all tokens of the global batch; or sum over tokens / (responses x "
        "loss_constant)",
    )
    loss_constant: int | None = _option(
        None,
        "With loss_aggregation constant: tokens that every response counts as; none = max_response_length",
        low=1,
        high=MOST_TOKENS,
    )
    masked_denominator: TokenSet = _option(
        "key", "Tokens that the means of the loss divide by: those that carry the policy gradient, or all"
    )
    advantage: str = _option(
        "group",
        "What a reward is compared with: mean and deviation of its group (GRPO), the group's mean (Dr. GRPO), the mean "
        "of the others in it (RLOO), mean and deviation of the global batch (REINFORCE++), or these after the group's "
        "mean was subtracted",
        choices=advantage_names,
    )
    advantage_over: AdvantageOver = _option(
        "responses", "With advantage batch or batch_baseline: mean and deviation over responses, or over tokens"
    )
    ratio: str = _option(
        "token",
        "Probability ratio to the old policy: clipped, of each token or of the whole response (GSPO; sequence_token: "
        "with each token's own gradient), or as a capped constant (CISPO)",
        choices=ratio_names,
    )
    ratio_cap: float = _option(5.0, "With ratio cispo: largest ratio", above=0, high=MOST_THRESHOLD)
    dual_clip: float | None = _option(
        None,
        "With ratio token: largest ratio of a token of negative advantage, e.g. 3; none = no limit",
        above=1,
        high=MOST_THRESHOLD,
    )
    kl_kind: KlKind = _option(
        "k3",
        "The KL to the reference model: an estimate from the sampled token (k3_plus: the value of k3, the gradient of "
        "k2), or full: over the whole vocabulary",
    )
    kl_in_reward: bool = _option(
        False, "Subtract kl_beta x the KL of the whole response from its reward, in place of a term of the loss"
    )
    kl_on: TokenSet = _option("key", "Tokens of the KL term: those that carry the policy gradient, or all")
    measure_full_kl: bool = _option(
        False,
        "Report the KL to the reference model over the whole vocabulary, mean over response tokens, as the metric "
        "kl_full, whatever the loss uses; kl_kind full reports it anyway",
    )
    entropy_bonus: float = _option(
        0.0, "Weight of the mean entropy of the key tokens, which the loss raises; 0 = off", low=0, high=MOST_WEIGHT
    )
    sampled_entropy_penalty: float = _option(
        0.0,
        "Weight of the mean -log-prob of all response tokens, which the loss lowers; 0 = off",
        low=0,
        high=MOST_WEIGHT,
    )
    mini_batches: int = _option(
        1,
        "Parts of equal size into which the prompts of a step are split, in the order they were drawn; each takes an "
        "optimizer step of its own, with ratios to the policy before the first",
        low=1,
        high=MOST_PROMPTS,
    )
    tw_alpha: float = _option(
        1.7,
        "tw_grpo: weight of the position where a group's responses differ most; where least, it is 1",
        low=1,
        high=MOST_WEIGHT,
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
    def num_updates(self) -> int:
        """The optimizer steps of a training step."""
        return self.updates_per_rollout * self.mini_batches

    @property
    def fixed_seconds_per_grid(self) -> float | None:
        """The ``seconds_per_grid`` of every video in every pass, sampling included; None = each video's own value."""
        return 1.0 if self.original_compat else None

    @property
    def selection_mode(self) -> Selection:
        """Which tokens carry the loss: ``selection``, or what the objective says."""
        return self.selection or objective_entry(self.objective).defaults.get("selection", "all")

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
        return self._by_signal(self.selection_ratio)

    @property
    def count_of_signal(self) -> dict[str, int]:
        """The number of tokens that each signal selects; empty where it selects a share."""
        return self._by_signal(self.selection_count) if self.selection_count else {}

    @property
    def weight_of_signal(self) -> dict[str, float]:
        """The weight of each signal in a weighted sum; empty where all have the same."""
        return self._by_signal(self.signal_weights) if self.signal_weights else {}

    def _by_signal(self, values: tuple[Any, ...]) -> dict[str, Any]:
        given = values * (len(self.signals) if len(values) == 1 else 1)
        return dict(zip(self.signals, given, strict=True))
