"""RLOO (arXiv 2402.14740): REINFORCE with a baseline from the other responses of the prompt.

    loss = -1 / (N L) sum_i sum_t ratio_it * A_i,    A_i = R_i - mean of R over the other responses of i's prompt
    R_i  = r_i - beta sum_t (logp_it - logp_reference_it)

The paper treats a response as one action, whose log-prob is the sum over its tokens. Its loss is this one without the
constant L (``loss_constant``, by default ``max_response_length``), which changes the scale of the gradient alone. beta
is 0.05, the default of TRL's RLOO trainer.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="rloo",
        title="RLOO",
        summary="REINFORCE with the mean reward of the other responses as the baseline, and the KL in the reward",
        build=build_policy_gradient,
        defaults={
            "advantage": "leave_one_out",
            "loss_aggregation": "constant",
            "kl_in_reward": True,
            "kl_kind": "k1",
            "kl_beta": 0.05,
        },
    )
)
