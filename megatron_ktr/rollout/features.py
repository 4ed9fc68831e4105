"""Adds the trainer's vision features to prompts for an engine that runs no vision encoder; each medium is encoded once.

    drawn prompts -> encoder on the first pipeline stage, all tensor ranks, current weights
                  -> features [visual tokens, D] on the host, one tensor per medium, beside the frames
                  -> (collective engines only) over the pipeline to the ranks of the other stages

The reading rank is on the first stage, so an engine on reading ranks alone needs no communication. The features are
valid for one step only, because the next update changes the encoder. The trainer's own groups therefore never carry
them.
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
    """Adds the trainer's features to prompts. Every rank of a replica calls it with the same prompts."""

    encode: Encode
    ranks: ParallelGroups
    media: MediaSpec
    feature_size: int
    """The size D of a feature vector."""
    dtype: torch.dtype
    device: torch.device
    to_every_stage: bool = False
    """If False, only ranks of the first stage get prompts with features; the others get their prompts unchanged."""

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
        """Sends the features from the first stage to all others. They go tensor by tensor, so that no rank holds more
        than the result; receivers know the sizes from the grids."""
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
    """The sender for a run with ``share_vision_features``; None if the engine runs its own vision encoder."""
    if not rollout.share_vision_features:
        return None
    return FeatureSender(
        encode=policy.vision_features,
        ranks=policy.ranks,
        media=media,
        feature_size=policy.model_config.vision.out_hidden_size,
        dtype=policy.dtype,
        device=policy.platform.device,
        # Colocated engines have a part on every rank; the client of servers is on the reading rank only.
        to_every_stage=rollout.engine == "vllm_colocated",
    )


def _from_first(tensor: Tensor, group: ProcessGroup) -> Tensor:
    torch.distributed.broadcast(tensor, group=group, group_src=0)
    return tensor


def _with_features(prompt: Prompt, features: Sequence[Tensor]) -> Prompt:
    # Features are copied, because the slices of one encoder call share memory: an engine that keeps one of them in its
    # cache would keep the memory of all.
    media = [
        dataclasses.replace(medium, features=feature_TD.detach().to("cpu", copy=True))
        for medium, feature_TD in zip(prompt.media, features, strict=True)
    ]
    return dataclasses.replace(prompt, media=tuple(media))
