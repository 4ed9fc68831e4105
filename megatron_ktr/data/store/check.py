"""Checks all records of a store before a model is built, in several processes, and keeps what was found.

What does not depend on files is checked once: the result lies beside the store, named by everything that can change it.
The column ``media`` of the result has each record's images and videos; whether these files exist is checked at every
start. The records of a small store are checked in the process itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.record_check import RecordChecker
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import Record
from megatron_ktr.data.store.check_job import CHUNK, CheckJob, ChunkFindings, check_chunk, is_clip
from megatron_ktr.data.store.check_process import chunks_of_processes
from megatron_ktr.data.store.record_store import RecordStore, progress
from megatron_ktr.data.store.sealed import open_sealed, sole_writer, write_sealed
from megatron_ktr.data.workers.cores import num_cores

PARALLEL_FROM = 20_000
"""Fewer records are checked in the process itself: starting others takes seconds."""
MAX_PROCESSES = 32
_SCHEMA = pa.schema([("media", pa.large_string())])


@dataclass(frozen=True)
class Clips:
    """The records that show only a part of a video by fields that have another meaning in some data sets."""

    num_records: int = 0
    first_number: int = 0
    """The number of the first of them in its file."""


def clips_of(records: Iterable[Record]) -> Clips:
    """The clips among ``records``."""
    numbers = [record["record_number"] for record in records if is_clip(record)]
    return Clips(len(numbers), numbers[0] if numbers else 0)


def check_store(
    store: RecordStore,
    *,
    problems: RecordProblems,
    loader: PromptLoader,
    rewards: Sequence[str] = (),
    is_spokesman: bool = True,
) -> Clips:
    """Adds to ``problems`` the records of ``store`` that cannot be used.

    Only one process of a machine checks a store; the others wait for its result.

    Args:
        loader: makes the prompts of these records.
        rewards: built-in rewards that must be able to judge them.
        is_spokesman: shows the progress of a long check.
    """
    job = CheckJob(
        file=store.file,
        path=store.path,
        rules=store.rules,
        builder=loader.builder,
        settings=loader.settings,
        sampling=loader.sampling,
        rewards=tuple(rewards),
    )
    found = _find(store, job, is_shown=is_spokesman)
    state = json.loads((found.schema.metadata or {})[b"found"])
    problems.load_state_dict(state["problems"])
    checker = RecordChecker(loader)
    place = 0
    for batch in found.column("media").chunks:
        for media in batch.to_pylist():
            if media is not None and (missing := checker.find_problem_of_files(_sources_of(media))):
                record = store[place]
                problems.add(
                    place, number=record["record_number"], problem_id=record["problem_id"], reason=missing.reason
                )
            place += 1
    return Clips(*state["clips"])


def _find(store: RecordStore, job: CheckJob, *, is_shown: bool) -> pa.Table:
    """What the check without files finds: kept from an earlier start, or found now."""
    if store.file is None:
        return _collect(store, job, is_shown=is_shown)
    path = store.file.path.with_name(f"{store.file.content}-check-{job.key()}.arrow")
    found = open_sealed(path)
    if found is None:
        with sole_writer(store.file.directory, path.name):
            found = open_sealed(path)  # another process may have written it meanwhile
            if found is None:
                table = found = _collect(store, job, is_shown=is_shown)
                write_sealed(path, schema=table.schema, write=lambda writer: writer.write_table(table))
    return found


def _collect(store: RecordStore, job: CheckJob, *, is_shown: bool) -> pa.Table:
    problems = RecordProblems("data_path", store.path)
    num_clips, first_clip = 0, 0
    by_start: dict[int, pa.RecordBatch] = {}
    found_problems: list[tuple[int, int, str | None, str]] = []
    with progress(f"checking {store.path.name}", total=len(store), is_shown=is_shown) as bar:
        for chunk in _chunks(store, job):
            by_start[chunk.start] = pa.RecordBatch.from_pydict({"media": chunk.media}, _SCHEMA)
            found_problems += chunk.problems
            num_clips += len(chunk.clip_numbers)
            first_clip = min(filter(None, (first_clip, *chunk.clip_numbers[:1])), default=0)
            bar.update(len(chunk.media))
    for place, number, problem_id, reason in sorted(found_problems, key=lambda problem: problem[0]):
        problems.add(place, number=number, problem_id=problem_id, reason=reason)
    state = {"problems": problems.state_dict(), "clips": [num_clips, first_clip]}
    table = pa.Table.from_batches([batch for _, batch in sorted(by_start.items(), key=lambda item: item[0])], _SCHEMA)
    return table.replace_schema_metadata({b"found": json.dumps(state).encode()})


def _chunks(store: RecordStore, job: CheckJob) -> Iterator[ChunkFindings]:
    """The findings of all chunks, in any order."""
    if store.file is None or len(store) < PARALLEL_FROM:
        checker = job.checker()
        yield from (check_chunk(store, checker, start=start) for start in range(0, len(store), CHUNK))
    else:
        num_processes = min(num_cores(), MAX_PROCESSES)
        yield from chunks_of_processes(job, num_processes=num_processes)


def _sources_of(media: str) -> list[MediaSource]:
    return [
        MediaSource(kind, written if isinstance(written, str) else tuple(written))
        for kind, written in json.loads(media)
    ]
