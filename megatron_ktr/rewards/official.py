"""The protocol ``official`` judges as the Video-KTR and Video-R1 releases do, mistakes included, to compare with their
numbers.

- A response without an answer block has the empty answer, which is right if the truth is empty.
- A number is what Python's ``float`` reads. "nan" is therefore a number, and scores 1 in regression. There, no number
  matches a truth of 0, not even 0.
- Letters must be equal to the character, OCR minds case, and ROUGE sees ASCII letters and digits only.

Questions that these releases do not have are judged as others do that have them: "temporal grounding" as
OneThinker and Time-R1, "spatial grounding" as OneThinker (``grounding.py``), "math" by math-verify, which OneThinker
uses.

There is one difference from the releases: a ``solution`` without ``<answer>`` tags is taken as it is, while they would
read nothing from it.
"""

from __future__ import annotations

from megatron_ktr.rewards import grounding
from megatron_ktr.rewards.overlap import rouge_mean, word_error_rate
from megatron_ktr.rewards.standard import mathematical
from megatron_ktr.rewards.text import extract_answer
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.words import ASCII_WORDS, stem

_EPSILON = 1e-9


def find_answer(response: str) -> str:
    """The content of the first ``<answer>`` block; "" if there is none."""
    return extract_answer(response) or ""


def has_format(response: str) -> bool:
    """Whether the response is ``<think>...</think>``, optional blanks, ``<answer>...</answer>``, with nothing around
    it. The same tags may occur again inside."""
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
    """1 if the texts are equal."""
    return float(answer.strip() == truth.text.strip())


def numerical(answer: str, truth: Truth) -> float:
    """1 if the numbers are equal after rounding to 2 decimals, and both or neither text contains '.' or ','."""
    if ("." in answer or "," in answer) != ("." in truth.text or "," in truth.text):
        return 0.0
    value, expected = number_of(answer), number_of(truth.text)
    return float(value is not None and expected is not None and round(value, 2) == round(expected, 2))


def ocr(answer: str, truth: Truth) -> float:
    """1 - word error rate, clipped to [0, 1]; words are compared as they are written."""
    return max(0.0, min(1.0, 1.0 - word_error_rate(answer.split(), truth.text.split())))


def free_form(answer: str, truth: Truth) -> float:
    """Mean F-measure of rouge-score's ROUGE-1, ROUGE-2 and ROUGE-L."""
    found, expected = (ASCII_WORDS.findall(text.lower()) for text in (answer, truth.text))
    return rouge_mean([stem(word) for word in found], [stem(word) for word in expected])


def regression(answer: str, truth: Truth) -> float:
    """1 - relative difference, clipped to [0, 1].

    Numerator and denominator of the relative difference are raised by 1e-9. Because of the order of min and max, a NaN
    scores 1.
    """
    value, expected = number_of(answer), number_of(truth.text)
    if value is None or expected is None:
        return 0.0
    difference = (abs(value - expected) + _EPSILON) / (abs(expected) + _EPSILON)
    return 1.0 - min(1.0, max(0.0, difference))


def number_of(text: str) -> float | None:
    """What Python's ``float`` reads from the text without its commas; None if it reads nothing."""
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
    "math": mathematical,
    grounding.TEMPORAL: grounding.judge_span_officially,
    grounding.SPATIAL: grounding.judge_box_strictly,
}
