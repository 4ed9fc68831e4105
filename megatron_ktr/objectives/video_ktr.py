"""Video-KTR (arXiv 2601.19686): GRPO on key tokens only.

    loss = -mean_i (1 / |K_i|) sum_{t in K_i} [ratio_it * A_i - beta * k3_it]
    K_i  = tokens of response i selected by any enabled signal of {entropy, visual, temporal}, each taking the top
           20% of the scores of the prompt's G responses together (``attribution/``)

The subsets of the signals are the rows of the paper's ablation table. ``signals: [entropy]`` alone is the "80/20"
recipe (train on the 20% of tokens with the highest entropy), with the top 20% taken within each prompt's group.

Deviations from the authors' code (``original_compat`` restores 1 to 3 here, and 4 and 5 where prompts are loaded; the
whole list: docs/deviations.md):
1. A response without key tokens adds zero to the loss and still counts in the mean; theirs divides 0 by 0.
2. The length bonus and the logged length count all tokens of a response; theirs count its key tokens.
3. A degenerate signal (nothing to hide or shuffle, or all scores equal) selects nothing; theirs selects all tokens. An
   infinite score is never selected; theirs selects +inf. Scores are fp32; theirs are bf16, where many scores tie
   (``scores_dtype``).
4. Videos keep their timing; theirs assumes 1.0 s per temporal patch in every pass, sampling included
   (``PreprocessSettings.fixed_seconds_per_grid``).
5. A prompt whose video cannot be used is skipped and counted; theirs keeps the question and shows one fixed other
   file in place of the video (``PromptLoader(substitutes=...)``).
6. One shuffled order is drawn per prompt and step, and it is never the identity. No option restores their order.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.objectives.policy_gradient import build_policy_gradient

register(
    ObjectiveEntry(
        name="video_ktr",
        title="Video-KTR",
        summary="the loss of GRPO on key tokens only, which entropy, sight of the video and order of its frames select",
        build=build_policy_gradient,
        defaults={"selection": "signals"},
        own_options=("scores_dtype",),
    )
)
