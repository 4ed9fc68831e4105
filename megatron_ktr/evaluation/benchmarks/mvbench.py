"""MVBench: 20 tasks of 200 questions about short videos, some about a clip of one.

    official    Video-R1's exact match, as in the release's table
    own         the authors' ``check_ans`` (``judges/mvbench.py``)
    lmms_eval   lmms-eval's ``mcq_acc``

Video-R1's file does not say the task. Where the folder of the video belongs to one task it is known, else the item is
in no category of the axis ``task``. lmms-eval's copies of the videos are cut to the clips already, so their folders are
not looked for: the clip would be taken from the clip.

Read in: OpenGVLab/Ask-Anything, ``video_chat2/mvbench.ipynb``; EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/mvbench``;
the evaluation file in longmalongma/TW-GRPO.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.data.records import Record
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import mvbench, video_r1
from megatron_ktr.evaluation.reading.records import (
    OPTION,
    Question,
    QuestionFile,
    extra,
    note_missing,
    question_files,
    read_items,
    written_video,
)

NAME = "mvbench"
FOLDER_OF_TASK = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
_SOURCES = sorted({folder.partition("/")[0] for folder in FOLDER_OF_TASK.values()})
FOLDERS = ("video", "", "MVBench", "Evaluation/MVBench", "MVBench/video")


def read(path: Path) -> list[Item]:
    """The file of one task, the folder ``json`` with all of them, the folder that has it, or Video-R1's
    ``eval_mvbench.json``. The files of the tasks give no ids: an item's is its task and its place in the file."""
    names = [f"{task}.json" for task in FOLDER_OF_TASK]
    found = [file for folder in (path / "json", path) for name in names if (file := folder / name).is_file()]
    if not found:
        found = question_files(path, benchmark=NAME, patterns=("eval_mvbench.json", "json/action_sequence.json"))
    tasks = [file.stem for file in found if file.stem in FOLDER_OF_TASK]
    note_missing(path, benchmark=NAME, wanted=tuple(FOLDER_OF_TASK), found=tasks, what="file")
    files = [_task_file(file) for file in found]
    return read_items(files, benchmark=NAME, layouts=("video_r1", "mvbench"), describe=_describe)


def _task_file(file: Path) -> QuestionFile:
    task = file.stem
    if task.startswith("eval_"):
        return QuestionFile(file)
    if task not in FOLDER_OF_TASK:
        raise UserError(f"{OPTION} {NAME}: {file}: expected the name of a task: {', '.join(FOLDER_OF_TASK)}")
    return QuestionFile(file, {"task_type": task}, add_prefix=FOLDER_OF_TASK[task])


def _describe(record: Record) -> Question:
    parts = written_video(record).split("/")
    start = next((place for place, part in enumerate(parts) if part in _SOURCES), None)
    if start is None:
        raise ValueError(f"expected a video below one of {', '.join(_SOURCES)}, got {'/'.join(parts)!r}")
    source = parts[start]
    (task,) = extra(record, "original_question_type")
    of_source = [name for name, folder in FOLDER_OF_TASK.items() if folder.partition("/")[0] == source]
    if not task and len(of_source) == 1:
        task = of_source[0]
    item_id = f"{task}-{record['problem_id']}" if record.get("original_question_type") else ""
    return Question("/".join((FOLDERS[0], *parts[start:])), {"task": task, "source": source}, item_id)


BENCHMARK = Benchmark(
    name=NAME,
    title="MVBench",
    read=read,
    official=video_r1.judge,
    other_judges={"own": mvbench.judge, "lmms_eval": mvbench.judge_lmms_eval},
    axes=("task", "source"),
    media_folders=FOLDERS,
    import_release="video_r1/eval",
    num_questions=4000,
    source="Video-R1, src/eval_bench.py",
)
