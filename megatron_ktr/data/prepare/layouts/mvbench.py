"""MVBench: one file per task; the answer is the text of a candidate, and some tasks ask about a clip.

    {"video": "6H78U.mp4", "question": "What happened ...?", "candidates": ["a", "b", "c", "d"], "answer": "b",
     "start": 11.1, "end": 19.6, "fps": 3}

    {"video": "s03e16_seg02_clip_04", "question": "What was ...?", "candidates": [...], "answer": "...", "start": 0.0,
     "end": 25.43, "fps": 3}

``start`` and ``end``, or ``bound`` with both, are the clip. A video without a suffix is a folder of pictures, as in the
task of episodic reasoning, and ``fps`` is their rate. Elsewhere ``fps`` is kept as ``raw_fps``. The paths are below the
folder of the task, so that ``--add-prefix`` names it.

Seen in: OpenGVLab/Ask-Anything, ``video_chat2/mvbench.ipynb``, whose loader reads ``video``, ``question``,
``candidates``, ``answer``, ``start`` and ``end``, and the pictures of folders; and in Video-R1's evaluation file
(longmalongma/TW-GRPO, ``data/evaluation/eval_mvbench.json``), which keeps ``fps``, ``subtitle`` and the names of the
videos. The files of MVBench themselves were not seen, and ``bound`` and ``task_type`` were not seen in any file.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from megatron_ktr.data.prepare.answers import choice_by_text, option_texts
from megatron_ktr.data.prepare.fields import clip, extras, fields_of, has_fields, media_path, optional_text, short, text
from megatron_ktr.data.prepare.layout import Layout, Options, Record


def recognises(raw: Any) -> bool:
    return has_fields(raw, "video", "question", "candidates", "answer")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    start, end, bound = fields.get("start"), fields.get("end"), fields.get("bound")
    if isinstance(bound, list):
        if len(bound) != 2:
            raise ValueError(f"expected [start, end] in 'bound', got {short(bound)}")
        start, end = bound
    texts = option_texts(fields.get("candidates"), name="candidates")
    video, rate = media_path(fields.get("video"), options, name="video"), fields.get("fps")
    is_folder = not PurePosixPath(video).suffix
    return {
        "problem_id": optional_text(fields, "question_id", "id"),
        "problem": text(fields, "question"),
        **choice_by_text(texts, text(fields, "answer")),
        "data_type": "video",
        "video": f"{video}/" if is_folder else video,
        **clip(start, end, name="start, end"),
        **({"fps": rate} if is_folder and rate is not None else {}),
        **extras(fields, ["subtitle", ("task_type", "original_question_type")]),
        **({} if is_folder else extras(fields, [("fps", "raw_fps")])),
    }


LAYOUT = Layout(
    name="mvbench",
    title="MVBench, one file per task",
    media_root="the folder of the task's videos, or with --add-prefix star/Charades_v1_480 the folder above (video)",
    recognises=recognises,
    convert=convert,
    reads=("bound",),
)
