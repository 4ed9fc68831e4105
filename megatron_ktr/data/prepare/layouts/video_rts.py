"""Video-RTS: selected questions of CG-Bench, with the options in the question's text.

    {"problem": "What ...?\\nA. yellow\\n...\\nG. orange\\n", "solution": "<answer>G.</answer>",
     "video": "/nas-ssd2/video_datasets/CG_bench_videos/video/BV1JH4y1w7Qz.mp4", "clue_intervals": [], "qid": 16,
     "duration": null, "original_answer": "orange"}

The paths are those of the authors' machine: the file's name is kept. A ``qid`` repeats between videos.

Seen in: Ziyang412/Video-RTS, ``src/training_data/cgbench_selected_training_samples.jsonl``.
"""

from __future__ import annotations

from typing import Any

from megatron_ktr.data.prepare.answers import choice, options_in_text
from megatron_ktr.data.prepare.fields import extras, fields_of, has_fields, media_path, short, text
from megatron_ktr.data.prepare.layout import Layout, Options, Record


def recognises(raw: Any) -> bool:
    return has_fields(raw, "problem", "solution", "video", "qid", "clue_intervals")


def convert(raw: Any, options: Options) -> Record:
    fields = fields_of(raw)
    question, texts, behind = options_in_text(text(fields, "problem"))
    if not question or not texts or behind:
        raise ValueError(f"expected a question that ends with its options, got {short(text(fields, 'problem'))}")
    name = media_path(fields.get("video"), Options(), name="video").rpartition("/")[2]
    return {
        "problem_id": f"{name.rpartition('.')[0] or name}-{text(fields, 'qid')}",
        "problem": question,
        **choice(texts, text(fields, "solution")),
        "data_type": "video",
        "video": media_path(name, options, name="video"),
        **extras(fields, ["duration"]),
    }


LAYOUT = Layout(
    name="video_rts",
    title="Video-RTS, its selected questions of CG-Bench",
    media_root="the folder of CG-Bench's video files",
    recognises=recognises,
    convert=convert,
)
