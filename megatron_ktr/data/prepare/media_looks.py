"""Looks at many media in processes of their own, with what an earlier check remembers, and shows the progress."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.prepare.media_probe import Look, MediaFacts, MediaTask, look_at
from megatron_ktr.data.prepare.media_state import MediaState
from megatron_ktr.data.prepare.reasons import DECODING_CRASHES, DECODING_HANGS, DOES_NOT_DECODE
from megatron_ktr.data.prepare.task_pool import TaskFailed, run_tasks
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.data.workers.cores import num_cores
from megatron_ktr.errors import UserError, number, whole

_KIND_OF_FAILURE = {"hangs": DECODING_HANGS, "crashes": DECODING_CRASHES, "memory": DECODING_CRASHES}


@dataclass(frozen=True)
class ProcessLimits:
    """The processes that look at media, and what one medium may cost them."""

    jobs: int = 1
    deadline_seconds: float = 300.0
    """More than decord's own time limit (``video.DECORD_TIMEOUT_SECONDS``), after which PyAV decodes the file."""
    memory_bytes: int = 8_000_000_000


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``ProcessLimits``."""
    parser.add_argument("--jobs", type=whole(high=1024), metavar="N", help="processes that decode (default: all cores)")
    parser.add_argument(
        "--deadline", type=number(above=0, high=86400), default=300.0, metavar="SECONDS", help="for one medium (300)"
    )
    parser.add_argument(
        "--max-memory-gb",
        type=number(low=1, high=4096),
        default=8.0,
        metavar="GB",
        help="for decoding one medium, in 10^9 bytes (8)",
    )


def read_process_options(options: argparse.Namespace) -> ProcessLimits:
    """The limits of a command line."""
    jobs = options.jobs or num_cores()
    return ProcessLimits(jobs, options.deadline, round(options.max_memory_gb * 1e9))


@dataclass(frozen=True)
class Seen:
    """What was found about one medium."""

    number: int
    """The number that the caller gave it."""
    facts: MediaFacts
    kind_of_problem: str = ""


def recall_media(
    media: Iterable[tuple[int, MediaSource]], *, look: Look, loader: PromptLoader, state: MediaState
) -> Iterator[Seen]:
    """What ``state`` remembers about these media, as far as it was found by looking at them this closely."""
    for medium, source in media:
        task = _task(medium, source, look=look, loader=loader)
        if isinstance(task, MediaTask) and (facts := state.find(task)) is not None:
            yield Seen(medium, facts, DOES_NOT_DECODE if facts.problem else "")


def look_at_media(
    media: Iterable[tuple[int, MediaSource]],
    *,
    look: Look,
    loader: PromptLoader,
    limits: ProcessLimits,
    state: MediaState | None = None,
    total: int | None = None,
    measures_time: bool = False,
) -> Iterator[Seen]:
    """Looks at every medium, in any order. ``media`` are (number, medium).

    Args:
        state: remembers what is found, except failures of processes: a slow disk is no property of a file.
        total: for the progress bar.
        measures_time: frames are also resized, as in training, so that ``MediaFacts.seconds`` is what a sample costs.
    """
    gone: list[Seen] = []

    def tasks() -> Iterator[MediaTask]:
        for medium, source in media:
            task = _task(medium, source, look=look, loader=loader, measures_time=measures_time)
            if isinstance(task, MediaTask):
                yield task
            else:
                gone.append(task)

    # The bar is shown on terminals only (``disable=None``).
    with tqdm(total=total, unit=" media", desc=_DESCRIPTIONS[look], disable=None, leave=False) as bar:
        for task, result in run_tasks(
            look_at,
            tasks(),
            jobs=limits.jobs,
            deadline_seconds=limits.deadline_seconds,
            memory_bytes=limits.memory_bytes,
        ):
            bar.update(1)
            if isinstance(result, TaskFailed):
                facts = MediaFacts(look, task.source.kind, problem=result.reason)
                yield Seen(task.number, facts, _KIND_OF_FAILURE[result.how])
                continue
            if state is not None:
                state.remember(task, result)
            yield Seen(task.number, result, DOES_NOT_DECODE if result.problem else "")
    yield from gone


_DESCRIPTIONS = {Look.HEADER: "opening", Look.INDEX: "reading", Look.FRAMES: "decoding"}


def _task(
    medium: int, source: MediaSource, *, look: Look, loader: PromptLoader, measures_time: bool = False
) -> MediaTask | Seen:
    try:
        files = files_of(source, loader.media_root)
    except (UnusableMedia, UserError) as error:  # it was there a moment ago
        return Seen(medium, MediaFacts(look, source.kind, problem=str(error)), DOES_NOT_DECODE)
    return MediaTask(
        number=medium,
        source=source,
        paths=(str(files),) if isinstance(files, Path) else tuple(map(str, files)),
        sampling=replace(loader.sampling, multiple=loader.settings.temporal_patch_size),
        look=look,
        settings=loader.settings if measures_time else None,
    )
