"""The vision encoders of policy and reference model, which supply the model's passes with vision features.

The object exists on every rank, but only ranks of the first pipeline stage hold encoders. On other ranks batches stay
as they are and ``features`` returns None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_ktr.config.sections import ParallelSection
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.policy.roles import ModelRole
from megatron_ktr.policy.vision_pass import VisionPass, sum_gradients
from megatron_ktr.policy.vision_watch import VisionWatch
from megatron_ktr.types import PackedBatch, Prompt, VisualInput
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec
from models.qwen2_5_vl.vision import VisionEncoder


class PolicyVision:
    """The vision passes of the policy and the reference model: one each, or one that both models share."""

    def __init__(
        self,
        encoder: VisionEncoder | None,
        *,
        parallel: ParallelSection,
        ranks: ParallelGroups,
        hf_dir: Path,
        device: torch.device,
    ) -> None:
        """``encoder`` is the policy's vision encoder; None on pipeline stages without one."""
        self._parallel, self._ranks, self._device = parallel, ranks, device
        self._media = media_spec(
            Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings.from_model(hf_dir).patchify
        )
        self._encoder = encoder
        self.watch = VisionWatch()
        self._passes: dict[ModelRole, VisionPass | None]
        self._passes = {ModelRole.POLICY: self._pass(encoder), ModelRole.REFERENCE: None}

    def add_reference(self, encoder: VisionEncoder | None, *, is_policy_copy: bool) -> None:
        """Adds the reference model's encoder. ``is_policy_copy`` says that it starts with the policy's weights; if
        these are frozen, both models then share one pass and its cache."""
        policy = self._passes[ModelRole.POLICY]
        is_shared = is_policy_copy and policy is not None and not policy.is_trainable
        self._passes[ModelRole.REFERENCE] = policy if is_shared else self._pass(encoder)

    def with_features(self, batch: PackedBatch, *, model: ModelRole) -> PackedBatch:
        """The batch with the features of its media, for the model chunk that embeds them."""
        vision = self._passes[model]
        if vision is None or not batch.media:
            return batch
        features_ED = vision.features(batch.media)
        if model is ModelRole.POLICY and torch.is_grad_enabled() and features_ED is not None:
            sizes = [self._media.num_visual_tokens(medium) for medium in batch.media]
            keys = [vision.units_of(medium)[0].key for medium in batch.media]
            self.watch.see(features_ED, keys=keys, sizes=sizes)
        return dataclasses.replace(batch, features_ED=features_ED)

    def prepare(self, batches: Sequence[PackedBatch]) -> None:
        """Runs the encoder over the batches' media before the first pass needs them. Passes without gradient then find
        the features ready, and so does the update, whose gradient can flow back through this same run."""
        vision = self._passes[ModelRole.POLICY]
        if vision is None:
            return
        for batch in batches:
            vision.prepare(batch.media)

    @torch.no_grad()
    def features(self, prompts: Sequence[Prompt]) -> list[tuple[Tensor, ...]] | None:
        """Features [visual tokens, D] of each prompt's media, in order; None without an encoder. Media are encoded one
        at a time, because the encoder's activations take far more memory than its result."""
        vision = self._passes[ModelRole.POLICY]
        if vision is None:
            return None

        def of_medium(medium: VisualInput) -> Tensor:
            features_TD = vision.features([medium])
            assert features_TD is not None, "a medium has features"
            return features_TD

        return [tuple(of_medium(medium) for medium in prompt.media) for prompt in prompts]

    def sum_gradients(self) -> None:
        """Adds up the encoder's gradients over the tensor ranks where frames were split over them: each rank then has a
        part of the sum only. Call it after the reduction over data-parallel ranks."""
        if self._encoder is not None and self._parallel.vision_parallel == "frame":
            sum_gradients(self._encoder.parameters(), group=self._ranks.tensor)

    def after_step(self) -> None:
        """Drops kept features that the optimizer step has made stale: those of a trained policy encoder."""
        vision = self._passes[ModelRole.POLICY]
        if vision is not None and vision.is_trainable:
            vision.forget()

    def forget(self) -> None:
        """Drops all kept features. Call it when weights were replaced from outside, frozen ones included."""
        for vision in self._passes.values():
            if vision is not None:
                vision.forget()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, features are neither taken from what is kept nor kept (``VisionPass.apart``)."""
        with ExitStack() as stack:
            for vision in {id(found): found for found in self._passes.values() if found is not None}.values():
                stack.enter_context(vision.apart())
            yield

    def take_counts(self) -> int:
        """The number of units (temporal patches) that this replica's encoders have encoded since the last call. Every
        rank of the replica calls it and gets the same number."""
        passes = {id(found): found for found in self._passes.values() if found is not None}
        counts = sum(found.take_counts() for found in passes.values())
        source = torch.distributed.get_global_rank(self._ranks.model, 0)
        return broadcast_object(counts, group=self._ranks.model, source=source)

    def _pass(self, encoder: VisionEncoder | None) -> VisionPass | None:
        if encoder is None:
            return None
        parallel = self._parallel
        is_split = parallel.vision_parallel == "frame"
        return VisionPass(
            encoder,
            media=self._media,
            device=self._device,
            cache_bytes=round(parallel.vision_cache_gb * 1e9),
            is_trainable=any(parameter.requires_grad for parameter in encoder.parameters()),
            recompute=parallel.recompute_vision,
            split_over=self._ranks.tensor_context if is_split else None,
            sum_gradient_over=self._ranks.context if is_split else None,
        )
