"""Video-R1: the 260k questions for RL, the 165k with reasoning for fine-tuning, and evaluation files in the same form.

    {"problem_id": 2, "problem": "What ...?", "data_type": "video" or "image", "problem_type": "multiple choice",
     "options": ["A. ...", ...], "process": "" or "<think>...</think>", "solution": "<answer>A</answer>",
     "path": "./LLaVA-Video-178K/...mp4", "data_source": "LLaVA-Video-178K/..."}

The problem types are multiple choice, numerical, OCR, free-form and regression. Evaluation files have ``video`` in
place of ``path`` ("/MMVU/videos/Art/0.mp4"). Video-MME's keep the fields of that benchmark. MVBench's have ``start``
and ``end`` of a clip, ``fps`` of the frames a video was joined from, and the data type "frame" for those. Video-KTR's
files have the same fields.

Seen in: tulerfeng/Video-R1, ``src/r1-v/src/open_r1/trainer/grpo_trainer.py``; longmalongma/TW-GRPO,
``data/evaluation/eval_mvbench.json`` and ``eval_mmvu.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.prepare.answers import choice, is_choice, option_texts, refuse_letter, solution
from megatron_ktr.data.prepare.fields import (
    clip,
    extras,
    fields_of,
    has_fields,
    media_path,
    media_paths,
    optional_text,
    short,
    text,
    whole_text,
)
from megatron_ktr.data.prepare.layout import Layout, Options, Record
from megatron_ktr.data.prepare.layouts.videomme import EXTRAS as VIDEOMME_EXTRAS

_KINDS = {"video": "video", "frame": "video", "image": "image"}


def recognises(raw: Any) -> bool:
    is_asked = has_fields(raw, "problem", "problem_type", "solution")
    return is_asked and any(isinstance(raw.get(name), str) for name in ("path", "video", "image"))


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    problem_type = text(fields, "problem_type")
    right = text(fields, "solution")
    if is_choice(problem_type):
        judged = choice(option_texts(fields.get("options")), right)
    else:
        if fields.get("options"):
            refuse_letter(right, problem_type=problem_type)
        judged = {"problem_type": problem_type, "solution": solution(right)}
    # The reasoning is imitated as it is written, with its line ends.
    process = whole_text(fields.get("process") or "", name="process")
    return {
        "problem_id": optional_text(fields, "problem_id"),
        "problem": text(fields, "problem"),
        **judged,
        **({"process": process} if process else {}),
        **_media(fields, options),
        **extras(fields, ["data_source", "original_question_type", ("fps", "raw_fps"), "subtitle", *VIDEOMME_EXTRAS]),
    }


def _media(fields: Mapping[str, Any], options: Options) -> dict[str, Any]:
    declared = optional_text(fields, "data_type") or ("image" if fields.get("image") else "video")
    kind = _KINDS.get(declared)
    if kind is None:
        raise ValueError(f"expected data_type to be video, frame or image, got {short(declared)}")
    name = next((name for name in ("path", kind) if fields.get(name)), "path")
    written = media_paths(fields[name], options, name=name) if isinstance(fields.get(name), list) else None
    media = {"data_type": kind, kind: written or media_path(fields.get(name), options, name=name)}
    return media | (clip(fields.get("start"), fields.get("end"), name="start, end") if kind == "video" else {})


LAYOUT = Layout(
    name="video_r1",
    title="Video-R1 260k (RL) and COT-165k (with reasoning), Video-KTR's and evaluation files of that form",
    media_root="the folder of the unpacked Video-R1-data, which has LLaVA-Video-178K, CLEVRER, Math, ...",
    recognises=recognises,
    convert=convert,
)
