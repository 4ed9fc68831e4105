"""What media files that were made to hurt cost: one sample each, with path and reason, and nothing beside it."""

from __future__ import annotations

import ctypes
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import pytest

from megatron_ktr.data.media import video
from megatron_ktr.data.media.files import MediaFiles, resolve_media_path
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.media.video import FrameSampling, read_image, read_video
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.errors import UserError
from tests.support.hostile_media import CASES, FRAMES, HUNGRY, PLAYLISTS, Case
from tests.support.media_jobs import facts, outcome, video_job
from tests.support.patience import PATIENCE_SECONDS
from tests.support.videos import write_video

IN_OPEN = 0x20
MEMORY_BYTES = 2_000_000_000


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(1, timeout_seconds=PATIENCE_SECONDS, memory_bytes=MEMORY_BYTES)
    yield pool
    pool.close()


def job_of(case: Case, folder: Path) -> MediaJob:
    path = folder / case.file
    case.write(path)
    return replace(video_job(path), kind=case.kind)


def decoded(pool: WorkerPool, job: MediaJob) -> LoadedMedia | str:
    def read(decode: Decode) -> LoadedMedia | str:
        return outcome(lambda: decode(job))

    return pool.submit(read).result()


def test_each_hostile_file_costs_one_sample_with_path_and_reason_and_the_worker_lives(
    pool: WorkerPool, tmp_path: Path
) -> None:
    jobs = {case.file: (case, job_of(case, tmp_path)) for case in CASES}
    wrong = []
    for name, (case, job) in jobs.items():
        found = decoded(pool, job)
        if isinstance(found, str):
            is_fine = not case.usable and found.startswith(f"{tmp_path / name}: ") and "\n" not in found
            is_fine = is_fine and re.search(case.reason, found) is not None
        else:
            is_fine = case.usable is not False and len(found.visual.frames_FCHW) > 0
        if not is_fine:
            wrong.append((name, found if isinstance(found, str) else tuple(found.visual.frames_FCHW.shape)))
    assert not wrong
    assert pool.counts() == {"data_workers/replaced": 0}, "no file cost a worker"

    hungry = decoded(pool, job_of(HUNGRY, tmp_path))
    assert isinstance(hungry, str) and "needs more than 2 GB (--data-worker-memory-gb)" in hungry
    assert pool.counts()["data_workers/replaced: memory"] == 1
    case, job = jobs["one frame.mp4"]
    assert facts(decoded(pool, job)) == facts(outcome(job.load)), "the next worker decodes as ever"


class Opened:
    """Counts how often files are opened, whoever opens them."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        for path in paths:
            assert self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), IN_OPEN) >= 0

    def seen(self) -> bool:
        try:
            return bool(os.read(self._descriptor, 1 << 16))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify tells which files are opened")
def test_no_file_makes_a_decoder_open_another_file_or_a_connection(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    canary = write_video(tmp_path / "elsewhere" / "canary.ts", FRAMES, encoder="mpeg2video")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    watch = Opened(canary)
    targets = ["elsewhere/canary.ts", str(canary), f"file:{canary}"]
    targets += [f"http://127.0.0.1:{server.getsockname()[1]}/a.ts", f"tcp://127.0.0.1:{server.getsockname()[1]}"]
    try:
        listed = tmp_path / "list.m3u8"
        listed.write_text(PLAYLISTS["list.m3u8"].format(targets[0]))
        av.open(str(listed)).close()
        assert watch.seen(), "without our limits FFmpeg follows the list, and the watch sees it"
        for target in targets:
            for name, text in PLAYLISTS.items():
                path = tmp_path / name
                path.write_text(text.format(target))
                for backend in ("auto", "pyav"):
                    with pytest.raises(UnusableMedia):
                        read_video(path, sampling=FrameSampling(), backend=backend)  # type: ignore[arg-type]
                path.write_bytes(text.format(target).encode() + canary.read_bytes())
                watch.seen()  # our own look
                outcome(video_job(path).load)
                assert not watch.seen(), (name, target)
        with pytest.raises(BlockingIOError):
            server.accept()
    finally:
        watch.close()
        server.close()


ODD_NAMES = [
    "new\nline.mp4",
    "\x1b[2Jclears.mp4",
    "100%d %s %n.mp4",
    "concat:a|b.mp4",
    "http:x.mp4",
    "pipe:0",
    "-i.mp4",
    "*?{a,b}[c].mp4",
    "name#t=1?x=y.mp4",
    "\u202egpj.mp4",
    "ünï 日本.mp4",
    "x" * 251 + ".mp4",
]


def test_a_name_is_a_name_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = write_video(tmp_path / "plain.mp4", FRAMES)
    expected = facts(outcome(video_job(plain).load))[:2]
    for name in ODD_NAMES:
        (tmp_path / name).write_bytes(plain.read_bytes())
        for path in (tmp_path / name, Path(name)):
            assert facts(outcome(video_job(path).load))[:2] == expected, name


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("a\0b.mp4", "expected a path below"),
        ("../a.mp4", "without '..' or scheme"),
        ("http://h/a.mp4", "without '..' or scheme"),
        ("concat:a|b", "without '..' or scheme"),
        ("x" * 5000, "File name too long|no such file"),
        ("out.mp4", "leads by a link out of media_root"),
        ("folder out/a.mp4", "leads by a link out of media_root"),
        ("loop.mp4", "loop|levels of symbolic links|no such file"),
        ("zero", "leads by a link out of media_root"),
    ],
)
def test_a_path_that_leads_out_of_the_media_root_is_refused_in_words(tmp_path: Path, written: str, reason: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_video(tmp_path / "secret.mp4", FRAMES[:1])
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "folder out").symlink_to(tmp_path)
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "zero").symlink_to("/dev/zero")

    def look() -> object:
        MediaFiles(root).check(written)
        return outcome(video_job(resolve_media_path(root, written)).load)

    with pytest.raises((UserError, UnusableMedia)) as caught:
        look()
    assert re.search(reason, str(caught.value), re.IGNORECASE) and "\n" not in str(caught.value)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe.mp4": os.mkfifo,
    "socket.mp4": _socket,
    "folder.mp4": Path.mkdir,
    "device.mp4": lambda path: path.symlink_to("/dev/zero"),
    "full.mp4": lambda path: path.symlink_to("/dev/full"),
    "memory.mp4": lambda path: path.symlink_to("/proc/self/mem"),
    "events.mp4": lambda path: path.symlink_to("/proc/kmsg"),
}


def test_pipes_sockets_devices_and_files_of_the_kernel_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in SPECIAL.items():
        make(tmp_path / name)
        for kind in ("video", "image"):
            said = outcome(replace(video_job(tmp_path / name), kind=kind).load)  # type: ignore[arg-type]
            assert isinstance(said, str) and re.search("regular file|is a folder|is empty|No such", said), said


@pytest.mark.parametrize("change", ["is removed", "is emptied", "is cut", "becomes a pipe", "becomes another"])
def test_a_file_that_changes_while_it_is_read_is_unusable_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write_video(tmp_path / "v.mp4", FRAMES)

    def index_then_change(path: Path) -> object:
        index = index_video(path)
        if change == "is emptied":
            os.truncate(path, 0)
        elif change == "is cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
        if change == "becomes a pipe":
            os.mkfifo(path)
        elif change == "becomes another":
            write_video(path, FRAMES[:3, :32])
        return index

    index_video = video.index_video
    monkeypatch.setattr(video, "index_video", index_then_change)
    monkeypatch.setattr(video, "DECORD_TIMEOUT_SECONDS", 2.0)  # what hangs here hangs for ever
    with pytest.raises(UnusableMedia) as caught:
        read_video(path, sampling=FrameSampling(num_frames=8))
    assert caught.value.source == str(path)


PICTURES = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]


@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures_are_read_or_unusable_and_nothing_else(tmp_path: Path, name: str) -> None:
    from PIL import Image

    rng, path = random.Random(name), tmp_path / "p.png"
    picture = Image.fromarray(FRAMES[0, :32, :32])
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    picture.save(path, name, **({"exif": exif} if name in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    original, outcomes = path.read_bytes(), set()
    for _ in range(100):
        data = bytearray(original)
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(min(len(data), 400))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(1, len(data))])])
        outcomes.add(_is_read(path))
    assert False in outcomes, "the damage was real"


def _is_read(path: Path) -> bool:
    try:
        return read_image(path).shape[:2] == (1, 3)
    except UnusableMedia:
        return False
