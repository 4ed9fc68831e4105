"""Hand-made records in the shape of each published layout, as raw rows, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OPTIONS = ["red", "blue", "green"]
LETTERED = ["A. red", "B. blue", "C. green"]

VIDEO_R1 = {
    **{"problem_id": 2, "problem": "Which colour?", "data_type": "video", "problem_type": "multiple choice"},
    **{"options": LETTERED, "process": "", "solution": "<answer>B</answer>", "path": "./clips/one.mp4"},
    "data_source": "CLEVRER",
}
LLAVA_TURNS = [
    {"from": "human", "value": "<image>\nWhich?\nA. red\nB. blue\nPlease respond with only the letter."},
    {"from": "gpt", "value": "B."},
    {"from": "human", "value": "And then?\nA. a red one\nB. none\nPlease provide your answer by stating the letter."},
    {"from": "gpt", "value": "A. a red one."},
    {"from": "human", "value": "What is seen?"},
    {"from": "gpt", "value": "Two balls."},
]
PERCEPTION = {
    "metadata": {"video_id": "video_7", "split": "train"},
    "mc_question": [
        {"id": 0, "question": "Which?", "options": OPTIONS, "answer_id": 1, "area": "physics", "tag": ["motion"]},
        {"id": 1, "question": "And then?", "options": OPTIONS, "answer_id": 2, "reasoning": "descriptive"},
    ],
}
ACTIVITYNET = {
    "duration": 20.0,
    "timestamps": [[0.83, 9.5], [9.5, 20.4]],
    "sentences": ["A ball falls.", "It rolls away."],
}
MESSAGES = [{"role": "user", "content": "<video>\nWhich?"}, {"role": "assistant", "content": "Blue.\n"}]

SAMPLES: dict[str, list[Any]] = {
    "video_holmes": [
        {
            **{"video ID": "RSm", "Question ID": 1, "Question Type": "SR", "Question": "Which?"},
            **{"Options": dict(zip("ABC", OPTIONS, strict=True)), "Answer": "C", "Explanation": "It is green."},
        }
    ],
    "video_r1": [
        VIDEO_R1,
        {**VIDEO_R1, "problem_id": 3, "process": "<think>x</think>\n"},
        {**VIDEO_R1, "problem_id": 4, "problem_type": "numerical", "options": [], "solution": "<answer>5</answer>"},
        {**VIDEO_R1, "problem_id": 5, "data_type": "image", "path": "./Math/a.png"},
        {**VIDEO_R1, "problem_id": 6, "start": 0.0, "end": 9.5, "fps": 3},
    ],
    "onethinker": [
        {
            **{"problem_id": 1, "problem": "<video>Which?", "data_type": "video", "problem_type": "multiple choice"},
            **{"options": LETTERED, "answer": "<answer>A</answer>", "videos": ["./QA/a.mp4"], "images": []},
        },
        {
            **{"problem_id": 2, "problem": "<image>Where?", "data_type": "image", "problem_type": "spatial grounding"},
            **{"options": [], "answer": '<answer>{"boxes": [1, 2, 3, 4]}</answer>', "images": ["./RefCOCO/a.jpg"]},
        },
        {
            **{"problem_id": 3, "problem": "When?", "data_type": "video", "problem_type": "temporal grounding"},
            **{"options": [], "answer": '<answer>{"time": [12.3, 25.7]}</answer>', "videos": ["./TG/a.mp4"]},
        },
        {
            **{"problem_id": 4, "problem": "<image>Why?", "data_type": "image", "problem_type": "open-ended"},
            **{"options": [], "answer": "<answer>Rain.</answer>", "images": ["a.jpg"]},
        },
    ],
    "video_rts": [
        {
            **{"problem": "Which?\nA. red\nB. blue\nC. green\n", "solution": "<answer>B.</answer>"},
            **{"video": "/disk/CG_bench_videos/video/BV1.mp4", "clue_intervals": [], "qid": 16, "duration": None},
            "original_answer": "blue",
        }
    ],
    "tw_grpo": [
        {
            **{"id": "48_1", "video": "/NExTQA/videos/48.mp4", "question": "why not", "type": "CW"},
            **{"options": ["(A) red", "(B) blue", "(C) green"], "answer": "(B),(C)", "is_negated": True},
            **{"problem": "why not\nA red\nB blue\nC green", "solution": "<answer>B,C</answer>"},
        },
        {
            **{"problem": "What if?\nA. red\nB. blue", "solution": "<answer>B</answer>"},
            "video": "train_video/video_1.mp4",
        },
    ],
    "star": [
        {
            **{"question_id": "Interaction_T1_13", "question": "Which?", "video_id": "6H78U", "start": 11.1},
            **{
                "end": 19.6,
                "answer": "blue",
                "choices": [{"choice_id": n, "choice": o} for n, o in enumerate(OPTIONS)],
            },
        }
    ],
    "mvbench": [
        {"video": "166583.webm", "question": "Which?", "candidates": OPTIONS, "answer": "green"},
        {
            **{"video": "6H.mp4", "question": "Which?", "candidates": OPTIONS, "answer": "red", "start": 1.5, "end": 3},
            "fps": 3,
        },
    ],
    "videomme": [
        {
            **{
                "video_id": "001",
                "duration": "short",
                "domain": "Knowledge",
                "sub_category": "Law",
                "url": "https://x",
            },
            **{"videoID": "fFj_-x", "question_id": "001-1", "task_type": "Counting Problem", "question": "Which?"},
            **{"options": LETTERED, "answer": "C"},
        }
    ],
    "mmvu": [
        {
            **{
                "id": "validation_0",
                "video": "https://example.org/resolve/main/videos/Law/0.mp4",
                "question": "Which?",
            },
            **{"question_type": "multiple-choice", "choices": {**dict(zip("ABC", OPTIONS, strict=True)), "D": ""}},
            **{"answer": "B", "metadata": {"subject": "Law", "textbook": "A book", "knowledge": ["x"]}},
        },
        {
            **{"id": "validation_1", "video_path": "./videos/Art/1.mp4", "question": "Which?", "answer": "Dolly Zoom"},
            **{"question_type": "open-ended", "choices": dict.fromkeys("ABCDE", ""), "metadata": {"subject": "Art"}},
        },
    ],
    "video_mmmu": [
        {
            **{"id": "validation_Basic_Medical_Science_7", "question": "Which?", "options": OPTIONS, "answer": "A"},
            "question_type": "multiple-choice",
        },
        {"id": "dev_Math_1", "question": "How much?", "options": [], "answer": "12.97", "question_type": "open"},
    ],
    "vsibench": [
        {
            **{"id": 0, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_counting"},
            **{"question": "How many?", "options": None, "ground_truth": "4"},
        },
        {
            **{"id": 1, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "route_planning"},
            **{"question": "Where?", "options": LETTERED, "ground_truth": "B"},
        },
    ],
    "llava_video": [{"id": "101", "data_source": "0_30_s", "video": "a/split_2.mp4", "conversations": LLAVA_TURNS}],
    "conversations": [
        {"id": "c1", "messages": MESSAGES, "videos": ["a.mp4"]},
        {
            **{"id": "c2", "video": "b.mp4"},
            "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}],
        },
    ],
    "plain": [
        {"video": "a.mp4", "question": "How many?", "answer": 3},
        {"video": "a.mp4", "question": "Which?", "options": OPTIONS, "answer": "blue"},
        {"image": "a.png", "question": "What is it?", "answer": "a ball"},
    ],
}
"""Layout -> rows of a JSONL file."""
OBJECTS: dict[str, dict[str, Any]] = {
    "perception_test": {"video_7": PERCEPTION},
    "tempcompass": {
        "103": {
            "action": [
                {"question": "What?\nA. dunking\nB. throwing", "answer": "B. throwing"},
                {"question": "Is it?", "answer": "yes"},
            ],
            "order": [
                {"question": "Which?\nCaption A: One runs.\nCaption B: One sits.", "answer": "Caption A: One runs."}
            ],
        }
    },
    "activitynet_captions": {"v_Q": ACTIVITYNET},
}
"""Layout -> the object that its file is."""
TEXTS: dict[str, tuple[str, str]] = {
    "charades_sta": ("sta.txt", "AO8RW 0.0 6.9##a person sits.\nAO8RW 4.2 8.0##a person stands.\n"),
    "nextqa": (
        "train.csv",
        "\ufeffvideo,frame_count,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        '4010069381,369,"how, then",1,6,CH,red,"blue\nand ""green""",c,d,e\n',
    ),
}
"""Layout -> name and text of its file."""
NAMES = (*SAMPLES, *OBJECTS, *TEXTS)


def write_published(folder: Path, layout: str) -> Path:
    """The sample of a layout as its file."""
    if layout in TEXTS:
        name, written = TEXTS[layout]
        (folder / name).write_text(written, encoding="utf-8")
        return folder / name
    path = folder / f"{layout}.json"
    if layout in OBJECTS:
        path.write_text(json.dumps(OBJECTS[layout], indent=1))
    else:
        path.write_text(json.dumps(SAMPLES[layout]))
    return path
