"""80/20 (arXiv 2506.01939): the policy gradient of the fifth of all tokens whose next word was least certain.

    loss = -(1 / N) sum_i sum_t [H_it >= tau] min(ratio_it * A_i, clamp(ratio_it, 0.8, 1.28) * A_i)
    H_it = entropy of the policy at token t of response i, over the full vocabulary and at the sampling temperature
    tau  = quantile of H at 0.8 over the global batch             N = all response tokens of the global batch

It is DAPO's loss (``dapo.py``) with a mask. N counts all tokens, selected or not.

Deviations:
1. tau is exact over the global batch, whatever the number of replicas and micro-batches; TRL and ms-swift take it for
   each micro-batch. ``--selection-scope prompt`` takes it for each prompt instead, as ``--objective video_ktr
   --signals entropy`` does.
2. With several updates per rollout, all of them use the entropies of the first; the paper takes the current policy's.
3. Dynamic sampling of prompts and the overlong penalty are options of their own, as with DAPO.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="entropy_80_20",
        title="80/20",
        summary="the loss of DAPO on the fifth of all tokens of the global batch with the highest entropy",
        build=build_policy_gradient,
        defaults={
            "selection": "signals",
            "signals": ("entropy",),
            "selection_ratio": (0.2,),
            "selection_scope": "batch",
            "masked_denominator": "all",
            "loss_aggregation": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "kl_beta": 0.0,
        },
    )
)
