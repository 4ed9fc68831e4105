"""The lengths of prompts under other options, and what the options in use drop or shrink. Nothing is decoded.

Frames and sizes come from the rules of training: ``select_frames`` and ``PreprocessSettings.frame_size``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.media.video import FrameSampling, select_frames
from megatron_ktr.data.prepare.media_probe import MediaFacts
from megatron_ktr.data.prepare.record_reader import frame_size, visual_tokens
from megatron_ktr.data.prepare.record_sample import PromptFacts

_NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Rules:
    """What decides which frames a prompt takes, and how large they are."""

    sampling: FrameSampling
    settings: PreprocessSettings

    def with_limits(self, *, max_frames: int | None = None, max_pixels: int | None = None) -> Rules:
        """The same rules with other values of --video-max-frames and --video-max-pixels."""
        sampling, settings = self.sampling, self.settings
        if max_frames is not None:
            fixed = sampling.num_frames
            sampling = replace(
                sampling, max_frames=max_frames, num_frames=None if fixed is None else min(fixed, max_frames)
            )
        if max_pixels is not None:
            low = min(settings.video_min_pixels, max_pixels)
            settings = replace(settings, video_max_pixels=max_pixels, video_min_pixels=low)
        return Rules(sampling, settings)


def count_tokens(prompt: PromptFacts, rules: Rules) -> int | None:
    """The length of a prompt under these rules; None if a medium could not be shown (see ``frames_taken``)."""
    try:
        return prompt.text_tokens + sum(
            visual_tokens(frames_taken(facts, source, rules), source, rules.settings) for source, facts in prompt.media
        )
    except ValueError:
        return None


def frames_taken(facts: MediaFacts, source: MediaSource, rules: Rules) -> MediaFacts:
    """The facts of a medium with the number of frames that it gives under these rules.

    Raises:
        ValueError: the record asks for more frames than they allow.
    """
    if source.kind == "image":
        return facts
    sampling = source.request.sampling(
        replace(rules.sampling, multiple=rules.settings.temporal_patch_size), is_pictures=source.is_pictures
    )
    chosen = select_frames(facts.total_frames, native_fps=facts.native_fps, sampling=sampling)
    return replace(facts, num_frames=len(chosen.indices), num_repeated=chosen.num_repeated)


def effects_in_words(prompts: Sequence[PromptFacts], rules: Rules, *, max_prompt_length: int) -> list[str]:
    """One sentence each for what --max-prompt-length, --video-max-frames and --video-max-pixels (and the one of
    images) do to these prompts."""
    lengths = [length for prompt in prompts if (length := count_tokens(prompt, rules)) is not None]
    told = []
    if lengths:
        too_long = sum(length > max_prompt_length for length in lengths)
        what = (
            f"{too_long:,} of {len(lengths):,} prompts are longer and would be skipped"
            if too_long
            else "no prompt is longer"
        )
        told.append(f"--max-prompt-length {max_prompt_length}: {what}; the longest has {max(lengths):,} tokens.")
    media = list(dict.fromkeys(shown for prompt in prompts for shown in prompt.media))
    videos = [shown for shown in media if shown[0].kind == "video"]
    images = [shown for shown in media if shown[0].kind == "image"]
    if videos:
        told += [_fewer_frames(videos, rules), _smaller(videos, rules, kind="video")]
    if images:
        told.append(_smaller(images, rules, kind="image"))
    return told


def _fewer_frames(videos: Sequence[tuple[MediaSource, MediaFacts]], rules: Rules) -> str:
    free = Rules(replace(rules.sampling, max_frames=_NO_LIMIT), rules.settings)
    wanted, taken = [], []
    for source, facts in videos:
        try:
            all_frames = frames_taken(facts, source, free).num_frames
            own_frames = frames_taken(facts, source, rules).num_frames
        except ValueError:
            continue
        if own_frames < all_frames:
            wanted.append(all_frames)
            taken.append(own_frames)
    flag = f"--video-max-frames {rules.sampling.max_frames}"
    if not wanted:
        return f"{flag}: no video loses frames to it."
    return (
        f"{flag}: {len(wanted):,} of {len(videos):,} videos give fewer frames than they would without it "
        f"(median {statistics.median(wanted):g}, now {statistics.median(taken):g})."
    )


def _smaller(media: Sequence[tuple[MediaSource, MediaFacts]], rules: Rules, *, kind: str) -> str:
    name = f"{kind}_max_pixels"
    limit = getattr(rules.settings, name)
    free = replace(rules.settings, **{name: _NO_LIMIT})
    changed = []
    for source, facts in media:
        try:
            facts = frames_taken(facts, source, rules)
            without, own = frame_size(facts, source, free), frame_size(facts, source, rules.settings)
        except ValueError:
            continue
        if own[0] * own[1] < without[0] * without[1]:
            changed.append((without[0] * without[1], without, own))
    flag, frames = f"--{kind}-max-pixels {limit}", "frames of" if kind == "video" else ""
    if not changed:
        return f"{flag}: no {kind} is reduced by it."
    _, before, after = sorted(changed)[len(changed) // 2]
    return (
        f"{flag}: {frames and f'{frames} '}{len(changed):,} of {len(media):,} {kind}s are reduced by it "
        f"(the median from {before[1]} x {before[0]} to {after[1]} x {after[0]})."
    )
