"""A video as a folder of pictures: their order, what else may not lie there, and the same frames as from a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media import folder as folder_module
from megatron_ktr.data.media.files import MediaFiles, files_of
from megatron_ktr.data.media.folder import list_pictures, natural_key
from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.records import check_record, record_digest
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from tests.support.fuzzing import fuzzed
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames

NUM_PICTURES = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips/7 holds frame_0.png .. frame_11.png, whose order as text is 0, 1, 10, 11, 2, .."""
    root = tmp_path_factory.mktemp("media")
    (root / "clips" / "7").mkdir(parents=True)
    for number, picture in enumerate(numbered_frames(NUM_PICTURES, height=56, width=84)):
        Image.fromarray(picture).save(root / "clips" / "7" / f"frame_{number}.png")
    save_tiny_tokenizer(root)
    return root


def record(**fields: object) -> dict[str, object]:
    return check_record({"problem": "Which?", "solution": "A", **fields}, number=1)


def load(root: Path, **fields: object) -> torch.Tensor:
    loader = PromptLoader.from_model(
        root, media_root=root, sampling=FrameSampling(fps=2, max_frames=16), video_min_pixels=784
    )
    (medium,) = loader.load(record(**fields)).media
    return medium.frames_FCHW, medium.seconds_per_grid


@pytest.mark.parametrize("fields", [{}, {"fps": 4}, {"sample_fps": 1, "video_start": 2.0}, {"nframes": 6}])
def test_a_folder_is_the_list_of_its_pictures_in_natural_order(root: Path, fields: dict[str, object]) -> None:
    names = [f"clips/7/frame_{number}.png" for number in range(NUM_PICTURES)]
    of_folder, of_list = load(root, video="clips/7/", **fields), load(root, video=names, **fields)
    assert torch.equal(of_folder[0], of_list[0]) and of_folder[1] == of_list[1]
    assert len(of_folder[0]) > 4


def test_several_folders_are_several_videos_and_path_names_one_too() -> None:
    assert record(videos=["a/", "b/"])["media"] == [("video", "a/"), ("video", "b/")]
    assert record(path="a/")["media"] == [("video", "a/")] and record(path="a/")["data_type"] == "video"
    assert record(video=["a/", "b.mp4"])["media"] == [("video", "a/"), ("video", "b.mp4")]
    (source,) = media_sources(record(video="a/", sample_fps=3))
    assert source.is_folder and source.is_pictures and source.name == "a/"


def test_records_of_different_folders_are_different_records() -> None:
    assert record_digest({"video": "x/1/"}) == record_digest({"video": "y/1/"}) != record_digest({"video": "x/2/"})


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True))
@fuzzed(50)
def test_numbers_in_names_order_as_numbers(numbers: list[int]) -> None:
    names = [f"a1_{number}b.jpg" for number in numbers]
    assert sorted(names, key=natural_key) == [f"a1_{number}b.jpg" for number in sorted(numbers)]


def fill(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8)).save(folder / name, format="PNG")
    return folder


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "is a folder without a picture"),
        (["1.png", "notes.txt"], "holds 'notes.txt', which is not a picture"),
        (["1.png", ".DS_Store"], "holds '.DS_Store'"),
        (["1.png", "2.mp4"], "holds '2.mp4'"),
        (["1.png", "2.png/"], "holds '2.png', which is not a picture"),
        (["7.png", "07.png"], "have the same place"),
        (["7.png", "7.jpg"], "have the same place"),
        ([f"{number}.png" for number in range(6)], "holds more than 5 files"),
    ],
)
def test_what_is_no_folder_of_pictures_is_refused_in_words_and_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], reason: str
) -> None:
    monkeypatch.setattr(folder_module, "MOST_PICTURES", 5)
    fill(tmp_path / "frames", names)
    (source,) = media_sources(record(video="frames/"))
    for read in (lambda: files_of(source, tmp_path), lambda: MediaFiles(tmp_path).check("frames/")):
        with pytest.raises(UnusableMedia) as caught:
            read()
        assert reason in caught.value.reason


def test_no_link_leads_out_of_the_media_root(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", ["1.png"])
    media = tmp_path / "media"
    fill(media, ["1.png"])
    (media / "frames").mkdir()
    (media / "frames" / "1.png").symlink_to(media / "1.png")
    assert list_pictures(media / "frames", root=media) == (media / "frames" / "1.png",)
    (media / "frames" / "2.png").symlink_to(outside / "1.png")
    with pytest.raises(UnusableMedia, match="leads by a link out of the media root"):
        list_pictures(media / "frames", root=media)
    (media / "linked").symlink_to(outside)
    for check in (MediaFiles(media).check, lambda written: files_of(media_sources(record(video=written))[0], media)):
        with pytest.raises(UserError, match="leads by a link out of media_root"):
            check("linked/")
    with pytest.raises(UnusableMedia, match="No such file"):
        list_pictures(media / "nowhere", root=media)
