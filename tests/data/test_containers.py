"""Videos in the containers of the web: which frames they have, at which rate, whatever sound and times they carry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_ktr.data.media.video import FrameSampling, read_video
from tests.support.videos import numbered_frames, write_video

NUM_FRAMES = 20
FRAMES = numbered_frames(NUM_FRAMES)
STEADY = [100 * number for number in range(NUM_FRAMES)]
UNSTEADY = [0, 40, 80, 500, 540, 580, 620, 1000, 1500, 1540] + [1600 + 100 * number for number in range(10)]
"""Frames in bursts: 19 intervals in 2.5 s. Matroska files say 10 frames a second for them, as the encoder was told."""
GIF_DELAYS = [50, 400] * (NUM_FRAMES // 2)


def _gif(path: Path, delays: int | list[int]) -> None:
    first, *rest = (Image.fromarray(picture) for picture in FRAMES)
    first.save(path, save_all=True, append_images=rest, duration=delays)


AV1 = {"encoder": "libsvtav1", "options": {"g": "8", "preset": "12", "svtav1-params": "lp=1"}}
FILES: dict[str, tuple[Callable[[Path], object], float, int]] = {
    "steady.gif": (lambda path: _gif(path, 100), 10.0, 0),
    "changing delays.gif": (lambda path: _gif(path, GIF_DELAYS), 1000 * NUM_FRAMES / sum(GIF_DELAYS), 0),
    "av1.webm": (lambda path: write_video(path, FRAMES, **AV1), 10.0, 0),
    "vp9 in bursts.webm": (lambda path: write_video(path, FRAMES, encoder="libvpx-vp9", milliseconds=UNSTEADY), 7.7, 0),
    "in bursts.mkv": (lambda path: write_video(path, FRAMES, milliseconds=UNSTEADY), 7.7, 0),
    "in bursts.mp4": (lambda path: write_video(path, FRAMES, milliseconds=UNSTEADY), 7.7, 0),
    "late.mkv": (lambda path: write_video(path, FRAMES, milliseconds=[5000 + time for time in STEADY]), 10.0, 0),
    "late.mp4": (lambda path: write_video(path, FRAMES, milliseconds=[5000 + time for time in STEADY]), 10.0, 0),
    "late.ts": (lambda path: write_video(path, FRAMES, milliseconds=[5000 + time for time in STEADY]), 10.0, 0),
    "before zero.mkv": (lambda path: write_video(path, FRAMES, milliseconds=[time - 500 for time in STEADY]), 10.0, 0),
    # Its edit list begins at 0, so players never show the frames before it.
    "before zero.mp4": (lambda path: write_video(path, FRAMES, milliseconds=[time - 500 for time in STEADY]), 10.0, 5),
    "sound.mkv": (lambda path: write_video(path, FRAMES, audio=True), 10.0, 0),
    "sound.ts": (lambda path: write_video(path, FRAMES, audio=True), 10.0, 0),
    "sound.avi": (lambda path: write_video(path, FRAMES, audio=True, encoder="mpeg4"), 10.0, 0),
}
"""Name -> (how it is written, frames a second, frames that are hidden at its beginning)."""


@pytest.mark.parametrize("name", FILES)
def test_every_container_gives_its_frames_by_number_and_its_mean_rate(tmp_path: Path, name: str) -> None:
    write, fps, num_hidden = FILES[name]
    write(tmp_path / name)
    video = read_video(tmp_path / name, sampling=FrameSampling(num_frames=8))
    assert video.total_frames == NUM_FRAMES - num_hidden
    # Containers round times and durations to their own ticks; that of the last frame is a guess where times change.
    assert video.native_fps == pytest.approx(fps, rel=0.05)
    originals_FCHW = torch.from_numpy(FRAMES).permute(0, 3, 1, 2).float()
    shown = [int((originals_FCHW - frame).abs().mean(dim=(1, 2, 3)).argmin()) for frame in video.frames_FCHW.float()]
    assert shown == [number + num_hidden for number in video.frame_indices]


@pytest.mark.parametrize("name", ["late.mkv", "in bursts.mp4"])
def test_a_clip_is_counted_from_the_first_frame_whatever_the_time_written_on_it(tmp_path: Path, name: str) -> None:
    FILES[name][0](tmp_path / name)
    clip = FrameSampling(num_frames=2, start_seconds=0.5, end_seconds=1.0)
    video = read_video(tmp_path / name, sampling=clip)
    # Frame i is taken to be shown at i / mean rate, as in qwen-vl-utils.
    assert video.frame_indices[0] == -int(-0.5 * video.native_fps // 1)
    assert video.frame_indices[1] == int(1.0 * video.native_fps)
