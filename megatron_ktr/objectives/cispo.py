"""CISPO (MiniMax-M1, arXiv 2506.13585): no token loses its gradient to a clip.

    loss = -(1 / N) sum_i sum_t stopgrad(min(ratio_it, cap)) * A_i * logp_it        N = tokens of the global batch

A is GRPO's, and there is no KL term. It differs from GRPO's gradient where a rollout has several updates
(``--mini-batches``, ``--updates-per-rollout``).
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="cispo",
        title="CISPO",
        summary="the policy gradient with the ratio as a capped constant, so that no token loses its gradient",
        build=build_policy_gradient,
        defaults={"ratio": "cispo", "loss_aggregation": "token", "kl_beta": 0.0},
    )
)
