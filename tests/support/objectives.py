"""Policy gradients with the settings that a test names, as the options of a run would compose them."""

from __future__ import annotations

from typing import Any

from megatron_ktr.attribution.key_tokens import KeyTokens, build_key_tokens
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.objectives.penalties.kl import KL
from megatron_ktr.objectives.policy_gradient import PolicyGradient
from megatron_ktr.objectives.surrogates.clipped import Clipped
from megatron_ktr.objectives.tw_grpo import PositionWeights


def grpo(
    *,
    kl_beta: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    length_bonus: LengthBonus | None = None,
    **parts: Any,
) -> PolicyGradient:
    """GRPO; ``parts`` are other fields of ``PolicyGradient``."""
    return PolicyGradient(
        **{
            "surrogate": Clipped(clip_low, clip_high),
            "penalties": (KL(kl_beta),) if kl_beta else (),
            "bonuses": () if length_bonus is None else (length_bonus,),
            **parts,
        }
    )


def video_ktr(
    *, original_compat: bool = False, key_tokens: dict[str, Any] | None = None, **parts: Any
) -> PolicyGradient:
    """Video-KTR; ``key_tokens`` are options of the objective section."""
    selection = key_tokens_of(original_compat=original_compat, **(key_tokens or {}))
    return grpo(**{"name": "video_ktr", "selection": selection, "original_compat": original_compat, **parts})


def key_tokens_of(**options: Any) -> KeyTokens:
    """The selection of tokens that options of the objective section describe."""
    found = build_key_tokens(ObjectiveSection(**options))
    assert found is not None
    return found


def tw_grpo(*, alpha: float = 1.7, has_weight_gradient: bool = False, **parts: Any) -> PolicyGradient:
    """TW-GRPO, which averages over tokens."""
    weights = PositionWeights(alpha=alpha, has_weight_gradient=has_weight_gradient)
    return grpo(**{"name": "tw_grpo", "aggregation": "token", "shapings": (weights,), **parts})
