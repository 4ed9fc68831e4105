"""What records say about their media: lists of pictures, clips and the fields of qwen-vl-utils."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media import pictures as pictures_module
from megatron_ktr.data.media.pictures import read_pictures
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings, load_media
from megatron_ktr.data.media.request import HONOURED, REFUSED, SYNONYMS, MediaRequest, media_sources
from megatron_ktr.data.media.video import FrameSampling, read_image, read_video, select_frames
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.records import check_record
from megatron_ktr.data.unusable import UnusableMedia, UnusableSample
from megatron_ktr.report.frames import FrameReader
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

SETTINGS = PreprocessSettings(video_min_pixels=784, image_min_pixels=784)
SAMPLING = FrameSampling(fps=2, max_frames=16)
HEIGHT, WIDTH = 56, 84


def record_of(**fields: Any) -> dict[str, Any]:
    return {"problem": "Which?", "solution": "A", **fields}


def checked(**fields: Any) -> dict[str, Any]:
    return check_record(record_of(**fields), number=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f0.jpg .. f7.jpg, the numbered frames of clip.mp4 (20 frames, 10 a second), an animation, and pictures in odd
    formats."""
    folder = tmp_path_factory.mktemp("pictures")
    frames = [Image.fromarray(picture) for picture in numbered_frames(20, height=HEIGHT, width=WIDTH)]
    write_video(folder / "clip.mp4", numbered_frames(20, height=HEIGHT, width=WIDTH))
    for number, picture in enumerate(frames[:8]):
        picture.save(folder / f"f{number}.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:8], duration=200)
    frames[0].convert("L").save(folder / "grey.png")
    frames[0].convert("P").save(folder / "palette.png")
    frames[0].convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 0x8000, dtype=np.uint16)).save(folder / "deep.png")
    turned = frames[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    frames[0].resize((WIDTH, HEIGHT * 2)).save(folder / "tall.png")
    frames[0].save(folder / "disguised.mp4", format="JPEG")
    save_tiny_tokenizer(folder)
    return folder


FRAMES = [f"f{number}.png" for number in range(8)]


def load(folder: Path, record: dict[str, Any], *, sampling: FrameSampling = SAMPLING) -> list[LoadedMedia]:
    found = []
    for source in media_sources(record):
        paths = [folder / written for written in source.paths]
        found.append(
            load_media(
                paths if source.is_pictures else paths[0],
                kind=source.kind,
                settings=SETTINGS,
                sampling=sampling,
                request=source.request,
            )
        )
    return found


# --- which files are one medium -------------------------------------------------------------------------------


def part(**fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [{"type": "video", **fields}, {"type": "text", "text": "Which?"}]}]
    }


@pytest.mark.parametrize(
    ("fields", "media"),
    [
        ({"video": ["a.jpg", "b.PNG"]}, [("video", ("a.jpg", "b.PNG"))]),
        ({"video": ["a.jpg"]}, [("video", ("a.jpg",))]),
        ({"video": [["a.jpg", "b.jpg"]]}, [("video", ("a.jpg", "b.jpg"))]),
        ({"videos": ["a.jpg", "b.jpg"]}, [("video", ("a.jpg", "b.jpg"))]),
        ({"videos": [["a.jpg"], ["b.jpg", "c.jpg"]]}, [("video", ("a.jpg",)), ("video", ("b.jpg", "c.jpg"))]),
        ({"videos": [["a.jpg"], "b.mp4"]}, [("video", ("a.jpg",)), ("video", "b.mp4")]),
        ({"video": ["a.mp4", "b.mkv"]}, [("video", "a.mp4"), ("video", "b.mkv")]),
        ({"video": ["a.gif", "b.gif"]}, [("video", "a.gif"), ("video", "b.gif")]),
        ({"path": ["a.jpg", "b.jpg"], "data_type": "video"}, [("video", ("a.jpg", "b.jpg"))]),
        ({"path": ["a.jpg", "b.jpg"]}, [("image", "a.jpg"), ("image", "b.jpg")]),
        ({"image": ["a.jpg", "b.gif"]}, [("image", "a.jpg"), ("image", "b.gif")]),
        (part(video=["a.jpg", "b.jpg"]), [("video", ("a.jpg", "b.jpg"))]),
    ],
)
def test_a_list_of_pictures_is_one_video_and_a_list_of_files_is_several(fields: dict, media: list) -> None:
    record = checked(**fields)
    assert record["media"] == media and record["data_type"] == media[0][0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "a.jpg"}, "names one picture, 'a.jpg', as a video"),
        ({"path": "a.jpg", "data_type": "video"}, "names one picture, 'a.jpg', as a video"),
        (part(video="a.jpg"), "names one picture, 'a.jpg', as a video"),
        ({"video": ["a.jpg", "b.mp4"]}, "mixes pictures and videos"),
        ({"videos": ["b.mp4", "a.jpg"]}, "mixes pictures and videos"),
        (part(video=["a.jpg", "b.mp4"]), "mixes pictures and videos"),
        ({"videos": [["a.mp4", "b.mp4"]]}, "pictures of one video"),
        ({"videos": [[]]}, "pictures of one video"),
        ({"videos": [[["a.jpg"]]]}, "expected a path"),
        ({"image": [["a.jpg"]]}, "expected a path"),
        ({"image": "a.mp4"}, "names a video"),
        ({"frames": ["a.jpg", "b.jpg"]}, "field 'frames'"),
        ({"video_path": "a.mp4"}, "field 'video_path'"),
        ({**part(video="a.mp4"), "video": "b.mp4"}, "other media"),
        ({"data_type": "text", "video": "a.mp4"}, "data_type is 'text'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match="expected|names|mixes|but it|parts") as caught:
        checked(**fields)
    assert reason in str(caught.value)


# --- pictures as frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "numbers", "seconds_per_grid"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7], 1.0),  # 8 pictures at the run's 2 a second: 4 s, all taken
        ({"sample_fps": 2}, [0, 1, 2, 3, 4, 5, 6, 7], 1.0),
        ({"fps": 1}, [0, 1, 2, 3, 4, 5, 6, 7], 2.0),  # 8 s; there are no more pictures than 1 a second
        ({"fps": 4.0}, [0, 2, 5, 7], 1.0),  # 2 s at 2 a second: 4 of them, 0 7/3 14/3 7 rounded
        ({"max_frames": 4}, [0, 2, 5, 7], 2.0),  # 4 frames over 4 s
        ({"nframes": 2}, [0, 7], 4.0),
        ({"video_start": 1.0, "video_end": 2.5}, [2, 3, 4, 5], 1.0),  # pictures 2 to 5 of 2 a second
    ],
)
def test_pictures_are_sampled_and_timed_as_any_video(
    folder: Path, fields: dict, numbers: list[int], seconds_per_grid: float
) -> None:
    (loaded,) = load(folder, checked(video=FRAMES, **fields))
    visual = loaded.visual
    assert (visual.kind, loaded.backend, visual.grid_thw) == ("video", "pillow", (len(numbers) // 2, 4, 6))
    assert visual.seconds_per_grid == pytest.approx(seconds_per_grid)
    originals = torch.from_numpy(numbered_frames(20, height=HEIGHT, width=WIDTH)).permute(0, 3, 1, 2)
    assert torch.equal(visual.frames_FCHW, originals[numbers])
    assert "f0.png .. " in visual.source and "(8 pictures)" in visual.source


def test_one_picture_is_a_frame_shown_twice_and_counted(folder: Path) -> None:
    (loaded,) = load(folder, checked(video=["f3.png"]))
    assert loaded.visual.grid_thw == (1, 4, 6) and loaded.num_repeated_frames == 1


def test_every_kind_of_picture_is_a_frame_upright_and_in_colour(folder: Path) -> None:
    names = ["f0.png", "grey.png", "palette.png", "alpha.png", "deep.png", "turned.jpg"]
    frames_FCHW = load(folder, checked(video=names))[0].visual.frames_FCHW
    assert frames_FCHW.shape == (6, 3, HEIGHT, WIDTH)
    assert torch.equal(frames_FCHW[3], frames_FCHW[0]), "opaque"
    assert (frames_FCHW[1, 0] == frames_FCHW[1, 2]).all() and len(frames_FCHW[1].unique()) > 50
    for number in (2, 5):  # the red corner is at the top left; 256 colours and JPEG change shades
        red, green, _ = frames_FCHW[number, :, 3:10, 3:10].float().mean(dim=(1, 2))
        assert red > 170 and green < 90
    assert frames_FCHW[4].unique().tolist() == [0x80], "16 bits are scaled, not clipped"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["f0.png", "tall.png"], "84 x 112 pixels, other frames of its video are 84 x 56"),
        (["f0.png", "nowhere.png"], "nowhere.png"),
        (["clip.mp4.png", "f0.png"], "No such file"),
    ],
)
def test_pictures_that_make_no_video_are_unusable(folder: Path, names: list[str], reason: str) -> None:
    with pytest.raises(UnusableMedia, match=reason):
        load(folder, checked(video=names))


@pytest.mark.parametrize("name", ["disguised.mp4", "."])
def test_a_picture_and_a_folder_are_no_videos_whatever_they_are_called(folder: Path, name: str) -> None:
    with pytest.raises(UnusableMedia, match="list of pictures|must end in"):
        read_video(folder / name, sampling=SAMPLING)


def test_an_animation_is_a_video(folder: Path) -> None:
    (loaded,) = load(folder, checked(video="moving.gif"))
    assert loaded.visual.grid_thw[0] >= 2, "8 pictures of 0.2 s"


def test_of_very_many_pictures_only_the_sampled_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_one(path: str) -> torch.Tensor:
        read.append(path)
        return torch.zeros(1, 3, 28, 28, dtype=torch.uint8)

    monkeypatch.setattr(pictures_module, "read_image", read_one)
    video = read_pictures([f"{i}.jpg" for i in range(10_000)], pictures_fps=10, sampling=SAMPLING)
    assert len(read) == 16 and (read[0], read[-1]) == ("0.jpg", "9999.jpg")
    assert video.sampled_fps == pytest.approx(16 / 1000)


# --- clips ----------------------------------------------------------------------------------------------------


def frame_range_of_qwen(total: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """The published rule, written down a second time: inwards to whole frames, clamped to the video."""
    duration = total / fps
    first = 0 if start is None else int(np.ceil(max(0.0, min(start, duration)) * fps))
    last = total - 1 if end is None else min(int(np.floor(max(0.0, min(end, duration)) * fps)), total - 1)
    return first, last


def test_a_clip_takes_the_frames_of_its_span_as_qwen_vl_utils_does() -> None:
    rng = random.Random(0)
    for _ in range(300):
        total, fps = rng.randint(30, 3000), rng.choice([10.0, 23.976, 29.97])
        start = rng.choice([None, rng.uniform(0, total / fps / 2)])
        end = rng.choice([None, rng.uniform(total / fps * 0.7, total / fps * 1.2)])
        first, last = frame_range_of_qwen(total, fps, start, end)
        count = last - first + 1
        wished = min(min(max(count / fps * 2, 4), 16), count)
        expected = torch.linspace(first, last, int(wished // 2 * 2)).round().long().tolist()
        span = FrameSampling(fps=2, max_frames=16, start_seconds=start, end_seconds=end)
        selection = select_frames(total, native_fps=fps, sampling=span)
        assert selection.indices == tuple(expected)
        assert selection.sampled_fps == pytest.approx(len(expected) / count * fps)


@pytest.mark.parametrize("names", [("video_start", "video_end"), ("start", "end")])
def test_only_the_clip_is_seen_with_its_own_timing(folder: Path, names: tuple[str, str]) -> None:
    """20 frames at 10 a second, 0.5 s to 1.5 s: frames 5 to 15; 4 of them, 5 8.33 11.67 15 rounded."""
    (loaded,) = load(folder, checked(video="clip.mp4", **dict(zip(names, (0.5, 1.5), strict=True))))
    whole = read_video(folder / "clip.mp4", sampling=FrameSampling(num_frames=20, max_frames=20)).frames_FCHW
    assert torch.equal(loaded.visual.frames_FCHW, whole[[5, 8, 12, 15]])
    assert loaded.visual.seconds_per_grid == pytest.approx(2 / (4 / 11 * 10))
    with pytest.raises(UnusableMedia, match=r"no frame between 2.5 s and the end: it has 20 frames, 2.00 s"):
        load(folder, checked(video="clip.mp4", video_start=2.5))


# --- every field ----------------------------------------------------------------------------------------------

QWEN_FIELDS = {
    "fps": 4.0,
    "nframes": 2,
    "min_frames": 8,
    "max_frames": 2,
    "min_pixels": 20000,
    "max_pixels": 1600,
    "total_pixels": 3200,
    "video_start": 1.0,
    "video_end": 1.0,
    "resized_height": 28,
    "resized_width": 28,
    "start": 1.0,
    "end": 1.0,
}


@pytest.mark.parametrize("name", QWEN_FIELDS)
@pytest.mark.parametrize("in_part", [False, True])
def test_a_field_of_qwen_vl_utils_changes_what_is_seen_or_is_refused_by_name(
    folder: Path, name: str, in_part: bool
) -> None:
    value = {name: QWEN_FIELDS[name]}
    fields = part(video="clip.mp4", **value) if in_part else {"video": "clip.mp4", **value}
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"'{name}'"):
            checked(**fields)
        return
    (plain,), (asked,) = load(folder, checked(video="clip.mp4")), load(folder, checked(**fields))
    assert asked.visual.frames_FCHW.shape != plain.visual.frames_FCHW.shape or not torch.equal(
        asked.visual.frames_FCHW, plain.visual.frames_FCHW
    )
    assert {name, SYNONYMS.get(name)} & {*HONOURED}


def test_pixel_limits_hold_for_images_and_within_the_runs(folder: Path) -> None:
    sizes = [
        load(folder, checked(image="f0.png", **fields))[0].visual.frames_FCHW.shape[-2:]
        for fields in ({}, {"max_pixels": 784}, {"min_pixels": 100 * 784})
    ]
    # 2 x 3 tokens; 1; at least 100: sqrt(100 * 784 / 4704) = 4.08 times the sides, rounded up to 28
    assert [tuple(size) for size in sizes] == [(56, 84), (28, 28), (252, 364)]
    with pytest.raises(UnusableMedia, match="max_pixels 100 leave no size"):
        load(folder, checked(image="f0.png", max_pixels=100))
    with pytest.raises(UnusableMedia, match="nframes 64 exceeds the most frames of a video, 16"):
        load(folder, checked(video="clip.mp4", nframes=64))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fps": 0}, "'fps'"),
        ({"fps": "2"}, "'fps'"),
        ({"fps": True}, "'fps'"),
        ({"fps": float("inf")}, "'fps'"),
        ({"nframes": 2.5}, "'nframes'"),
        ({"fps": 2, "nframes": 4}, "got both"),
        ({"fps": 2, "sample_fps": 4}, "differ"),
        ({"sample_fps": 4}, "list of pictures"),
        ({"min_frames": 8, "max_frames": 4}, "exceeds"),
        ({"video_start": 3, "video_end": 2}, "is not after"),
        ({"video_start": -1}, "'video_start'"),
        ({"start": 1, "video_start": 2}, "differ"),
        ({"start": "the beginning"}, "--ignore-fields start"),
        ({"video": ["a.mp4", "b.mp4"], "video_start": 1}, "2 videos"),
        ({"video": None, "image": "a.png", "video_start": 1}, "0 videos"),
        ({"start_time": 3.0}, "--ignore-fields start_time"),
        ({"audio": "a.wav"}, "'audio'"),
        ({"tools": [{"name": "zoom"}]}, "'tools'"),
        ({"system": 3}, "system"),
    ],
)
def test_fields_without_a_meaning_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        checked(**{"video": "a.mp4", **fields})
    assert reason in str(caught.value)


def test_data_stays_data_and_null_is_nothing() -> None:
    data = {
        "duration": 12.0,
        "timestamp": [1, 2],
        "accurate_start": 1.0,
        "subtitle": "",
        "url": "https://x",
        "fps": None,
    }
    record = checked(video="a.mp4", audio=None, start=None, **data)
    assert record["media_requests"] == [{}] and record["timestamp"] == [1, 2]
    raw = record_of(video="a.mp4", start="first", fps=30)
    record = check_record(raw, number=1, ignored=("start", "fps"))
    assert record["media_requests"] == [{}] and record["start"] == "first"


# --- what is kept by medium -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_caches_and_the_report_tell_readings_of_the_same_files_apart(folder: Path, tmp_path: Path, cache: str) -> None:
    disk = FrameCache(tmp_path, max_bytes=1 << 30) if cache == "disk" else None
    media = MediaReader(memory_bytes=0 if disk else 1 << 30, disk=disk)
    loader = PromptLoader.from_model(
        folder, media_root=folder, sampling=SAMPLING, video_min_pixels=784, image_min_pixels=784, reader=media
    )
    readings = [
        {"video": FRAMES[:2]},
        {"video": FRAMES[:4]},
        {"video": FRAMES[:4], "fps": 8},
        {"image": FRAMES[:1]},
        {"video": FRAMES[:1]},
        {"video": "clip.mp4"},
        {"video": "clip.mp4", "video_end": 1.0},
        {"video": "clip.mp4", "max_pixels": 1000},
    ]
    reader = FrameReader(folder, SAMPLING)
    for _ in range(2):
        for fields in readings:
            record = checked(**fields)
            (expected,) = load(folder, record)
            (medium,) = loader.load(record).media
            assert torch.equal(medium.frames_FCHW, expected.visual.frames_FCHW)
            assert medium.seconds_per_grid == expected.visual.seconds_per_grid
            (strip,) = reader.strips_of(record)
            assert not strip.problem and strip.num_sampled == len(expected.visual.frames_FCHW)
    assert sum(number for name, number in loader.counts.items() if name.startswith("decoder/p")) >= 5
    known = len(media.memory._items) if disk is None else disk.counts()["frame_cache/misses"]
    assert known == len(readings)
    assert disk is None or disk.counts()["frame_cache/hits"] == len(readings)


def test_thirty_two_bit_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((28, 28), 70_000, dtype=np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(UnusableMedia, match="32 bits a pixel"):
        read_image(tmp_path / "i.tif")


def test_a_request_that_asks_for_nothing_is_the_runs() -> None:
    assert MediaRequest().sampling(SAMPLING, is_pictures=False) == SAMPLING
    assert MediaRequest().settings(SETTINGS, kind="video") == SETTINGS
    assert issubclass(UnusableMedia, UnusableSample)
