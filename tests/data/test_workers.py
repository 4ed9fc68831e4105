"""Worker processes that decode, what their failures cost, and reading ahead without a change of prompts or state."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.records import check_record
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.data.workers.look_ahead import LookAhead
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.data.workers.process import WorkerProcess
from megatron_ktr.errors import UserError
from tests.data.test_dataset import make_loader, media_root, model_dir, question  # noqa: F401
from tests.support.media_jobs import facts, outcome, video_job
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.videos import CODECS, numbered_frames, shared_videos, write_codec

BAD_WORKER = [sys.executable, str(REPOSITORY / "tests" / "support" / "bad_worker.py")]
SMALL = 200_000_000


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Three real workers, which all tests share; no file may take them longer than the suite's patience."""
    pool = WorkerPool(3, timeout_seconds=PATIENCE_SECONDS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One in each of a few codecs, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("videos")
    made = [write_codec(folder, name, numbered_frames(12)) for name in ("h264", "hevc open gop", "mjpeg mov")]
    assert set(CODECS) > {"h264", "hevc open gop", "mjpeg mov"}
    (folder / "text.mp4").write_bytes(b"no video")
    (folder / "cut.mp4").write_bytes(made[0].read_bytes()[:-800])
    return [*made, folder / "text.mp4", folder / "cut.mp4", folder / "missing.mp4", folder]


def bad_pool(**options: Any) -> WorkerPool:
    return WorkerPool(1, **{"timeout_seconds": PATIENCE_SECONDS, "command": BAD_WORKER, **options})


def decode_all(jobs: list[MediaJob], pool: WorkerPool) -> list[LoadedMedia | str]:
    def read(decode: Decode, *, job: MediaJob) -> LoadedMedia | str:
        return outcome(lambda: decode(job))

    return [future.result() for future in [pool.submit(partial(read, job=job)) for job in jobs]]


def ask(pool: WorkerPool, *names: str) -> list[LoadedMedia | str]:
    """The outcomes of jobs of one sample."""
    return pool.submit(lambda decode: [outcome(lambda: decode(video_job(Path(name)))) for name in names]).result()  # noqa: B023


# --- the same frames ------------------------------------------------------------------------------------------


def test_workers_give_the_frames_and_the_errors_of_reading_here(pool: WorkerPool, videos: list[Path]) -> None:
    jobs = [video_job(path) for path in [*videos, *shared_videos()]]
    jobs += [video_job(videos[0], video_end=0.5, max_pixels=800), video_job(videos[0], video_start=90.0)]
    found, expected = decode_all(jobs, pool), [outcome(job.load) for job in jobs]
    assert [facts(one) for one in found] == [facts(one) for one in expected]
    assert sum(isinstance(one, str) for one in found) >= 5 and pool.counts() == {"data_workers/replaced": 0}


def test_workers_read_through_the_frame_cache(pool: WorkerPool, videos: list[Path], tmp_path: Path) -> None:
    reader = MediaReader(disk=FrameCache(tmp_path, max_bytes=1 << 30))
    jobs = [video_job(path) for path in [*videos, *shared_videos()]]

    def read(decode: Decode, *, job: MediaJob) -> LoadedMedia | str:
        return outcome(lambda: reader.read(job, decode))

    expected = [facts(outcome(job.load)) for job in jobs]
    for _ in range(2):
        futures = [pool.submit(partial(read, job=job)) for job in jobs]
        assert [facts(future.result()) for future in futures] == expected
    num_usable = sum(not isinstance(one, str) for one in expected)
    assert reader.counts()["frame_cache/hits"] == num_usable > 0
    assert reader.counts()["frame_cache/damaged"] == reader.counts()["frame_cache/off"] == 0


# --- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why", "text"),
    [
        ("dies.mp4", "died", r"the worker died \(signal 9\) on it"),
        ("leaves.mp4", "died", "the worker ended with code 3: no such codec on it"),
        ("sleeps.mp4", "timeout", r"not decoded within the 1 s of a sample \(--data-timeout-seconds\)"),
        ("stops halfway.mp4", "timeout", "not decoded within the 1 s of a sample"),
        ("swells.mp4", "memory", r"the worker needs more than 0.2 GB \(--data-worker-memory-gb\)"),
        ("child swells.mp4", "memory", "the worker needs more than 0.2 GB"),
        ("allocates.mp4", "memory", "the worker needs more than 0.2 GB"),
    ],
)
def test_a_worker_that_fails_costs_its_sample_alone(
    name: str, why: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = bad_pool(memory_bytes=SMALL)
    try:
        (first,) = ask(pool, "fine.mp4")
        if why == "timeout":
            pool.timeout_seconds = 1.0
        (said,) = ask(pool, name)
        pool.timeout_seconds = PATIENCE_SECONDS
        (last,) = ask(pool, "fine.mp4")
    finally:
        pool.close()
    assert isinstance(said, str) and said.startswith(f"{name}: ")
    assert re.search(text, said)
    assert facts(first) == facts(last) and not isinstance(last, str)
    assert pool.counts() == {"data_workers/replaced": 1, f"data_workers/replaced: {why}": 1}
    assert sum("the worker is replaced" in record.getMessage() for record in caplog.records) == 1


def test_all_media_of_a_sample_share_its_time() -> None:
    pool = bad_pool(timeout_seconds=1.0)
    try:
        found = ask(pool, "sleeps.mp4", "fine.mp4")
    finally:
        pool.close()
    assert [str(one).split(":")[0] for one in found] == ["sleeps.mp4", "fine.mp4"]
    assert pool.counts()["data_workers/replaced"] == 1, "nobody was asked for the second one"


def test_a_worker_that_dies_with_nothing_to_do_costs_no_sample() -> None:
    pool = bad_pool()
    try:
        (first,) = ask(pool, "fine.mp4")
        os.kill(pid_of(pool), signal.SIGKILL)
        wait_until(lambda: pool._running()[0].is_gone)
        (second,) = ask(pool, "fine.mp4")
    finally:
        pool.close()
    assert not isinstance(first, str) and facts(first) == facts(second)
    assert pool.counts()["data_workers/replaced: died"] == 1


def test_a_real_worker_that_is_killed_in_the_middle_is_replaced(
    videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, asked = WorkerPool(1, timeout_seconds=PATIENCE_SECONDS), threading.Event()
    job, write = video_job(videos[0]), WorkerProcess._write

    def note(worker: WorkerProcess, *arguments: Any) -> None:
        write(worker, *arguments)
        asked.set()

    try:
        (expected,) = decode_all([job], pool)
        monkeypatch.setattr(WorkerProcess, "_write", note)
        first = pid_of(pool)
        os.kill(first, signal.SIGSTOP)
        pending = pool.submit(lambda decode: outcome(lambda: decode(job)))
        asked.wait()
        os.kill(first, signal.SIGKILL)
        assert str(pending.result()) == f"{videos[0]}: the worker died (signal 9) on it"
        assert facts(*decode_all([job], pool)) == facts(expected)
        second = pid_of(pool)
        family = [second, *(child.pid for child in psutil.Process(second).children())]
    finally:
        pool.close()
    assert pool.counts() == {"data_workers/replaced": 1, "data_workers/replaced: died": 1}
    wait_until(lambda: not any(is_alive(number) for number in (first, *family)))


def pid_of(pool: WorkerPool) -> int:
    (worker,) = pool._running()
    assert worker._process is not None
    return worker._process.pid


def test_a_worker_that_cannot_start_is_one_error_of_the_user(model_dir: Path, media_root: Path) -> None:  # noqa: F811
    pool = WorkerPool(1, command=[*BAD_WORKER, "no start"])
    dataset = PromptDataset([check_record(question(), number=1)], loader=make_loader(model_dir, media_root))
    dataset.read_ahead(pool)
    message = "data_workers: a worker process cannot start: .*code 1: ImportError: no module named codec"
    with pytest.raises(UserError, match=message):
        dataset.next(1)
    dataset.close()
    absent = WorkerPool(1, command=[str(REPOSITORY / "no such program")])
    with pytest.raises(UserError, match="cannot start: No such file"):
        absent.submit(lambda decode: decode(video_job(Path("a.mp4")))).result()
    absent.close()


def test_a_mistake_of_the_program_in_a_worker_is_no_skipped_sample() -> None:
    pool = bad_pool()
    try:
        with pytest.raises(RuntimeError, match="in a data worker, on has a bug.mp4:\nKeyError"):
            ask(pool, "has a bug.mp4")
    finally:
        pool.close()


def test_closing_ends_workers_that_hang_and_drops_what_waits() -> None:
    pool = bad_pool()
    ask(pool, "fine.mp4")
    pid = pid_of(pool)
    hanging, waiting = (pool.submit(lambda decode: decode(video_job(Path("sleeps.mp4")))) for _ in range(2))
    wait_until(hanging.running)
    pool.close()
    assert waiting.cancelled() and isinstance(hanging.exception(), UnusableMedia)
    assert not psutil.pid_exists(pid) and pool.counts()["data_workers/replaced"] == 0


PARENT = """
import os, pathlib, signal, sys, threading
from megatron_ktr.data.media.video_decord import DecordProcess
from megatron_ktr.data.workers.pool import WorkerPool
from tests.support.media_jobs import video_job

if __name__ == "__main__":
    video, fifo = map(pathlib.Path, sys.argv[1:])
    pool = WorkerPool(2)
    decode = [pool.submit(lambda decode: decode(video_job(video))) for _ in range(6)]
    [one.result() for one in decode]
    workers = [worker._process.pid for worker in pool._running()]
    # One worker hangs. So does a decord child of this process, or will as soon as it reads what was sent to it: in
    # native code, because opening a pipe without a writer blocks.
    os.kill(workers[0], signal.SIGSTOP)
    decord = DecordProcess()
    if decord.is_installed():
        ask = dict(num_frames=12, size=(64, 96), is_last=True, timeout_seconds=3600.0)
        decord.read_frames(video, [0], **ask)
        threading.Thread(target=decord.read_frames, args=(fifo, [0]), kwargs=ask, daemon=True).start()
        workers.append(decord._child.pid)
    print(*workers, flush=True)
    signal.pause()
"""


def test_no_process_is_left_when_the_training_process_is_killed(tmp_path: Path, videos: list[Path]) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(tmp_path / "parent.py"), str(videos[0]), str(tmp_path / "fifo.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        numbers = [int(number) for number in parent.stdout.readline().split()]
        family = psutil.Process(parent.pid).children(recursive=True)
        assert {process.pid for process in family} >= set(numbers) and len(numbers) >= 2
        # A scheduler's signal to every process of a job is the trainer's business.
        for process in family:
            process.send_signal(signal.SIGTERM)
        parent.kill()
    wait_until(lambda: not any(is_alive(process.pid) for process in family), pause_seconds=0.05)


def is_alive(pid: int) -> bool:
    """A zombie is dead, although nobody may have asked for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- reading ahead --------------------------------------------------------------------------------------------


def mixed_records() -> list[dict[str, Any]]:
    """Videos, a picture, text alone, and some that cannot be used."""
    media = [dict(path="clips/one.mp4"), dict(path="clips/broken.mp4"), dict(path="", data_type="text")]
    media += [dict(path="picture.png", data_type="image"), dict(path="clips/one.mp4", video_end=1.0)]
    media += [dict(path=..., image="picture.png", video="clips/one.mp4"), dict(path="clips/absent.mp4")]
    return [check_record(question(problem_id=i, **fields), number=i) for i, fields in enumerate(media)]


def seen(dataset: PromptDataset, steps: list[int]) -> list[Any]:
    """Every prompt of the steps, pixels included, with the state and the counts after each step."""
    found: list[Any] = []
    for num_prompts in steps:
        for prompt in dataset.next(num_prompts):
            pixels = [one.frames_FCHW.contiguous().numpy().tobytes() for one in prompt.media]
            found.append((prompt.identity, prompt.token_ids, pixels, [one.source for one in prompt.media]))
        counts = {name: number for name, number in dataset.counts.items() if not name.startswith("data_workers/")}
        found.append((json.loads(json.dumps(dataset.state_dict())), counts))
    return found


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_prompts_counts_and_state_do_not_depend_on_workers(
    model_dir: Path,  # noqa: F811
    media_root: Path,  # noqa: F811
    pool: WorkerPool,
    num_workers: int,
    prefetch_steps: int,
) -> None:
    def make(rank: int = 0, size: int = 1, *, with_workers: bool) -> PromptDataset:
        skips = SkipCounter(max_skip_share=1.0)
        loader = make_loader(model_dir, media_root)
        dataset = PromptDataset(mixed_records(), loader=loader, seed=3, rank=rank, size=size, skips=skips)
        if with_workers:
            dataset.read_ahead(few, prefetch_steps=prefetch_steps)
        return dataset

    few = pool if num_workers == 3 else OneAtATime(pool)
    steps = [3, 3, 2, 4]
    expected = seen(make(with_workers=False), steps)
    assert seen(make(with_workers=True), steps) == expected
    # What was read ahead of the second step is not in its state: a resumed run reads it again.
    first = make(with_workers=True)
    seen(first, steps[:2])
    state = json.loads(json.dumps(first.state_dict()))
    for with_workers in (True, False):
        resumed = make(with_workers=with_workers)
        resumed.next(1)  # reads ahead from the beginning, in vain
        resumed.load_state_dict(state)
        assert seen(resumed, steps[2:]) == expected[-(sum(steps[2:]) + 2) :]
    # Two ranks save, one continues: whichever of them had workers.
    resharded = []
    for with_workers in (True, False):
        halves = [make(rank, 2, with_workers=with_workers) for rank in range(2)]
        for half in halves:
            half.next(2)
            half.next(2)
        alone = make(with_workers=not with_workers)
        alone.load_state_dict(reshard_states([half.state_dict() for half in halves], rank=0, size=1))
        resharded.append(seen(alone, [5]))
    assert resharded[0] == resharded[1]


class OneAtATime(WorkerPool):
    """A pool that uses one worker of another."""

    def __init__(self, pool: WorkerPool) -> None:
        super().__init__(1)
        self.submit_there = pool.submit

    def submit(self, read: Any) -> Future[Any]:
        return self._threads.submit(lambda: self.submit_there(read).result())


def test_errors_of_users_come_when_their_sample_does(
    model_dir: Path,  # noqa: F811
    media_root: Path,  # noqa: F811
    pool: WorkerPool,
) -> None:
    """A path that leads out of the root ends the run when it is drawn, not when it is read ahead."""
    outside = check_record(question(), number=2) | {"media": [("video", "../one.mp4")]}
    records = [check_record(question(problem_id=0), number=1), outside]
    dataset = PromptDataset(records, loader=make_loader(model_dir, media_root), shuffle=False)
    dataset.read_ahead(pool, prefetch_steps=3)
    assert [prompt.problem_id for prompt in dataset.next(1)] == ["0"]
    with pytest.raises(UserError, match=r"'\.\./one.mp4'.*media_root"):
        dataset.next(1)


def test_a_hanging_file_is_a_skipped_sample_of_the_run(
    model_dir: Path,  # noqa: F811
    media_root: Path,  # noqa: F811
) -> None:
    root = media_root / "hostile"
    root.mkdir()
    names = ["fine", "sleeps", "dies"]
    for name in names:
        shutil.copy(media_root / "clips" / "one.mp4", root / f"{name}.mp4")
    records = [check_record(question(problem_id=name, path=f"{name}.mp4"), number=1) for name in names]
    dataset = PromptDataset(
        records, loader=make_loader(model_dir, root), shuffle=False, skips=SkipCounter(max_skip_share=1.0)
    )
    dataset.read_ahead(bad_pool(timeout_seconds=1.5), prefetch_steps=1)
    try:
        assert [prompt.problem_id for prompt in dataset.next(2)] == ["fine", "fine"]
        assert dataset.counts["skipped/unusable_media"] == 2
        assert dataset.counts["data_workers/replaced"] >= 2
    finally:
        dataset.close()


class Numbered:
    """Element ``number`` of a sequence of which every third is left out."""

    def __init__(self, position: int) -> None:
        self.number = position + (position % 3 == 2)
        self.next_position = self.number + 1


def media_of(num_bytes: int) -> LoadedMedia:
    loaded = LoadedMedia.__new__(LoadedMedia)
    frames = torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
    object.__setattr__(loaded, "visual", type("Visual", (), {"frames_FCHW": frames})())
    return loaded


def test_reading_ahead_keeps_order_and_to_its_limits() -> None:
    asked: list[int] = []
    waiting: dict[int, Future[Any]] = {}

    def submit(element: Numbered) -> Future[Any]:
        asked.append(element.number)
        waiting[element.number] = Future()
        return waiting[element.number]

    ahead = LookAhead(element_at=Numbered, submit=submit, most_bytes=1_000_000_000)
    element, media = ahead.take(0, num_wanted=4)
    assert (element.number, asked) == (0, [0, 1, 3, 4]) and media is waiting[0]
    # Four that are loaded and too large leave no room; the next one is loaded all the same, when it is asked for.
    for future in waiting.values():
        future.set_result([media_of(400_000_000)])
    for number in (1, 3, 4, 6):
        element, _ = ahead.take(element.next_position, num_wanted=4)
        assert element.number == number
    assert asked == [0, 1, 3, 4, 6, 7, 9]
    # Another position, after a state was loaded: what was read ahead is forgotten.
    element, media = ahead.take(30, num_wanted=1)
    assert element.number == 30 and media is waiting[30] and waiting[7].cancelled()
