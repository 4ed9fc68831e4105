"""LLaVA-Video-178K: conversations about a video in which every pair of turns is one question.

    {"id": "101-zukEQgbWdsY-split_2", "data_source": "0_30_s_academic_v0_1",
     "video": "academic_source/youcook2/101/zukEQgbWdsY/split_2.mp4",
     "conversations": [{"from": "human", "value": "<image>\\nWhat ...?\\nA. A tattoo\\n...\\nPlease respond with ..."},
                       {"from": "gpt", "value": "A."}, ...]}

A pair with options in its text becomes multiple choice, without the instruction behind them; every other pair becomes
free-form. ``--from conversations`` keeps the conversations whole for fine-tuning.

The files of lmms-lab's LLaVA-Video-178K on the hub (``*_mc_*.json``, ``*_oe_*.json``) were not seen. Their fields are
those that loaders of other projects quote.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ktr.data.prepare.answers import choice, options_in_text, refuse_unread_options, solution
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, media_path, short, text
from megatron_ktr.data.prepare.layout import Layout, Options, Record

_INSTRUCTIONS = ("Please ", "Answer ")
"""How the line behind the options begins. Our wording has its own instruction."""


def recognises(raw: Any) -> bool:
    return has_fields(raw, "id", "conversations", "data_source", "video")


def split(raw: Any) -> Iterable[Any]:
    fields = fields_of(raw)
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(f"expected pairs of turns in 'conversations', got {short(turns)}")
    shared = {name: fields.get(name) for name in ("id", "video", "data_source")}
    return [
        {**shared, "number": number, "turns": turns[2 * number : 2 * number + 2]} for number in range(len(turns) // 2)
    ]


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    asked, answered = (fields_of(turn) for turn in fields["turns"])
    if asked.get("from") != "human" or answered.get("from") != "gpt":
        raise ValueError(f"expected a turn of human and one of gpt, got {short(fields['turns'])}")
    written = text(asked, "value").replace("<image>", "").replace("<video>", "")
    question, texts, behind = options_in_text(written.strip())
    if behind and not behind.startswith(_INSTRUCTIONS):
        raise ValueError(f"expected an instruction behind the options, got {short(behind)}")
    answer = text(answered, "value")
    if not texts:
        refuse_unread_options(question, answer)
    judged = choice(texts, answer) if texts else {"problem_type": "free-form", "solution": solution(answer)}
    if not question:
        raise ValueError(f"expected a question, got {short(written)}")
    return {
        "problem_id": f"{text(fields, 'id')}-{text(fields, 'number')}",
        "problem": question,
        **judged,
        "data_type": "video",
        "video": media_path(fields.get("video"), options, name="video"),
        **extras(fields, ["data_source"]),
    }


LAYOUT = Layout(
    name="llava_video",
    title="LLaVA-Video-178K, its questions one by one",
    media_root="the folder of the unpacked videos, which has academic_source, liwei_youtube_videos, ...",
    recognises=recognises,
    convert=convert,
    split=split,
)
