"""Sizes, resizing and patches: HF's rules and numbers where HF's processor runs without torchvision, else by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf_processing

from megatron_ktr.data.media.preprocess import PreprocessSettings, load_media, patchify, resize_frames
from megatron_ktr.data.media.smart_resize import most_tokens, smart_resize
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from tests.support.videos import numbered_frames, shared_videos, write_video


def random_frames(num_frames: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)


def test_smart_resize_equals_hf_over_many_sizes() -> None:
    """Where no side is shorter than half a token before or after: HF has a rule of its own there, see the next test."""
    rng = random.Random(0)
    num_compared = 0
    for _ in range(5000):
        height, width = rng.randint(17, 4000), rng.randint(17, 4000)
        low = rng.choice([4, 16, 128]) * 784
        limits = {"factor": rng.choice([28, 32]), "min_pixels": low, "max_pixels": low * rng.choice([1, 2, 6, 96])}
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match="200"):
                smart_resize(height, width, **limits)
            continue
        expected = hf_processing.smart_resize(height, width, **limits)
        if min(expected) > limits["factor"]:
            num_compared += 1
            assert smart_resize(height, width, **limits) == expected
    assert num_compared > 3500


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        # The release's run, 100,352 to 105,369 pixels. Reduced: 360, 640 times sqrt(105369 / 230400) = 243, 433.
        ((360, 640), (100352, 105369), (224, 420)),
        ((1080, 1920), (100352, 105369), (224, 420)),
        # Between the limits: 308 x 336 = 103,488, rounded only.
        ((310, 340), (100352, 105369), (308, 336)),
        # Enlarged by sqrt(100352 / 10000) = 3.17 to 317 and rounded up: 12 tokens, 7% above the maximum.
        ((100, 100), (100352, 105369), (336, 336)),
        # A side of less than half a token is one token before areas are compared: 28 x 1008 is large enough.
        ((10, 1000), (3136, 105369), (28, 1008)),
        ((10, 1000), (100352, 105369), (56, 3192)),
        # Reduced by sqrt(80000 / 12544) = 2.5 the short side would be 8, no token: it keeps one, the other gets
        # what is left of 12,544 pixels, 16 tokens.
        ((20, 4000), (3136, 12544), (28, 448)),
        ((4000, 20), (3136, 12544), (448, 28)),
        # Less than one token allowed (a share of a small budget): one token.
        ((360, 640), (1, 500.5), (28, 28)),
    ],
)
def test_sizes_worked_by_hand(size: tuple[int, int], limits: tuple[int, float], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, factor=28, min_pixels=limits[0], max_pixels=limits[1]) == expected


@pytest.mark.parametrize("limits", [(784, 784), (3136, 100352), (100352, 105369), (200704, 200704), (9000, 9001)])
def test_no_size_exceeds_the_most_tokens_and_none_vanishes(limits: tuple[int, int]) -> None:
    """What an engine is built for. Sizes up to 60 x 2000 and some larger ones; long ones, enlarged, are worst."""
    low, high = limits
    bound = most_tokens(factor=28, min_pixels=low, max_pixels=high)
    rng = random.Random(0)
    sizes = [(short, long) for short in range(1, 60, 3) for long in range(short, min(2000, 200 * short) + 1, 7)]
    sizes += [(rng.randint(60, 4000), rng.randint(60, 4000)) for _ in range(2000)]
    largest = 0
    for size in sizes:
        height, width = smart_resize(*size, factor=28, min_pixels=low, max_pixels=high)
        assert height >= 28 and width >= 28
        largest = max(largest, height * width // 784)
    # The bound is no more than what some size reaches, but for the last token of a side.
    assert 0.8 * bound <= largest <= bound


@pytest.mark.parametrize("size", [(56, 84), (28, 28), (140, 56)])
def test_image_patches_equal_hf(size: tuple[int, int]) -> None:
    frames_FCHW = random_frames(1, *size)
    settings = PreprocessSettings()
    processor = hf_processing.Qwen2VLImageProcessorPil(size=settings.passthrough_size())
    theirs = processor(images=[frames_FCHW[0].permute(1, 2, 0).numpy()], return_tensors="pt")
    ours = settings.patchify(frames_FCHW)
    assert settings.grid_thw(frames_FCHW) == tuple(theirs["image_grid_thw"][0].tolist())
    # fp32 rounding of values up to 2.7: HF rescales by 1/255 first, we by std * 255 at once.
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("num_frames", "patch", "temporal", "merge"),
    [(4, 14, 2, 2), (5, 14, 2, 2), (1, 14, 2, 2), (6, 2, 3, 2), (4, 4, 1, 3)],
)
def test_patches_are_cut_where_the_definition_says(num_frames: int, patch: int, temporal: int, merge: int) -> None:
    """Patch by patch, in the order: time, then blocks of merge x merge patches row by row, then inside a block."""
    side = patch * merge
    frames_FCHW = random_frames(num_frames, 2 * side, 3 * side)
    ours = patchify(
        frames_FCHW,
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.25, 0.125),
    )
    expected = []
    for first in range(0, num_frames, temporal):
        for block_y, block_x in ((y, x) for y in range(2) for x in range(3)):
            for inner_y, inner_x in ((y, x) for y in range(merge) for x in range(merge)):
                top, left = block_y * side + inner_y * patch, block_x * side + inner_x * patch
                values = []
                for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 0.125)]):
                    for step in range(temporal):
                        frame = frames_FCHW[min(first + step, num_frames - 1), channel].double()
                        values.append(((frame[top : top + patch, left : left + patch] / 255 - mean) / std).flatten())
                expected.append(torch.cat(values))
    # fp32 rounding of values up to 7
    torch.testing.assert_close(ours.double(), torch.stack(expected), atol=2e-6, rtol=0)


def test_an_image_is_one_frame_shown_twice() -> None:
    frame = random_frames(1, 56, 56)
    assert torch.equal(patchify(frame), patchify(frame.expand(2, -1, -1, -1)))


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 28, 28, dtype=torch.float64),
        torch.zeros(2, 3, 28, 30, dtype=torch.uint8),
        torch.zeros(3, 28, 28).byte(),
    ],
)
def test_patchify_refuses_frames_of_the_wrong_kind(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        patchify(frames)


def test_resizing_keeps_frames_apart_and_stays_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    frames_FCHW = random_frames(5, 50, 70)
    together = resize_frames(frames_FCHW, (28, 56))
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 28, 56)
    one_by_one = torch.cat([resize_frames(frame[None], (28, 56)) for frame in frames_FCHW])
    assert torch.equal(together, one_by_one)
    monkeypatch.setattr("megatron_ktr.data.media.preprocess._RESIZE_PIXELS", 50 * 70 * 2)
    assert torch.equal(together, resize_frames(frames_FCHW, (28, 56)))
    assert torch.equal(resize_frames(frames_FCHW, (50, 70)), frames_FCHW), "the final size is left alone"


def test_resizing_agrees_with_pillow() -> None:
    picture_HWC = numbered_frames(1, height=120, width=200)[0]
    theirs = torch.from_numpy(np.array(Image.fromarray(picture_HWC).resize((84, 56), Image.Resampling.BICUBIC)))
    ours = resize_frames(torch.from_numpy(picture_HWC).permute(2, 0, 1)[None], (56, 84))[0].permute(1, 2, 0)
    # Pillow rounds to uint8 between the two passes: two roundings of half a level, one more for its 8-bit weights.
    assert (ours.int() - theirs.int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("settings", "num_frames", "expected"),
    [
        (PreprocessSettings(), 16, (364, 644)),  # fits: only rounded to multiples of 28
        (PreprocessSettings(video_max_pixels=128 * 784), 16, (224, 420)),  # 128 tokens of 28 x 28 per frame
        (
            PreprocessSettings(video_min_pixels=4 * 784, video_total_pixels=64 * 784 * 8),
            16,
            (168, 280),
        ),  # 64 each: 6 x 10
        (PreprocessSettings(video_total_pixels=784), 16, (224, 420)),  # the share never falls below 1.05 * minimum
    ],
)
def test_video_sizes_share_the_total_budget(
    settings: PreprocessSettings, num_frames: int, expected: tuple[int, int]
) -> None:
    assert settings.frame_size(360, 640, kind="video", num_frames=num_frames) == expected


def test_the_share_rule_never_raises_the_cap_above_the_option() -> None:
    """1.05 times a minimum of 100,352 is 105,369, which 308 x 336 fit; the option says 100,352."""
    narrow = PreprocessSettings(video_min_pixels=100352, video_max_pixels=100352)
    release = PreprocessSettings(video_min_pixels=100352, video_max_pixels=105369)
    assert narrow.frame_size(310, 340, kind="video", num_frames=16) == (280, 308)
    assert release.frame_size(310, 340, kind="video", num_frames=16) == (308, 336)


def test_settings_come_from_the_model_directory(tmp_path: Path) -> None:
    assert PreprocessSettings.from_model(tmp_path) == PreprocessSettings()
    (tmp_path / "config.json").write_text(
        json.dumps({"vision_config": {"patch_size": 16, "spatial_merge_size": 4, "temporal_patch_size": 2}})
    )
    assert PreprocessSettings.from_model(tmp_path).factor == 64
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 50176, "image_mean": [0.5] * 3}
        )
    )
    (tmp_path / "video_preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 7840, "longest_edge": 78400}})
    )
    settings = PreprocessSettings.from_model(tmp_path)
    assert (settings.factor, settings.image_mean) == (28, (0.5, 0.5, 0.5))
    assert (settings.image_min_pixels, settings.image_max_pixels) == (3136, 50176)
    assert (settings.video_min_pixels, settings.video_max_pixels) == (7840, 78400)


def test_options_win_over_the_model_directory_and_drag_the_other_limit_along(tmp_path: Path) -> None:
    low = PreprocessSettings.from_model(tmp_path, video_max_pixels=4 * 784, image_max_pixels=None)
    assert (low.video_min_pixels, low.video_max_pixels) == (4 * 784, 4 * 784)
    assert low.image_max_pixels == PreprocessSettings.image_max_pixels
    with pytest.raises(UserError, match="video_min_pixels 9 and|expected 0 < video_min_pixels"):
        PreprocessSettings.from_model(tmp_path, video_min_pixels=9 * 784, video_max_pixels=4 * 784)
    with pytest.raises(UserError, match="video_max_pixels of at least one visual token, 28 x 28 = 784 pixels, got 783"):
        PreprocessSettings.from_model(tmp_path, video_max_pixels=783)
    huge = 10**400  # no float holds it
    for wrong in ("{", json.dumps({"patch_size": huge}), json.dumps({"image_mean": [huge] * 3})):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(UserError, match="preprocessor_config.json"):
            PreprocessSettings.from_model(tmp_path)


def test_a_loaded_video_has_grid_and_seconds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(40, height=64, width=96), fps=10)
    settings = PreprocessSettings(video_min_pixels=4 * 784, video_max_pixels=6 * 784)
    loaded = load_media(path, kind="video", settings=settings, sampling=FrameSampling(fps=2, max_frames=16))
    # 4 s at 2 a second: 8 frames, 4 temporal patches a second apart; 64 x 96 -> 56 x 84 = 2 x 3 tokens.
    assert loaded.visual.grid_thw == (4, 4, 6)
    assert loaded.visual.seconds_per_grid == pytest.approx(1.0)
    assert loaded.visual.frames_FCHW.shape == (8, 3, 56, 84)
    assert settings.num_visual_tokens(loaded.visual.grid_thw) == 24
    assert settings.patchify(loaded.visual.frames_FCHW, loaded.visual).shape == (4 * 4 * 6, 3 * 2 * 14 * 14)


def test_a_loaded_image_has_one_grid_in_time(tmp_path: Path) -> None:
    Image.fromarray(numbered_frames(1, height=60, width=90)[0]).save(tmp_path / "picture.png")
    loaded = load_media(tmp_path / "picture.png", kind="image", settings=PreprocessSettings(), sampling=FrameSampling())
    assert (loaded.visual.kind, loaded.visual.grid_thw, loaded.visual.seconds_per_grid) == ("image", (1, 4, 6), 0.0)


def test_a_sliver_is_unusable(tmp_path: Path) -> None:
    Image.new("RGB", (1, 300)).save(tmp_path / "sliver.png")
    with pytest.raises(UnusableMedia, match="200"):
        load_media(tmp_path / "sliver.png", kind="image", settings=PreprocessSettings(), sampling=FrameSampling())


def test_every_real_video_loads_at_training_size_or_says_why_not() -> None:
    videos = shared_videos()
    if not videos:
        pytest.skip("no real videos here")
    settings = PreprocessSettings(video_min_pixels=4 * 784, video_max_pixels=16 * 784)
    unusable = []
    for path in videos:
        try:
            visual = load_media(path, kind="video", settings=settings, sampling=FrameSampling(max_frames=8)).visual
        except UnusableMedia as error:
            unusable.append(Path(error.source).name)
            continue
        _, height, width = visual.grid_thw
        assert 4 <= height * width // 4 <= 16
        assert settings.patchify(visual.frames_FCHW).isfinite().all()
    assert unusable == [path.name for path in videos if path.name == "corrupted.mp4"]
