"""What data costs: a million records at the start, decoding, and what of it training waits for.

    python benchmarks/data.py                                  all parts, as tables
    python benchmarks/data.py --part wait --json               one part, JSON on stdout
    python benchmarks/data.py --videos DIR --out FILE.json     the mp4 files of a folder
    python benchmarks/data.py --qwen-python .venv-vllm/bin/python      decoding by qwen-vl-utils beside ours

records   Time from the question file to the first prompt, and memory, of a run's own path (``read_questions``): the
          record store at its first start (the store is written, every record is checked), at the second (both are
          there), and a list of all records in memory, which is what the store took the place of. A list of a million
          takes long, so that its number of records is an option of its own; compare numbers per record. Memory is what
          the process adds after its imports: ``private``, which every reading rank has for itself, and ``shared``,
          pages of the mapped store, which a machine holds once.
decode    Seconds a video, 16 frames of at most 128 visual tokens: decoding in the training process, in one and two
          workers, from the frame cache, and qwen-vl-utils with decord. All take turns in one run.
wait      The share of a step that the training process waits for its prompts, with 0, 1 and 2 workers. Decoding one
          step's videos takes half as long as the rest of the step, which is simulated by sleeping: a GPU trains
          without the host's cores. The first steps, in which workers start, are not counted.

Every measurement runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

# `python benchmarks/X.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil  # noqa: E402

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.config import load_config  # noqa: E402
from megatron_ktr.data.dataset import PromptDataset  # noqa: E402
from megatron_ktr.data.frame_cache import FrameCache  # noqa: E402
from megatron_ktr.data.loader import PromptLoader  # noqa: E402
from megatron_ktr.data.media.job import MediaJob  # noqa: E402
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings  # noqa: E402
from megatron_ktr.data.media.request import NOTHING_ASKED  # noqa: E402
from megatron_ktr.data.media.video import FrameSampling  # noqa: E402
from megatron_ktr.data.record_check import check_questions  # noqa: E402
from megatron_ktr.data.record_problems import RecordProblems  # noqa: E402
from megatron_ktr.data.records import check_record, read_records  # noqa: E402
from megatron_ktr.data.template import load_tokenizer  # noqa: E402
from megatron_ktr.data.workers.pool import WorkerPool  # noqa: E402
from megatron_ktr.distributed.platform import start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.rollout.questions import read_questions  # noqa: E402
from tests.support.videos import numbered_frames, write_video  # noqa: E402

PARTS = ("records", "decode", "wait")
SIZES = dict(video_min_pixels=784, video_max_pixels=128 * 784)
SAMPLING = FrameSampling(fps=2.0, max_frames=16)
PROMPTS_OF_STEP = 2
WARM_UP_STEPS = 3
NUM_CLIPS = 10_000


# --- records --------------------------------------------------------------------------------------------------


def write_questions(path: Path, number: int) -> None:
    """Questions of about the length of Video-R1's, with options, on ``NUM_CLIPS`` videos beside the file."""
    clips = path.parent / "clips"
    if not clips.is_dir():
        clips.mkdir()
        write_video(clips / "0.mp4", numbered_frames(8), fps=4)
        for number_of_clip in range(1, NUM_CLIPS):
            os.link(clips / "0.mp4", clips / f"{number_of_clip}.mp4")
    options = [
        f"{letter}. The {colour} ball is moved behind the box" for letter, colour in zip("ABCD", "rgby", strict=True)
    ]
    with path.open("w", encoding="utf-8") as out:
        for place in range(number):
            record = {
                "problem_id": place,
                "problem": f"In question {place}, what happens after the hand has left the table? "
                + "Look closely. " * 20,
                "data_type": "video",
                "path": f"./clips/{place % NUM_CLIPS}.mp4",
                "problem_type": "multiple choice",
                "options": options,
                "process": "",
                "solution": f"<answer>{'ABCD'[place % 4]}</answer>",
            }
            out.write(json.dumps(record) + "\n")


def measure_start(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first prompt and bytes added by it, by the store or by a list."""
    config = load_config(
        ["--model", job["model"], "--data-path", job["path"], "--engine", "hf", "--train-steps", "1"]
        + ["--run-dir", job["store"], "--record-store-dir", job["store"]]
    )
    tokenizer = load_tokenizer(job["model"])
    before, started = _memory(), time.perf_counter()
    if job["reader"] == "store":
        sources = read_questions(config, tokenizer=tokenizer, vocab_size=len(tokenizer), is_spokesman=True).sources
        dataset = PromptDataset.of_sources(sources)
    else:
        problems = RecordProblems("data_path", Path(job["path"]))
        records = read_records(job["path"], problems=problems)
        loader = PromptLoader.from_model(job["model"], media_root=Path(job["path"]).parent, tokenizer=tokenizer)
        check_questions(records, problems=problems, loader=loader)
        dataset = PromptDataset(records, loader=loader)
    dataset.next(1)
    seconds, after = time.perf_counter() - started, _memory()
    number = len(dataset.records)
    return {"records": number, "seconds": seconds, **{name: after[name] - before[name] for name in after}}


def _memory() -> dict[str, int]:
    info = psutil.Process().memory_full_info()
    return {"private_bytes": info.uss, "shared_bytes": info.rss - info.uss}


def records_part(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    model = folder / "model"
    results = []
    for reader, number, starts in (("store", arguments.records, 2), ("list", arguments.list_records, 1)):
        path = folder / f"{reader}.jsonl"
        write_questions(path, number)
        for attempt in range(starts):
            job = dict(part="records", reader=reader, path=str(path), model=str(model), store=str(folder / "store"))
            name = "list" if reader == "list" else ("store, first start", "store, second start")[attempt]
            result = {"reader": name, **_in_process(job)}
            result["microseconds_per_record"] = result["seconds"] / number * 1e6
            results.append(result)
            say(f"{name}: {result}")
    return results


# --- decoding -------------------------------------------------------------------------------------------------


def jobs_of(videos: list[str]) -> list[MediaJob]:
    settings = PreprocessSettings(**SIZES)
    return [MediaJob((Path(path),), "video", False, NOTHING_ASKED, settings, SAMPLING) for path in videos]


def measure_decoding(job: dict[str, Any]) -> dict[str, float]:
    """Median seconds a video of each way, over ``repeats`` turns of all ways."""
    jobs = jobs_of(job["videos"])
    pools = {workers: WorkerPool(workers) for workers in (1, 2)}
    cache = FrameCache(job["cache"], max_bytes=10**10)
    ways: dict[str, Callable[[], object]] = {
        "in the training process": lambda: [one.load() for one in jobs],
        "1 worker": lambda: _by_workers(pools[1], jobs),
        "2 workers": lambda: _by_workers(pools[2], jobs),
        "frame cache": lambda: [cache.read_through(one, MediaJob.load) for one in jobs],
    }
    try:
        return _take_turns(ways, repeats=job["repeats"], num_videos=len(jobs))
    finally:
        for pool in pools.values():
            pool.close()


def measure_qwen(job: dict[str, Any]) -> dict[str, float]:
    """qwen-vl-utils and ours by turns, in the environment that has the library."""
    from megatron_ktr.files.hf_model import make_torchvision_importable

    make_torchvision_importable()
    from qwen_vl_utils import vision_process

    vision_process.FORCE_QWENVL_VIDEO_READER = "decord"
    jobs = jobs_of(job["videos"])
    asked = dict(fps=SAMPLING.fps, max_frames=SAMPLING.max_frames, min_pixels=784, max_pixels=SIZES["video_max_pixels"])
    ways: dict[str, Callable[[], object]] = {
        "qwen-vl-utils": lambda: [vision_process.fetch_video({"video": path, **asked}) for path in job["videos"]],
        "ours beside qwen-vl-utils": lambda: [one.load() for one in jobs],
    }
    return _take_turns(ways, repeats=job["repeats"], num_videos=len(jobs))


def _by_workers(pool: WorkerPool, jobs: list[MediaJob]) -> list[LoadedMedia]:
    futures: list[Future[LoadedMedia]] = [pool.submit(lambda decode, one=one: decode(one)) for one in jobs]
    return [future.result() for future in futures]


def _take_turns(ways: dict[str, Callable[[], object]], *, repeats: int, num_videos: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn starts workers and fills the cache
                seconds[name].append((time.perf_counter() - started) / num_videos)
    return {name: statistics.median(found) for name, found in seconds.items()}


def decode_part(arguments: argparse.Namespace, folder: Path, videos: list[str]) -> dict[str, Any]:
    job = dict(part="decode", videos=videos, repeats=arguments.repeats, cache=str(folder / "frames"))
    seconds = _in_process(job)
    if arguments.qwen_python is not None:
        seconds |= _in_process({**job, "part": "qwen"}, python=arguments.qwen_python)
    base = seconds["in the training process"]
    ratios = {name: base / seconds[name] for name in ("1 worker", "2 workers", "frame cache")}
    if "qwen-vl-utils" in seconds:
        ratios["ours / qwen-vl-utils, seconds"] = seconds["ours beside qwen-vl-utils"] / seconds["qwen-vl-utils"]
    say(f"decoding: {seconds}")
    return {"videos": len(videos), "seconds_per_video": seconds, "times_as_fast": ratios}


# --- waiting --------------------------------------------------------------------------------------------------


def measure_wait(job: dict[str, Any]) -> dict[str, float]:
    """The share of the steps that ``dataset.next`` takes while the rest of a step takes twice as long as decoding."""
    records = [_question(number, path) for number, path in enumerate(job["videos"])]
    loader = PromptLoader.from_model(job["model"], media_root=job["root"], sampling=SAMPLING, **SIZES)
    started = time.perf_counter()
    for record in records:
        loader.load(record)
    decode_seconds = (time.perf_counter() - started) / len(records) * PROMPTS_OF_STEP
    dataset = PromptDataset(records, loader=loader)
    if job["workers"]:
        dataset.read_ahead(WorkerPool(job["workers"]), prefetch_steps=job["prefetch_steps"])
    shares = []
    try:
        for step in range(WARM_UP_STEPS + job["steps"]):
            started = time.perf_counter()
            dataset.next(PROMPTS_OF_STEP)
            waited = time.perf_counter() - started
            time.sleep(2 * decode_seconds)
            if step >= WARM_UP_STEPS:
                shares.append(waited / (time.perf_counter() - started))
    finally:
        dataset.close()
    return {"mean": statistics.fmean(shares), "largest": max(shares), "decode_seconds_per_step": decode_seconds}


def _question(number: int, path: str) -> dict[str, Any]:
    raw = {"problem_id": number, "problem": "What is seen?", "video": Path(path).name, "solution": "B"}
    return {**check_record(raw, number=number + 1), "record_number": number + 1}


def wait_part(arguments: argparse.Namespace, folder: Path, videos: list[str]) -> dict[str, Any]:
    results = {}
    for workers in (0, 1, 2):
        job = dict(part="wait", workers=workers, steps=arguments.steps, prefetch_steps=arguments.prefetch_steps)
        job |= dict(videos=videos, model=str(folder / "model"), root=str(Path(videos[0]).parent))
        results[f"{workers} workers"] = _in_process(job)
        say(f"waiting with {workers} workers: {results[f'{workers} workers']}")
    return {"data_wait_fraction": results, "prefetch_steps": arguments.prefetch_steps}


# --- all ------------------------------------------------------------------------------------------------------

MEASURE = {"records": measure_start, "decode": measure_decoding, "qwen": measure_qwen, "wait": measure_wait}


def _in_process(job: dict[str, Any], *, python: Path | str = sys.executable) -> dict[str, Any]:
    command = [str(python), str(Path(__file__).resolve()), "--job", json.dumps(job)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError(f"measurement failed (exit status {result.returncode}): {job}")
    return json.loads(result.stdout.splitlines()[-1])


def find_videos(folder: Path | None, scratch: Path) -> list[str]:
    """The mp4 files of a folder that can be decoded, or made-up ones."""
    if folder is None:
        made = scratch / "videos"
        made.mkdir()
        for number in range(4):
            write_video(made / f"{number}.mp4", numbered_frames(120, height=360, width=640), fps=24)
        return sorted(map(str, made.glob("*.mp4")))
    found = []
    for job in jobs_of(sorted(map(str, folder.resolve().glob("*.mp4")))):
        try:
            job.load()
            found.append(str(job.paths[0]))
        except Exception as error:  # whatever it is, such a file measures nothing
            say(f"left out: {error}")
    if not found:
        raise UserError(f"--videos: no mp4 file in {folder} can be decoded")
    return found


def table(report: dict[str, Any]) -> str:
    lines = []
    for row in report.get("records", ()):
        megabytes = f"{row['private_bytes'] / 1e6:8.0f} MB private {row['shared_bytes'] / 1e6:8.0f} MB shared"
        lines.append(f"{row['reader']:<24} {row['records']:>9} records {row['seconds']:8.1f} s {megabytes}")
    for name, seconds in report.get("decode", {}).get("seconds_per_video", {}).items():
        lines.append(f"{name:<28} {seconds * 1e3:9.1f} ms a video")
    for name, share in report.get("wait", {}).get("data_wait_fraction", {}).items():
        lines.append(f"{name:<12} data_wait_fraction {share['mean']:.4f} (largest {share['largest']:.4f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--records", type=int, default=1_000_000, help="of the store")
    parser.add_argument("--list-records", type=int, default=200_000, help="of the list in memory")
    parser.add_argument("--videos", type=Path, help="folder of mp4 files; without it videos are made")
    parser.add_argument("--qwen-python", type=Path, help="a Python with qwen-vl-utils and this package")
    parser.add_argument("--repeats", type=int, default=5, help="turns of decoding, the median of which counts")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of waiting")
    parser.add_argument("--prefetch-steps", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps(MEASURE[job["part"]](job)))
        return
    parts = arguments.part or list(PARTS)
    report: dict[str, Any] = {"machine": {**about_machine(start("cpu")), "cores": os.cpu_count()}}
    report["settings"] = {"prompts_of_step": PROMPTS_OF_STEP, "steps": arguments.steps, "repeats": arguments.repeats}
    # Not at the top: the process beside qwen-vl-utils must make torchvision importable before transformers is used.
    from tests.support.tiny import save_tiny_hf
    from tests.support.tokenizer import save_tiny_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_hf(folder / "model")
        save_tiny_tokenizer(folder / "model")
        videos = find_videos(arguments.videos, folder) if {"decode", "wait"} & set(parts) else []
        if "records" in parts:
            report["records"] = records_part(arguments, folder)
        if "decode" in parts:
            report["decode"] = decode_part(arguments, folder, videos)
        if "wait" in parts:
            report["wait"] = wait_part(arguments, folder, videos)
    text = write_report(report, out=arguments.out, figure=None, draw=str)
    print(text if arguments.json else table(report))


if __name__ == "__main__":
    run_cli(main)
