"""The verdicts of the Video-KTR and Video-R1 releases, slips included, to compare with their numbers.

A response without an answer block has the empty answer, which is right where the truth is empty. Numbers are what
Python's ``float`` reads, so "nan" is one, and its regression scores 1; a truth of 0 is matched by nothing. Letters must
be equal to the character, OCR minds case, and ROUGE sees ASCII letters and digits only. The one exception: a
``solution`` without ``<answer>`` tags is taken as it is, where the releases would read nothing from it.
"""

from __future__ import annotations

from megatron_ktr.rewards.overlap import rouge_mean, word_error_rate
from megatron_ktr.rewards.text import extract_answer
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.words import ASCII_WORDS, stem

_EPSILON = 1e-9


def find_answer(response: str) -> str:
    """The first ``<answer>`` block, "" without one."""
    return extract_answer(response) or ""


def has_format(response: str) -> bool:
    """Whether the response is ``<think>...</think>``, blanks, ``<answer>...</answer>``, and nothing around it; tags
    inside may repeat."""
    if not (response.startswith("<think>") and response.endswith("</answer>")):
        return False
    end = response.find("</think>", len("<think>"))
    while end >= 0:
        place = end + len("</think>")
        while place < len(response) and response[place].isspace():
            place += 1
        if response.startswith("<answer>", place):
            return place + len("<answer>") <= len(response) - len("</answer>")
        end = response.find("</think>", place)
    return False


def multiple_choice(answer: str, truth: Truth) -> float:
    """Equality of the texts."""
    return float(answer.strip() == truth.text.strip())


def numerical(answer: str, truth: Truth) -> float:
    """Equality after rounding to 2 decimals, where both or neither contain '.' or ','."""
    if ("." in answer or "," in answer) != ("." in truth.text or "," in truth.text):
        return 0.0
    value, expected = _number(answer), _number(truth.text)
    return float(value is not None and expected is not None and round(value, 2) == round(expected, 2))


def ocr(answer: str, truth: Truth) -> float:
    """1 - WER on words as they are written, clipped."""
    return max(0.0, min(1.0, 1.0 - word_error_rate(answer.split(), truth.text.split())))


def free_form(answer: str, truth: Truth) -> float:
    """Mean F-measure of rouge-score's ROUGE-1, ROUGE-2 and ROUGE-L."""
    found, expected = (ASCII_WORDS.findall(text.lower()) for text in (answer, truth.text))
    return rouge_mean([stem(word) for word in found], [stem(word) for word in expected])


def regression(answer: str, truth: Truth) -> float:
    """1 - relative difference, both parts of it raised by 1e-9, clipped in the order that lets NaN through as 1."""
    value, expected = _number(answer), _number(truth.text)
    if value is None or expected is None:
        return 0.0
    difference = (abs(value - expected) + _EPSILON) / (abs(expected) + _EPSILON)
    return 1.0 - min(1.0, max(0.0, difference))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


JUDGES = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
}
