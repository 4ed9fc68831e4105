"""Dr. GRPO (arXiv 2503.20783): GRPO without its two divisions, so that neither length nor difficulty is favoured.

    loss = -1 / (N L) sum_i sum_t ratio_it * (r_i - mean(r))        N = responses of the global batch

L is a constant, ``loss_constant``, by default ``max_response_length``. (The paper's code divides by the longest
response it can generate, too.) There is no KL term, as in the paper.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="dr_grpo",
        title="Dr. GRPO",
        summary="GRPO without the division by the deviation of rewards and by the length of responses",
        build=build_policy_gradient,
        defaults={"advantage": "group_mean", "loss_aggregation": "constant", "kl_beta": 0.0},
    )
)
