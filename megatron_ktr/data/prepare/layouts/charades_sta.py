"""Charades-STA: temporal grounding in a text file with one line per sentence, or in a table.

    AO8RW 0.0 6.9##a person is putting a book on a shelf.

    {"video": "AO8RW.mp4", "caption": "a person ...", "timestamp": [0.0, 6.9]}

The two files of the release (``charades_sta_train.txt`` and ``charades_sta_test.txt``, named by jiyanggao/TALL) and the
hub's table (lmms-lab's charades_sta) were not seen. The form of the lines and the fields of the table are those that
loaders of other projects read.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_ktr.data.prepare.answers import grounding, when_question
from megatron_ktr.data.prepare.fields import fields_of, has_fields, short, span, text, video_of_id
from megatron_ktr.data.prepare.layout import Layout, Options, Record

_LINE = re.compile(r"(\S+) +(\d+(?:\.\d+)?) +(\d+(?:\.\d+)?) *##(.*)")


def recognises(raw: Any) -> bool:
    if isinstance(raw, str):
        return _LINE.fullmatch(raw) is not None
    return has_fields(raw, "video", "caption", "timestamp")


def convert(raw: Any, options: Options) -> Record:
    if isinstance(raw, str):
        match = _LINE.fullmatch(raw)
        if match is None:
            raise ValueError(f"expected 'VIDEO START END##sentence', got {short(raw)}")
        video, start, end, sentence = match.groups()
        fields: Any = {"video": video, "caption": sentence, "timestamp": [start, end]}
    else:
        fields = fields_of(raw)
    time = fields.get("timestamp")
    if not isinstance(time, list) or len(time) != 2:
        raise ValueError(f"expected [start, end] in 'timestamp', got {short(time)}")
    first, last = span(*time, name="timestamp")
    video = text(fields, "video")
    return {
        # A video has many sentences: the lines have no ids of their own.
        "problem_id": f"{video}-{first:g}-{last:g}",
        "problem": when_question(text(fields, "caption")),
        **grounding(first, last),
        "data_type": "video",
        "video": video_of_id(video, options, name="video"),
    }


LAYOUT = Layout(
    name="charades_sta",
    title="Charades-STA, temporal grounding",
    media_root="the folder of Charades' videos (Charades_v1_480)",
    recognises=recognises,
    convert=convert,
    options=("video_map", "video_suffix"),
)
