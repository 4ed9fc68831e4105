"""The strong baseline of ``run.py``: what a careful user makes of the weak one without touching the model.

Pinned, like the weak one, whose formulas it shares.

    the vision encoder runs once per content and model: intact (policy, with gradient), shuffled, intact (reference)
    logits of the rows that predict response tokens only
    the hidden view is text alone: no visual tokens, no encoder
    the prompt is still repeated for each of the G responses, in every pass; gradient checkpointing as before
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from benchmarks.step.baseline import (
    OtherLogprobs,
    Selected,
    StepNumbers,
    WeakBaseline,
    continued,
    entropy,
    finish_step,
    patches,
    text_positions,
    video_positions,
)
from megatron_ktr.types import RolloutGroup


class StrongBaseline(WeakBaseline):
    """Same models, optimizer and numbers."""

    def step(self, group: RolloutGroup, order: Tensor, *, tied: Selected | None = None) -> StepNumbers:
        (video,) = group.prompt.media
        response_GR = torch.tensor([rollout.token_ids for rollout in group.rollouts])
        prompt_P = torch.tensor(group.prompt.token_ids)
        is_visual_P = prompt_P == self.policy.config.video_token_id
        intact = (prompt_P, video_positions(self.policy, group), response_GR)
        # Without visual tokens the positions are those of plain text.
        text = (prompt_P[~is_visual_P], text_positions(is_visual_P)[:, ~is_visual_P], response_GR)
        grid = torch.tensor([video.grid_thw])
        features_ED = _features(self.policy, patches(video.frames_FCHW), grid)
        with torch.no_grad():
            shuffled_ED = _features(self.policy, patches(video.frames_FCHW[order]), grid)
            reference_ED = _features(self.reference, patches(video.frames_FCHW), grid)
            hidden_GR = _logprobs(self.policy, *text, features_ED=None)[0]
            shuffled_GR = _logprobs(self.policy, *intact, features_ED=shuffled_ED)[0]
            reference_GR = _logprobs(self.reference, *intact, features_ED=reference_ED)[0]
        logprob_GR, entropy_GR = _logprobs(self.policy, *intact, features_ED=features_ED)
        return finish_step(
            self.policy,
            self.optimizer,
            logprob_GR,
            entropy_GR=entropy_GR,
            others=OtherLogprobs(hidden_GR, shuffled_GR, reference_GR),
            rewards=[rollout.reward for rollout in group.rollouts],
            settings=self.settings,
            tied=tied,
        )


def _features(model: HFModel, patches_SD: Tensor, grid: Tensor) -> Tensor:
    return torch.cat(model.model.get_video_features(patches_SD, grid, return_dict=True).pooler_output)


def _logprobs(
    model: HFModel, prompt_P: Tensor, position_3P: Tensor, response_GR: Tensor, *, features_ED: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [G, R] of the response tokens."""
    num_responses, length = response_GR.shape
    token_GL = torch.cat([prompt_P.expand(num_responses, -1), response_GR], dim=1)
    embeds_GLD = model.get_input_embeddings()(token_GL)
    if features_ED is not None:
        is_visual_GL = torch.zeros_like(token_GL, dtype=torch.bool)
        is_visual_GL[:, : len(prompt_P)] = prompt_P == model.config.video_token_id
        embeds_GLD = embeds_GLD.masked_scatter(is_visual_GL[..., None], features_ED.repeat(num_responses, 1))
    hidden_GLD = model.model.language_model(
        inputs_embeds=embeds_GLD,
        position_ids=continued(position_3P, length)[:, None].expand(-1, num_responses, -1),
        use_cache=False,
    ).last_hidden_state
    logprob_GRV = model.lm_head(hidden_GLD[:, -length - 1 : -1]).log_softmax(dim=-1)
    return logprob_GRV.gather(2, response_GR[..., None])[..., 0], entropy(logprob_GRV)
