"""Video-Holmes: 1,837 questions about 270 films of 1 to 5 minutes, seven kinds of reasoning, six options.

    official   the authors' letter match (``judges/video_holmes.py``)
    video_r1   Video-R1's exact match

How the paper scored its column is not published: Video-KTR's ``eval_bench.py`` does not have this benchmark, and the
script that its README names was not found. So both stand in the table.

Read in: TencentARC/Video-Holmes, ``README.md``, ``evaluate.py``, ``Pipeline/example_questions``; the evaluation file of
Ziyang412/Video-RTS. The folder of cropped videos is lmms-eval's, ``video`` is VLMEvalKit's.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_holmes, video_r1
from megatron_ktr.evaluation.reading.records import Question, extra, last_parts, one_file, read_items, written_video

NAME = "video_holmes"
FOLDERS = ("videos", "videos_cropped", "video", "Benchmark/videos", "Benchmark/videos_cropped", "")


def read(path: Path) -> list[Item]:
    """The file, the downloaded folder, or Video-R1-style records of the benchmark.

    A ``Question ID`` counts within its video, so that an item's id is ``<video ID>-<Question ID>``.
    """
    patterns = ("Benchmark/test_Video-Holmes.json", "test_Video-Holmes.json", "eval_video*holmes.json")
    files = one_file(path, benchmark=NAME, patterns=patterns)
    return read_items(files, benchmark=NAME, layouts=("video_holmes", "video_r1"), describe=_describe)


def _describe(record: Record) -> Question:
    (subtask,) = extra(record, "original_question_type")
    return Question(f"{FOLDERS[0]}/{last_parts(written_video(record))}", {"subtask": subtask})


BENCHMARK = Benchmark(
    name=NAME,
    title="Video-Holmes",
    read=read,
    official=video_holmes.judge,
    other_judges={"video_r1": video_r1.judge},
    axes=("subtask",),
    media_folders=FOLDERS,
    wording="video_holmes",
    import_release="video_holmes/eval",
    num_questions=1837,
    source="TencentARC/Video-Holmes, evaluate.py",
)
