"""TempCompass: 410 short videos, five temporal aspects, four tasks with 7,540 questions in all.

    official   Video-R1's exact match, as in the paper's column
    own        the authors' matching rules without their language model (``judges/tempcompass.py``)

Of the authors' files the three tasks are read that have a right answer: multi-choice, yes_no and caption_matching,
about 5,500 questions. The fourth, captioning, is judged by a language model from a description, and is left out. The
paper's column is Video-R1's file with all 7,540, whose fields for captioning are not known; whoever has it can name it.

Read in: llyx97/TempCompass, ``questions``, ``eval_*.py``; EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/tempcompass``.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import tempcompass, video_r1
from megatron_ktr.evaluation.reading.records import (
    OPTION,
    Question,
    QuestionFile,
    extra,
    last_parts,
    note_missing,
    question_files,
    read_items,
    written_video,
)
from megatron_ktr.files.listing import paths_in_folders_below

NAME = "tempcompass"
TASKS = ("multi-choice", "yes_no", "caption_matching")
FOLDERS = ("videos", "TempCompass/videos", "Evaluation/TempCompass/videos", "TempCompass", "tempcompass_videos", "")


def read(path: Path) -> list[Item]:
    """The authors' file of one task, their folder ``questions`` or the one that has it, the hub's folder with a table
    for each task, or Video-R1's ``eval_tempcompass.json``. Questions have no ids: an item's is its video, dimension and
    task with its place among those of the same."""
    if "captioning" in (path.stem, path.resolve().parent.name):
        raise UserError(
            f"{OPTION} {NAME}: {path}: the task captioning has no right answer: a language model judges it, which is "
            f"not done here; expected {', '.join(TASKS)}"
        )
    folder = path / "questions" if (path / "questions").is_dir() else path
    tasks = [folder / f"{task}.json" for task in TASKS]
    found = [file for file in tasks if file.is_file()] or paths_in_folders_below(path, TASKS, "*.parquet")
    found = found or question_files(
        path, benchmark=NAME, patterns=("questions/multi-choice.json", "eval_tempcompass.json")
    )
    tasks = [task for file in found for task in (file.stem, file.parent.name) if task in TASKS]
    note_missing(path, benchmark=NAME, wanted=TASKS, found=tasks, what="questions")
    files = [QuestionFile(file) for file in found]
    return read_items(
        files, benchmark=NAME, layouts=("video_r1", "tempcompass"), describe=partial(_describe, seen=Counter())
    )


def _describe(record: Record, *, seen: Counter[str]) -> Question:
    task, dimension = extra(record, "original_question_type", "dimension")
    seen[record["problem_id"]] += 1
    # Video-R1's records have an id of their own, and no dimension.
    item_id = f"{record['problem_id']}-{seen[record['problem_id']]}" if dimension else ""
    video = f"{FOLDERS[0]}/{last_parts(written_video(record))}"
    return Question(video, {"dimension": dimension, "task": task}, item_id)


BENCHMARK = Benchmark(
    name=NAME,
    title="TempCompass",
    read=read,
    official=video_r1.judge,
    other_judges={"own": tempcompass.judge},
    axes=("dimension", "task"),
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    num_questions=7540,
    source="Video-R1, src/eval_bench.py",
)
