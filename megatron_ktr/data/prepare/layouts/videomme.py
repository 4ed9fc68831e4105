"""Video-MME: 900 videos with three questions each.

    {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanities & History",
     "url": "https://...", "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting Problem",
     "question": "When ...?", "options": ["A. Apples.", ...], "answer": "C"}

Seen in: BradyFU/Video-MME, ``README.md``; EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videomme/utils.py``, which
reads the hub's table (lmms-lab/Video-MME, ``videomme/test-00000-of-00001.parquet``) and ``data/<videoID>.mp4``.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record

EXTRAS = ("duration", "domain", "sub_category", "task_type", "videoID", "question_id")


def recognises(raw: Any) -> bool:
    return has_fields(raw, "videoID", "question_id", "question", "options", "answer") and "problem" not in raw


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    return {
        "problem_id": text(fields, "question_id"),
        "problem": text(fields, "question"),
        **choice(option_texts(fields.get("options")), text(fields, "answer")),
        "data_type": "video",
        "video": video_of_id(text(fields, "videoID"), options, name="videoID"),
        **extras(fields, EXTRAS),
    }


LAYOUT = Layout(
    name="videomme",
    title="Video-MME",
    media_root="the folder of the release's videos (data)",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
