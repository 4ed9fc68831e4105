"""MMVU: questions of experts in 27 subjects, five options or an open answer.

    {"id": "validation_0", "video": "https://.../videos/Thermodynamics/0.mp4", "question_type": "multiple-choice" or
     "open-ended", "question": "What ...?", "choices": {"A": "...", ..., "E": "..."}, "answer": "C",
     "metadata": {"subject": "Thermodynamics", "textbook": "...", "knowledge": [...], "rationale": "..."}}

The hub's table has ``video_path`` for ``video``. The choices of open questions are empty texts. The path of a video
begins with ``videos``.

Seen in: yale-nlp/MMVU, ``utils/prepare_input.py`` and ``main.py``, which read ``data/validation.json``;
EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/mmvu/utils.py``. The first records of the file were seen.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, option_texts, solution
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, media_path, short, text
from megatron_ktr.data.prepare.layout import Layout, Options, Record

_FOLDER = "videos/"


def recognises(raw: Any) -> bool:
    return has_fields(raw, "question_type", "choices", "answer", "metadata") and bool(
        raw.get("video") or raw.get("video_path")
    )


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    question_type, answer = text(fields, "question_type"), text(fields, "answer")
    if question_type == "multiple-choice":
        choices = fields.get("choices")
        if isinstance(choices, dict):
            choices = {letter: option for letter, option in choices.items() if option not in ("", None)}
        judged = choice(option_texts(choices, name="choices"), answer)
    elif question_type == "open-ended":
        judged = {"problem_type": "free-form", "solution": solution(answer)}
    else:
        raise ValueError(f"expected question_type to be multiple-choice or open-ended, got {short(question_type)}")
    metadata = fields.get("metadata")
    return {
        "problem_id": text(fields, "id"),
        "problem": text(fields, "question"),
        **judged,
        "data_type": "video",
        "video": media_path(_below_videos(text(fields, "video", "video_path")), options, name="video"),
        "original_question_type": question_type,
        **extras(metadata if isinstance(metadata, dict) else {}, ["subject", "textbook"]),
    }


def _below_videos(written: str) -> str:
    """``videos/Art/0.mp4`` of the address at which the hub has it, or of a path."""
    place = f"/{written}".rfind(f"/{_FOLDER}")
    return written if place < 0 else f"/{written}"[place + 1 :]


LAYOUT = Layout(
    name="mmvu",
    title="MMVU, validation questions",
    media_root="the folder that has the release's folder videos",
    recognises=recognises,
    convert=convert,
)
