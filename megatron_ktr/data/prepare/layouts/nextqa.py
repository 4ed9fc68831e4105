"""NExT-QA, NExT-GQA, NExT-OE and IntentQA: a CSV file or table with five options, or with an answer in words.

    video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
    1001,300,640,480,what does the boy do with the cup,0,6,CH,drink from it,...          NExT-QA
    video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
    1001,300,640,480,what does the boy do with the cup,drink from it,6,CH,drink from it,...   NExT-GQA
    video,frame_count,width,height,question,answer,qid,type
    1001,300,640,480,what does the boy do with the cup,drinks,6,CH                       NExT-OE

With options ``answer`` is the number of the right one, from 0 (NExT-QA, IntentQA), or its text (NExT-GQA). Without
a0 .. a4 it is the answer in words, and the problem type is free-form. NExT-GQA and IntentQA call the video
``video_id``. ``--video-map map_vid_vidorID.json`` gives the path in the release ("1164/3238737531"); without it the
videos lie in one folder by id.

Seen in: doc-doc/NExT-QA, ``dataset/nextqa/val.csv`` and ``map_vid_vidorID.json``; doc-doc/NExT-GQA,
``datasets/nextgqa/val.csv``; doc-doc/NExT-OE, ``dataset/nextqa/val.csv``; JoseponLee/IntentQA,
``datasets/IntentQA/val.csv``. The hub's table (lmms-lab's NExTQA) was not seen; its fields are those that
EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/nextqa/utils.py``, reads.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice_by_number, choice_by_text, option_texts, solution
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, refuse_option_columns, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record

_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_OF_OTHERS = ("options", "candidates", "choices")
"""Other data sets have the same fields, and their options here."""


def recognises(raw: Any) -> bool:
    is_asked = has_fields(raw, "question", "answer", "qid", "type") and ("video" in raw or "video_id" in raw)
    return is_asked and not any(name in raw for name in _OF_OTHERS)


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    video = text(fields, "video", "video_id")
    if any(name in fields for name in _OPTIONS):
        texts = option_texts([fields.get(name) for name in _OPTIONS], name="a0 .. a4")
        answer = fields.get("answer")
        if isinstance(answer, str) and not answer.strip().isdecimal():
            judged = choice_by_text(texts, text(fields, "answer"))
        else:
            judged = choice_by_number(texts, answer, name="answer")
    else:
        if others := [name for name in _OF_OTHERS if fields.get(name)]:
            raise ValueError(f"options in '{others[0]}' are not NExT-QA's, which are a0 .. a4: see --from plain")
        refuse_option_columns(fields)
        judged = {"problem_type": "free-form", "solution": solution(text(fields, "answer"))}
    return {
        "problem_id": f"{video}-{text(fields, 'qid')}",
        "problem": text(fields, "question"),
        **judged,
        "data_type": "video",
        "video": video_of_id(video, options, name="video"),
        **extras(fields, [("type", "original_question_type")]),
    }


LAYOUT = Layout(
    name="nextqa",
    title="NExT-QA, NExT-GQA, NExT-OE and IntentQA, multiple choice and open-ended",
    media_root="the folder of the videos (NExTVideo with --video-map map_vid_vidorID.json)",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
