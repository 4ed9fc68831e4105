"""Frames of videos and images: the right ones, upright, from every codec, and never a crash or a hang."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ktr.data.media import video as video_module
from megatron_ktr.data.media.video import DecodedVideo, FrameSampling, read_image, read_video, select_frames
from megatron_ktr.data.media.video_decord import DecordFailed, DecordProcess
from megatron_ktr.data.media.video_pyav import decode_frames, index_video
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.videos import (
    CODECS,
    SHARED_VIDEOS_VARIABLE,
    numbered_frames,
    set_display_matrix,
    shared_videos,
    write_codec,
    write_video,
)

HAS_DECORD = DecordProcess.is_installed()
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord has no wheel for this machine")
NUM_FRAMES = 25


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("codecs")
    return {name: write_codec(folder, name, numbered_frames(NUM_FRAMES)) for name in CODECS}


# --- which frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "fps", "sampling", "count", "sampled_fps"),
    [
        (300, 30.0, FrameSampling(fps=2, max_frames=16), 16, 1.6),  # 20 wished, capped
        (300, 30.0, FrameSampling(fps=2), 20, 2.0),
        (330, 30.0, FrameSampling(fps=2), 22, 2.0),
        (345, 30.0, FrameSampling(fps=2), 22, 22 / 345 * 30),  # 23 wished, made even
        (30, 30.0, FrameSampling(fps=2), 4, 4.0),  # at least 4
        (3, 30.0, FrameSampling(fps=2), 2, 20.0),  # has no 4
        (300, 30.0, FrameSampling(fps=2, max_frames=7), 6, 0.6),  # even cap
        (300, 30.0, FrameSampling(num_frames=8), 8, 0.8),
        (300, 30.0, FrameSampling(num_frames=7), 8, 0.8),
        (300, 30.0, FrameSampling(num_frames=64, max_frames=16), 16, 1.6),
    ],
)
def test_hand_worked_selections(
    total: int, fps: float, sampling: FrameSampling, count: int, sampled_fps: float
) -> None:
    selection = select_frames(total, native_fps=fps, sampling=sampling)
    assert len(selection.indices) == count
    assert (selection.indices[0], selection.indices[-1]) == (0, total - 1)
    assert selection.sampled_fps == pytest.approx(sampled_fps)
    assert selection.num_repeated == 0
    steps = np.diff(selection.indices)
    assert steps.max() - steps.min() <= 1, "evenly spaced up to rounding"


@pytest.mark.parametrize(
    ("total", "sampling", "indices"),
    [
        (1, FrameSampling(), (0, 0)),
        (1, FrameSampling(num_frames=8), (0, 0)),
        (3, FrameSampling(num_frames=8), (0, 1, 2, 2)),
        (4, FrameSampling(num_frames=8), (0, 1, 2, 3)),
        (3, FrameSampling(multiple=4), (0, 1, 2, 2)),
    ],
)
def test_short_clips_give_all_frames_and_repeat_the_last(
    total: int, sampling: FrameSampling, indices: tuple[int, ...]
) -> None:
    selection = select_frames(total, native_fps=25.0, sampling=sampling)
    assert selection.indices == indices
    assert selection.num_repeated == len(indices) - total
    assert selection.sampled_fps == 25.0, "consecutive frames are 1 / 25 s apart"


def test_selection_follows_qwen_vl_utils_rule_for_many_lengths() -> None:
    """The rule written down a second time, from the published behaviour, over random lengths and rates."""
    rng = random.Random(0)
    for _ in range(500):
        total, native = rng.randint(4, 5000), rng.choice([10.0, 22.29, 23.976, 25.0, 29.97, 60.0])
        fps, most = rng.choice([0.5, 1.0, 2.0, 4.0]), rng.choice([4, 16, 33, 768])
        cap = min(most, total) // 2 * 2
        wished = min(min(max(total / native * fps, 4), cap), total)
        count = int(wished // 2 * 2)
        selection = select_frames(total, native_fps=native, sampling=FrameSampling(fps=fps, max_frames=most))
        assert selection.indices == tuple(torch.linspace(0, total - 1, count).round().long().tolist())
        assert selection.sampled_fps == pytest.approx(count / total * native)


@pytest.mark.parametrize("options", [{"fps": 0.0}, {"max_frames": 1}, {"num_frames": 0}])
def test_impossible_sampling_is_a_user_error(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="video_"):
        FrameSampling(**options)


# --- frames by number, in every codec -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_seeking_finds_the_frames_that_sequential_decoding_finds(videos: dict[str, Path], name: str) -> None:
    with av.open(str(videos[name])) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    index = index_video(videos[name])
    assert index.num_frames == len(truth) == NUM_FRAMES
    rng = random.Random(1)
    for _ in range(12):
        wanted = sorted(rng.sample(range(NUM_FRAMES), rng.randint(1, 8)))
        for number, frame in zip(wanted, decode_frames(index, wanted), strict=True):
            assert np.array_equal(frame, truth[number]), (name, wanted, number)


@pytest.mark.parametrize("name", CODECS)
def test_frames_show_the_number_they_are_asked_for(videos: dict[str, Path], name: str) -> None:
    decoded = read_video(videos[name], sampling=FrameSampling(num_frames=8))
    originals = torch.from_numpy(numbered_frames(NUM_FRAMES)).permute(0, 3, 1, 2).float()
    for number, frame in zip(decoded.frame_indices, decoded.frames_FCHW.float(), strict=True):
        distances = (originals - frame).abs().mean(dim=(1, 2, 3))
        assert int(distances.argmin()) == number
        # Lossy codecs at these settings were seen to be off by 1.7 to 3.8 levels on average.
        assert distances[number] < 6


@needs_decord
@pytest.mark.parametrize("name", CODECS)
def test_both_decoders_give_the_same_frames(videos: dict[str, Path], name: str) -> None:
    for num_frames in (4, 6, 16):
        sampling = FrameSampling(num_frames=num_frames)
        ours = read_video(videos[name], sampling=sampling)
        pyav = read_video(videos[name], sampling=sampling, backend="pyav")
        assert ours.frame_indices == pyav.frame_indices
        # Same codec maths, but two FFmpeg versions may round colours differently; a wrong frame differs by 200.
        assert (ours.frames_FCHW.int() - pyav.frames_FCHW.int()).abs().max() <= 2


@needs_decord
@pytest.mark.parametrize(
    ("name", "backend"), [("h264", "decord"), ("vp9", "decord"), ("hevc open gop", "pyav"), ("av1", "pyav")]
)
def test_decord_decodes_what_it_can_be_trusted_with(videos: dict[str, Path], name: str, backend: str) -> None:
    decoded = read_video(videos[name], sampling=FrameSampling())
    assert decoded.backend == backend
    assert bool(decoded.fallback_reason) == (backend == "pyav")


@needs_decord
def test_decord_alone_miscounts_open_groups_of_pictures(videos: dict[str, Path]) -> None:
    """Why such files go to PyAV. If this fails, decord was mended and the rule may go."""
    sampling = FrameSampling(num_frames=8)
    pyav = read_video(videos["hevc open gop"], sampling=sampling, backend="pyav")
    decord = read_video(videos["hevc open gop"], sampling=sampling, backend="decord")
    assert (pyav.frames_FCHW.int() - decord.frames_FCHW.int()).abs().max() > 100


@needs_decord
def test_fallback_is_said_once_and_returned_every_time(
    videos: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    results = [read_video(videos["av1"], sampling=FrameSampling()) for _ in range(3)]
    assert [result.fallback_reason for result in results] == ["decord cannot open av1"] * 3
    assert len([record for record in caplog.records if "decord cannot open av1" in record.getMessage()]) == 1


def test_decord_is_given_up_for_a_codec_only_after_several_files_and_none_that_it_decoded(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failure, asked = DecordFailed("open", "an odd file"), []

    class Refusing:
        def read_frames(self, path: Path, *args: object, **kwargs: object) -> np.ndarray:
            asked.append(path)
            raise failure

    monkeypatch.setattr(video_module, "_has_decord", lambda: True)
    monkeypatch.setattr(video_module, "_decord_process", lambda process_id: Refusing())
    reasons = [read_video(videos["h264"], sampling=FrameSampling()).fallback_reason for _ in range(5)]
    assert reasons == ["decord cannot open h264"] * 5 and len(asked) == 3
    video_module._FAILED_OPENINGS["h264"] = -1  # one was decoded
    for _ in range(5):
        read_video(videos["h264"], sampling=FrameSampling())
    assert len(asked) == 8, "odd files cost the others nothing"


def test_pyav_alone_is_enough(videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_video(videos["h264"], sampling=FrameSampling())
    monkeypatch.setattr(video_module, "_has_decord", lambda: False)
    alone = read_video(videos["h264"], sampling=FrameSampling())
    assert (alone.backend, alone.fallback_reason) == ("pyav", "decord is not installed")
    assert (alone.frames_FCHW.int() - expected.frames_FCHW.int()).abs().max() <= 2  # colour rounding, as above


@pytest.mark.parametrize("backend", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_frames_resized_chunk_by_chunk_equal_frames_resized_at_once(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    sampling = FrameSampling(num_frames=10)
    whole = read_video(videos["h264"], sampling=sampling, backend=backend)  # type: ignore[arg-type]
    monkeypatch.setattr(video_module, "_CHUNK_BYTES", 3 * 64 * 96 * 3)
    seen = []

    def halve(chunk_FCHW: torch.Tensor, num_frames: int) -> torch.Tensor:
        seen.append((len(chunk_FCHW), num_frames))
        return chunk_FCHW[..., ::2, ::2]

    chunked = read_video(videos["h264"], sampling=sampling, transform=halve, backend=backend)  # type: ignore[arg-type]
    assert seen == [(3, 10), (3, 10), (3, 10), (1, 10)]
    assert torch.equal(chunked.frames_FCHW, whole.frames_FCHW[..., ::2, ::2])


def test_the_best_of_several_streams_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "with_sound.mp4", numbered_frames(12), audio=True)
    decoded = read_video(path, sampling=FrameSampling())
    assert decoded.total_frames == 12
    assert decoded.frames_FCHW.shape[1:] == (3, 64, 96)


# --- orientation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, 1)),  # a quarter turn clockwise takes top left to top right
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (1, 0)),
        ((-1, 0, 0, 1), (0, 1)),  # mirrored left to right
        ((1, 0, 0, -1), (1, 0)),  # upside down, mirrored
        ((0, 1, 1, 0), (0, 0)),  # transposed
        ((0, -1, -1, 0), (1, 1)),
    ],
)
def test_rotated_and_mirrored_recordings_come_out_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int], backend: str
) -> None:
    path = write_video(tmp_path / "turned.mp4", numbered_frames(4))
    set_display_matrix(path, matrix)
    frame_CHW = read_video(path, sampling=FrameSampling(), backend=backend).frames_FCHW[0].int()  # type: ignore[arg-type]
    assert frame_CHW.shape == ((3, 96, 64) if matrix[0] == 0 else (3, 64, 96))
    found = [
        (y, x)
        for y in (0, 1)
        for x in (0, 1)
        if frame_CHW[0, -4 if y else 3, -4 if x else 3] > 170 and frame_CHW[1, -4 if y else 3, -4 if x else 3] < 90
    ]
    assert found == [corner]


# --- damage ---------------------------------------------------------------------------------------------------


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode())


BROKEN = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no video"),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "sound only": _audio_only,
    "a list of files": lambda path: path.write_text("ffconcat version 1.0\nfile good.mp4\n"),
    "a playlist": lambda path: path.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n"
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_video_is_unusable_with_path_and_reason(tmp_path: Path, what: str) -> None:
    write_video(tmp_path / "good.mp4", numbered_frames(4))
    path = tmp_path / "broken.mp4"
    BROKEN[what](path)
    with pytest.raises(UnusableMedia) as caught:
        read_video(path, sampling=FrameSampling())
    assert caught.value.source == str(path)
    assert caught.value.reason and "\n" not in caught.value.reason


def test_a_cut_off_video_is_unusable_not_short(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "whole.mp4", numbered_frames(40), options={"movflags": "faststart", "g": "8", "qp": "10"}
    )
    with (
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as output,
        av.open(str(path)) as source,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    data = (tmp_path / "front.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index is in front, so the file still opens"
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UnusableMedia, match="cut off: .* of the 40"):
        read_video(tmp_path / "cut.mp4", sampling=FrameSampling())


def test_damaged_bytes_give_frames_or_unusable_media_and_nothing_else(videos: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(2)
    outcomes = []
    for name in ("h264", "h264 all-intra", "vp9", "mpeg2 ts", "mpeg4 avi"):
        for kind in ("flipped", "zeroed", "truncated"):
            data = bytearray(videos[name].read_bytes())
            if kind == "flipped":
                for _ in range(10):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind == "zeroed":
                start = rng.randrange(len(data) // 2)
                data[start : start + len(data) // 10] = bytes(len(data) // 10)
            else:
                del data[rng.randrange(len(data) // 4, len(data)) :]
            path = tmp_path / f"{kind}_{videos[name].name}"
            path.write_bytes(data)
            try:
                outcomes.append(read_video(path, sampling=FrameSampling(num_frames=8)))
            except UnusableMedia as error:
                outcomes.append(error)
    assert len(outcomes) == 15
    assert any(isinstance(outcome, UnusableMedia) for outcome in outcomes), "the damage was real"
    assert all(len(outcome.frames_FCHW) for outcome in outcomes if isinstance(outcome, DecodedVideo))


@pytest.mark.parametrize(
    ("program", "stage", "reason"),
    [
        ("import time; time.sleep(3600)", "timeout", "decord hangs"),
        ("import os; os._exit(7)", "crash", "decord crashed"),
        ("import os; os.kill(os.getpid(), 11)", "crash", "decord crashed"),
        ("print('not json', flush=True)", "crash", "decord crashed"),
    ],
)
def test_a_decoder_that_hangs_or_crashes_is_replaced_and_pyav_decodes(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, program: str, stage: str, reason: str
) -> None:
    process = DecordProcess([sys.executable, "-c", program])
    monkeypatch.setattr(video_module, "_decord_process", lambda process_id: process)
    monkeypatch.setattr(video_module, "_has_decord", lambda: True)
    patience = 1.0 if stage == "timeout" else PATIENCE_SECONDS
    monkeypatch.setattr(video_module, "DECORD_TIMEOUT_SECONDS", patience)
    for _ in range(2):  # a fresh child each time
        decoded = read_video(videos["h264"], sampling=FrameSampling())
        assert (decoded.backend, decoded.fallback_reason) == ("pyav", reason)
    with pytest.raises(DecordFailed) as caught:
        process.read_frames(
            videos["h264"], [0], num_frames=NUM_FRAMES, size=(64, 96), is_last=True, timeout_seconds=patience
        )
    assert caught.value.stage == stage
    assert process.close() is None, "nothing is left running"


@needs_decord
def test_the_decoder_process_ends_with_its_parent(videos: dict[str, Path]) -> None:
    program = (
        "import sys\nfrom megatron_ktr.data.media import video\n"
        "video.read_video(sys.argv[1], sampling=video.FrameSampling())\n"
        "import os; print(video._decord_process(os.getpid())._child.pid, flush=True)\nos._exit(0)"
    )
    parent = subprocess.run(
        [sys.executable, "-c", program, str(videos["h264"])],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    child = int(parent.stdout)

    def has_ended() -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return b"Z" in Path(f"/proc/{child}/stat").read_bytes()[:30]
        return True

    wait_until(has_ended)  # it only has to notice the closed pipe


# --- real files -----------------------------------------------------------------------------------------------

REAL = shared_videos()
REAL_FACTS = {
    "flipping_a_pancake.mkv": (310, (240, 426)),
    "h264_640x360_22fps.mp4": (491, (360, 640)),
    "h265_video.mp4": (10, (128, 128)),
    "rotated_90.mov": (3, (568, 320)),  # stored 568 wide; upright it is portrait
    "short_clip.mp4": (240, (360, 640)),
    "with_audio_two_streams.mp4": (390, (270, 480)),  # the larger of its two video streams
}


@pytest.mark.parametrize("path", REAL or [None], ids=lambda path: path.name if path else "none")
def test_every_real_video_decodes_or_says_why_not(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"no real videos here: set {SHARED_VIDEOS_VARIABLE}, or put them into ../shared/data/videos")
    sampling = FrameSampling(fps=2, max_frames=16)
    if path.name == "corrupted.mp4":
        with pytest.raises(UnusableMedia, match="damaged"):
            read_video(path, sampling=sampling)
        return
    decoded = read_video(path, sampling=sampling)
    pyav = read_video(path, sampling=sampling, backend="pyav")
    assert decoded.frames_FCHW.dtype == torch.uint8 and len(decoded.frames_FCHW) % 2 == 0
    assert (decoded.frames_FCHW.int() - pyav.frames_FCHW.int()).abs().max() <= 2  # colour rounding, as above
    assert decoded.frames_FCHW.float().std() > 5, "a picture, not one colour"
    if path.name in REAL_FACTS:
        assert (decoded.total_frames, tuple(decoded.frames_FCHW.shape[-2:])) == REAL_FACTS[path.name]


# --- images ---------------------------------------------------------------------------------------------------


def test_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    pixels_HWC = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels_HWC[:10, :10] = (255, 0, 0)
    image = Image.fromarray(pixels_HWC)
    exif = image.getexif()
    exif[0x0112] = 6  # stored turned: to be shown a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    frames_FCHW = read_image(tmp_path / "turned.png")
    assert frames_FCHW.shape == (1, 3, 40, 20)
    assert frames_FCHW[0, :, 2, -3].tolist() == [255, 0, 0], "top left became top right"


def test_transparency_is_shown_over_white_and_16_bits_are_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").unique().tolist() == [255]
    Image.fromarray(np.full((8, 8), 128 << 8, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [128]
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").unique().tolist() == [77]


def test_damaged_images_are_unusable(tmp_path: Path) -> None:
    Image.fromarray(numbered_frames(1)[0]).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "text.jpg", "missing.png"):
        with pytest.raises(UnusableMedia, match=name):
            read_image(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no such call on this system")
def test_encoding_test_videos_leaves_the_priority_of_this_process_alone(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0)
    for name in CODECS:
        write_codec(tmp_path, name, numbered_frames(3))
        assert os.sched_getscheduler(0) == before, name
