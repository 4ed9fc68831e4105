"""Made-up questions in the official layout of each benchmark, as its repository or the hub publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.videos import numbered_frames, write_video

COLOURS = ["red", "blue", "green", "black"]
_HUB = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos"


def _holmes(video: str, number: int, kind: str, answer: str) -> dict[str, Any]:
    options = dict(zip("ABCDEF", [*COLOURS, "white", "none"], strict=True))
    asked = {"Question": f"Which colour, {number}?", "Options": options, "Answer": answer, "Explanation": "It is seen."}
    return {"video ID": video, "Question ID": number, "Question Type": kind, **asked}


def _mmmu(name: str, question_type: str, options: list[str], answer: str) -> dict[str, Any]:
    row = {"id": name, "question": f"What of {name}?", "options": options, "answer": answer}
    return {**row, "question_type": question_type, "link_selected": "https://example.org"}


def _mmvu(number: int, subject: str, answer: str, *, is_open: bool = False) -> dict[str, Any]:
    choices = dict.fromkeys("ABCDE", "") if is_open else dict(zip("ABCDE", [*COLOURS, "white"], strict=True))
    return {
        **{"id": f"validation_{number}", "video": f"{_HUB}/{subject}/{number}.mp4", "youtube_url": "https://x"},
        **{"question_type": "open-ended" if is_open else "multiple-choice", "question": "Which?", "choices": choices},
        **{"answer": answer, "metadata": {"subject": subject.replace("_", " "), "textbook": "A book", "knowledge": []}},
    }


def _mme(video: int, number: int, duration: str, answer: str) -> dict[str, Any]:
    return {
        **{
            "video_id": f"{video:03}",
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "https://x",
        },
        **{"videoID": f"v-{video}_x", "question_id": f"{video:03}-{number}", "task_type": "Counting Problem"},
        **{"question": "How many?", "options": ["A. 1.", "B. 2.", "C. 3.", "D. 4."], "answer": answer},
    }


def _vsi(number: int, kind: str, options: list[str] | None, truth: str) -> dict[str, Any]:
    row = {"id": number, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": kind}
    return {**row, "question": "How far?", "options": options, "ground_truth": truth}


VIDEO_HOLMES = [_holmes("RSm", 1, "SR", "C"), _holmes("RSm", 2, "TCI", "A"), _holmes("x_-Y", 1, "SR", "F")]
VIDEO_MMMU = {
    "Perception": [_mmmu("validation_Art_Theory_1", "multiple-choice", [*COLOURS], "B")],
    "Comprehension": [_mmmu("validation_Art_Theory_1", "multiple-choice", [f"statement {n}" for n in range(10)], "J")],
    "Adaptation": [_mmmu("validation_Art_Theory_1", "open", [], "12.97"), _mmmu("dev_Math_2", "open", [], "a circle")],
}
MMVU = [_mmvu(0, "Civil_Engineering", "E"), _mmvu(1, "Art", "Dolly Zoom", is_open=True), _mmvu(2, "Law", "A")]
TEMPCOMPASS: dict[str, dict[str, Any]] = {
    "multi-choice": {
        "103": {
            "action": [{"question": "What is done?\nA. dunking\nB. throwing", "answer": "B. throwing"}],
            "speed": [{"question": "How fast? \nA. slow\nB. fast\nC. it stands", "answer": "A. slow"}],
        },
        "103_reverse": {"direction": [{"question": "Where to?\nA. up\nB. down", "answer": "A. up"}]},
    },
    "yes_no": {
        "103": {"action": [{"question": "Is it thrown?", "answer": "yes"}, {"question": "Hit?", "answer": "no"}]}
    },
    "caption_matching": {
        "103": {
            "order": [
                {"question": "Which?\nCaption A: One runs.\nCaption B: One sits.", "answer": "Caption B: One sits."},
                {"question": "Which?\nOption 1: One runs.\nOption 2: One sits.", "answer": "Option 1: One runs."},
            ]
        }
    },
    "captioning": {"103": {"action": [{"question": "Describe it.\nGenerated Caption:", "answer": ""}]}},
}
VIDEOMME = [_mme(1, 1, "short", "B"), _mme(1, 2, "short", "D"), _mme(2, 1, "long", "A")]
MVBENCH: dict[str, list[dict[str, Any]]] = {
    "action_sequence": [
        {"video": "A.mp4", "question": "Then?", "candidates": COLOURS, "answer": "blue", "start": 1.5, "end": 4.0}
    ],
    "action_antonym": [{"video": "166583.webm", "question": "Which?", "candidates": COLOURS[:3], "answer": "green"}],
    "episodic_reasoning": [
        {
            **{"video": "s03e16_seg02", "question": "Why?", "candidates": COLOURS, "answer": "red"},
            **{"start": 0.0, "end": 25.4, "fps": 3},
        }
    ],
}
VSIBENCH = [
    _vsi(0, "object_counting", None, "4"),
    _vsi(1, "object_rel_direction_easy", ["A. left", "B. right"], "B"),
    _vsi(2, "object_rel_direction_hard", ["A. left", "B. right"], "A"),
    _vsi(3, "route_planning", ["A. back", "B. left", "C. right"], "C"),
]
VIDEOS: dict[str, list[str]] = {
    "video_holmes": ["videos/RSm.mp4", "videos/x_-Y.mp4"],
    "video_mmmu": ["Art/validation_Art_Theory_1.mp4", "Science/dev_Math_2.mp4"],
    "mmvu": ["videos/Civil_Engineering/0.mp4", "videos/Art/1.mp4", "videos/Law/2.mp4"],
    "tempcompass": ["videos/103.mp4", "videos/103_reverse.mp4"],
    "videomme": ["data/v-1_x.mp4", "data/v-2_x.mp4"],
    "mvbench": ["video/star/Charades_v1_480/A.mp4", "video/ssv2_video/166583.webm"],
    "vsibench": ["scannet/scene0011_00.mp4"],
}
"""Where each download has the videos of the questions."""
PICTURES = "video/tvqa/frames_fps3_hq/s03e16_seg02"
"""A video of MVBench that is published as a folder of pictures."""


def write_benchmark(folder: Path, name: str) -> Path:
    """The downloaded folder of a benchmark below ``folder``."""
    root = folder / name
    if name == "video_holmes":
        _put(root / "Benchmark" / "test_Video-Holmes.json", VIDEO_HOLMES)
    elif name == "video_mmmu":
        for track, rows in VIDEO_MMMU.items():
            _table(root / track / "test-00000-of-00001.parquet", rows)
    elif name == "mmvu":
        _put(root / "data" / "validation.json", MMVU)
    elif name == "tempcompass":
        for task, videos in TEMPCOMPASS.items():
            _put(root / "questions" / f"{task}.json", videos)
    elif name == "videomme":
        _table(root / "videomme" / "test-00000-of-00001.parquet", VIDEOMME)
    elif name == "mvbench":
        for task, rows in MVBENCH.items():
            _put(root / "json" / f"{task}.json", rows)
    else:
        assert name == "vsibench", name
        root.mkdir(parents=True)
        (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in VSIBENCH), encoding="utf-8")
    return root


def write_videos(root: Path, name: str) -> None:
    """The videos of a downloaded folder, each with frames of its own: five seconds, 56 pixels high and wide."""
    for number, path in enumerate(VIDEOS[name]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        encoder = "libvpx" if path.endswith(".webm") else "libx264"
        write_video(root / path, _frames(f"{name} {number}"), encoder=encoder)
    if name == "mvbench":
        (root / PICTURES).mkdir(parents=True)
        for number, frame in enumerate(_frames(PICTURES)[:30]):
            Image.fromarray(frame).save(root / PICTURES / f"{number + 1:05}.jpg")


def _frames(seed: str) -> np.ndarray:
    """uint8 [50, 56, 56, 3]: a bar that moves, over squares of colours that change each second."""
    frames = numbered_frames(50, height=56, width=56)
    colours = np.random.default_rng(list(seed.encode())).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    squares = colours.repeat(10, axis=0).repeat(14, axis=1).repeat(14, axis=2)
    frames[:, :28] = squares[:, :28]
    return frames


def _put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
