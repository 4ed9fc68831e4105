"""TempCompass: multiple choice, yes or no, and matching of captions, about five temporal aspects.

    questions/multi-choice.json      {"1034419625": {"action": [{"question": "What ...?\\nA. up\\nB. down",
                                                                 "answer": "B. down"}], "direction": [...]}, ...}
    questions/yes_no.json            {... {"question": "Is ...?", "answer": "yes"} ...}
    questions/caption_matching.json  {... {"question": "Which ...?\\nCaption A: x\\nCaption B: y",
                                           "answer": "Caption B: y"} ...}
    the hub's tables                 {"video_id": "1034419625", "dim": "action", "question": ..., "answer": ...}

Every question becomes multiple choice: yes and no are the options A and B, and captions, sentences and descriptions get
letters in place of their labels, which stay in ``published_options``. ``captioning.json`` asks for a description, which
only a model can judge, and has no answer; its records are refused.

Seen in: llyx97/TempCompass, ``questions/``, ``run_qwen2_vl.py``; EvolvingLMMs-Lab/lmms-eval,
``lmms_eval/tasks/tempcompass/utils.py``, which reads the hub's tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from megatron_ktr.data.prepare.answers import choice, choice_by_number, options_in_text
from megatron_ktr.data.prepare.fields import fields_of, has_fields, short, text, video_of_id
from megatron_ktr.data.prepare.layout import Keyed, Layout, Options, Record

DIMENSIONS = ("action", "direction", "speed", "order", "attribute_change")
_YES_NO = ["yes", "no"]
_LABELLED = re.compile(r"(?:Caption|Sentence|Option|Description) (?:[A-Z]|\d): (\S.*)")


def recognises(raw: Any) -> bool:
    if isinstance(raw, Keyed):
        return isinstance(raw.value, dict) and bool(raw.value) and all(name in DIMENSIONS for name in raw.value)
    return has_fields(raw, "video_id", "question", "answer", "dim")


def split(raw: Any) -> Iterable[Any]:
    """The questions of a video, each with its ``video_id``, ``dim`` and place among those of the dimension."""
    if not isinstance(raw, Keyed):
        return (raw,)
    parts = []
    for dimension, questions in raw.value.items() if isinstance(raw.value, dict) else ():
        if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
            raise ValueError(f"expected a list of questions in '{dimension}', got {short(questions)}")
        for number, question in enumerate(questions, start=1):
            parts.append({**question, "video_id": raw.key, "dim": dimension, "number": number})
    return parts


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    video, dimension, number = text(fields, "video_id"), text(fields, "dim"), fields.get("number")
    task, question, judged = _judged(text(fields, "question"), text(fields, "answer"))
    return {
        "problem_id": "-".join(map(str, (video, dimension, task, *([number] if number else ())))),
        "problem": question,
        **judged,
        "data_type": "video",
        "video": video_of_id(video, options, name="video_id"),
        "original_question_type": task,
        "dimension": dimension,
    }


def _judged(question: str, answer: str) -> tuple[str, str, dict[str, Any]]:
    """(task, question without its options, fields that judge it)."""
    if answer.lower() in _YES_NO:
        return "yes_no", question, choice_by_number(_YES_NO, _YES_NO.index(answer.lower()), name="answer")
    asked, *lines = [line.strip() for line in question.split("\n")]
    labelled = [_LABELLED.fullmatch(line) for line in lines]
    if len(lines) >= 2 and all(labelled):
        if lines.count(answer) != 1:
            raise ValueError(f"the answer {short(answer)} is not among the options {short(lines)}")
        texts = [match.group(1) for match in labelled if match]
        judged = choice_by_number(texts, lines.index(answer), name="answer")
        return "caption_matching", asked, {**judged, "published_options": lines}
    asked, texts, behind = options_in_text(question)
    if not texts or behind:
        raise ValueError(f"expected a question that ends with its options, got {short(question)}")
    return "multi-choice", asked, choice(texts, answer)


LAYOUT = Layout(
    name="tempcompass",
    title="TempCompass: multi-choice, yes_no and caption_matching",
    media_root="the folder of the release's videos",
    recognises=recognises,
    convert=convert,
    split=split,
    options=("video_map", "video_suffix"),
)
