"""REINFORCE++ with a baseline (arXiv 2501.03262): the mean of the prompt is subtracted, then the batch normalises.

    loss = -(1 / N) sum_i sum_t [ratio_it * A_i - beta * k2_it]        N = tokens of the global batch; clipped ratio
    A_i  = (c_i - mean_B(c)) / (std_B(c) + 1e-4),   c_i = r_i - mean of i's group

Unlike GRPO it divides by one deviation for all prompts. The KL is a term of the loss by k2, whose expected gradient is
the one of KL(policy || reference). (ms-swift puts it into the reward: ``--kl-in-reward``.)
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="reinforce_pp_baseline",
        title="REINFORCE++ baseline",
        summary="rewards less the mean of their prompt, normalised over the global batch",
        build=build_policy_gradient,
        defaults={"advantage": "batch_baseline", "loss_aggregation": "token", "kl_kind": "k2", "kl_beta": 0.01},
    )
)
