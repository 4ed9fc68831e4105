"""DAPO (arXiv 2503.14476): GRPO with a mean over tokens, clip-higher, dynamic sampling and no KL term.

    loss = -(1 / N) sum_i sum_t min(ratio_it * A_i, clamp(ratio_it, 0.8, 1.28) * A_i)    N = tokens of the global batch

Dynamic sampling replaces groups of equal rewards by those of further prompts (``filter_groups``). The soft penalty of
overlong responses is a reward: ``--reward-functions accuracy,format,overlong``. The authors train on a rollout in 16
mini-batches (``--mini-batches 16``); with one update per rollout no ratio is clipped.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="dapo",
        title="DAPO",
        summary="GRPO with a mean over tokens, a higher upper clip, dynamic sampling and no KL",
        build=build_policy_gradient,
        defaults={
            "loss_aggregation": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "kl_beta": 0.0,
            "filter_groups": "equal",
        },
    )
)
