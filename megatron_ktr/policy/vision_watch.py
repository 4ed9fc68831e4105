"""Whether the features of images and videos differ at all, and whether a gradient comes back to them.

    spread(X) = median over columns d of (max_n X_nd - min_n X_nd) / max_n |X_nd|      for rows n; 0 if all are equal

Of an update: ``token_spread`` is the spread over the visual tokens of a micro-batch, the largest of all micro-batches;
``video_spread`` that over the mean features of the different media of the step on this rank (there is none with a
single medium); ``gradient_max`` the largest element of the loss's gradient with respect to features, where the encoder
is trained; ``media_pull`` whether any response to media may have a gradient at all. Real features have spreads near 1;
equal ones have 0 or what rounding leaves.

Everything is found on the device in passes that run anyway, and read with the update's other numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.batch.micro_batch import WATCHED
from megatron_ktr.config.view_registry import visual_views
from megatron_ktr.objectives.base import Objective
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import RolloutGroup, TokenScores, TokenStreams

ALIKE = 0.02
"""A spread up to this is no difference: twice what rounding to bf16 leaves."""
NO_SHIFT = 1e-4
"""Nats: log-probs that differ by less do so by rounding, in fp32."""
VISION_FAULTS = ("vision/tokens_alike", "vision/videos_alike", "vision/no_gradient", "vision/no_shift")


class VisionWatch:
    """Collects what the passes with gradient of one update show, on ranks that hold the encoder."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._means: dict[bytes, Tensor] = {}
        """The mean features [D] of each medium of the step, by its key."""

    def see(self, features_ED: Tensor, *, keys: Sequence[bytes], sizes: Sequence[int]) -> None:
        """Looks at the features of the media of a micro-batch, ``sizes`` rows each, in order. Media with the same
        content have the same key."""
        seen_ED = features_ED.detach()
        self._add("token_spread", spread(seen_ED))
        for key, part_ED in zip(keys, seen_ED.split(list(sizes)), strict=True):
            self._means[key] = part_ED.float().mean(dim=0)
        if features_ED.requires_grad:
            features_ED.register_hook(self._see_gradient)

    def take(self) -> Metrics:
        """What was seen since the last call."""
        if len(self._means) > 1:
            self._add("video_spread", spread(torch.stack(list(self._means.values()))))
        taken, self._metrics, self._means = self._metrics, Metrics(), {}
        return taken

    def _see_gradient(self, gradient: Tensor) -> None:
        low, high = torch.aminmax(gradient)
        self._add("gradient_max", torch.maximum(-low, high).float())

    def _add(self, name: str, value: Tensor) -> None:
        self._metrics.add_later([WATCHED + name], value, are_maxima=True)


@torch.no_grad()
def media_pull(
    objective: Objective, streams: TokenStreams, scores: TokenScores, *, groups: Sequence[RolloutGroup]
) -> Metrics:
    """Whether any response that was given media may have a gradient, the largest number ``media_pull``; nothing without
    media. Only then should a gradient come to the features: beside texts, all answers to a video may be as good."""
    lengths = [(bool(one.prompt.media), len(answer.token_ids)) for one in groups for answer in one.rollouts]
    found = Metrics()
    if not any(has_media for has_media, _ in lengths):
        return found
    if not all(has_media for has_media, _ in lengths):
        shown = torch.tensor([float(has_media) for has_media, length in lengths for _ in range(length)])
        shown_R = send(shown, streams.weight_R.device)
        every_R = streams.all_weight_R
        streams = dataclasses.replace(
            streams,
            weight_R=streams.weight_R * shown_R,
            all_weight_R=None if every_R is None else every_R * shown_R,
        )
    pull = objective.any_gradient(streams, scores).float()
    found.add_later([f"{WATCHED}media_pull"], pull, are_maxima=True)
    return found


@torch.no_grad()
def spread(rows_ND: Tensor) -> Tensor:
    """The spread of the rows (see above), fp32 []."""
    low_D, high_D = torch.aminmax(rows_ND, dim=0)
    low_D, high_D = low_D.float(), high_D.float()
    size_D = torch.maximum(low_D.abs(), high_D.abs()).clamp_min(1e-30)
    return ((high_D - low_D) / size_D).median()


def take_watched(metrics: Metrics) -> dict[str, float]:
    """Takes the numbers that are no metrics out of those of an update: this watch's, and the largest score by view."""
    names = [name for name in metrics.maxima if name.startswith(WATCHED)]
    return {name.removeprefix(WATCHED): metrics.maxima.pop(name) for name in names}


def vision_faults(watched: Mapping[str, float], *, has_stepped: bool, noise: float = 0.0) -> dict[str, float]:
    """Those of ``VISION_FAULTS`` that the update shows, as metrics of value 1; none of an update without media.

    Args:
        watched: the numbers that ``take_watched`` returned.
        has_stepped: whether there was a gradient; without one it says nothing that none came to the features.
        noise: the size of score that rounding alone explains, in nats, if it has been measured.
    """
    if "token_spread" not in watched:
        return {}
    shifts = [watched[f"shift/{view}"] for view in visual_views() if f"shift/{view}" in watched]
    is_found = (
        watched["token_spread"] <= ALIKE,
        watched.get("video_spread", 1.0) <= ALIKE,
        has_stepped and watched.get("media_pull", 1.0) > 0.0 and watched.get("gradient_max", 1.0) == 0.0,
        bool(shifts) and max(shifts) <= max(NO_SHIFT, noise),
    )
    return {name: 1.0 for name, is_fault in zip(VISION_FAULTS, is_found, strict=True) if is_fault}
