"""Runs the same inputs through Hugging Face's model and through ours, for ``tools/verify_checkpoint.py`` to compare.

    prompt with media + 32 random response tokens -> log-prob of each response token
    loss = sum of the 32 log-probs                -> gradient of every parameter

Hugging Face's model always receives our ``position_ids``, because its own rule differs for videos (see ``mrope.py``).
Everything here runs in one process; the tool compares the two results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.objectives.base import Objective
from megatron_ktr.sums import Metrics
from megatron_ktr.types import (
    BatchFacts,
    PackedBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredBatch,
    Selection,
    TokenScores,
    TokenStreams,
    VisualInput,
)

NUM_RESPONSE_TOKENS = 32
SEED = 0
QUESTION = "What happens here, and in which order?"
GRADIENT_FLOOR = 1e-3
"""The error of a gradient is measured relative to its norm, or to this share of the largest gradient norm if that is
more. Otherwise a gradient that cancels to nearly zero would be judged by its rounding noise."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LogprobSum(Objective):
    """An objective without rewards and selection. Its loss is the mean over responses of the sum of their log-probs."""

    name = "logprob_sum"

    def token_streams(
        self, item: ScoredBatch, facts: BatchFacts, *, selection: Selection | None = None
    ) -> TokenStreams:
        ones_R = torch.ones_like(item.scores.policy_logprob_R)
        return TokenStreams(
            advantage_R=ones_R, weight_R=ones_R / facts.num_responses, is_key_token_R=ones_R.to(torch.bool)
        )

    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return (streams.weight_R * statistics.logprob_R).sum(), Metrics()


@dataclass(frozen=True)
class VerificationInput:
    """One prompt with one response."""

    group: RolloutGroup
    note: str = ""
    """The reason why the text around the media is random; empty if it is a question in the model's chat format."""


def build_input(
    hf_dir: Path | str,
    *,
    media: Sequence[VisualInput],
    spec: MediaSpec,
    vocab_size: int,
    vision_start_id: int,
    vision_end_id: int,
    pad_id: int | None = None,
) -> VerificationInput:
    """The media, a question in the model's chat format, and random response tokens (seed 0).

    If the directory has no tokenizer, or one that does not fit its config, random tokens replace the text, because any
    text serves for the comparison.
    """
    # These tokens are not drawn: media tokens would need media, and Hugging Face's embedding drops the gradient of the
    # padding token.
    reserved = {spec.image_token_id, spec.video_token_id, vision_start_id, vision_end_id, pad_id}
    generator = torch.Generator().manual_seed(SEED)
    allowed = torch.tensor([token for token in range(vocab_size) if token not in reserved])

    def random_tokens(number: int) -> list[int]:
        return allowed[torch.randint(len(allowed), (number,), generator=generator)].tolist()

    # The response is drawn first, so that it depends on the vocabulary only.
    response = Rollout(token_ids=tuple(random_tokens(NUM_RESPONSE_TOKENS)), is_finished=False)
    prompt, note = _chat_prompt(hf_dir, media=media, vocab_size=vocab_size, merge_size=spec.merge_size)
    if prompt is None:
        tokens = random_tokens(5)
        for medium in media:
            placeholders = [spec.token_id(medium)] * spec.num_visual_tokens(medium)
            tokens += [vision_start_id, *placeholders, vision_end_id, *random_tokens(3)]
        prompt = Prompt("verification", tuple(tokens + random_tokens(5)), tuple(media))
    return VerificationInput(RolloutGroup(prompt, (response,)), note)


def _chat_prompt(
    hf_dir: Path | str, *, media: Sequence[VisualInput], vocab_size: int, merge_size: int
) -> tuple[Prompt | None, str]:
    """(prompt, "") or (None, reason why there is no prompt)."""
    if not any((Path(hf_dir) / name).is_file() for name in TOKENIZER_FILES):
        return None, "no tokenizer in the directory"
    record = {"problem_id": "verification", "messages": [{"role": "user", "content": QUESTION}]}
    try:
        tokenizer = load_tokenizer(hf_dir)
        visual_tokens = VisualTokens.from_model(hf_dir, tokenizer)
        prompt = PromptBuilder(tokenizer, visual_tokens=visual_tokens, merge_size=merge_size).build(record, media)
    except Exception as error:  # tokenizers and chat templates are code of the model's author
        return None, " ".join(str(error).split())
    if max(prompt.token_ids) >= vocab_size:
        return None, f"the tokenizer gives id {max(prompt.token_ids)}, but vocab_size is {vocab_size}"
    return prompt, ""


def draw_test_pattern(settings: PreprocessSettings) -> VisualInput:
    """A video of four temporal patches, five tokens high and three wide, in which a bar moves over moving gradients.

    A temporal patch lasts 2.5 s. At Qwen's two positions per second the temporal positions reach 15, far more than
    those of height and width. The sides are odd numbers of tokens, so that attention windows are incomplete.
    """
    num_frames = 4 * settings.temporal_patch_size
    height, width = 5 * settings.factor, 3 * settings.factor
    time, row, column = np.ogrid[:num_frames, :height, :width]
    frames_FCHW = np.stack(np.broadcast_arrays(row + 16 * time, column * 2 + 9 * time, row + 2 * column), axis=1) % 256
    top = height * time // num_frames
    is_bar = np.broadcast_to((row >= top) & (row < top + settings.patch_size), (num_frames, height, width))
    frames_FCHW = np.where(is_bar[:, None], 240, frames_FCHW).astype(np.uint8)
    grid = (4, height // settings.patch_size, width // settings.patch_size)
    return VisualInput("video", torch.from_numpy(frames_FCHW), grid, seconds_per_grid=2.5, source="test pattern")


@dataclass(frozen=True)
class HFAnswer:
    """The results of Hugging Face's model, on the host."""

    logprob_R: Tensor
    gradients: dict[str, Tensor]
    """d(sum of log-probs) / d parameter, by published name."""


def run_hugging_face(
    hf_dir: Path | str, batch: PackedBatch, *, kinds: Sequence[str], device: torch.device, rename: Callable[[str], str]
) -> HFAnswer:
    """Loads the model in fp32, runs ``batch`` (one group of one response) forward and backward, and frees the model.

    Args:
        kinds: the kind of each medium, "image" or "video".
        rename: maps the name of a parameter in memory to its published name.

    Raises:
        UserError: transformers cannot load the directory, or its log-probs are not finite.
    """
    from transformers.utils import logging

    from megatron_ktr.files.hf_model import hf_model_class, reading_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with reading_model(hf_dir):
        model = hf_model_class().from_pretrained(
            str(hf_dir),
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        )
    model = model.to(device).eval()
    # A padding index would drop the gradient of that token's embedding if the prompt contains the token.
    model.get_input_embeddings().padding_idx = None
    inputs = {name: torch.from_numpy(value).to(device) for name, value in hf_inputs(batch, kinds=kinds).items()}
    targets_R = batch.target_ids_R.to(device)
    # Hugging Face's patch embedding is a convolution, and convolutions use TF32 unless this is switched off.
    with torch.backends.cudnn.flags(allow_tf32=False), torch.enable_grad():
        logits = model(
            input_ids=inputs.pop("token_ids")[None],
            position_ids=inputs.pop("position_ids")[:, None],
            use_cache=False,
            logits_to_keep=len(targets_R) + 1,
            **inputs,
        ).logits[0, :-1]
        logprob_R = logits.log_softmax(dim=-1).gather(1, targets_R[:, None])[:, 0]
        if not logprob_R.isfinite().all():
            raise UserError(f"--hf {hf_dir}: Hugging Face's log-probs are not finite; the weights are damaged")
        logprob_R.sum().backward()
    gradients = {rename(name): p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return HFAnswer(logprob_R.detach().cpu(), gradients)


def hf_inputs(batch: PackedBatch, *, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of the one sequence in ``batch``, without padding, with media under Hugging Face's argument names.

    These are ``token_ids`` [T] and ``position_ids`` [3, T]; for images ``pixel_values`` [S, C tp p p] and
    ``image_grid_thw`` [M, 3]; for videos ``pixel_values_videos`` and ``video_grid_thw`` of the same shapes.
    """
    length = batch.layout.groups[-1].end
    arrays = {
        "token_ids": batch.token_ids_T[:length].cpu().numpy(),
        "position_ids": batch.position_ids_3T[:, :length].cpu().numpy(),
    }
    grids = batch.grid_thw_M3.cpu()
    patches = batch.patches_SD.cpu().split(grids.prod(dim=1).tolist()) if batch.patches_SD is not None else ()
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        chosen = [index for index, found in enumerate(kinds) if found == kind]
        if chosen:
            arrays[name] = torch.cat([patches[index] for index in chosen]).numpy()
            arrays[f"{kind}_grid_thw"] = grids[chosen].numpy()
    return arrays


@dataclass(frozen=True)
class GradientDifference:
    """The largest difference of gradients, and the name of its tensor."""

    value: float
    name: str


def max_relative_difference(ours: Iterable[tuple[str, Tensor]], theirs: Mapping[str, Tensor]) -> GradientDifference:
    """max over tensors of |g - g_hf| / max(|g_hf|, 1e-3 of the largest |g_hf|), Frobenius norms; NaN counts as inf.

    ``ours`` is consumed one tensor at a time.

    Raises:
        ValueError: the two sides do not have gradients for the same tensors.
    """
    norms = {name: _norm(gradient) for name, gradient in theirs.items()}
    floor = GRADIENT_FLOOR * max(norms.values())
    worst = GradientDifference(0.0, "")
    unseen = set(theirs)
    for name, gradient in ours:
        if name not in unseen:
            raise ValueError(f"gradient of {name}: Hugging Face's model has none")
        unseen.remove(name)
        distance, scale = _norm(gradient - theirs[name].to(gradient.device)), max(norms[name], floor)
        difference = distance / scale if scale > 0 else (0.0 if distance == 0 else math.inf)
        difference = difference if math.isfinite(difference) else math.inf
        if difference >= worst.value:
            worst = GradientDifference(difference, name)
    if unseen:
        raise ValueError(f"gradient of {sorted(unseen)[0]} (and {len(unseen) - 1} more): this model has none")
    return worst


def max_abs_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest |ours - theirs|; inf if a value is not finite."""
    difference = float((ours.double() - theirs.double()).abs().max())
    return difference if math.isfinite(difference) else math.inf


def write_dump(path: Path, batch: PackedBatch, *, kinds: Sequence[str], ours_R: Tensor, theirs_R: Tensor) -> None:
    """Writes ``hf_inputs`` with both sides' log-probs [R]; the last R of ``token_ids`` are the response."""
    with path.open("wb") as file:  # given a path without suffix, numpy would append one
        arrays: dict[str, Any] = {
            **hf_inputs(batch, kinds=kinds),
            "logprobs": ours_R.cpu().numpy(),
            "hf_logprobs": theirs_R.cpu().numpy(),
        }
        np.savez(file, **arrays)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
