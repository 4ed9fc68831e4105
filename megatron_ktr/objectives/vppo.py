"""VPPO (arXiv 2510.09285): the tokens that depend most on the picture, and more of the responses that do.

    loss     = -(1 / N) sum_i sum_t m_it surrogate_it  +  0.06 (1 / N) sum_i sum_t (-log p(o_it))
    S_it     = KL(p_intact || p_blackened) at token t of response i            ``attribution/signals/dependence.py``
    m_it     = 1 on the ceil(0.4 |o_i|) tokens of response i with the largest S                        rank selection
    A'_i     = alpha_i A_i, alpha_i from 0.9, growing with the mean of S over the response   ``attribution/shaping.py``
    surrogate = min(ratio A', clamp(ratio, 0.8, 1.28) A'), and at least 3 A' where A' < 0                    dual clip

N is the number of response tokens of the global batch, selected or not. Half of the picture's area is blackened, in
random patches (``attribution/views/patches.py``). There is no KL to a reference model. The second term lowers the
entropy of the sampled tokens, as the authors do.

Deviations from the paper and its release:
1. S is the KL over the whole vocabulary, as the paper's equation 3 has it. The release computes k3 of the sampled
   token; ``--dependence k3`` does so too.
2. The paper's equation 6 averages over responses; the release averages over tokens, as this does.
3. alpha is exact over the global batch; in the release it depends on the split into micro-batches. Its mean over the
   responses of the batch is 1.
4. Patches are the squares of visual tokens, the same for all responses of a prompt, and videos are blackened too. In
   the release each response has patches of its own and videos stay as they are.
5. Of tokens with equal S, the earlier is taken. Responses whose S are all equal (nothing to see) have no key tokens.
6. With several updates per rollout, all of them use S and alpha of the first.

The authors train with rewards for accuracy alone, 8 responses at top-p 0.99, and three updates per rollout of 384
prompts (``--mini-batches 3``).
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="vppo",
        title="VPPO",
        summary="the loss of DAPO on the tokens of each response that depend most on the picture, with advantages that "
        "grow with the dependence of the response",
        build=build_policy_gradient,
        defaults={
            "selection": "signals",
            "signals": ("dependence",),
            "selection_ratio": (0.4,),
            "selection_rule": "rank",
            "selection_scope": "response",
            "advantage_shaping": "dependence",
            "visual_view": "patches",
            "masked_denominator": "all",
            "loss_aggregation": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "dual_clip": 3.0,
            "kl_beta": 0.0,
            "sampled_entropy_penalty": 0.06,
        },
    )
)
