"""Chooses the frames of a video that the model sees: pure functions of its number of frames and its rate.

fps        so many frames for each second, within limits          qwen-vl-utils, Video-R1, Video-KTR, TW-GRPO
fixed      a fixed number of frames                               qwen-vl-utils with ``nframes``
resampled  a fixed number, chosen from the frames that fps takes  training of Video-RTS

To add a rule, write a function of ``_RULES`` and its name in ``config/words.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_ktr.config.words import FrameRule
from megatron_ktr.errors import UserError

RESAMPLED_FROM = 768
"""The most frames from which the rule "resampled" chooses; qwen-vl-utils' limit of frames."""


@dataclass(frozen=True)
class FrameSampling:
    """How many frames to take from a video.

    Worked example: of 10 s at 30 fps, ``fps=2, max_frames=16`` asks for 20 frames and takes 16, or 1.6 a second.
    """

    fps: float = 2.0
    """Frames per second of video. Not used by the rule "fixed"."""
    num_frames: int | None = None
    """A fixed number of frames, whatever the length of the video."""
    min_frames: int = 4
    """The lowest number of frames when sampling by fps, if the video has that many."""
    max_frames: int = 768
    multiple: int = 2
    """The temporal patch size: the number of frames is a multiple of it."""
    start_seconds: float | None = None
    end_seconds: float | None = None
    """Only frames of this span of the video are taken. None means from its beginning, or to its end."""
    rule: FrameRule | None = None
    """None means "fixed" if ``num_frames`` is given, else "fps"."""

    def __post_init__(self) -> None:
        if not self.fps > 0 or self.multiple < 1 or self.max_frames < self.multiple:
            raise UserError(
                f"expected video_fps > 0 and video_max_frames >= {max(self.multiple, 1)} (the temporal patch size), "
                f"got video_fps {self.fps} and video_max_frames {self.max_frames}"
            )
        if self.num_frames is not None and self.num_frames < 1:
            raise UserError(f"expected video_num_frames >= 1, got {self.num_frames}")
        if (self.rule_in_use == "fps") != (self.num_frames is None):
            raise UserError(f"frame_sampling {self.rule} does not fit video_num_frames {self.num_frames}")

    @property
    def rule_in_use(self) -> FrameRule:
        return self.rule or ("fps" if self.num_frames is None else "fixed")


@dataclass(frozen=True)
class FrameSelection:
    """The frames to take. Example: of a video with 3 frames 8 are wanted: ``indices == (0, 1, 2, 2)``,
    ``num_repeated == 1``."""

    indices: tuple[int, ...]
    sampled_fps: float
    """Frames taken per second of video. The seconds of a temporal patch are computed from it."""
    num_repeated: int = 0
    """How many of the frames are shown again, because the video has fewer frames than wanted or than a patch."""


def select_frames(total_frames: int, *, native_fps: float, sampling: FrameSampling) -> FrameSelection:
    """The numbers of the frames to take, in order, evenly spaced from the first to the last frame.

    fps:        n = floor_m(min(max(total / native_fps * fps, ceil_m(min_frames)), floor_m(max_frames), floor_m(total)))
    fixed:      n = min(round_m(num_frames), floor_m(max_frames))
                index_k = round(k * (total - 1) / (n - 1)),   sampled_fps = n / total * native_fps
    resampled:  of the f frames that fps takes with max_frames = 768, number floor(k * (f - 1) / (n - 1)),
                n as for fixed; frames repeat where f < n

    where x_m rounds to a multiple of ``sampling.multiple``. If a video has fewer frames than one temporal patch or than
    the fixed number, fps and fixed take all its frames, and the last one is repeated up to a multiple; qwen-vl-utils
    raises ValueError here. With a span of time, total is the number of its frames, and indices begin at its first.

    Raises:
        ValueError: the span contains no frame.
    """
    first, total_frames = _frames_of_span(total_frames, native_fps=native_fps, sampling=sampling)
    return _RULES[sampling.rule_in_use](first, total_frames, native_fps, sampling)


def _by_fps(first: int, total_frames: int, native_fps: float, sampling: FrameSampling) -> FrameSelection:
    multiple = sampling.multiple
    most = sampling.max_frames // multiple * multiple
    wanted = total_frames / native_fps * sampling.fps
    wanted = min(max(wanted, math.ceil(sampling.min_frames / multiple) * multiple), most)
    num_frames = max(int(min(wanted, total_frames) // multiple) * multiple, multiple)
    return _spaced(num_frames, first=first, total_frames=total_frames, native_fps=native_fps, multiple=multiple)


def _fixed(first: int, total_frames: int, native_fps: float, sampling: FrameSampling) -> FrameSelection:
    return _spaced(
        _fixed_number(sampling),
        first=first,
        total_frames=total_frames,
        native_fps=native_fps,
        multiple=sampling.multiple,
    )


def _resampled(first: int, total_frames: int, native_fps: float, sampling: FrameSampling) -> FrameSelection:
    by_fps = _by_fps(first, total_frames, native_fps, replace(sampling, max_frames=RESAMPLED_FROM, **_NO_NUMBER))
    num_frames = _fixed_number(sampling)
    # The release cuts torch's float32 linspace off, without rounding it.
    places = torch.linspace(0, len(by_fps.indices) - 1, num_frames).long().tolist()
    indices = tuple(by_fps.indices[place] for place in places)
    return FrameSelection(
        indices=indices,
        sampled_fps=num_frames / total_frames * native_fps,
        num_repeated=num_frames - len(set(indices)),
    )


_NO_NUMBER = {"num_frames": None, "rule": "fps"}
_RULES: Mapping[FrameRule, Callable[[int, int, float, FrameSampling], FrameSelection]] = {
    "fps": _by_fps,
    "fixed": _fixed,
    "resampled": _resampled,
}


def _fixed_number(sampling: FrameSampling) -> int:
    assert sampling.num_frames is not None, "checked by FrameSampling"
    multiple = sampling.multiple
    return min(
        max(round(sampling.num_frames / multiple) * multiple, multiple), sampling.max_frames // multiple * multiple
    )


def _spaced(num_frames: int, *, first: int, total_frames: int, native_fps: float, multiple: int) -> FrameSelection:
    if num_frames > total_frames:
        num_repeated = -total_frames % multiple
        indices = [*range(first, first + total_frames), *[first + total_frames - 1] * num_repeated]
        return FrameSelection(indices=tuple(indices), sampled_fps=native_fps, num_repeated=num_repeated)
    # torch's float32 linspace and its rounding of halves to even are used on purpose, as qwen-vl-utils uses them.
    spaced = torch.linspace(first, first + total_frames - 1, num_frames).round().long()
    return FrameSelection(indices=tuple(spaced.tolist()), sampled_fps=num_frames / total_frames * native_fps)


def _frames_of_span(total_frames: int, *, native_fps: float, sampling: FrameSampling) -> tuple[int, int]:
    """(number of the first frame, number of frames) of the span. Frame i is shown at i / native_fps. The ends of the
    span are rounded inwards, as in qwen-vl-utils."""
    start, end = sampling.start_seconds, sampling.end_seconds
    first = 0 if start is None else math.ceil(start * native_fps)
    last = total_frames - 1 if end is None else min(math.floor(end * native_fps), total_frames - 1)
    if first > last:
        raise ValueError(
            f"no frame between {start or 0:g} s and {'the end' if end is None else f'{end:g} s'}: "
            f"it has {total_frames} frames, {total_frames / native_fps:.2f} s"
        )
    return first, last - first + 1
