"""ActivityNet Captions as temporal grounding: when does what a sentence describes happen?

    {"v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86], ...], "sentences": ["A woman ...", ...]}, ...}

    {"video_id": "v_QOlSCBRmfWY", "duration": 82.73, "timestamps": [...], "sentences": [...]}

A sentence whose times end beyond the video is cut there, because the annotations run over by fractions of a second.

The files of the release (Krishna et al. 2017: ``train.json``, ``val_1.json``, ``val_2.json``) and the hub's table
(friedrichor's ActivityNet_Captions) were not seen. Their fields are those that loaders of other projects quote and
read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ktr.data.prepare.answers import grounding, when_question
from megatron_ktr.data.prepare.fields import fields_of, has_fields, seconds, short, span, text, video_of_id
from megatron_ktr.data.prepare.layout import Keyed, Layout, Options, Record


def recognises(raw: Any) -> bool:
    if isinstance(raw, Keyed):
        return has_fields(raw.value, "timestamps", "sentences")
    return has_fields(raw, "video_id", "timestamps", "sentences")


def split(raw: Any) -> Iterable[Any]:
    fields = fields_of(raw.value if isinstance(raw, Keyed) else raw)
    video = raw.key if isinstance(raw, Keyed) else fields.get("video_id")
    times, sentences = fields.get("timestamps"), fields.get("sentences")
    if not isinstance(times, list) or not isinstance(sentences, list) or len(times) != len(sentences):
        raise ValueError(f"expected as many 'timestamps' as 'sentences', got {short(times)} and {short(sentences)}")
    shared = {"video_id": video, "duration": fields.get("duration")}
    return [
        {**shared, "number": number, "sentence": sentence, "time": time}
        for number, (sentence, time) in enumerate(zip(sentences, times, strict=True))
    ]


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    time, duration = fields.get("time"), seconds(fields.get("duration"), name="duration")
    if not isinstance(time, list) or len(time) != 2:
        raise ValueError(f"expected [start, end] in 'timestamps', got {short(time)}")
    start, end = span(*time, name="timestamps")
    start, end = span(start, min(end, duration), name="timestamps")
    video = text(fields, "video_id")
    return {
        "problem_id": f"{video}-{text(fields, 'number')}",
        "problem": when_question(text(fields, "sentence")),
        **grounding(start, end),
        "data_type": "video",
        "video": video_of_id(video, options, name="video_id"),
        "duration": duration,
    }


LAYOUT = Layout(
    name="activitynet_captions",
    title="ActivityNet Captions, as temporal grounding",
    media_root="the folder of ActivityNet's video files, named v_<id>.mp4",
    recognises=recognises,
    convert=convert,
    split=split,
    options=("video_map", "video_suffix"),
)
