"""MMVU: questions of experts in 27 subjects of four disciplines, here the 625 multiple-choice ones for validation.

The paper's column is "MMVU(mc)", judged by Video-R1's exact match. The other 375 have an answer in words, which the
benchmark's authors let a language model judge, and so their own rule for multiple choice: there is no column ``own``.
Open questions in a file are left out.

Read in: yale-nlp/MMVU, ``data/validation.json``, ``utils``; EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/mmvu``, which
has the disciplines; the evaluation file in longmalongma/TW-GRPO.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_r1
from megatron_ktr.evaluation.reading.records import Question, last_parts, one_file, read_items, written_video

NAME = "mmvu"
_SUBJECTS = {
    "Science": "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science Neurobiology Electromagnetism "
    "Thermodynamics Mechanics",
    "Engineering": "Civil_Engineering Electrical_Engineering Mechanical_Engineering Biomedical_Engineering "
    "Electronics_and_Communication Computer_Science",
    "Healthcare": "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry",
    "Humanities and Social Science": "Art Literature History Law Economics Management",
}
DISCIPLINES = {subject: discipline for discipline, subjects in _SUBJECTS.items() for subject in subjects.split()}
FOLDERS = ("videos", "MMVU/videos", "Evaluation/MMVU/videos", "")


def read(path: Path) -> list[Item]:
    """``validation.json``, the hub's table, the downloaded folder, or Video-R1's ``eval_mmvu.json``."""
    patterns = ("data/validation.json", "validation.json", "**/validation*.parquet", "eval_mmvu.json")
    files = one_file(path, benchmark=NAME, patterns=patterns)
    return read_items(files, benchmark=NAME, layouts=("video_r1", "mmvu"), describe=_describe)


def _describe(record: Record) -> Question | None:
    if record["problem_type"] != "multiple choice":
        return None
    below = last_parts(written_video(record), 2)
    subject = below.partition("/")[0]
    if subject not in DISCIPLINES:
        raise ValueError(f"expected a video in the folder of one of the 27 subjects, got {below!r}")
    return Question(f"{FOLDERS[0]}/{below}", {"discipline": DISCIPLINES[subject], "subject": subject})


BENCHMARK = Benchmark(
    name=NAME,
    title="MMVU (multiple choice)",
    read=read,
    official=video_r1.judge,
    axes=("discipline", "subject"),
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    num_questions=625,
    source="Video-R1, src/eval_bench.py",
)
