"""VSI-Bench: about 5,100 spatial questions about 288 videos of rooms, ten types, four of them with numbers.

    official   Video-R1's exact match and mean relative accuracy
    own        the authors' first word and mean relative accuracy, whose borders differ (``judges/vsibench.py``)

Overall is the mean over eight types. Relative direction is one of them, and its figure is the mean of those of its
three difficulties, whatever their numbers of questions: so do the authors.
Video-R1 reports choices and numbers apart, without an overall figure.

Read in: vision-x-nyu/thinking-in-space and EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/vsibench``.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_r1, vsibench
from megatron_ktr.evaluation.reading.records import Question, extra, last_parts, one_file, read_items, written_video

NAME = "vsibench"
_DIRECTION = "object_rel_direction"
FOLDERS = ("", "videos", "vsibench", "VSI-Bench", "VSIBench", "Evaluation/VSI-Bench", "Evaluation/vsibench")


def read(path: Path) -> list[Item]:
    """``test.jsonl``, the hub's table, the downloaded folder, or Video-R1's ``eval_vsibench.json``."""
    patterns = ("test.jsonl", "test-*.parquet", "eval_vsibench.json")
    files = one_file(path, benchmark=NAME, patterns=patterns)
    return read_items(files, benchmark=NAME, layouts=("video_r1", "vsibench"), describe=_describe)


def _describe(record: Record) -> Question:
    (question_type,) = extra(record, "original_question_type")
    kind = _DIRECTION if question_type.startswith(_DIRECTION) else question_type
    video = last_parts(written_video(record), 2)
    return Question(video, {"type": kind, "question_type": question_type, "dataset": video.partition("/")[0]})


BENCHMARK = Benchmark(
    name=NAME,
    title="VSI-Bench",
    read=read,
    official=video_r1.judge,
    other_judges={"own": vsibench.judge},
    axes=("type", "question_type", "dataset"),
    macro_axis="type",
    inner_axis="question_type",
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    source="Video-R1, src/eval_bench.py",
)
