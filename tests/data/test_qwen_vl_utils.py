"""Frames and sizes against the real qwen-vl-utils, which Qwen2.5-VL was trained with, and where ours differ on purpose.

The library reads with decord here; its other readers (torchcodec, a function that torchvision has dropped) are not in
the vLLM environment. What differs is in docs/preprocessing.md; each line of it has a test below.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ktr.data.media.preprocess import PreprocessSettings, load_media
from megatron_ktr.data.media.request import MediaRequest
from megatron_ktr.data.media.video import FrameSampling, read_image, read_video, select_frames
from megatron_ktr.data.media.video_pyav import index_video
from megatron_ktr.data.unusable import UnusableMedia
from tests.support.torchvision_ops import declare_torchvision_operators
from tests.support.videos import numbered_frames, shared_videos, write_codec, write_video

pytestmark = pytest.mark.vllm

RELEASE = {"min_pixels": 100352, "max_pixels": 105369}
"""What the release's constants (128 tokens for both limits) come to: 1.05 times the minimum is its maximum."""
OPTIONS: dict[str, dict[str, Any]] = {
    "its defaults": {},
    "the release's run": {"fps": 2.0, "max_frames": 16, **RELEASE},
    "fixed number": {"nframes": 8, "min_pixels": 3136, "max_pixels": 50176},
    "many frames of a small budget": {"fps": 4.0, "max_frames": 32, "min_pixels": 3136, "total_pixels": 32 * 784 * 20},
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``qwen_vl_utils.vision_process``, reading with decord."""
    declare_torchvision_operators()
    from qwen_vl_utils import vision_process as module

    monkeypatch.setattr(module, "FORCE_QWENVL_VIDEO_READER", "decord")
    module.get_video_reader_backend.cache_clear()
    return module


def our_settings(options: dict[str, Any]) -> PreprocessSettings:
    """Settings under the library's names; where it has a default and a directory of Qwen2.5-VL has not, both agree."""
    return PreprocessSettings(**{f"video_{name}": options[name] for name in options if name.endswith("_pixels")})


def our_sampling(options: dict[str, Any]) -> FrameSampling:
    return FrameSampling(
        fps=options.get("fps", 2.0),
        num_frames=options.get("nframes"),
        max_frames=options.get("max_frames", 768),
        start_seconds=options.get("video_start"),
        end_seconds=options.get("video_end"),
    )


def their_video(library: Any, path: Path, options: dict[str, Any]) -> tuple[torch.Tensor, list[int], float]:
    """(frames, frame numbers, frames a second) of the library."""
    (frames, metadata), sampled_fps = library.fetch_video(
        {"video": str(path), **options}, return_video_sample_fps=True, return_video_metadata=True
    )
    return frames, list(metadata["frames_indices"]), sampled_fps


def check_same(library: Any, path: Path, options: dict[str, Any]) -> None:
    frames_FCHW, indices, sampled_fps = their_video(library, path, options)
    sampling = our_sampling(options)
    clip = MediaRequest(video_start=options.get("video_start"), video_end=options.get("video_end"))
    ours = load_media(path, kind="video", settings=our_settings(options), sampling=sampling, request=clip)
    index = index_video(path)
    selection = select_frames(index.num_frames, native_fps=index.native_fps, sampling=sampling)
    assert list(selection.indices) == indices
    # The same fp64 operations in another order; decord keeps rates in fp32.
    assert selection.sampled_fps == pytest.approx(sampled_fps, rel=1e-6)
    assert ours.visual.seconds_per_grid == 2 / selection.sampled_fps
    assert ours.visual.frames_FCHW.shape == frames_FCHW.shape
    if ours.backend == "decord":  # PyAV stands in exactly where decord's frames are not those of their numbers
        # Both interpolate in fp32 and round once; a value within 1e-5 of a half may round either way.
        assert (ours.visual.frames_FCHW - frames_FCHW).abs().max() <= 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_real_videos_have_the_librarys_frames_and_sizes(library: Any, options: dict[str, Any]) -> None:
    videos = shared_videos()
    if not videos:
        pytest.skip("no real videos here")
    for path in videos:
        if path.name == "corrupted.mp4":
            with pytest.raises(Exception, match="read_video|Error sending packet"):
                their_video(library, path, options)
            with pytest.raises(UnusableMedia, match="damaged"):
                load_media(path, kind="video", settings=PreprocessSettings(), sampling=our_sampling(options))
        elif path.name == "rotated_90.mov" and "nframes" in options:
            continue  # three frames: see the test of videos with fewer frames than wanted
        else:
            check_same(library, path, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_made_videos_have_the_librarys_frames_and_sizes(library: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    for num_frames, height, width in ((9, 64, 96), (33, 240, 90), (80, 360, 640)):
        frames_FHWC = numbered_frames(num_frames, height=height, width=width)
        check_same(library, write_video(tmp_path / f"{num_frames}.mp4", frames_FHWC), options)
    check_same(library, write_codec(tmp_path, "vp9", numbered_frames(21)), options)


def test_every_container_that_decord_opens_gives_the_librarys_frames(library: Any, tmp_path: Path) -> None:
    for name in ("vp8 hidden frames", "mpeg4 avi", "mpeg2 ts", "h264 all-intra", "mjpeg mov"):
        check_same(library, write_codec(tmp_path, name, numbered_frames(25)), {"fps": 4.0})
    for name in ("sound.mp4", "sound.mkv", "late.mkv"):
        times = [5000 + 100 * number for number in range(25)] if name == "late.mkv" else None
        path = write_video(tmp_path / name, numbered_frames(25), audio="sound" in name, milliseconds=times)
        check_same(library, path, {"fps": 4.0})


CLIPS: list[dict[str, Any]] = [
    {"video_start": 1.0},
    {"video_end": 2.5},
    {"video_start": 0.999, "video_end": 3.001},
    {"video_start": 1.0, "video_end": 1000.0},
    {"video_start": 0.5, "video_end": 4.0, "nframes": 4},
]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_clips_of_real_videos_have_the_librarys_frames(library: Any, clip: dict[str, Any]) -> None:
    videos = [
        path for path in shared_videos() if path.name not in ("corrupted.mp4", "h265_video.mp4", "rotated_90.mov")
    ]
    if not videos:
        pytest.skip("no real videos here")
    for path in videos:
        check_same(library, path, clip)


def their_size(library: Any, shape: tuple[int, int, int], options: dict[str, Any], patch: Any) -> tuple[int, int]:
    """What the library would resize [F, H, W] = ``shape`` to; nothing is decoded or resized."""
    found: list[tuple[int, int]] = []

    def record(video: torch.Tensor, size: list[int], **kwargs: Any) -> torch.Tensor:
        found.append((size[0], size[1]))
        return torch.zeros(1)

    num_frames, height, width = shape
    empty = torch.empty(1).expand(num_frames, 3, height, width)
    patch.setitem(library.VIDEO_READER_BACKENDS, "decord", lambda element: (empty, {}, 2.0))
    patch.setattr(library, "transforms", SimpleNamespace(functional=SimpleNamespace(resize=record)))
    library.fetch_video({"video": "any", **options})
    return found[0]


def test_sizes_equal_the_librarys_or_it_leaves_no_pixels(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides from 1 to 5,800, every limit random: shares that fall below a token and limits between tokens, too."""
    rng = random.Random(0)
    num_compared = num_vanished = 0
    for _ in range(6000):
        shape = (rng.choice([2, 4, 16, 100, 334, 768]), *(round(2 ** rng.uniform(0, 12.5)) for _ in range(2)))
        low = rng.choice([1, 784, 3136, 100352, rng.randint(1, 400000)])
        options = {
            "min_pixels": low,
            "max_pixels": rng.choice([max(low, 784), 602112, rng.randint(max(low, 784), 602112)]),
            "total_pixels": rng.choice([90316800, rng.randint(10000, 20000000)]),
        }
        settings = our_settings(options)
        if max(shape[1:]) > 200 * min(shape[1:]):
            with pytest.raises(ValueError, match="200"):
                their_size(library, shape, options, monkeypatch)
            with pytest.raises(ValueError, match="200"):
                settings.frame_size(*shape[1:], kind="video", num_frames=shape[0])
            continue
        theirs = their_size(library, shape, options, monkeypatch)
        ours = settings.frame_size(*shape[1:], kind="video", num_frames=shape[0])
        if 0 in theirs:
            num_vanished += 1
            cap = max(options["total_pixels"] / shape[0] * 2, int(low * 1.05), 784)
            assert min(ours) == 28 and ours[0] * ours[1] <= cap, (shape, options)
        else:
            num_compared += 1
            assert ours == theirs, (shape, options)
    assert num_compared > 3000 and num_vanished > 1


def test_the_release_s_constants_are_our_two_options(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has 128 tokens as least and as most pixels of a frame, and no option; the rule makes 105,369 of the latter."""
    monkeypatch.setattr(library, "VIDEO_MAX_TOKEN_NUM", 128)
    settings = our_settings(RELEASE)
    rng = random.Random(1)
    for _ in range(2000):
        shape = (rng.choice([2, 4, 10, 16]), rng.randint(30, 2200), rng.randint(30, 2200))
        ours = settings.frame_size(*shape[1:], kind="video", num_frames=shape[0])
        assert ours == their_size(library, shape, {}, monkeypatch), shape


def test_image_sizes_equal_the_librarys(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the image cap of the release's run, and others."""
    rng = random.Random(2)
    for _ in range(2000):
        width, height = rng.randint(20, 4000), rng.randint(20, 4000)
        low, high = rng.choice([(3136, 200704), (3136, 1003520), (50176, 50176), (784, 12845056)])
        fake = SimpleNamespace(size=(width, height), resize=lambda size: size)
        monkeypatch.setattr(library, "to_rgb", lambda image, fake=fake: fake)
        theirs = library.fetch_image({"image": Image.new("1", (1, 1)), "min_pixels": low, "max_pixels": high})
        ours = PreprocessSettings(image_min_pixels=low, image_max_pixels=high).frame_size(height, width, kind="image")
        if 0 in theirs:
            assert min(ours) == 28 and ours[0] * ours[1] <= high
        else:
            assert ours == theirs[::-1], (height, width, low, high)


def test_frame_numbers_equal_the_librarys(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decord reader over a video that is nothing but a number of frames and a rate."""

    class Numbers:
        def __init__(self, path: str) -> None:
            self.num_frames, self.fps = path.split("@")

        def __len__(self) -> int:
            return int(self.num_frames)

        def get_avg_fps(self) -> float:
            return float(self.fps)

        def get_batch(self, indices: list[int]) -> Any:
            return SimpleNamespace(asnumpy=lambda: np.zeros((len(indices), 1, 1, 3), dtype=np.uint8))

    monkeypatch.setattr("decord.VideoReader", Numbers)
    rng = random.Random(3)
    num_compared = 0
    for _ in range(3000):
        total, native = rng.randint(2, 20000), rng.choice([0.5, 10.0, 23.976023976, 25.0, 29.97002997, 60.0, 1000.0])
        options = rng.choice([{"nframes": rng.randint(2, 64)}, {"fps": rng.choice([0.1, 1.0, 2.0, 3.3])}, {}])
        if "nframes" not in options:
            options = {**options, "max_frames": rng.choice([2, 16, 17, 768])}
        elif round(options["nframes"] / 2) * 2 > total:
            continue
        _, metadata, sampled_fps = library.VIDEO_READER_BACKENDS["decord"]({"video": f"{total}@{native}", **options})
        ours = select_frames(total, native_fps=native, sampling=our_sampling(options))
        assert list(ours.indices) == metadata["frames_indices"], (total, native, options)
        assert ours.sampled_fps == pytest.approx(sampled_fps, rel=1e-12)
        num_compared += 1
    assert num_compared > 2500


def numbers_of(library: Any, total: int, native: float, options: dict[str, Any], patch: Any) -> list[int]:
    """The frame numbers that the library takes of a video that is nothing but a number of frames and a rate."""

    class Numbers:
        def __init__(self, path: str) -> None:
            pass

        def __len__(self) -> int:
            return total

        def get_avg_fps(self) -> float:
            return native

        def get_batch(self, indices: list[int]) -> Any:
            return SimpleNamespace(asnumpy=lambda: np.zeros((len(indices), 1, 1, 3), dtype=np.uint8))

    patch.setattr("decord.VideoReader", Numbers)
    return library.VIDEO_READER_BACKENDS["decord"]({"video": "any", **options})[1]["frames_indices"]


@pytest.mark.parametrize(("release", "most"), [("Video-R1, Video-KTR, TW-GRPO", 16), ("Video-RTS, evaluation", 128)])
def test_the_rule_of_most_releases_is_the_librarys_with_another_constant(
    library: Any, monkeypatch: pytest.MonkeyPatch, release: str, most: int
) -> None:
    """Their copies of the library change FPS_MAX_FRAMES and the limits of pixels, and set no option: our rule fps."""
    monkeypatch.setattr(library, "FPS_MAX_FRAMES", most)
    rng = random.Random(4)
    for _ in range(300):
        total, native = rng.randint(2, 5000), rng.choice([10.0, 23.976, 29.97, 60.0])
        theirs = numbers_of(library, total, native, {}, monkeypatch)
        ours = select_frames(total, native_fps=native, sampling=FrameSampling(max_frames=most, rule="fps"))
        assert list(ours.indices) == theirs, (release, total, native)


def test_the_rule_of_video_rts_is_resampled(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training there takes 32 of the frames that the library takes by default, at places that are cut off, not rounded:
    short videos show frames several times."""
    rng = random.Random(5)
    num_repeating = 0
    for _ in range(300):
        total, native = (
            rng.choice([rng.randint(2, 300), rng.randint(2, 60000)]),
            rng.choice([10.0, 23.976, 29.97, 60.0]),
        )
        of_library = numbers_of(library, total, native, {}, monkeypatch)
        theirs = [of_library[place] for place in torch.linspace(0, len(of_library) - 1, 32).long().tolist()]
        ours = select_frames(
            total, native_fps=native, sampling=FrameSampling(num_frames=32, max_frames=32, rule="resampled")
        )
        assert list(ours.indices) == theirs and ours.num_repeated == 32 - len(set(theirs)), (total, native)
        assert ours.sampled_fps == pytest.approx(32 / total * native)
        num_repeating += ours.num_repeated > 0
    assert 30 < num_repeating < 270


# Where ours differs on purpose


def test_a_clip_of_one_frame_is_shown_where_the_library_refuses_it(library: Any, tmp_path: Path) -> None:
    path = write_video(tmp_path / "ten.mp4", numbered_frames(30))
    with pytest.raises(AttributeError):  # decord's reader raises ValueError, and the one tried next is not there
        their_video(library, path, {"video_start": 1.0, "video_end": 1.05})
    clip = FrameSampling(start_seconds=1.0, end_seconds=1.05)
    assert read_video(path, sampling=clip).frame_indices == (10, 10)


def test_pictures_of_a_video_are_sampled_and_resized_once(library: Any, tmp_path: Path) -> None:
    """The library takes all of them, and resizes each to multiples of 56 before the size of the video is chosen."""
    names = []
    for number, picture in enumerate(numbered_frames(40, height=140, width=196)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        names.append(tmp_path / f"{number}.png")
    options = {"min_pixels": 784, "max_pixels": 100352}
    (theirs, _), _ = library.fetch_video(
        {"video": [str(name) for name in names], **options},
        return_video_sample_fps=True,
        return_video_metadata=True,
    )
    ours = load_media(names, kind="video", settings=our_settings(options), sampling=FrameSampling(max_frames=16))
    assert theirs.shape == (40, 3, 112, 224), "neither the number nor the aspect ratio of the pictures"
    assert ours.visual.frames_FCHW.shape == (16, 3, 140, 196)


def test_a_rate_that_the_times_of_frames_contradict_is_not_believed(library: Any, tmp_path: Path) -> None:
    """200 frames in 20 s, in a file that says 100 a second: the library takes 4 frames, as of 2 s."""
    times = [100 * number for number in range(200)]
    path = write_video(tmp_path / "wrong.mkv", numbered_frames(200), fps=100, milliseconds=times)
    _, indices, _ = their_video(library, path, {})
    assert len(indices) == 4
    assert len(read_video(path, sampling=FrameSampling()).frame_indices) == 40


def test_a_video_of_fewer_frames_than_wanted_is_taken_whole(library: Any, tmp_path: Path) -> None:
    """The library raises for it, or for the reader it then tries; ours takes all frames and repeats the last."""
    three = write_video(tmp_path / "three.mp4", numbered_frames(3))
    one = write_video(tmp_path / "one.mp4", numbered_frames(1))
    for path, options, expected in ((three, {"nframes": 8}, (0, 1, 2, 2)), (one, {}, (0, 0))):
        with pytest.raises((ValueError, AttributeError)):
            their_video(library, path, options)
        assert read_video(path, sampling=our_sampling(options)).frame_indices == expected


def test_more_pixels_than_768_tokens_are_given_where_they_are_asked_for(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library lowers the option to its constant and writes a warning."""
    options = {"max_pixels": 2000 * 784}
    assert their_size(library, (8, 1080, 1920), options, monkeypatch) == (560, 1008)
    assert our_settings(options).frame_size(1080, 1920, kind="video", num_frames=8) == (924, 1652)


def test_a_photograph_is_shown_upright(library: Any, tmp_path: Path) -> None:
    """The library ignores the orientation that a camera notes: height and width change places."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.fromarray(numbered_frames(1, height=90, width=300)[0]).save(tmp_path / "photo.jpg", exif=exif)
    theirs = library.fetch_image({"image": str(tmp_path / "photo.jpg")})
    ours = load_media(
        tmp_path / "photo.jpg", kind="image", settings=PreprocessSettings(), sampling=FrameSampling()
    ).visual.frames_FCHW
    assert theirs.size == (308, 84) and tuple(ours.shape[-2:]) == (308, 84)


def test_transparency_is_white_in_every_kind_of_picture(library: Any, tmp_path: Path) -> None:
    """The library does so for RGBA alone: a palette's transparent colour shows."""
    picture = Image.new("P", (56, 56), 0)
    picture.putpalette([10, 20, 30] + [0] * 765)
    picture.save(tmp_path / "transparent.png", transparency=0)
    theirs = np.array(library.fetch_image({"image": str(tmp_path / "transparent.png")}))
    assert theirs[0, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "transparent.png")[0, :, 0, 0].tolist() == [255, 255, 255]
