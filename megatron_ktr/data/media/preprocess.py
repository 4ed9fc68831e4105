"""Converts decoded frames to the input of the vision encoder: resizes them once, then cuts them into patches.

Frames are resized once, to uint8 frames of their final size. All consumers get these frames: our encoder, the Hugging
Face model it is compared with, and vLLM, whose processors then have nothing left to resize (see
``PreprocessSettings.passthrough_size``). Sizes are those of qwen-vl-utils, with which Qwen2.5-VL was trained;
``docs/preprocessing.md`` explains the exceptions. They include the budget of pixels that all frames of a video share,
which Hugging Face's processor leaves out by default. Patches have exactly the order of Hugging Face's processors:

    frames [F, C, H, W] -> pad F to a multiple of tp by repeating the last frame
    -> [F/tp, tp, C, H/(m p), m, p, W/(m p), m, p] -> permute to (F/tp, H/(m p), W/(m p), m, m, C, tp, p, p)
    -> [S, C tp p p]

with p = patch size, tp = temporal patch size, m = merge size: the m * m patches that the merger joins into one
visual token are neighbours, and an image is a video of one frame shown tp times.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.sections import DataSection
from megatron_ktr.data.media.frames import read_frames
from megatron_ktr.data.media.request import NOTHING_ASKED, MediaRequest, media_name
from megatron_ktr.data.media.smart_resize import most_tokens, smart_resize
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from megatron_ktr.files.json_files import read_json_object
from megatron_ktr.transfer import send
from megatron_ktr.types import MediaKind, VisualInput

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESIZE_PIXELS = 1 << 24
"""Input pixels per interpolation call. This bounds the fp32 copy of a call to 200 MB."""


@dataclass(frozen=True)
class PreprocessSettings:
    """Sizes and limits of preprocessing, in pixels of one frame unless noted. The defaults are Qwen2.5-VL's.

    Worked example, 640 x 360, 16 frames, ``video_max_pixels`` = 128 * 28 * 28: resized to 420 x 224, grid
    (8, 16, 30), 8 * 16 * 30 / 4 = 960 visual tokens.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    image_min_pixels: int = 4 * 28 * 28
    image_max_pixels: int = 16384 * 28 * 28
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    """The upper limit of one frame of a video."""
    video_total_pixels: int = int(128000 * 28 * 28 * 0.9)
    """The budget of a whole video, which its F / temporal_patch_size temporal patches share."""
    fixed_seconds_per_grid: float | None = None
    """If set, it replaces every video's own seconds between two temporal patches. ``original_compat`` sets 1.0, so that
    sampler and trainer both see the release's timing."""

    def __post_init__(self) -> None:
        for kind in ("image", "video"):
            low, high = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if not 0 < low <= high:
                raise UserError(
                    f"expected 0 < {kind}_min_pixels <= {kind}_max_pixels, got {low} and {high}; "
                    f"change {kind}_min_pixels or {kind}_max_pixels"
                )
            if high < self.factor**2:
                raise UserError(
                    f"expected {kind}_max_pixels of at least one visual token, {self.factor} x {self.factor} = "
                    f"{self.factor**2} pixels, got {high}"
                )

    @property
    def factor(self) -> int:
        """The side of one visual token in pixels. Height and width of a frame are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_model(cls, model_dir: Path | str, **overrides: float | None) -> PreprocessSettings:
        """The settings of a Hugging Face directory. ``overrides`` are the data options; None means not set.

        Values are read from these files in this order, and later ones override earlier ones: ``config.json`` (patch
        sizes), ``processor_config.json`` (its ``image_processor`` and ``video_processor``),
        ``preprocessor_config.json``, ``video_preprocessor_config.json``. ``overrides`` come last. Values that no file
        gives are Qwen2.5-VL's. If only one of the limits min and max is overridden, the other is moved where it would
        contradict it.
        """
        directory = Path(model_dir)
        path = directory / "config.json"
        values: dict[str, Any] = _vision_sizes(_read_json(path), path=path)
        path = directory / "processor_config.json"
        processor = _read_json(path)
        values.update(_processor_values(_part(processor, "image_processor", path=path), kind="image", path=path))
        values.update(_processor_values(_part(processor, "video_processor", path=path), kind="video", path=path))
        kinds: dict[str, MediaKind] = {"preprocessor_config.json": "image", "video_preprocessor_config.json": "video"}
        for name, kind in kinds.items():
            values.update(_processor_values(_read_json(directory / name), kind=kind, path=directory / name))
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in overrides.items() if value is not None}
        if unknown := given.keys() - known:
            raise TypeError(f"unknown preprocessing options {sorted(unknown)}")
        for kind in ("image", "video"):
            low, high = f"{kind}_min_pixels", f"{kind}_max_pixels"
            if high in given and low not in given:
                given[low] = min(values.get(low, getattr(cls, low)), given[high])
            elif low in given and high not in given:
                given[high] = max(values.get(high, getattr(cls, high)), given[low])
        return cls(**{**values, **given})

    def passthrough_size(self) -> dict[str, int]:
        """The ``size`` for Hugging Face's and vLLM's processors with which they do not resize final frames again."""
        return {"shortest_edge": self.factor**2, "longest_edge": 1 << 40}

    def frame_size(self, height: int, width: int, *, kind: MediaKind, num_frames: int = 1) -> tuple[int, int]:
        """The final (height, width) of a frame. The upper limit of pixels of a video's frame is
        min(max(min(video_max_pixels, video_total_pixels / F * tp), int(1.05 * video_min_pixels)), video_max_pixels).

        The budget of a long video therefore never lowers this limit below 1.05 times the minimum, and the limit never
        exceeds the user's ``video_max_pixels``. qwen-vl-utils has 768 tokens in place of the first video_max_pixels,
        and thus lowers any larger value to that.

        Raises:
            ValueError: aspect ratio above 200.
        """
        if kind == "image":
            return smart_resize(
                height,
                width,
                factor=self.factor,
                min_pixels=self.image_min_pixels,
                max_pixels=self.image_max_pixels,
            )
        low, cap = self.video_min_pixels, self.video_max_pixels
        # The share is not rounded, because a fraction of a pixel can decide whether a side reaches the next multiple of
        # the factor.
        share = self.video_total_pixels / num_frames * self.temporal_patch_size
        high = min(max(min(cap, share), int(low * 1.05)), cap)
        return smart_resize(height, width, factor=self.factor, min_pixels=low, max_pixels=high)

    def max_frame_tokens(self, kind: MediaKind) -> int:
        """The largest number of visual tokens that an image, or a frame of a video, can have, whatever its size.

        The minimum is taken equal to the maximum here, because a record may ask for any minimum up to it.
        """
        high = getattr(self, f"{kind}_max_pixels")
        return most_tokens(factor=self.factor, min_pixels=high, max_pixels=high)

    def grid_thw(self, frames_FCHW: Tensor) -> tuple[int, int, int]:
        """The number of patches along time, height and width, for frames of their final size."""
        num_frames, _, height, width = frames_FCHW.shape
        return -(-num_frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def num_visual_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        return math.prod(grid_thw) // self.merge_size**2

    def seconds_per_grid(self, sampled_fps: float) -> float:
        """Seconds between two temporal patches."""
        if self.fixed_seconds_per_grid is not None:
            return self.fixed_seconds_per_grid
        return self.temporal_patch_size / sampled_fps

    def patchify(self, frames_FCHW: Tensor, visual: VisualInput | None = None) -> Tensor:
        """``patchify`` with these sizes. ``packing.MediaSpec`` passes the second argument, which is not used here."""
        del visual
        return patchify(
            frames_FCHW,
            patch_size=self.patch_size,
            temporal_patch_size=self.temporal_patch_size,
            merge_size=self.merge_size,
            mean=self.image_mean,
            std=self.image_std,
        )


def pixel_limits(data: DataSection) -> dict[str, int]:
    """The pixel options of a run, as keyword arguments for ``PreprocessSettings.from_model``."""
    names = (field.name for field in fields(PreprocessSettings) if field.name.endswith("_pixels"))
    return {name: getattr(data, name) for name in names}


def resize_frames(frames_FCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames resized to ``size`` (height, width), uint8 [F, C, H, W]. The interpolation is antialiased bicubic in fp32;
    values are rounded and clamped to uint8."""
    if tuple(frames_FCHW.shape[-2:]) == tuple(size):
        return frames_FCHW.contiguous()
    step = max(1, _RESIZE_PIXELS // (frames_FCHW.shape[-2] * frames_FCHW.shape[-1]))
    parts = []
    for part in frames_FCHW.split(step):
        resized = torch.nn.functional.interpolate(
            part.float(), size=size, mode="bicubic", align_corners=False, antialias=True
        )
        parts.append(resized.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def patchify(
    frames_FCHW: Tensor,
    *,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """fp32 patches [S, C * tp * p * p] of frames of pixel values 0..255. They are uint8, or fp32 where a view adds
    noise. A value is (x / 255 - mean) / std, and the order is that of Hugging Face (see the module's docstring).

    Raises:
        ValueError: frames are not of this kind, [F, C, H, W], or H or W is not a multiple of patch * merge.
    """
    if frames_FCHW.dtype not in (torch.uint8, torch.float32) or frames_FCHW.ndim != 4:
        raise ValueError(
            f"expected uint8 or fp32 frames [F, C, H, W], got {frames_FCHW.dtype} of shape {tuple(frames_FCHW.shape)}"
        )
    num_frames, channels, height, width = frames_FCHW.shape
    factor = patch_size * merge_size
    if not num_frames or not height or not width or height % factor or width % factor:
        raise ValueError(
            f"expected at least one frame with sides in multiples of {factor} (patch * merge), "
            f"got {num_frames} frames of {width} x {height}"
        )
    if missing := -num_frames % temporal_patch_size:
        frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:].expand(missing, -1, -1, -1)])
    mean_C11, std_C11 = (send(255 * torch.tensor(values).view(-1, 1, 1), frames_FCHW.device) for values in (mean, std))
    values_FCHW = (frames_FCHW.float() - mean_C11) / std_C11
    patches = values_FCHW.reshape(
        -1,
        temporal_patch_size,
        channels,
        height // factor,
        merge_size,
        patch_size,
        width // factor,
        merge_size,
        patch_size,
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(-1, channels * temporal_patch_size * patch_size**2)


@dataclass(frozen=True)
class LoadedMedia:
    """One image or video ready for the model, with facts about its decoding that are counted in the metrics."""

    visual: VisualInput
    backend: str
    """The decoder: decord, pyav or pillow."""
    num_repeated_frames: int = 0
    fallback_reason: str = ""
    frame_seconds: tuple[float, ...] = ()
    """When each frame is shown, from the beginning of the video; empty for an image."""


def load_media(
    path: Path | str | Sequence[Path],
    *,
    kind: MediaKind,
    settings: PreprocessSettings,
    sampling: FrameSampling,
    request: MediaRequest = NOTHING_ASKED,
) -> LoadedMedia:
    """Reads, samples and resizes one file, or one video given as a list of pictures. ``request`` says how the record
    asks for it to be read.

    The frame rate of pictures for which the record names no rate is the run's frames per second.

    Raises:
        UnusableMedia: the medium cannot be read, its aspect ratio exceeds 200, or the request contradicts the run's
            limits.
    """
    pictures = None if isinstance(path, Path | str) else tuple(path)
    source = media_name(str(path) if pictures is None else tuple(map(str, pictures)), request)
    sampling = replace(sampling, multiple=settings.temporal_patch_size)
    pictures_fps = request.pictures_fps or sampling.fps
    try:
        sampling = request.sampling(sampling, is_pictures=pictures is not None)
        settings = request.settings(settings, kind=kind)

        def resize(chunk_FCHW: Tensor, num_frames: int) -> Tensor:
            size = settings.frame_size(*chunk_FCHW.shape[-2:], kind=kind, num_frames=num_frames)
            return resize_frames(chunk_FCHW, size)

        decoded = read_frames(path, kind=kind, sampling=sampling, pictures_fps=pictures_fps, transform=resize)
    except ValueError as error:
        raise UnusableMedia(source, error) from error
    visual = VisualInput(
        kind=kind,
        frames_FCHW=decoded.frames_FCHW,
        grid_thw=settings.grid_thw(decoded.frames_FCHW),
        seconds_per_grid=settings.seconds_per_grid(decoded.sampled_fps) if kind == "video" else 0.0,
        source=source,
    )
    frame_seconds = tuple(index / decoded.native_fps for index in decoded.frame_indices) if kind == "video" else ()
    return LoadedMedia(visual, decoded.backend, decoded.num_repeated, decoded.fallback_reason, frame_seconds)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, option="model") if path.is_file() else {}


def _vision_sizes(config: Mapping[str, Any], *, path: Path) -> dict[str, int]:
    vision = _part(config, "vision_config", path=path)
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
    names |= {"spatial_merge_size": "merge_size"}
    return {ours: _size(vision[theirs], theirs, path=path) for theirs, ours in names.items() if theirs in vision}


def _processor_values(processor: Mapping[str, Any], *, kind: MediaKind, path: Path) -> dict[str, Any]:
    """The values of one Hugging Face processor file under our names. Newer files have the pixel limits in ``size``."""
    values: dict[str, Any] = {}
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if processor.get(name) is not None:
            values[name] = _size(processor[name], name, path=path)
    for name in ("image_mean", "image_std"):
        if processor.get(name) is not None:
            values[name] = _channels(processor[name], name, path=path)
    size = _part(processor, "size", path=path)
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = processor.get(bound) or size.get(bound) or size.get(edge)
        if limit is not None:
            values[f"{kind}_{bound}"] = _size(limit, bound, path=path)
    return values


def _part(values: Mapping[str, Any], name: str, *, path: Path) -> Mapping[str, Any]:
    part = values.get(name) or {}
    if not isinstance(part, Mapping):
        raise UserError(f"model: expected an object in {name} of {path}, got {part!r}")
    return part


def _is_finite(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold: JSON may have whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _size(value: Any, name: str, *, path: Path) -> int:
    if not _is_finite(value) or value != int(value) or not 0 < value < 2**63:
        raise UserError(f"model: expected a positive whole number in {name} of {path}, got {value!r}")
    return int(value)


def _channels(value: Any, name: str, *, path: Path) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(map(_is_finite, numbers)) or (name == "image_std" and min(numbers) <= 0):
        least = ", each above 0" if name == "image_std" else ""
        raise UserError(f"model: expected three numbers{least} in {name} of {path}, got {value!r}")
    return tuple(float(x) for x in numbers)
