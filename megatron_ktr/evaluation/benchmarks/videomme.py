"""Video-MME: 2,700 questions about 900 videos, 300 each of up to 2, 4 to 15, and 30 to 60 minutes; without subtitles.

    official    Video-R1's exact match, as in the paper's column
    own         the authors' ``extract_characters_regex`` (``judges/videomme.py``)
    lmms_eval   lmms-eval's copy of it, which knows fewer phrases

Read in: BradyFU/Video-MME, ``README.md``; EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videomme``; the evaluation
file in longmalongma/TW-GRPO. ``video`` is VLMEvalKit's folder.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_r1, videomme
from megatron_ktr.evaluation.reading.records import Question, extra, last_parts, one_file, read_items, written_video

NAME = "videomme"
AXES = ("duration", "domain", "sub_category", "task_type")
FOLDERS = ("data", "video", "videos", "videoMME/data", "Evaluation/videoMME/data", "")


def read(path: Path) -> list[Item]:
    """The hub's table, the downloaded folder, the same records as JSON, or Video-R1's ``eval_videomme.json``."""
    patterns = ("videomme/test-*.parquet", "test-*.parquet", "eval_videomme.json")
    files = one_file(path, benchmark=NAME, patterns=patterns)
    return read_items(files, benchmark=NAME, layouts=("video_r1", "videomme"), describe=_describe)


def _describe(record: Record) -> Question:
    (item_id,) = extra(record, "question_id")
    categories: dict[str, str] = dict(zip(AXES, extra(record, *AXES), strict=True))
    return Question(f"{FOLDERS[0]}/{last_parts(written_video(record))}", categories, item_id)


BENCHMARK = Benchmark(
    name=NAME,
    title="Video-MME (without subtitles)",
    read=read,
    official=video_r1.judge,
    other_judges={"own": videomme.judge, "lmms_eval": videomme.judge_lmms_eval},
    axes=AXES,
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    num_questions=2700,
    source="Video-R1, src/eval_bench.py",
)
