"""What a kind reader would accept: the right answer, however it is worded, wherever it stands.

Letters may be small, named with their option's text ("B. red") or by that text alone; numbers may be worded
(``worded_number.py``), with or without a decimal part. Tags may be in capitals, and the last one may be missing.
Without any block the answer is what follows the reasoning.
"""

from __future__ import annotations

from megatron_ktr.rewards import standard
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.worded_number import read_number


def find_answer(response: str) -> str | None:
    """The first answer block, its tags in any case, to the end of the response where it is not closed; without one,
    what follows the last ``</think>``, else the whole response. None where that is empty."""
    tags = _ascii_lower(response)
    start = tags.find("<answer>")
    if start >= 0:
        start += len("<answer>")
        end = tags.find("</answer>", start)
    else:
        think = tags.rfind("</think>")
        start, end = (think + len("</think>") if think >= 0 else 0), -1
    return response[start : end if end >= 0 else len(response)].strip() or None


def multiple_choice(answer: str, truth: Truth) -> float:
    """1 if the answer, or its last line, names the right option; several letters in any order where several are
    right."""
    options = labelled_options(truth.options)
    expected = named_labels(truth.text, options)
    if not expected:
        return standard.multiple_choice(answer, truth)
    return float(any(named_labels(part, options) == expected for part in _readings(answer)))


def numerical(answer: str, truth: Truth) -> float:
    """1 if the numbers agree to 2 decimals."""
    if standard.are_alike(standard.written_number(answer), standard.written_number(truth.text)):
        return 1.0
    value, expected = _number(answer), read_number(truth.text)
    return float(value is not None and expected is not None and round(value, 2) == round(expected, 2))


def regression(answer: str, truth: Truth) -> float:
    """1 - min(1, relative difference); a truth of 0 is matched only by 0."""
    if standard.are_alike(standard.written_number(answer), standard.written_number(truth.text)):
        return 1.0
    return standard.relative_score(_number(answer), read_number(truth.text))


def _number(answer: str) -> float | None:
    """The number of the answer, or of its last line."""
    return next((value for part in _readings(answer) if (value := read_number(part)) is not None), None)


def _readings(answer: str) -> list[str]:
    """The answer, then its last line: what a response without an answer block ends with."""
    last = answer.rstrip().rpartition("\n")[2]
    return [answer] if last == answer else [answer, last]


def _ascii_lower(text: str) -> str:
    """Lower case with every character in its place: ``str.lower`` lengthens some."""
    return text.lower() if text.isascii() else "".join(c.lower() if c.isascii() else c for c in text)


JUDGES = standard.JUDGES | {"multiple choice": multiple_choice, "numerical": numerical, "regression": regression}
