"""Our preprocessing against HF's torchvision processors, which exist in the vLLM environment only."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron_ktr.data.media.preprocess import PreprocessSettings, resize_frames
from tests.support.torchvision_ops import declare_torchvision_operators
from tests.support.videos import numbered_frames

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def hf() -> Any:
    """HF's image and video processor classes."""
    declare_torchvision_operators()
    pytest.importorskip("torchvision", reason="torchvision is in the vLLM environment only")
    from transformers.models.qwen2_vl import image_processing_qwen2_vl, video_processing_qwen2_vl

    class Processors:
        image = image_processing_qwen2_vl.Qwen2VLImageProcessor
        video = video_processing_qwen2_vl.Qwen2VLVideoProcessor
        image_resize = staticmethod(image_processing_qwen2_vl.smart_resize)
        video_resize = staticmethod(video_processing_qwen2_vl.smart_resize)

    return Processors


def random_frames(num_frames: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(8, 56, 84), (5, 28, 140), (2, 112, 56), (1, 56, 56)])
def test_video_patches_and_grids_equal_hf(hf: Any, shape: tuple[int, int, int]) -> None:
    frames_FCHW = random_frames(*shape)
    settings = PreprocessSettings()
    processor = hf.video(size=settings.passthrough_size(), do_sample_frames=False)
    theirs = processor(videos=[frames_FCHW], return_tensors="pt")
    assert settings.grid_thw(frames_FCHW) == tuple(theirs["video_grid_thw"][0].tolist())
    ours = settings.patchify(frames_FCHW)
    # Same fused fp32 formula; values up to 2.7, one rounding apart at most.
    torch.testing.assert_close(ours, theirs["pixel_values_videos"].reshape(ours.shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(56, 84), (28, 28), (140, 56)])
def test_image_patches_and_grids_equal_hf(hf: Any, size: tuple[int, int]) -> None:
    frames_FCHW = random_frames(1, *size)
    settings = PreprocessSettings()
    theirs = hf.image(size=settings.passthrough_size())(images=[frames_FCHW[0]], return_tensors="pt")
    assert settings.grid_thw(frames_FCHW) == tuple(theirs["image_grid_thw"][0].tolist())
    torch.testing.assert_close(settings.patchify(frames_FCHW), theirs["pixel_values"], atol=1e-6, rtol=0)  # as above


def test_frames_of_final_size_pass_hf_processors_without_another_resize(hf: Any) -> None:
    """Even frames far smaller than HF's own minimum, which would enlarge them."""
    frames_FCHW = random_frames(4, 28, 28)
    stock = hf.video(do_sample_frames=False)(videos=[frames_FCHW], return_tensors="pt")
    passed = hf.video(size=PreprocessSettings().passthrough_size(), do_sample_frames=False)
    assert stock["video_grid_thw"][0].tolist() != [2, 2, 2], "the stock limits do resize"
    assert passed(videos=[frames_FCHW], return_tensors="pt")["video_grid_thw"][0].tolist() == [2, 2, 2]


def test_sizes_equal_hf_with_its_total_budget_switched_on(hf: Any) -> None:
    rng = random.Random(0)
    settings = PreprocessSettings()
    for _ in range(300):
        num_frames, height, width = rng.choice([2, 16, 128, 512, 768]), rng.randint(20, 1500), rng.randint(20, 1500)
        budget = int(128000 * 28 * 28 * 0.9) * 2 // num_frames
        cap = max(min(settings.video_max_pixels, budget), int(settings.video_min_pixels * 1.05))
        expected = hf.video_resize(height, width, 28, settings.video_min_pixels, cap)
        assert settings.frame_size(height, width, kind="video", num_frames=num_frames) == expected
        expected = hf.image_resize(height, width, 28, settings.image_min_pixels, settings.image_max_pixels)
        assert settings.frame_size(height, width, kind="image") == expected


def test_hf_caps_a_long_video_at_our_size(hf: Any) -> None:
    """Through the processor itself: 240 frames share the budget, so each is smaller than a lone one would be."""
    settings = PreprocessSettings(video_min_pixels=4 * 784, video_total_pixels=int(600 * 784 * 0.9))
    frames_FCHW = random_frames(240, 90, 120)
    processor = hf.video(
        size={"shortest_edge": 4 * 784, "longest_edge": settings.video_max_pixels},
        max_video_tokens=600,
        cap_pixels_per_frame=True,
        do_sample_frames=False,
    )
    _, height, width = processor(videos=[frames_FCHW], return_tensors="pt")["video_grid_thw"][0].tolist()
    assert settings.frame_size(90, 120, kind="video", num_frames=240) == (height * 14, width * 14) == (28, 56)
    assert settings.frame_size(90, 120, kind="video", num_frames=2) == (84, 112)


def test_resizing_equals_what_qwen_vl_utils_calls(hf: Any) -> None:
    """torchvision's first-generation function, which interpolates in fp32 and rounds once."""
    from torchvision.transforms import InterpolationMode, functional

    frames_FCHW = random_frames(3, 90, 130)
    theirs = functional.resize(frames_FCHW, [56, 84], interpolation=InterpolationMode.BICUBIC, antialias=True)
    difference = (resize_frames(frames_FCHW, (56, 84)).int() - theirs.int()).abs()
    # The same fp32 interpolation; a value within 1e-5 of a half may round either way.
    assert difference.max() <= 1 and difference.float().mean() < 1e-3


def test_resizing_is_close_to_hf_processors_own(hf: Any) -> None:
    """HF's processor resizes uint8 in 8-bit passes; on a picture (not noise) that differs by rounding."""
    frames_FCHW = torch.from_numpy(numbered_frames(4, height=90, width=130)).permute(0, 3, 1, 2)
    processor = hf.video(size={"shortest_edge": 6 * 784, "longest_edge": 6 * 784}, do_sample_frames=False)
    theirs = processor(videos=[frames_FCHW], return_tensors="pt")
    settings = PreprocessSettings(video_min_pixels=6 * 784, video_max_pixels=6 * 784)
    ours = resize_frames(frames_FCHW, settings.frame_size(90, 130, kind="video", num_frames=4))
    assert settings.grid_thw(ours) == tuple(theirs["video_grid_thw"][0].tolist())
    difference = (settings.patchify(ours) - theirs["pixel_values_videos"]).abs() * 255 * 0.2686
    # In levels of 255: two roundings of half a level; where overshoot is clipped between their passes, more.
    assert difference.mean() < 0.5 and difference.max() < 12
