"""OneThinker: image and video questions of many kinds for RL; its fine-tuning files are conversations.

    {"problem_id": 1, "problem": "<video>When ...?", "data_type": "video", "problem_type": "temporal grounding",
     "options": [], "answer": "<answer>{\\"time\\": [12.3, 25.7]}</answer>", "images": [], "videos": ["./QA/a.mp4"],
     "data_source": "Holmes-train", "problem_reserved_text": "When ...?"}

Its problem types become: multiple choice, numerical, OCR and regression the same; open-ended becomes free-form, which
is judged in the same way (the mean of ROUGE-1, -2, -L); temporal grounding gets the answer in words that all temporal
grounding here has. Math and spatial grounding keep their types; boxes need the field ``box_size`` besides, which the
files do not have. What no reward of ours judges is kept with its own type and its JSON answer: spatial-temporal
grounding, tracking, segmentation.

Fine-tuning files (``onethinker_sft_image.json``, ``onethinker_sft_video.json``) have ``messages`` and ``images`` or
``videos``: see ``conversations``.

Seen in: tulerfeng/OneThinker, ``EasyR1/verl/utils/dataset.py``, ``EasyR1/verl/reward_function/onethinker_reward.py``
and ``LLaMA-Factory/data/dataset_info.json``, which read the files; the files themselves were not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.prepare.answers import (
    TEMPORAL_GROUNDING,
    choice,
    grounding,
    is_choice,
    option_texts,
    refuse_letter,
    solution,
)
from megatron_ktr.data.prepare.fields import (
    extras,
    fields_of,
    has_fields,
    media_paths,
    optional_text,
    short,
    span,
    text,
)
from megatron_ktr.data.prepare.layout import Layout, Options, Record
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rewards.text import extract_answer

_RENAMED = {"open-ended": "free-form"}


def recognises(raw: Any) -> bool:
    return has_fields(raw, "problem", "problem_type", "answer") and ("images" in raw or "videos" in raw)


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    return {
        "problem_id": optional_text(fields, "problem_id"),
        "problem": text(fields, "problem"),
        **_judged(fields),
        **_media(fields, options),
        **extras(fields, ["data_source"]),
    }


def _judged(fields: Mapping[str, Any]) -> dict[str, Any]:
    problem_type, answer = text(fields, "problem_type"), text(fields, "answer")
    if is_choice(problem_type):
        return choice(option_texts(fields.get("options")), answer)
    if problem_type == TEMPORAL_GROUNDING:
        return grounding(*_time(extract_answer(answer) or answer))
    if fields.get("options"):
        refuse_letter(answer, problem_type=problem_type)
    return {"problem_type": _RENAMED.get(problem_type, problem_type), "solution": solution(answer)}


def _time(answer: str) -> tuple[float, float]:
    try:
        found = parse_json(answer)
    except ValueError:
        found = None
    time = found.get("time") if isinstance(found, dict) else None
    if not isinstance(time, list) or len(time) != 2:
        raise ValueError(f'expected {{"time": [start, end]}} as the answer, got {short(answer)}')
    return span(*time, name="time")


def _media(fields: Mapping[str, Any], options: Options) -> dict[str, Any]:
    named = [name for name in ("images", "videos") if fields.get(name)]
    if len(named) != 1:
        raise ValueError(f"expected paths in either 'images' or 'videos', got {' and '.join(named) or 'none'}")
    return {"data_type": named[0].removesuffix("s"), named[0]: media_paths(fields[named[0]], options, name=named[0])}


LAYOUT = Layout(
    name="onethinker",
    title="OneThinker, questions for RL (its fine-tuning files are 'conversations')",
    media_root="the folder of the unpacked OneThinker-train-data, which has QA, Segmentation, ...",
    recognises=recognises,
    convert=convert,
)
