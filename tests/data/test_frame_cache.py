"""The frame cache on disk: what entries are named by, damage, full disks, several processes, and its limit."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.data import frame_cache as frame_cache_module
from megatron_ktr.data import frame_cache_space
from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.frame_cache_space import SCRATCH_PREFIX, CacheSpace
from megatron_ktr.data.media.job import MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from tests.support.media_jobs import facts, outcome, video_job
from tests.support.patience import PATIENCE_SECONDS
from tests.support.videos import numbered_frames, write_video

PLENTY = 1 << 30


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_video(tmp_path_factory.mktemp("video") / "one.mp4", numbered_frames(12))
    os.utime(path, (1e9, 1e9))  # long ago: the digest of a file that has just changed is not remembered
    return path


def entries(folder: Path, part: str = "frames") -> list[Path]:
    return sorted(path for path in (folder / part).rglob("*") if path.is_file())


def events(cache: FrameCache) -> dict[str, int]:
    """What happened, without zeros and bytes."""
    found = {name.removeprefix("frame_cache/"): number for name, number in cache.counts().items()}
    return {name: number for name, number in found.items() if number and "bytes" not in name}


def never(job: MediaJob) -> LoadedMedia:
    raise AssertionError(f"{job.name} is decoded although it is stored")


def test_a_hit_is_what_was_decoded(tmp_path: Path, video: Path) -> None:
    job = video_job(video, video_end=1.0)
    expected = facts(job.load())
    first, other = FrameCache(tmp_path, max_bytes=PLENTY), FrameCache(tmp_path, max_bytes=PLENTY)
    assert facts(first.read_through(job, MediaJob.load)) == expected
    assert facts(other.read_through(job, never)) == expected
    assert (events(first), events(other)) == ({"misses": 1}, {"hits": 1})
    assert other.counts()["frame_cache/bytes_read"] == first.counts()["frame_cache/bytes_written"] > 0
    assert len(entries(tmp_path)) == len(entries(tmp_path, "contents")) == 1


def test_an_entry_is_named_by_content_and_by_what_decides_the_pixels(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, job = FrameCache(tmp_path / "cache", max_bytes=PLENTY), video_job(video)
    cache.read_through(job, MediaJob.load)
    copy = Path(shutil.copy2(video, tmp_path / "copy.mp4"))
    cache.read_through(video_job(copy), never)  # the same content at another place
    settings, sampling = job.settings, job.sampling
    others = [
        dataclasses.replace(job, settings=dataclasses.replace(settings, video_max_pixels=16 * 784)),
        dataclasses.replace(job, settings=dataclasses.replace(settings, fixed_seconds_per_grid=1.0)),
        dataclasses.replace(job, sampling=dataclasses.replace(sampling, max_frames=4)),
        video_job(video, nframes=2),
        video_job(video, video_start=0.5),
    ]
    write_video(copy, numbered_frames(12)[::-1])  # another content at the same place
    others.append(video_job(copy))
    for other in others:
        assert facts(cache.read_through(other, MediaJob.load)) == facts(other.load())
    assert events(cache) == {"hits": 1, "misses": 1 + len(others)}
    monkeypatch.setattr(frame_cache_module, "_versions", lambda: {"av": "another"})
    cache.read_through(job, MediaJob.load)
    assert events(cache)["misses"] == 2 + len(others) == len(entries(tmp_path / "cache"))


def test_a_file_that_is_written_over_with_its_old_size_and_time_is_another(tmp_path: Path, video: Path) -> None:
    """As rsync --inplace and cp --preserve leave it: the same inode, too."""
    path = write_video(tmp_path / "one.mp4", numbered_frames(12)[::-1])
    contents = [video.read_bytes(), path.read_bytes()]
    cache, size, inode = FrameCache(tmp_path / "cache", max_bytes=PLENTY), max(map(len, contents)), path.stat().st_ino
    for content in contents:
        path.write_bytes(content.ljust(size, b"\0"))
        os.utime(path, (1e9, 1e9))
        assert path.stat().st_ino == inode
        assert facts(cache.read_through(video_job(path), MediaJob.load)) == facts(video_job(path).load())
    assert events(cache) == {"misses": 2}


def test_a_file_that_takes_too_long_to_hash_is_decoded_without_the_cache(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache_module, "_MOST_SECONDS", -1.0)
    cache = FrameCache(tmp_path, max_bytes=PLENTY)
    assert facts(cache.read_through(video_job(video), MediaJob.load)) == facts(video_job(video).load())
    assert events(cache) == {} and entries(tmp_path) == []


def test_a_crash_of_decord_is_not_stored(tmp_path: Path, video: Path) -> None:
    cache = FrameCache(tmp_path, max_bytes=PLENTY)
    crashed = dataclasses.replace(video_job(video).load(), backend="pyav", fallback_reason="decord crashed")
    cache.read_through(video_job(video), lambda _: crashed)
    assert entries(tmp_path) == []


def test_a_file_that_is_replaced_while_it_is_decoded_is_not_stored(tmp_path: Path, video: Path) -> None:
    path = Path(shutil.copy2(video, tmp_path / "one.mp4"))
    cache, job = FrameCache(tmp_path / "cache", max_bytes=PLENTY), video_job(path)

    def decode(job: MediaJob) -> LoadedMedia:
        write_video(path, numbered_frames(12)[::-1])
        return job.load()

    cache.read_through(job, decode)
    assert entries(tmp_path / "cache") == []
    shutil.copy2(video, path)
    assert facts(cache.read_through(job, MediaJob.load)) == facts(job.load())


def test_what_cannot_be_used_is_not_stored_and_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_bytes(b"no video")
    os.mkfifo(tmp_path / "fifo.mp4")
    cache = FrameCache(tmp_path / "cache", max_bytes=PLENTY)
    for name in ("text.mp4", "fifo.mp4", "absent.mp4", "cache"):
        job = video_job(tmp_path / name)
        for _ in range(2):
            said = outcome(lambda: cache.read_through(job, MediaJob.load))  # noqa: B023
            assert isinstance(said, str) and said == outcome(job.load)
    assert entries(tmp_path / "cache") == []


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the magic": lambda data: flip(data, 0),
    "a bit of the length": lambda data: flip(data, 9),
    "a bit of the checksum": lambda data: flip(data, 25),
    "a bit of the facts": lambda data: flip(data, 60),
    "a bit of the first pixel": lambda data: flip(data, data.index(b"}}") + 2),
    "a bit of the last pixel": lambda data: flip(data, len(data) - 1),
    "truncated": lambda data: data[:-1000],
    "truncated in its head": lambda data: data[:10],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "a length without end": lambda data: data[:8] + b"\xff" * 12 + data[20:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_deleted_counted_and_decoded_anew(
    tmp_path: Path, video: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache, job = FrameCache(tmp_path, max_bytes=PLENTY), video_job(video)
    expected = facts(cache.read_through(job, MediaJob.load))
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGE[damage](whole))
    assert facts(cache.read_through(job, MediaJob.load)) == expected
    assert events(cache) == {"misses": 2, "damaged": 1}
    assert entry.read_bytes() == whole
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"frame_cache: {entry} is damaged" in message
    assert facts(cache.read_through(job, never)) == expected


def test_an_entry_under_the_name_of_another_is_damaged(tmp_path: Path, video: Path) -> None:
    cache, job, other = FrameCache(tmp_path, max_bytes=PLENTY), video_job(video), video_job(video, nframes=2)
    cache.read_through(job, MediaJob.load)
    (mine,) = entries(tmp_path)
    expected = facts(cache.read_through(other, MediaJob.load))
    (theirs,) = set(entries(tmp_path)) - {mine}
    shutil.copy(mine, theirs)
    assert facts(cache.read_through(other, MediaJob.load)) == expected
    assert events(cache)["damaged"] == 1


def test_a_damaged_digest_of_content_leads_to_no_wrong_frames(tmp_path: Path, video: Path) -> None:
    cache, job = FrameCache(tmp_path, max_bytes=PLENTY), video_job(video)
    expected = facts(cache.read_through(job, MediaJob.load))
    (digest,) = entries(tmp_path, "contents")
    for text in (b"", b"\xff\xfe", b"0" * 32, b"g" * 32, b"1" * 31):
        digest.write_bytes(text)
        assert facts(cache.read_through(job, MediaJob.load)) == expected


# --- disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB. Only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_turns_writing_off_and_the_run_goes_on(
    small_disk: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(small_disk, max_bytes=PLENTY)
    stored, unstored = video_job(video, nframes=2), video_job(video)
    cache.read_through(stored, MediaJob.load)
    with open(small_disk / "other", "wb") as file:  # somebody else takes the rest
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        file.write(bytes(room - 4096))
    for _ in range(3):
        assert facts(cache.read_through(unstored, MediaJob.load)) == facts(unstored.load())
    cache.read_through(stored, never)
    assert events(cache) == {"hits": 1, "misses": 4, "off": 1}
    (message,) = (record.getMessage() for record in caplog.records)
    assert "No space left on device; no more frames are stored, the run goes on" in message
    assert [path for path in small_disk.rglob(f"{SCRATCH_PREFIX}*")] == [], "nothing half written takes the last room"
    with pytest.raises(UserError, match="frame_cache_dir: .* cannot be used: No space left on device"):
        FrameCache(small_disk, max_bytes=PLENTY)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_fails_later_is_one_warning(
    tmp_path: Path, video: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(number, os.strerror(number))

    cache = FrameCache(tmp_path, max_bytes=PLENTY)
    monkeypatch.setattr(Path, "replace", fail)
    for num_frames in (2, 4):
        job = video_job(video, nframes=num_frames)
        assert facts(cache.read_through(job, MediaJob.load)) == facts(job.load())
    assert events(cache) == {"misses": 2, "off": 1}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert os.strerror(number) in caplog.text and entries(tmp_path) == []


def test_a_disk_that_cannot_be_read_is_used_no_more(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(file: Any, **names: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache, job = FrameCache(tmp_path, max_bytes=PLENTY), video_job(video)
    cache.read_through(job, MediaJob.load)
    monkeypatch.setattr(frame_cache_module, "_read_entry", fail)
    for _ in range(2):
        assert facts(cache.read_through(job, MediaJob.load)) == facts(job.load())
    assert events(cache)["off"] == 1 and len(caplog.records) == 1


def test_a_directory_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        Path("/proc/none"),
        Path("a\0b"),
        Path("x" * 300),
    ):
        with pytest.raises(UserError, match="^frame_cache_dir: .* cannot be used: "):
            FrameCache(directory, max_bytes=PLENTY)


# --- sharing and the limit ------------------------------------------------------------------------------------


def read_many(folder: Path, video: Path, *, rounds: int, max_bytes: int) -> tuple[list[Any], dict[str, int]]:
    """Reads a few media again and again, removing old entries after each: (distinct results by job, events)."""
    cache = FrameCache(folder, max_bytes=max_bytes)
    results: list[Any] = []
    for _ in range(rounds):
        for num_frames in (2, 4, 6):
            found = facts(cache.read_through(video_job(video, nframes=num_frames), MediaJob.load))
            if (num_frames, found) not in results:
                results.append((num_frames, found))
            cache._space.evict()
    return results, events(cache)


def test_two_processes_write_and_remove_at_once(tmp_path: Path, video: Path) -> None:
    expected = [(number, facts(video_job(video, nframes=number).load())) for number in (2, 4, 6)]
    arguments: dict[str, Any] = {"rounds": 15, "max_bytes": 100_000}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as both:
        futures = [both.submit(read_many, tmp_path, video, **arguments) for _ in range(2)]
        found = [future.result() for future in futures]
    total = Counter[str]()
    for results, happened in found:
        assert results == expected, "every reading gave the same frames"
        total.update(happened)
    assert total["evicted"] > 0 and not total["damaged"] and not total["off"]
    assert total["hits"] + total["misses"] == 2 * 15 * 3
    assert list(tmp_path.rglob(f"{SCRATCH_PREFIX}*")) == []


def test_the_least_recently_used_entries_go_and_abandoned_files_too(tmp_path: Path) -> None:
    FrameCache(tmp_path, max_bytes=PLENTY)
    space = CacheSpace(tmp_path, max_bytes=10 * 8192)
    names = [f"{number:02d}{'0' * 30}" for number in range(14)]
    for age, name in enumerate(names):
        path = tmp_path / "frames" / name[:2] / name
        path.parent.mkdir()
        path.write_bytes(bytes(8192))
        os.utime(path, (2e9 - age, 2e9 - age))
    young, old = (tmp_path / "frames" / "00" / f"{SCRATCH_PREFIX}{name}" for name in ("young", "old"))
    probe = tmp_path / f"{SCRATCH_PREFIX}host.1.probe"
    for path in (young, old, probe):
        path.write_bytes(bytes(8192))
    for path in (old, probe):
        os.utime(path, (1e9, 1e9))
    space.evict()
    # 95% of ten entries: nine are left, the youngest.
    assert [path.name for path in entries(tmp_path) if path != young] == names[:9] and space.num_evicted == 5
    assert young.exists() and not old.exists() and not probe.exists()
    space.evict()
    assert space.num_evicted == 5


def test_a_use_makes_an_entry_young(tmp_path: Path, video: Path) -> None:
    cache = FrameCache(tmp_path, max_bytes=PLENTY)
    jobs = [video_job(video, nframes=number) for number in (2, 4)]
    for job in jobs:
        cache.read_through(job, MediaJob.load)
    for path in entries(tmp_path):
        os.utime(path, (1e9, 1e9))
    cache.read_through(jobs[0], never)
    assert sorted(path.stat().st_mtime > 1e9 for path in entries(tmp_path)) == [False, True]


def test_writing_past_the_limit_leads_to_removal(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache_space, "_SECONDS_BETWEEN_SCANS", PATIENCE_SECONDS)
    cache = FrameCache(tmp_path, max_bytes=20_000)
    cache.read_through(video_job(video, nframes=6), MediaJob.load)
    thread = cache._space._thread
    assert thread is not None
    thread.join()
    assert entries(tmp_path) == [] and cache.counts()["frame_cache/evicted"] >= 1
    # Some time has to pass before somebody looks again.
    cache.read_through(video_job(video, nframes=6), MediaJob.load)
    cache._space._thread.join()
    assert len(entries(tmp_path)) == 1
    os.utime(tmp_path / "scanned", (1e9, 1e9))
    cache._space._added = 20_000
    cache.read_through(video_job(video, nframes=4), MediaJob.load)
    cache._space._thread.join()
    assert entries(tmp_path) == []


def test_entries_hold_no_pickle(tmp_path: Path, video: Path) -> None:
    """What a foreign directory holds is read as numbers and JSON."""
    FrameCache(tmp_path, max_bytes=PLENTY).read_through(video_job(video), MediaJob.load)
    (entry,) = entries(tmp_path)
    data = entry.read_bytes()
    size = int.from_bytes(data[8:12], "little")
    assert json.loads(data[36 : 36 + size])["shape"][1] == 3
    assert len(data) == 36 + size + video_job(video).load().visual.frames_FCHW.nbytes


def test_an_unusable_medium_of_a_worker_passes_through(tmp_path: Path, video: Path) -> None:
    def decode(job: MediaJob) -> LoadedMedia:
        raise UnusableMedia(job.name, "the worker died (signal 9) on it")

    cache = FrameCache(tmp_path, max_bytes=PLENTY)
    with pytest.raises(UnusableMedia, match="signal 9"):
        cache.read_through(video_job(video), decode)
    assert entries(tmp_path) == []
