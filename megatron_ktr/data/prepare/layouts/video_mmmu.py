"""VideoMMMU: lectures in six disciplines, three questions each (perception, comprehension, adaptation).

    {"id": "validation_Biology_7", "question": "Which ...?", "options": ["...", ...], "answer": "C",
     "question_type": "multiple-choice" or "open", "link_selected": "https://...", "image": {"bytes": ..., ...}}

The subject is the middle of the ``id``. Questions without options have a number or a text as their answer. The picture
of a question of adaptation is also at the end of its video, and is not read.

Seen in: EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videommmu/utils.py``, which reads ``id``, ``question``,
``options``, ``answer`` and ``question_type`` of the hub's tables (lmms-lab/VideoMMMU, one configuration for each
track), and ``<discipline>/<id>.mp4``. The tables themselves were not seen.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts, solution
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, optional_text, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record
from megatron_ktr.rewards.text import parse_number

_ID = re.compile(r"(?:dev|validation|test|new)_\w+_\d+")


def recognises(raw: Any) -> bool:
    return has_fields(raw, "id", "question", "options", "answer", "question_type") and bool(
        isinstance(raw["id"], str) and _ID.fullmatch(raw["id"])
    )


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    name, answer = text(fields, "id"), text(fields, "answer")
    if fields.get("options"):
        judged = choice(option_texts(fields["options"]), answer)
    else:
        is_number = parse_number(answer) is not None
        judged = {"problem_type": "numerical" if is_number else "free-form", "solution": solution(answer)}
    track = optional_text(fields, "track")
    return {
        "problem_id": f"{track}-{name}" if track else name,
        "problem": text(fields, "question"),
        **judged,
        "data_type": "video",
        "video": video_of_id(name, options, name="id"),
        **extras(fields, [("question_type", "original_question_type"), "track"]),
    }


LAYOUT = Layout(
    name="video_mmmu",
    title="VideoMMMU, one table for each track",
    media_root="the folder of the videos, without folders for disciplines",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
