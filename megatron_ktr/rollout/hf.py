"""Rollout with Hugging Face's ``generate``: a simple and exact engine for CPUs and for debugging.

The model is Hugging Face's own class with the trainer's exported weights, in the trainer's precision. In fp32 a copy of
a bf16 model would be twice as large, and the sampler would differ more from the trainer. Positions, rotary angles and
log-probs are fp32 in any precision.

Each prompt's media are encoded once, and its embeddings are repeated for the G samples. All samples of all prompts are
decoded as one left-padded batch with a key-value cache. Positions are computed as in the trainer
(``models/qwen2_5_vl/mrope.py``), because Hugging Face's differ on long videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.files.hf_files import published_name
from megatron_ktr.files.hf_model import hf_model_class, reading_model
from megatron_ktr.rollout.base import RolloutEngine, counts_of
from megatron_ktr.rollout.sampling import (
    GumbelSampler,
    SamplingSettings,
    StopStrings,
    end_token_ids,
    penalised,
    sample_seed,
)
from megatron_ktr.transfer import send
from megatron_ktr.types import Prompt, Rollout, RolloutGroup


class HFEngine(RolloutEngine):
    """Generates with a Hugging Face model that it loads from ``model_dir`` (config and initial weights)."""

    def __init__(
        self,
        model_dir: Path | str,
        *,
        tokenizer: Tokenizer,
        media: MediaSpec,
        sampling: SamplingSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``dtype`` is the type of weights and arithmetic; it should be the policy's."""
        from transformers import GenerationConfig
        from transformers.utils import logging

        self.tokenizer = tokenizer
        self.media = media
        self.sampling = sampling
        self.device = current().device
        logging.disable_progress_bar()
        with reading_model(model_dir):
            self.model = hf_model_class().from_pretrained(model_dir, dtype=dtype, use_safetensors=True)
        self.model.to(self.device).eval().requires_grad_(False)
        self.end_token_ids = end_token_ids(model_dir, tokenizer)
        # The generation config of published models sets a repetition penalty and more, which ``generate`` applies to
        # the logits before our sampler sees them. Responses and log-probs would then be those of another distribution
        # than the trainer's. So only the end tokens are kept.
        self.model.generation_config = GenerationConfig(
            eos_token_id=list(self.end_token_ids), pad_token_id=self.end_token_ids[0], do_sample=False
        )
        self._parameters = {published_name(name): tensor for name, tensor in self.model.named_parameters()}

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copies tensors under Hugging Face's names into the model, one at a time.

        Raises UserError for a name or shape that the model does not have, and if a weight of the model is missing.
        """
        missing = set(self._parameters)
        with torch.no_grad():
            for name, tensor in named_tensors:
                parameter = self._parameters.get(name)
                if parameter is None or parameter.shape != tensor.shape:
                    shape = None if parameter is None else tuple(parameter.shape)
                    raise UserError(
                        f"rollout engine hf: weight {name} has shape {tuple(tensor.shape)}, expected {shape}"
                    )
                parameter.copy_(tensor)
                missing.discard(name)
        if missing:
            raise UserError(f"rollout engine hf: {len(missing)} weights were not sent, among them {sorted(missing)[0]}")

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int = 0,
        sampling: SamplingSettings | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Generates batch by batch. The responses to a prompt do not depend on the other prompts."""
        sampling = sampling or self.sampling
        numbers = counts_of(prompts, counts=counts, sampling=sampling)
        for batch in _batches(numbers, max_size=sampling.max_batch_size):
            asked = [(prompts[index], numbers[index]) for index in batch]
            yield from zip(batch, self._generate_batch(asked, step=step, sampling=sampling), strict=True)

    def close(self) -> None:
        """Drops the model."""
        del self.model, self._parameters

    @torch.no_grad()
    def _generate_batch(
        self, asked: Sequence[tuple[Prompt, int]], *, step: int, sampling: SamplingSettings
    ) -> list[RolloutGroup]:
        """The groups of prompts with their numbers of responses."""
        embedded = [self._embed(prompt) for prompt, _ in asked]
        repeats = torch.tensor([number for _, number in asked], device=self.device)
        length = max(embeds.shape[0] for embeds, _ in embedded)
        inputs, positions, mask = [], [], []
        for embeds_PD, positions_3P in embedded:
            padding = length - embeds_PD.shape[0]
            inputs.append(torch.nn.functional.pad(embeds_PD, (0, 0, padding, 0)))
            positions.append(torch.nn.functional.pad(positions_3P, (padding, 0)))
            mask.append(torch.arange(length, device=self.device) >= padding)
        seeds = [
            sample_seed(seed=sampling.seed, step=step, identity=prompt.identity, sample=sample)
            for prompt, number in asked
            for sample in range(number)
        ]
        sampler = GumbelSampler(seeds, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        stopper = _Stopper(sampling.stop, decode=self._text, num_rows=len(seeds)) if sampling.stop else None
        token_ids_BR = self.model.generate(
            inputs_embeds=torch.stack(inputs).repeat_interleave(repeats, dim=0),
            attention_mask=torch.stack(mask).long().repeat_interleave(repeats, dim=0),
            position_ids=torch.stack(positions, dim=1).repeat_interleave(repeats, dim=1),
            max_new_tokens=sampling.max_response_length,
            logits_processor=[_Chooser(sampler, sampling)],
            stopping_criteria=[stopper] if stopper else None,
            use_cache=True,
        ).cpu()
        logprobs_BR = torch.stack(sampler.logprobs, dim=1)
        stop_lengths = stopper.lengths if stopper else [None] * len(seeds)
        responses = iter(
            self._rollout(ids, None if sampling.has_penalties else logprobs, stop_length)
            for ids, logprobs, stop_length in zip(
                token_ids_BR.tolist(), logprobs_BR.tolist(), stop_lengths, strict=True
            )
        )
        return [RolloutGroup(prompt=prompt, rollouts=tuple(islice(responses, number))) for prompt, number in asked]

    def _embed(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """([P, D] embeddings with vision features in place of placeholders, [3, P] positions) of one prompt."""
        token_ids = torch.tensor(prompt.token_ids, device=self.device)
        embeds_PD = self.model.get_input_embeddings()(token_ids)
        if prompt.media:
            patches = send(torch.cat([self.media.patchify(m.frames_FCHW, m) for m in prompt.media]), self.device)
            grids = torch.tensor([m.grid_thw for m in prompt.media], device=self.device)
            # Images and videos go through the encoder in the same way, so one call takes all of them in order.
            features = self.model.model.visual(patches, grid_thw=grids).pooler_output
            rows = (token_ids == self.media.image_token_id) | (token_ids == self.media.video_token_id)
            embeds_PD = embeds_PD.index_copy(0, rows.nonzero()[:, 0], features.to(embeds_PD.dtype))
        positions_3P, next_position = self.media.positions(
            prompt.token_ids,
            grid_thw=[m.grid_thw for m in prompt.media],
            kinds=[m.kind for m in prompt.media],
            seconds_per_grid=[m.seconds_per_grid for m in prompt.media],
        )
        if int(positions_3P[:, -1].max()) + 1 != next_position or self.media.is_visual(prompt.token_ids[-1]):
            raise UserError(f"prompt {prompt.problem_id} must end in text: generation continues from its last position")
        return embeds_PD, positions_3P.to(self.device)

    def _rollout(self, token_ids: list[int], logprobs: list[float] | None, stop_length: int | None) -> Rollout:
        """The response in one row of ``generate``, cut after its end token or after the token that completed a stop
        string. The stop string stays in the text, the end token does not."""
        ends = [index for index, token in enumerate(token_ids) if token in self.end_token_ids]
        has_end_token = bool(ends) and (stop_length is None or ends[0] < stop_length)
        length = ends[0] + 1 if has_end_token else stop_length or len(token_ids)
        return Rollout(
            token_ids=tuple(token_ids[:length]),
            sampler_logprobs=None if logprobs is None else tuple(logprobs[:length]),
            text=self._text(token_ids[: length - 1] if has_end_token else token_ids[:length]),
            is_finished=has_end_token or stop_length is not None,
        )

    def _text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _batches(counts: Sequence[int], *, max_size: int) -> Iterator[list[int]]:
    """Yields the places of consecutive prompts with at most ``max_size`` responses together, or of one with more."""
    batch: list[int] = []
    size = 0
    for place, count in enumerate(counts):
        if batch and size + count > max_size:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += count
    if batch:
        yield batch


class _Stopper:
    """A stopping criterion for ``generate`` that ends rows at stop strings."""

    def __init__(self, stop: Sequence[str], *, decode: Callable[[list[int]], str], num_rows: int) -> None:
        self._strings = StopStrings(stop, decode=decode, num_rows=num_rows)
        self.lengths: list[int | None] = [None] * num_rows
        """The number of tokens of each row up to the one that completed a stop string; None if none was completed."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        # With embeddings as input, input_ids holds only the generated tokens. A row that has reached its end token
        # continues with padding. A stop string in the padding does no harm, as ``_rollout`` cuts at the end token.
        for row, token_id in enumerate(input_ids[:, -1].tolist()):
            if self.lengths[row] is None and self._strings.completed_by(row, token_id):
                self.lengths[row] = input_ids.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class _Chooser:
    """A logits processor that masks all tokens but the sampler's choice, so that ``generate`` must take it."""

    def __init__(self, sampler: GumbelSampler, sampling: SamplingSettings) -> None:
        self._sampler = sampler
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # With embeddings as input, input_ids holds only the generated tokens.
        settings = self._sampling
        if settings.has_penalties:
            scores = penalised(
                scores.float(),
                input_ids,
                presence=settings.presence_penalty,
                frequency=settings.frequency_penalty,
            )
        choice = self._sampler.choose(scores)
        return torch.full_like(scores, float("-inf")).scatter(1, choice[:, None], 0.0)
