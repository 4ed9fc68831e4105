"""The protocol ``lenient`` accepts what a kind reader would: the right answer, however worded and wherever it stands.

A letter may be lower case, and an option may be named with its text ("B. red") or by its text alone. A number may be
worded (``worded_number.py``), with or without a decimal part. Tags may be in capitals, and the closing tag may be
missing. In a response without an answer block, the answer is the text after the reasoning.
"""

from __future__ import annotations

from megatron_ktr.rewards import standard
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.worded_number import read_number


def find_answer(response: str) -> str | None:
    """The text of the answer; None if it is empty.

    It is the content of the first answer block, whose tags may be in any case. A block that is not closed extends to
    the end of the response. Without a block it is the text after the last ``</think>``, and without that tag the whole
    response.
    """
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
    """1 if the answer, or its last line, names the right option. Where several options are right, it must name all of
    them, in any order."""
    options = labelled_options(truth.options)
    expected = named_labels(truth.text, options)
    if not expected:
        return standard.multiple_choice(answer, truth)
    return float(any(named_labels(part, options) == expected for part in readings(answer)))


def numerical(answer: str, truth: Truth) -> float:
    """1 if the numbers agree to 2 decimals, or are written alike."""
    if standard.are_alike(standard.written_number(answer), standard.written_number(truth.text)):
        return 1.0
    value, expected = stated_number(answer), read_number(truth.text)
    return float(value is not None and expected is not None and round(value, 2) == round(expected, 2))


def regression(answer: str, truth: Truth) -> float:
    """1 - min(1, relative difference). If the truth is 0, only 0 is right."""
    if standard.are_alike(standard.written_number(answer), standard.written_number(truth.text)):
        return 1.0
    return standard.relative_score(stated_number(answer), read_number(truth.text))


def mathematical(answer: str, truth: Truth) -> float:
    """1 if the answer, its last line or its last box is mathematically the same as the truth."""
    return float(any(standard.mathematical(part, truth) for part in readings(answer)))


def stated_number(answer: str) -> float | None:
    """The number of the answer, or of its last line."""
    return next((value for part in readings(answer) if (value := read_number(part)) is not None), None)


def readings(answer: str) -> list[str]:
    """The texts in which to look for the answer: the answer as a whole, then its last line, then what its last
    ``\\boxed{...}`` holds. In a response without an answer block, the last line often states the answer."""
    last = answer.rstrip().rpartition("\n")[2]
    return list(dict.fromkeys((answer, last, *_last_box(answer))))


def _last_box(text: str) -> tuple[str, ...]:
    """The content of the last ``\\boxed{...}``; nothing if there is none, or if it is not closed."""
    start = text.rfind("\\boxed{")
    depth = 1
    for place in range(start + len("\\boxed{"), len(text) if start >= 0 else 0):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return (text[start + len("\\boxed{") : place],)
    return ()


def _ascii_lower(text: str) -> str:
    """Lower case in ASCII only, so that every character keeps its place; ``str.lower`` makes some characters longer."""
    return text.lower() if text.isascii() else "".join(c.lower() if c.isascii() else c for c in text)


JUDGES = standard.JUDGES | {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "regression": regression,
    "math": mathematical,
}
