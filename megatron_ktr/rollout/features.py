"""Prompts on their way to an engine that runs no vision encoder: the trainer encodes each medium once, for all.

    drawn prompts -> encoder on the first pipeline stage, all tensor ranks, current weights
                  -> features [visual tokens, D] on the host, one tensor per medium, beside the frames
                  -> (collective engines only) over the pipeline to the ranks of the other stages

The reading rank is on the first stage, so an engine that lives there alone costs no communication. The features belong
to the step: the trainer's own groups never carry them, as they are stale after the next update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config.sections import RolloutSection
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.types import Prompt

if TYPE_CHECKING:
    from megatron_ktr.policy.policy import Policy

Encode = Callable[[Sequence[Prompt]], list[tuple[Tensor, ...]] | None]
"""Features of each prompt's media on the ranks of the first stage, None on the others (``Policy.vision_features``)."""


@dataclasses.dataclass(frozen=True)
class FeatureSender:
    """Gives prompts the trainer's features; every rank of a replica calls it with the same prompts."""

    encode: Encode
    ranks: ParallelGroups
    media: MediaSpec
    feature_size: int
    """D."""
    dtype: torch.dtype
    device: torch.device
    to_every_stage: bool = False
    """False: only ranks of the first stage are given features, the others their prompts as they came."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        features = self.encode(prompts)
        if self.to_every_stage and self.ranks.sizes.pipeline > 1:
            features = self._over_pipeline(prompts, features)
        if features is None:
            return list(prompts)
        return [_with_features(prompt, found) for prompt, found in zip(prompts, features, strict=True)]

    def _over_pipeline(
        self, prompts: Sequence[Prompt], features: list[tuple[Tensor, ...]] | None
    ) -> list[tuple[Tensor, ...]]:
        """Tensor by tensor, so that no rank holds more than the result; sizes follow from the grids."""
        received = []
        for index, prompt in enumerate(prompts):
            found = []
            for place, medium in enumerate(prompt.media):
                if features is not None:
                    feature_TD = features[index][place].contiguous()
                else:
                    shape = (self.media.num_visual_tokens(medium), self.feature_size)
                    feature_TD = torch.empty(shape, dtype=self.dtype, device=self.device)
                found.append(_from_first(feature_TD, self.ranks.pipeline).cpu())
            received.append(tuple(found))
        return received


def build_feature_sender(rollout: RolloutSection, *, policy: Policy, media: MediaSpec) -> FeatureSender | None:
    """``share_vision_features`` of a run; None where the engine encodes for itself."""
    if not rollout.share_vision_features:
        return None
    return FeatureSender(
        encode=policy.vision_features,
        ranks=policy.ranks,
        media=media,
        feature_size=policy.model_config.vision.out_hidden_size,
        dtype=policy.dtype,
        device=policy.platform.device,
        # Colocated engines live on every rank, a client of servers on the reading rank alone.
        to_every_stage=rollout.engine == "vllm_colocated",
    )


def _from_first(tensor: Tensor, group: ProcessGroup) -> Tensor:
    torch.distributed.broadcast(tensor, group=group, group_src=0)
    return tensor


def _with_features(prompt: Prompt, features: Sequence[Tensor]) -> Prompt:
    # Copies: slices of one encoder call would keep each other alive, and an engine may keep them for its cache.
    media = [
        dataclasses.replace(medium, features=feature_TD.detach().to("cpu", copy=True))
        for medium, feature_TD in zip(prompt.media, features, strict=True)
    ]
    return dataclasses.replace(prompt, media=tuple(media))
