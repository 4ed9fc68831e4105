"""Rules between the options of token selection. They hold for every objective that selects tokens.

Where ``selection`` is ``all``, as it is for GRPO, the other options of selection are passed over: a comparison of
algorithms changes the line of the objective, or of the control, and the other lines stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config.given import flag, is_given
from megatron_ktr.config.signal_registry import available_signals
from megatron_ktr.config.view_rules import view_problems

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


NOT_SUPERVISED = (
    "selection",
    "selection_count",
    "selection_rule",
    "selection_scope",
    "combine",
    "signal_weights",
    "token_weights",
    "weight_temperature",
    "dependence",
    "advantage_shaping",
    "shaping_min",
    "shaping_max",
)
"""Options that the likelihood of given responses does not have. (``signals``, ``selection_ratio`` and ``shift`` are
passed over, as they always were.)"""


def selection_problems(section: ObjectiveSection) -> Iterator[str]:
    """One sentence for each rule that the options break."""
    if section.is_supervised:
        yield from _supervised(section)
        return
    yield from _shaping(section)
    if section.selection_mode == "all":
        return
    if not section.signals:
        yield (
            f"--signals must name at least one of {', '.join(available_signals())} for --objective "
            f"{section.objective}; --selection all selects nothing"
        )
        return
    if len(set(section.signals)) != len(section.signals):
        yield f"--signals must be different ones, got {', '.join(section.signals)}"
    yield from _numbers(section)
    yield from _weights(section)
    yield from view_problems(section)
    yield from _compat(section)
    reads_dependence = "dependence" in section.signals or section.advantage_shaping == "dependence"
    if is_given(section, "dependence", objective=section.objective) and not reads_dependence:
        yield (
            f"--dependence {section.dependence} is not read: add the signal dependence, or --advantage-shaping "
            "dependence"
        )


def _supervised(section: ObjectiveSection) -> Iterator[str]:
    for name in NOT_SUPERVISED:
        if is_given(section, name, objective=section.objective):
            yield f"{flag(name)} is not read by --objective {section.objective}"


def _numbers(section: ObjectiveSection) -> Iterator[str]:
    """How many tokens each signal selects."""
    names = f"({len(section.signals)}: {', '.join(section.signals)})"
    for name, least in (("selection_ratio", 1), ("selection_count", 0)):
        values = getattr(section, name)
        if len(values) not in (least, 1, len(section.signals)):
            yield f"{flag(name)} needs 1 value or one per signal {names}, got {len(values)}"
        if len(set(values)) > 1 and section.combine == "weighted":
            yield (f"{flag(name)} needs 1 value with --combine weighted: tokens are selected once, by the weighted sum")
    if section.selection_count and is_given(section, "selection_ratio", objective=section.objective):
        yield "--selection-count and --selection-ratio both say how many tokens are selected: give one of them"


def _weights(section: ObjectiveSection) -> Iterator[str]:
    if section.signal_weights and section.combine != "weighted":
        yield f"--signal-weights is not read with --combine {section.combine}: add --combine weighted"
    elif len(section.signal_weights) not in (0, len(section.signals)):
        yield (
            f"--signal-weights needs one value per signal ({len(section.signals)}: {', '.join(section.signals)}), got "
            f"{len(section.signal_weights)}"
        )
    if section.weight_temperature != 1 and section.token_weights != "softmax":
        yield f"--weight-temperature is not read with --token-weights {section.token_weights}"
    if section.token_weights == "hard":
        return
    soft = f"--token-weights {section.token_weights}"
    if section.selection_mode != "signals":
        yield f"{soft} needs --selection signals: a control selects tokens and has no scores"
    if section.combine != "weighted" and len(section.signals) > 1:
        yield f"{soft} needs one score per token: give one signal, or --combine weighted"
    if section.selection_count:
        yield f"{soft} gives every token a weight: --selection-count is not read with it"
    unread = ("selection_rule",) if section.token_weights == "soft_mask" else ("selection_rule", "selection_ratio")
    for name in unread:
        if is_given(section, name, objective=section.objective):
            yield f"{soft} gives every token a weight: {flag(name)} is not read with it"


def _compat(section: ObjectiveSection) -> Iterator[str]:
    if section.scores_dtype != "fp32" and not section.original_compat:
        yield f"--scores-dtype {section.scores_dtype} needs --original-compat: it is there to reproduce the release"
    if not section.original_compat:
        return
    like_release = dict(
        selection_count=(),
        selection_rule="quantile",
        selection_scope="prompt",
        combine="union",
        token_weights="hard",
        visual_view="hidden",
        temporal_view="shuffled",
        min_shift=0.0,
    )
    for name, value in like_release.items():
        given = getattr(section, name)
        if given != value:
            shown = ",".join(map(str, given)) if isinstance(given, tuple) else given
            yield f"--original-compat does as the release, which has no {flag(name)} {shown}"


def _shaping(section: ObjectiveSection) -> Iterator[str]:
    if section.advantage_shaping == "none":
        for name in ("shaping_min", "shaping_max"):
            if is_given(section, name, objective=section.objective):
                yield f"{flag(name)} is not read with --advantage-shaping none"
        return
    if section.original_compat:
        yield "--original-compat does as the release of Video-KTR, which has no --advantage-shaping"
    low, high = section.shaping_min, section.shaping_max
    if high is not None and high < low:
        yield f"--shaping-min {low:g} exceeds --shaping-max {high:g}"
    if high is None and low > 1:
        yield f"--shaping-min {low:g} is above 1, the mean factor where --shaping-max is none"
