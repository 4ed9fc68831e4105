"""Video-Holmes, train and test: six options in an object, one right letter.

    {"video ID": "RSmjqss0XKQ", "Question ID": 1, "Question Type": "SR", "Question": "What ...?",
     "Options": {"A": "Cleaners", ..., "F": "Office coworkers"}, "Answer": "A", "Explanation": "The woman ..."}

Seen in: the release's example of questions; TencentARC/Video-Holmes on the hub, ``train_Video-Holmes.json`` and
``test_Video-Holmes.json``, whose videos are ``videos_cropped/<video ID>.mp4``.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record


def recognises(raw: Any) -> bool:
    return has_fields(raw, "video ID", "Question", "Options", "Answer")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    video = text(fields, "video ID")
    return {
        "problem_id": f"{video}-{text(fields, 'Question ID')}",
        "problem": text(fields, "Question"),
        **choice(option_texts(fields.get("Options"), name="Options"), text(fields, "Answer")),
        "data_type": "video",
        "video": video_of_id(video, options, name="video ID"),
        **extras(fields, [("Question Type", "original_question_type"), ("Explanation", "explanation")]),
    }


LAYOUT = Layout(
    name="video_holmes",
    title="Video-Holmes, train and test questions",
    media_root="the folder of the release's videos (Benchmark/videos_cropped)",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
