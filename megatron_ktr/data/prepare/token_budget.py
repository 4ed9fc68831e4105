"""Suggests --video-max-frames and --video-max-pixels with which prompts fit into a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.data.prepare.prompt_lengths import Rules, count_tokens, frames_taken
from megatron_ktr.data.prepare.record_sample import PromptFacts

_FRAMES = (4, 8, 16, 32, 64, 128, 256, 512, 768)
_FRAME_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Visual tokens of one pair of frames. Qwen2.5-VL was trained with 128 to 768."""
_FITTING_SHARE = 0.99
"""The share of prompts that must fit; a few very long questions should not decide for all."""


@dataclass(frozen=True)
class Suggestion:
    """Options with which the prompts fit."""

    video_max_frames: int
    video_max_pixels: int
    median_tokens: int
    longest_tokens: int
    num_fitting: int
    fitting_share: float
    """``num_fitting`` as a share of the sample's prompts."""


def suggest_options(prompts: Sequence[PromptFacts], rules: Rules, *, token_budget: int) -> list[Suggestion]:
    """For each number of frames that some video can give, the most pixels with which 99% of the prompts fit.

    Prompts that no choice makes fit, because their text or images alone are too long, do not count for the 99%. Few
    large frames come first, many small ones last. The list is empty if there is no video, or if nothing fits.
    """
    most_taken = _most_frames(prompts, rules)
    factor = rules.settings.factor**2
    smallest = [rules.with_limits(max_frames=frames, max_pixels=_FRAME_TOKENS[0] * factor) for frames in _FRAMES]
    num_feasible = sum(
        any((count_tokens(prompt, few) or token_budget + 1) <= token_budget for few in smallest) for prompt in prompts
    )
    num_wanted = max(1, math.ceil(_FITTING_SHARE * num_feasible))
    found = []
    for max_frames in _FRAMES:
        if max_frames < rules.settings.temporal_patch_size:
            continue
        if max_frames < (rules.sampling.num_frames or 0):
            continue  # training refuses these options together
        for frame_tokens in reversed(_FRAME_TOKENS):
            if frame_tokens * factor < rules.settings.video_min_pixels:
                break
            fitted = _measure(prompts, rules, max_frames, frame_tokens * factor, token_budget=token_budget)
            if fitted is not None and fitted.num_fitting >= num_wanted:
                found.append(fitted)
                break
        if max_frames >= most_taken:  # no video has more to give
            break
    return found if most_taken else []


def _measure(
    prompts: Sequence[PromptFacts], rules: Rules, max_frames: int, max_pixels: int, *, token_budget: int
) -> Suggestion | None:
    changed = rules.with_limits(max_frames=max_frames, max_pixels=max_pixels)
    lengths = sorted(length for prompt in prompts if (length := count_tokens(prompt, changed)) is not None)
    if not lengths:
        return None
    return Suggestion(
        video_max_frames=max_frames,
        video_max_pixels=max_pixels,
        median_tokens=lengths[len(lengths) // 2],
        longest_tokens=lengths[-1],
        num_fitting=sum(length <= token_budget for length in lengths),
        fitting_share=sum(length <= token_budget for length in lengths) / len(prompts),
    )


def _most_frames(prompts: Sequence[PromptFacts], rules: Rules) -> int:
    """The most frames that any video gives at the run's frame rate; 0 without a video."""
    free = rules.with_limits(max_frames=_FRAMES[-1])
    most = 0
    for source, facts in {shown for prompt in prompts for shown in prompt.media if shown[0].kind == "video"}:
        try:
            most = max(most, frames_taken(facts, source, free).num_frames)
        except ValueError:
            continue
    return most
