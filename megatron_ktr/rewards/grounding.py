"""Answers that say when (a span of seconds) or where (a box), and how much two of them overlap.

    IoU = |intersection| / |union|        of (3.2, 8.5) and (4, 10): 4.5 / 6.8

A span is read from JSON with a known key (``{"time": [3.2, 8.5]}``), else it is the last of the forms "3.2 to 8.5",
"from 3.2s to 8.5 seconds", "between 00:03 and 00:08", "3.2-8.5". A box is read from JSON (``{"boxes": [x1, y1, x2,
y2]}``), else from the last four numbers in brackets. A span that does not end after it starts, a box without area, a
negative time and what is not finite are no answers: 0.

official   temporal grounding: JSON with the key "time" as OneThinker reads it; else as Time-R1 does, the last
           "<number> to <number>" or "<number> and <number>" with single blanks. Both in the last answer block (of
           several OneThinker reads the first). The union is the hull of both spans.
           spatial grounding as OneThinker does: JSON with the key "boxes" and nothing else
strict     JSON with the key "time" or "boxes", and nothing around it

Read in: www-Ye/Time-R1, ``src/open_r1/grpo_video.py``; tulerfeng/OneThinker,
``EasyR1/verl/reward_function/onethinker_reward.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rewards.fold import fold_number
from megatron_ktr.rewards.truth import Truth

Span = tuple[float, float]
Box = tuple[float, float, float, float]

TEMPORAL = "temporal grounding"
SPATIAL = "spatial grounding"
MOST_CHARACTERS = 10_000
"""Only the last characters of a longer answer are read."""
_TIME_KEYS = ("time", "span", "timestamp", "timestamps", "segment")
_BOX_KEYS = ("boxes", "box", "bbox", "bbox_2d")
_NUMBER = r"\d++(?::\d++){0,2}+(?:\.\d++)?+"
_NUMBERS = re.compile(_NUMBER)
_BETWEEN = re.compile(r"\s*+(?:seconds?|secs?|s|秒)?+\.?+\s*+(?:to|and|until|till|[-~]|至|到)\s*+", re.IGNORECASE)
_MOST_BETWEEN = 40
_BRACKETS = re.compile(r"[\[(<{]\s*+((?:-?+\d++(?:\.\d++)?+[\s,]*+){4})[\])>}]")
_SIGNED = re.compile(r"-?+\d++(?:\.\d++)?+")
_RELEASE = re.compile(r"(\d+\.?\d*) (?:to|and) (\d+\.?\d*)", re.IGNORECASE)


def span_overlap(first: Span, second: Span) -> float:
    """IoU of two spans; 0 if one of them is empty."""
    if not (first[0] < first[1] and second[0] < second[1]):
        return 0.0
    common = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    return common / ((first[1] - first[0]) + (second[1] - second[0]) - common)


def box_overlap(first: Box, second: Box) -> float:
    """IoU of two boxes (x1, y1, x2, y2); 0 if one of them has no area, or its corners are exchanged."""
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second)]
    if first[0] >= first[2] or second[0] >= second[2] or not all(areas) or not all(map(math.isfinite, areas)):
        return 0.0
    common = math.prod(max(0.0, min(first[2 + i], second[2 + i]) - max(first[i], second[i])) for i in (0, 1))
    return common / (areas[0] + areas[1] - common)


def read_span(text: str) -> Span | None:
    """The span that an answer says, in any of the forms above; None if it says none."""
    text = fold_number(text[-MOST_CHARACTERS:]).strip()
    if (found := _json_numbers(text, keys=_TIME_KEYS, number=2)) is not None:
        return _checked_span(found)
    return _worded_span(text)


def read_span_strictly(text: str) -> Span | None:
    """The span of JSON with the key "time"."""
    found = _json_numbers(text.strip(), keys=("time",), number=2, is_object=True)
    return None if found is None else _checked_span(found)


def read_box(text: str) -> Box | None:
    """The box that an answer says; None if it says none or several as JSON."""
    text = fold_number(text[-MOST_CHARACTERS:]).strip()
    found = _json_numbers(text, keys=_BOX_KEYS, number=4)
    if found is None and (brackets := _BRACKETS.findall(text)):
        found = [float(number) for number in _SIGNED.findall(brackets[-1])]
    return None if found is None else _checked_box(found)


def read_box_strictly(text: str) -> Box | None:
    """The box of JSON with the key "boxes"."""
    found = _json_numbers(text.strip(), keys=("boxes",), number=4, is_object=True)
    return None if found is None else _checked_box(found)


def _overlap(read: Callable[[str], Any], read_truth: Callable[[str], Any], measure: Callable[[Any, Any], float]):
    def judge(answer: str, truth: Truth) -> float:
        found, expected = read(answer), read_truth(truth.text)
        return 0.0 if found is None or expected is None else measure(found, expected)

    return judge


judge_span = _overlap(read_span, read_span, span_overlap)
"""IoU of the answer's span and the truth's, in [0, 1]."""
judge_span_strictly = _overlap(read_span_strictly, read_span, span_overlap)
judge_box = _overlap(read_box, read_box, box_overlap)
"""IoU of the answer's box and the truth's, in [0, 1]. Both are in the same coordinates, those of the question."""
judge_box_strictly = _overlap(read_box_strictly, read_box, box_overlap)


def judge_span_officially(answer: str, truth: Truth) -> float:
    """OneThinker's rule for JSON, else Time-R1's. A span that ends before it starts is taken as it is."""
    expected = read_span(truth.text)
    found = _json_numbers(answer.strip(), keys=("time",), number=2, is_object=True)
    if found is None and (worded := _RELEASE.findall(_bounded(answer))):
        found = [float(number) for number in worded[-1]]
    if found is None or expected is None:
        return 0.0
    start, end = found
    common = max(0.0, min(end, expected[1]) - max(start, expected[0]))
    hull = max(end, expected[1]) - min(start, expected[0])
    return common / hull if hull > 0 and math.isfinite(hull) else 0.0


def find_last_answer(response: str) -> str:
    """The content of the last ``<answer>`` block, which Time-R1 reads; "" if there is none."""
    blocks = response.split("<answer>")[1:]
    closed = [block.partition("</answer>")[0] for block in blocks if "</answer>" in block]
    return closed[-1] if closed else ""


def _json_numbers(text: str, *, keys: Sequence[str], number: int, is_object: bool = False) -> list[float] | None:
    """The ``number`` numbers under the first known key of a JSON object, or of a JSON list; None if there are none."""
    text = _without_fence(text)
    if text[:1] not in ("{", "["):
        return None
    try:
        found = parse_json(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) and not is_object:
        found = found[0]  # Qwen2.5-VL lists its boxes
    if isinstance(found, dict):
        found = next((found[key] for key in keys if key in found), None)
    elif is_object:
        return None
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list) and not is_object:
        found = found[0]
    if not isinstance(found, list) or len(found) != number:
        return None
    values = [_number(value) for value in found]
    return [value for value in values if value is not None] if None not in values else None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _seconds(value.strip()) if _NUMBERS.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _without_fence(text: str) -> str:
    """``text`` without the fence of a code block around it."""
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        return text[3:-3].removeprefix("json").strip()
    return text


def _worded_span(text: str) -> Span | None:
    """The last two numbers with "to" or its like between them."""
    found: Span | None = None
    numbers = list(_NUMBERS.finditer(text))
    for first, second in zip(numbers, numbers[1:], strict=False):
        between = text[first.end() : second.start()]
        if len(between) > _MOST_BETWEEN or not _BETWEEN.fullmatch(between):
            continue
        start, end = _seconds(first.group()), _seconds(second.group())
        is_negative = text[: first.start()].endswith("-")
        found = None if start is None or end is None or is_negative else _checked_span((start, end))
    return found


def _seconds(text: str) -> float | None:
    """Seconds of "8.5", "1:08.5" (minutes) and "1:02:03" (hours); None if minutes or seconds reach 60."""
    if len(text) > 40:
        return None
    *larger, seconds = text.split(":")
    values = [float(part) for part in (*larger, seconds)]
    if larger and any(value >= 60 for value in values[1:]):
        return None
    return sum(value * 60**power for power, value in enumerate(reversed(values)))


def _checked_span(values: Sequence[float]) -> Span | None:
    start, end = values
    return (start, end) if 0 <= start < end < math.inf else None


def _checked_box(values: Sequence[float]) -> Box | None:
    if len(values) != 4 or not all(map(math.isfinite, values)):
        return None
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _bounded(text: str) -> str:
    """The end of a text, without runs of digits over which the release's expression takes quadratic time."""
    return re.sub(r"\d{101,}", "x", text[-MOST_CHARACTERS:])
