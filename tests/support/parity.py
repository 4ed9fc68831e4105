"""The same prompts and responses for our model (one packed batch) and for Hugging Face (one sequence per response).

Built here by hand, from the definitions in ``megatron_ktr/types.py``, so that a mistake in ``batch/packing.py`` cannot
hide behind itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.types import GroupSpan, PackedBatch, PackedLayout
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.mrope import mrope_positions
from tests.support.tiny import FIRST_SPECIAL_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VISION_END_ID, VISION_START_ID

PATCH_DIM = 3 * 2 * 14 * 14
MERGE = 2


@dataclass(frozen=True)
class Medium:
    kind: str
    grid: tuple[int, int, int]
    """Patches along time, height and width, before merging."""
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class Group:
    """A prompt with its media and responses, as plain tensors."""

    prompt: Tensor
    prompt_positions: Tensor
    """[3, prompt length]"""
    next_position: int
    media: tuple[Medium, ...]
    patches: tuple[Tensor, ...]
    responses: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    """Loss = -sum(weight * log-prob): a different weight per response token, so that no mix-up cancels."""


def make_group(
    config: Qwen2_5_VLConfig, *, media: Sequence[Medium], response_lengths: Sequence[int], seed: int
) -> Group:
    """Random text around the given media, random patches, random responses."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(0, FIRST_SPECIAL_ID, (length,), generator=generator).tolist()

    prompt = text(3)
    for index, medium in enumerate(media):
        num_tokens = medium.grid[0] * medium.grid[1] * medium.grid[2] // MERGE**2
        token = IMAGE_TOKEN_ID if medium.kind == "image" else VIDEO_TOKEN_ID
        prompt += [VISION_START_ID, *[token] * num_tokens, VISION_END_ID, *text(1 + index % 3)]
    prompt += text(2)
    positions, next_position = mrope_positions(
        prompt,
        grid_thw=[medium.grid for medium in media],
        kinds=[medium.kind for medium in media],
        seconds_per_grid=[medium.seconds_per_grid for medium in media],
        config=config,
    )
    return Group(
        prompt=torch.tensor(prompt),
        prompt_positions=positions,
        next_position=next_position,
        media=tuple(media),
        patches=tuple(torch.randn(m.grid[0] * m.grid[1] * m.grid[2], PATCH_DIM, generator=generator) for m in media),
        responses=tuple(torch.tensor(text(length)) for length in response_lengths),
        weights=tuple(torch.rand(length, generator=generator) for length in response_lengths),
    )


def pack(groups: Sequence[Group], *, pad_to_multiple: int = 1) -> PackedBatch:
    """One packed batch, padded with token 0 at position 0."""
    spans, tokens, positions, rows, visual, response_ids, group_ids = [], [], [], [], [], [], []
    start = num_responses = 0
    for index, group in enumerate(groups):
        prompt_length = len(group.prompt)
        is_visual = (group.prompt == IMAGE_TOKEN_ID) | (group.prompt == VIDEO_TOKEN_ID)
        visual.append(start + is_visual.nonzero()[:, 0])
        tokens.append(group.prompt)
        positions.append(group.prompt_positions)
        row = start + prompt_length
        for response in group.responses:
            length = len(response)
            tokens.append(response)
            positions.append((group.next_position + torch.arange(length)).expand(3, -1))
            rows += [start + prompt_length - 1, *range(row, row + length - 1)]
            response_ids += [num_responses] * length
            group_ids += [index] * length
            num_responses += 1
            row += length
        spans.append(GroupSpan(start, prompt_length, tuple(len(response) for response in group.responses)))
        start = row
    num_padding = -start % pad_to_multiple
    tokens.append(torch.zeros(num_padding, dtype=torch.long))
    positions.append(torch.zeros(3, num_padding, dtype=torch.long))
    patches = [patch for group in groups for patch in group.patches]
    grids = [medium.grid for group in groups for medium in group.media]
    return PackedBatch(
        view="intact",
        layout=PackedLayout(tuple(spans), num_padding=num_padding),
        token_ids_T=torch.cat(tokens),
        position_ids_3T=torch.cat(positions, dim=1),
        predicting_rows_R=torch.tensor(rows),
        target_ids_R=torch.cat([response for group in groups for response in group.responses]),
        response_R=torch.tensor(response_ids),
        group_R=torch.tensor(group_ids),
        visual_rows=torch.cat(visual),
        patches_SD=torch.cat(patches) if patches else None,
        grid_thw_M3=torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
    )


def weights_R(groups: Sequence[Group]) -> Tensor:
    """Loss weights in the order of ``pack``'s response tokens."""
    return torch.cat([weight for group in groups for weight in group.weights])


def hf_logprobs(model: HFModel, group: Group) -> list[Tensor]:
    """Log-probs of each response's tokens: one full sequence per response, naive log-softmax over full logits."""
    logprobs = []
    for response in group.responses:
        length = len(response)
        positions = torch.cat(
            [group.prompt_positions, (group.next_position + torch.arange(length)).expand(3, -1)], dim=1
        )
        logits = model(
            input_ids=torch.cat([group.prompt, response])[None],
            position_ids=positions[:, None],
            use_cache=False,
            **_media_inputs(group),
        ).logits[0]
        predicting = logits[len(group.prompt) - 1 : -1].log_softmax(dim=-1)
        logprobs.append(predicting.gather(1, response[:, None])[:, 0])
    return logprobs


def hf_reference(model: HFModel, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hugging Face's log-probs [R] and the gradients of -sum(weight * log-prob) by published parameter name."""
    model.zero_grad(set_to_none=True)
    collected = []
    for group in groups:
        logprobs = hf_logprobs(model, group)
        loss = -sum((w * lp).sum() for w, lp in zip(group.weights, logprobs, strict=True))
        loss.backward()
        collected += [lp.detach() for lp in logprobs]
    # In memory transformers 5 nests both halves under "model."; published checkpoints do not.
    gradients = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return torch.cat(collected), gradients


def max_relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest |g - g_hf| / max(|g_hf|, 1e-3 of the largest norm) over tensors, Frobenius norms.

    The floor keeps a tensor whose true gradient is nearly zero from being judged by its rounding noise.
    """
    floor = 1e-3 * max(float(gradient.norm()) for gradient in theirs.values())
    return max(
        float((ours[name] - gradient).norm()) / max(float(gradient.norm()), floor) for name, gradient in theirs.items()
    )


def _media_inputs(group: Group) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for kind, patch_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        chosen = [(m, p) for m, p in zip(group.media, group.patches, strict=True) if m.kind == kind]
        if chosen:
            inputs[patch_name] = torch.cat([patch for _, patch in chosen])
            inputs[f"{kind}_grid_thw"] = torch.tensor([medium.grid for medium, _ in chosen])
    return inputs
