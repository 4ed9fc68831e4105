"""The weak baseline of ``run.py``: one Video-KTR step as it is usually written on Hugging Face's model.

Pinned: written once from the description, not to be tuned with the trainer. Nothing of ours is used but the data
classes of the input.

    prompt and pixels repeated for each of the G responses, vision encoder inside every pass
    four passes   policy (gradient checkpointing), video hidden, frames shuffled, reference model
    full logits of every row, log-softmax row by row, then the response's part
    hidden        the visual tokens stay, masked from all attention; positions are those of the remaining text
    selection     quantile of each signal's scores over the G responses, union
    loss          -mean_i 1 / |K_i| sum_K [ratio A - beta k3]; AdamW

Positions follow the transformers 4.49 rule and are handed over explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.types import RolloutGroup

Selected = dict[str, Tensor]
"""bool [G, R] by signal: entropy, visual, temporal."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class StepNumbers:
    """What two implementations of one step are compared by."""

    loss: float
    grad_norm: float
    """Of all parameters, before clipping."""
    logprob_GR: Tensor
    """Of the policy, before the step."""
    is_selected: Selected
    num_ties: int = 0
    """Tokens at a threshold that were chosen, or not, because the other side did."""


@dataclass(frozen=True)
class StepSettings:
    learning_rate: float = 2e-6
    weight_decay: float = 0.01
    clip_grad: float = 5.0
    selection_ratio: float = 0.2
    tie: float = 5e-5
    """Nats. Whether a score this near its threshold lies above it is a matter of rounding."""
    kl_beta: float = 0.04


PAPER = StepSettings()


class WeakBaseline:
    """Policy, reference model and optimizer; ``step`` is one update on one prompt group."""

    def __init__(self, policy_dir: Path, reference_dir: Path, *, settings: StepSettings = PAPER) -> None:
        self.settings = settings
        self.policy = _load(policy_dir).train()
        self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = _load(reference_dir).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self, group: RolloutGroup, order: Tensor, *, tied: Selected | None = None) -> StepNumbers:
        """
        Args:
            group: responses are of one length.
            order: [F], the frame shown in each place of the shuffled view.
            tied: what the other side selected: decides tokens whose scores lie at a threshold, and no others. One of
                them chosen differently would move the gradient by a percent.
        """
        response_GR = torch.tensor([rollout.token_ids for rollout in group.rollouts])
        with torch.no_grad():
            hidden_GR = self._logprobs(self.policy, group, response_GR, is_hidden=True)[0]
            shuffled_GR = self._logprobs(self.policy, group, response_GR, order=order)[0]
            reference_GR = self._logprobs(self.reference, group, response_GR)[0]
        logprob_GR, entropy_GR = self._logprobs(self.policy, group, response_GR)
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

    def _logprobs(
        self,
        model: HFModel,
        group: RolloutGroup,
        response_GR: Tensor,
        *,
        is_hidden: bool = False,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [G, R] of the response tokens."""
        (video,) = group.prompt.media
        frames_FCHW = video.frames_FCHW if order is None else video.frames_FCHW[order]
        num_responses, length = response_GR.shape
        prompt_P = torch.tensor(group.prompt.token_ids)
        is_visual_P = prompt_P == model.config.video_token_id
        positions_3P = text_positions(is_visual_P) if is_hidden else video_positions(model, group)
        token_GL = torch.cat([prompt_P.expand(num_responses, -1), response_GR], dim=1)
        mask_GL = torch.ones_like(token_GL)
        if is_hidden:
            mask_GL[:, : len(prompt_P)] -= is_visual_P.long()
        logits_GLV = model(
            input_ids=token_GL,
            attention_mask=mask_GL,
            position_ids=continued(positions_3P, length)[:, None].expand(-1, num_responses, -1),
            pixel_values_videos=patches(frames_FCHW).repeat(num_responses, 1),
            video_grid_thw=torch.tensor([video.grid_thw]).repeat(num_responses, 1),
            use_cache=False,
        ).logits
        logprobs, entropies = [], []
        for logits_LV, token_L in zip(logits_GLV[:, :-1], token_GL[:, 1:], strict=True):
            logprob_LV = logits_LV.log_softmax(dim=-1)
            logprobs.append(logprob_LV.gather(1, token_L[:, None])[-length:, 0])
            entropies.append(entropy(logprob_LV[-length:]))
        return torch.stack(logprobs), torch.stack(entropies)


@dataclass(frozen=True)
class OtherLogprobs:
    """Log-probs of the responses, [G, R], beside the policy's own on the intact video."""

    hidden_GR: Tensor
    shuffled_GR: Tensor
    reference_GR: Tensor


def finish_step(
    model: HFModel,
    optimizer: torch.optim.Optimizer,
    logprob_GR: Tensor,
    *,
    entropy_GR: Tensor,
    others: OtherLogprobs,
    rewards: list[float],
    settings: StepSettings,
    tied: Selected | None,
) -> StepNumbers:
    """From log-probs to the changed weights."""
    known_GR = logprob_GR.detach()
    scores = {"entropy": entropy_GR, "visual": known_GR - others.hidden_GR, "temporal": known_GR - others.shuffled_GR}
    selected, num_ties = {}, 0
    for name, score_GR in scores.items():
        above_GR = score_GR - torch.quantile(score_GR, 1 - settings.selection_ratio)
        selected[name] = above_GR >= 0
        if tied is not None:
            is_other_GR = (above_GR.abs() <= settings.tie) & (tied[name] != selected[name])
            selected[name], num_ties = selected[name] ^ is_other_GR, num_ties + int(is_other_GR.sum())
    is_key_GR = torch.stack(list(selected.values())).any(dim=0)
    reward_G = torch.tensor(rewards)
    advantage_G = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-4)
    difference_GR = (others.reference_GR - logprob_GR).clamp(-10, 10)
    k3_GR = difference_GR.exp() - difference_GR - 1
    gain_GR = (logprob_GR - known_GR).exp() * advantage_G[:, None] - settings.kl_beta * k3_GR
    loss = -((gain_GR * is_key_GR).sum(1) / is_key_GR.sum(1).clamp(min=1)).mean()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return StepNumbers(float(loss.detach()), float(grad_norm), known_GR, selected, num_ties)


@torch.no_grad()
def entropy(logprob_RV: Tensor) -> Tensor:
    return -(logprob_RV.exp() * logprob_RV).sum(dim=-1)


def patches(frames_FCHW: Tensor) -> Tensor:
    """[S, 1176] in the order of Hugging Face's processors, normalised; an even number of frames."""
    pixels = frames_FCHW.float().div(255).sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None])
    frames, channels, height, width = pixels.shape
    split = pixels.reshape(frames // 2, 2, channels, height // 28, 2, 14, width // 28, 2, 14)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * 2 * 14 * 14)


def video_positions(model: HFModel, group: RolloutGroup) -> Tensor:
    """M-RoPE positions [3, P] of a prompt with one video: text counts, the video is a box that starts where the text
    ended, and text goes on after the largest position of any axis."""
    (video,) = group.prompt.media
    is_visual_P = torch.tensor(group.prompt.token_ids) == model.config.video_token_id
    first = int(is_visual_P.int().argmax())
    num_t, num_h, num_w = video.grid_thw[0], video.grid_thw[1] // 2, video.grid_thw[2] // 2
    box = torch.cartesian_prod(torch.arange(num_t), torch.arange(num_h), torch.arange(num_w)).T.clone()
    box[0] = (box[0] * (video.seconds_per_grid * model.config.vision_config.tokens_per_second)).long()
    before = torch.arange(first).expand(3, -1)
    after = torch.arange(len(is_visual_P) - first - box.shape[1]).expand(3, -1)
    return torch.cat([before, first + box, first + int(box.max()) + 1 + after], dim=1)


def text_positions(is_visual_P: Tensor) -> Tensor:
    """Positions [3, P] that count the text alone; what a visual token has is not read."""
    return ((~is_visual_P).long().cumsum(0) - 1).clamp(min=0).expand(3, -1)


def continued(position_3P: Tensor, length: int) -> Tensor:
    """[3, P + length]: a response follows."""
    response = int(position_3P.max()) + 1 + torch.arange(length)
    return torch.cat([position_3P, response.expand(3, -1)], dim=1)


def _load(directory: Path) -> HFModel:
    return HFModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
