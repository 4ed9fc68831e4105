"""REINFORCE++ (arXiv 2501.03262): no baseline of the prompt; rewards are normalised over the global batch.

    loss = -(1 / N) sum_i sum_t ratio_it * A_i                         N = tokens of the global batch; clipped ratio
    A_i  = (R_i - mean_B(R)) / (std_B(R) + 1e-4),   R_i = r_i - beta sum_t (logp_it - logp_reference_it)

It needs no second response of a prompt: ``num_generations`` may be 1. Deviations: ``advantages/batch.py``. With the KL
in the reward, the moments of the batch need the log-probs of all responses before the update, which costs one more
pass over the intact view without gradient.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="reinforce_pp",
        title="REINFORCE++",
        summary="the policy gradient of rewards normalised over the global batch, without a baseline of the prompt",
        build=build_policy_gradient,
        defaults={
            "advantage": "batch",
            "loss_aggregation": "token",
            "kl_in_reward": True,
            "kl_kind": "k1",
            "kl_beta": 0.01,
        },
    )
)
