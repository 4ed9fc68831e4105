"""GSPO (arXiv 2507.18071): the ratio to the old policy is that of the whole response.

    loss = -mean_i min(s_i * A_i, clamp(s_i, 1 - 3e-4, 1 + 4e-4) * A_i)        s_i: ``surrogates/sequence.py``

A is GRPO's, and there is no KL term, as in the paper. The authors split a rollout into four mini-batches
(``--mini-batches 4``); with one update per rollout every s_i is 1, and the gradient is GRPO's.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="gspo",
        title="GSPO",
        summary="the policy gradient with one clipped ratio for each response",
        build=build_policy_gradient,
        defaults={"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_beta": 0.0},
    )
)
