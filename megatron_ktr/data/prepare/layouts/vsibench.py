"""VSI-Bench: spatial questions about rooms, with options or with a number.

    {"id": 0, "dataset": "arkitscenes", "scene_name": "41069025", "question_type": "object_counting",
     "question": "How many ...?", "ground_truth": "4", "options": null}
    {..., "question_type": "object_rel_distance", "options": ["A. table", ...], "ground_truth": "C"}

Numbers become the problem type regression, as in Video-R1's file of the benchmark.

Seen in: EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/vsibench/utils.py``, which reads these fields of the hub's
``test.jsonl`` (nyu-visionx/VSI-Bench) and ``<dataset>/<scene_name>.mp4``. The file itself was not seen.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts, solution
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, short, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record
from megatron_ktr.rewards.text import parse_number


def recognises(raw: Any) -> bool:
    return has_fields(raw, "dataset", "scene_name", "question_type", "question", "ground_truth")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    answer = text(fields, "ground_truth")
    if fields.get("options"):
        judged = choice(option_texts(fields["options"]), answer)
    elif parse_number(answer) is None:
        raise ValueError(f"expected a number in 'ground_truth' of a question without options, got {short(answer)}")
    else:
        judged = {"problem_type": "regression", "solution": solution(answer)}
    return {
        "problem_id": text(fields, "id"),
        "problem": text(fields, "question"),
        **judged,
        "data_type": "video",
        "video": video_of_id(f"{text(fields, 'dataset')}/{text(fields, 'scene_name')}", options, name="scene_name"),
        **extras(fields, [("question_type", "original_question_type"), "dataset"]),
    }


LAYOUT = Layout(
    name="vsibench",
    title="VSI-Bench",
    media_root="the folder that has arkitscenes, scannet and scannetpp",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
