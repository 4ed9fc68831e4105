"""Hugging Face's side of an update: one sequence per response and view, full logits, ordinary autograd.

Gives ``ReferenceResponse`` objects, from which the formulas of ``reference_ktr.py`` and its siblings make losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.attribution.counterfactuals import draw_permutations
from megatron_ktr.types import RolloutGroup, VisualInput
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.mrope import mrope_positions
from tests.support.reference_ktr import ReferenceResponse, predicting_logits
from tests.support.tiny import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, save_tiny_hf


@dataclass(frozen=True)
class Models:
    policy: HFModel
    reference: HFModel
    policy_dir: Path
    reference_dir: Path
    config: Qwen2_5_VLConfig

    @classmethod
    def save(cls, policy_dir: Path, reference_dir: Path) -> Models:
        """Two tiny random models, written to the directories."""
        policy, reference = save_tiny_hf(policy_dir), save_tiny_hf(reference_dir, seed=7)
        return cls(policy, reference, policy_dir, reference_dir, Qwen2_5_VLConfig.from_hf(policy_dir))


def _patches(frames_FCHW: Tensor) -> Tensor:
    """Patches by loops, in the order transformers wants: blocks of 2 x 2 patches together, an odd frame repeated."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None, None]
    pixels = frames_FCHW.float().transpose(0, 1) / 255
    if pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], dim=1)
    pixels = (pixels - mean) / std
    _, num_frames, height, width = pixels.shape
    return torch.stack(
        [
            pixels[:, f : f + 2, y + dy : y + dy + 14, x + dx : x + dx + 14].flatten()
            for f in range(0, num_frames, 2)
            for y in range(0, height, 28)
            for x in range(0, width, 28)
            for dy in (0, 14)
            for dx in (0, 14)
        ]
    )


def _logits(
    model: HFModel, group: RolloutGroup, media: Sequence[VisualInput], *, config: Qwen2_5_VLConfig
) -> list[Tensor]:
    """Logits that predict each response's tokens, given ``media`` (none: without visual tokens in the prompt)."""
    prompt = [t for t in group.prompt.token_ids if media or t not in (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID)]
    positions_3P, next_position = mrope_positions(
        prompt,
        grid_thw=[medium.grid_thw for medium in media],
        kinds=[medium.kind for medium in media],
        seconds_per_grid=[medium.seconds_per_grid for medium in media],
        config=config,
    )
    inputs: dict[str, Tensor] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if chosen := [medium for medium in media if medium.kind == kind]:
            inputs[name] = torch.cat([_patches(medium.frames_FCHW) for medium in chosen])
            inputs[f"{kind}_grid_thw"] = torch.tensor([medium.grid_thw for medium in chosen])
    found = []
    for rollout in group.rollouts:
        response_3N = (next_position + torch.arange(len(rollout.token_ids))).expand(3, -1)
        logits = model(
            input_ids=torch.tensor([[*prompt, *rollout.token_ids]]),
            position_ids=torch.cat([positions_3P, response_3N], dim=1)[:, None],
            use_cache=False,
            **inputs,
        ).logits[0]
        found.append(predicting_logits(logits, prompt_length=len(prompt)))
    return found


def score_responses(
    models: Models,
    groups: Sequence[RolloutGroup],
    *,
    unit: str = "frame",
    visual_view: Callable[[RolloutGroup], Sequence[VisualInput]] = lambda group: (),
) -> list[list[ReferenceResponse]]:
    """Everything the formulas ask for, without gradient. ``visual_view`` gives the media in the place of the hidden
    ones; by default there are none."""
    found = []
    with torch.no_grad():
        for group in groups:
            media = group.prompt.media
            options = dict(config=models.config)
            views = dict(
                intact=_logits(models.policy, group, media, **options),
                reference=_logits(models.reference, group, media, **options),
            )
            if media:
                views["hidden"] = _logits(models.policy, group, visual_view(group), **options)
            orders = draw_permutations(group.prompt, unit=unit, seed=0, step=0)
            if any(order is not None for order in orders):
                shuffled = [
                    medium if order is None else dataclasses.replace(medium, frames_FCHW=medium.frames_FCHW[order])
                    for medium, order in zip(media, orders, strict=True)
                ]
                views["shuffled"] = _logits(models.policy, group, shuffled, **options)
            found.append(
                [
                    ReferenceResponse(
                        rollout.token_ids,
                        reward=rollout.reward,
                        accuracy=rollout.rewards["accuracy"],
                        **{view: logits[index] for view, logits in views.items()},
                    )
                    for index, rollout in enumerate(group.rollouts)
                ]
            )
    return found


def with_gradient(
    model: HFModel, config: Qwen2_5_VLConfig, groups: Sequence[RolloutGroup], responses: list, *, old: bool = False
) -> list[list[ReferenceResponse]]:
    """The responses with differentiable intact logits; ``old``: their present ones become the old policy's."""
    found = []
    for group, known in zip(groups, responses, strict=True):
        logits = _logits(model, group, group.prompt.media, config=config)
        found.append(
            [
                dataclasses.replace(response, intact=fresh, old_policy=response.intact if old else None)
                for response, fresh in zip(known, logits, strict=True)
            ]
        )
    return found


def gradients_of(model: HFModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def published_name(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
