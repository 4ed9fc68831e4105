"""PerceptionTest's multiple-choice questions: one object per video, or a table with one row per question.

    {"video_1234": {"metadata": {"video_id": "video_1234", "split": "train", ...},
                    "mc_question": [{"id": 0, "question": "What ...?", "options": ["a", "b", "c"], "answer_id": 1,
                                     "area": "physics", "reasoning": "descriptive", "tag": ["motion"]}]}}

    {"video_name": "video_1234", "question_id": "0", "question": "What ...?", "options": [...], "answer_id": "1", ...}

Seen in: google-deepmind/perception_test, its README and notebooks, which describe ``mc_question_train.json``. The hub's
table (lmms-lab's PerceptionTest_Val) was not seen; its fields are those that EvolvingLMMs-Lab/lmms-eval,
``lmms_eval/tasks/perceptiontest/val/utils.py``, reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ktr.data.prepare.answers import choice_by_number, option_texts
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, short, text, video_of_id
from megatron_ktr.data.prepare.layout import Keyed, Layout, Options, Record


def recognises(raw: Any) -> bool:
    if isinstance(raw, Keyed):
        return has_fields(raw.value, "mc_question")
    return has_fields(raw, "question", "options", "answer_id") and ("video_name" in raw or "video_id" in raw)


def split(raw: Any) -> Iterable[Any]:
    if not isinstance(raw, Keyed):
        return (raw,)
    video = fields_of(raw.value)
    metadata, questions = video.get("metadata"), video.get("mc_question")
    if not isinstance(questions, list) or not questions:
        raise ValueError(f"expected a list of questions in 'mc_question', got {short(questions)}")
    name = metadata.get("video_id", raw.key) if isinstance(metadata, dict) else raw.key
    return [{**question, "video_id": name} if isinstance(question, dict) else question for question in questions]


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    video = text(fields, "video_id", "video_name")
    return {
        "problem_id": f"{video}-{text(fields, 'id', 'question_id')}",
        "problem": text(fields, "question"),
        **choice_by_number(option_texts(fields.get("options")), fields.get("answer_id"), name="answer_id"),
        "data_type": "video",
        "video": video_of_id(video, options, name="video_id"),
        **extras(fields, ["area", ("reasoning", "original_question_type"), "tag"]),
    }


LAYOUT = Layout(
    name="perception_test",
    title="PerceptionTest, multiple choice",
    media_root="the folder of its video files (videos)",
    recognises=recognises,
    convert=convert,
    split=split,
    options=("video_map", "video_suffix"),
)
