"""VideoMMMU: 900 questions about 300 lectures in 30 subjects of six disciplines; three tracks of 300.

    official   Video-R1's exact match on letters and numbers, as in the paper's column; text answers score 0 there
    own        MMMU's parsers, with which lmms-eval evaluates it (``judges/mmmu.py``)

Overall is the mean over items, which is the mean of the three tracks, since they have the same size. Video-R1's file of
the benchmark does not say the track.

Read in: EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videommmu``; EvolvingLMMs-Lab/VideoMMMU, ``README.md``; the
evaluation file of Ziyang412/Video-RTS.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import mmmu, video_r1
from megatron_ktr.evaluation.reading.records import (
    Question,
    QuestionFile,
    extra,
    last_parts,
    note_missing,
    question_files,
    read_items,
    stem,
    written_video,
)
from megatron_ktr.files.listing import paths_in_folders_below

NAME = "video_mmmu"
TRACKS = ("Perception", "Comprehension", "Adaptation")
_SUBJECTS = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
}
DISCIPLINES = {subject: discipline for discipline, subjects in _SUBJECTS.items() for subject in subjects.split()}
"""Subject -> discipline, which is also the name of the folder of its videos."""
_HOMES = ("videos/", "video_mmmu/", "VideoMMMU/", "Evaluation/VideoMMMU/")
FOLDERS = ("", *(home.rstrip("/") for home in _HOMES), "*", *(f"{home}*" for home in _HOMES))
"""Video-R1's copy has no folders for disciplines."""


def read(path: Path) -> list[Item]:
    """A table of one track, the downloaded folder with all three, or Video-R1's ``eval_videommmu.json``.

    A table does not say its track: the name of the file or of its folder must.
    """
    tables = paths_in_folders_below(path, TRACKS, "*.parquet")
    found = tables or question_files(path, benchmark=NAME, patterns=("*.parquet", "eval_videommmu.json"))
    note_missing(path, benchmark=NAME, wanted=TRACKS, found=[_track(table) for table in tables], what="table")
    files = [QuestionFile(file, {"track": _track(file)}) for file in found]
    return read_items(files, benchmark=NAME, layouts=("video_r1", "video_mmmu"), describe=_describe)


def _track(file: Path) -> str:
    """The track that the name of a file, or of its folder, has; "" if there is none, or several."""
    name = f"{file.resolve().parent.name}/{file.stem}".lower()
    found = [track for track in TRACKS if track.lower() in name]
    return found[0] if len(found) == 1 else ""


def _describe(record: Record) -> Question:
    name = last_parts(written_video(record))
    subject = "_".join(stem(name).split("_")[1:-1])
    discipline = DISCIPLINES.get(subject)
    if discipline is None:
        raise ValueError(f"expected a video named by one of the 30 subjects ('validation_Biology_7'), got {name!r}")
    (track,) = extra(record, "track")
    # In the benchmark's own tables a question is named by its video, which the three tracks share.
    if not track and record["problem_id"] == stem(name):
        raise ValueError(f"expected {', '.join(TRACKS)} in the name of the file or its folder, to tell the track")
    return Question(f"{discipline}/{name}", {"track": track, "discipline": discipline, "subject": subject})


BENCHMARK = Benchmark(
    name=NAME,
    title="VideoMMMU",
    read=read,
    official=video_r1.judge,
    other_judges={"own": mmmu.judge},
    axes=("track", "discipline", "subject"),
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    num_questions=900,
    source="Video-R1, src/eval_bench.py",
)
