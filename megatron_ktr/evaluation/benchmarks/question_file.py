"""Any question file in the style of Video-R1, which is also that of our own records (``docs/records.md``).

The harness is Video-R1's, so that its evaluation files give the figures of its ``eval_bench.py``. Questions of every
problem type that the rewards know are judged, by ``strict`` and ``lenient`` also OCR and free-form.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.data.records import Record, check_record, check_writable
from megatron_ktr.data.reward_checks import check_frame_of_boxes, check_problem_type, check_truth
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_r1
from megatron_ktr.evaluation.reading.records import OPTION

AXES = ("problem_type", "task", "original_question_type")
"""Fields whose values are categories, where records have them."""


def read(path: Path, *, name: str) -> list[Item]:
    """The records as items.

    Raises:
        UserError: the file cannot be read, one of its records is of an unknown type or cannot be used, or two have the
            same ``problem_id``.
    """
    items: list[Item] = []
    for number, raw in iter_raw_records(path, option=OPTION):
        try:
            check_writable(raw)
            record = check_record(raw, number=number)
            check_problem_type(record, who="evaluation")
            check_truth(record)
            check_frame_of_boxes(record)
        except ValueError as error:
            raise UserError(f"{OPTION}: {path}, record {number}: {error}") from error
        categories = {axis: str(record[axis]) for axis in AXES if record.get(axis)}
        items.append(Item(name, record["problem_id"], record, categories, video_id=_video_of(record)))
    if not items:
        raise UserError(f"{OPTION}: {path} has no records at all")
    repeated = [item_id for item_id, count in Counter(item.item_id for item in items).items() if count > 1]
    if repeated:
        raise UserError(
            f"{OPTION}: {path} has the problem_id {repeated[0]!r} more than once ({len(repeated)} such ids)"
        )
    return items


def _video_of(record: Record) -> str:
    """The name of its media, so that questions about the same ones belong together."""
    return " ".join(str(written) for _, written in record["media"])


def benchmark_of_file(path: Path, *, name: str) -> Benchmark:
    """The benchmark of a file under a name of its own. ``read`` takes the file's path."""
    return Benchmark(
        name=name,
        title=name,
        read=partial(read, name=name),
        official=video_r1.judge,
        axes=AXES,
        import_release="video_r1/eval",
        source="Video-R1, src/eval_bench.py",
    )
