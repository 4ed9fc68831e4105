"""GRPO (arXiv 2402.03300), as Video-R1 trains it: every response token carries the loss.

    loss = -mean_i (1 / |o_i|) sum_t [ratio_it * A_i - beta * k3_it]            i over all responses of the batch

It is the composition of default parts; deviations are listed in ``policy_gradient.py``.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="grpo",
        title="GRPO",
        summary="the policy gradient of group-relative advantages, on every response token",
        build=build_policy_gradient,
    )
)
