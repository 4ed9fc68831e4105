"""STAR: questions about a clip of a Charades video, with four options.

    {"question_id": "Interaction_T1_13", "question": "Which object ...?", "video_id": "6H78U", "start": 11.1,
     "end": 19.6, "answer": "The closet/cabinet.", "choices": [{"choice_id": 0, "choice": "The blanket."}, ...]}

Seen in: csbobby/STAR, ``data/sel_examples.json``, examples on the benchmark's page; ``STAR_train.json`` and
``STAR_val.json`` themselves were not seen. Tables may hold ``choices`` as an object of lists.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice_by_text, option_texts
from megatron_ktr.data.prepare.fields import clip, fields_of, has_fields, short, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record


def recognises(raw: Any) -> bool:
    return has_fields(raw, "question_id", "question", "video_id", "start", "end", "choices", "answer")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    choices = fields.get("choices")
    texts = choices.get("choice") if isinstance(choices, dict) else choices
    if not isinstance(texts, list):
        raise ValueError(f"expected a list in 'choices', got {short(choices)}")
    texts = [one.get("choice") if isinstance(one, dict) else one for one in texts]
    number = text(fields, "question_id")
    return {
        "problem_id": number,
        "problem": text(fields, "question"),
        **choice_by_text(option_texts(texts, name="choices"), text(fields, "answer")),
        "data_type": "video",
        "video": video_of_id(fields.get("video_id"), options, name="video_id"),
        **clip(fields.get("start"), fields.get("end"), name="start, end"),
        "original_question_type": number.partition("_")[0],
    }


LAYOUT = Layout(
    name="star",
    title="STAR, situated reasoning about clips of Charades",
    media_root="the folder of Charades' videos (Charades_v1_480)",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
