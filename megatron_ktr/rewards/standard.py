"""Judges an answer by problem type, as training does by default: pure functions of (answer, truth), each in [0, 1].

    multiple choice   1 if the letters are equal
    numerical         1 if equal after rounding to 2 decimals, and both or neither have a decimal part
    OCR               1 - word error rate, clipped to [0, 1]
    free-form         mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming; 1 for the same words
    regression        1 - min(1, |answer - truth| / |truth|)
    math              1 if equal as mathematics (``math_answers.py``)
    temporal grounding, spatial grounding   IoU of spans or boxes (``grounding.py``)

A number has a "decimal part" if its text contains '.' or ','. Texts that look the same count as equal (``fold.py``).
An empty truth or answer is never right.
"""

from __future__ import annotations

from megatron_ktr.rewards import grounding
from megatron_ktr.rewards.choices import read_label, read_letters
from megatron_ktr.rewards.fold import bare, fold_case, fold_number
from megatron_ktr.rewards.math_answers import are_equal
from megatron_ktr.rewards.overlap import rouge_mean, word_error_rate
from megatron_ktr.rewards.text import parse_number
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.words import rouge_words, stem, written_words


def multiple_choice(answer: str, truth: Truth) -> float:
    """1 if the letters are equal. A trailing '.' or ')', brackets, emphasis, ``\\boxed`` and full-width forms are
    ignored."""
    label = read_label(answer)
    return float(bool(label) and label == read_label(truth.text))


def soft_choice(answer: str, truth: Truth) -> float:
    """|S| / |T| if the answer's letters S are a subset of the right ones T, else 0. Letters may be written as "B",
    "A, C", "AC" or "(A) and (C)"; an answer with any other word has no letters."""
    letters, expected = read_letters(answer), read_letters(truth.text)
    return len(letters) / len(expected) if letters and letters <= expected else 0.0


def numerical(answer: str, truth: Truth) -> float:
    """1 if both are numbers that agree to 2 decimals, and both or neither have a decimal part; also 1 if both are
    written alike."""
    found, expected = written_number(answer), written_number(truth.text)
    if are_alike(found, expected):
        return 1.0
    if truth.is_written and _has_decimal_part(found) != _has_decimal_part(expected):
        return 0.0
    value, right_value = parse_number(found), parse_number(expected)
    if value is None or right_value is None:
        return 0.0
    return float(round(value, 2) == round(right_value, 2))


def ocr(answer: str, truth: Truth) -> float:
    """1 - word error rate, clipped to [0, 1], with case ignored. In scripts that put no blanks between words, each
    character counts as a word."""
    found, expected = written_words(answer), written_words(truth.text)
    if not found or not expected:
        return 0.0
    return min(1.0, max(0.0, 1.0 - word_error_rate(found, expected)))


def free_form(answer: str, truth: Truth) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L with stemming. The same words score 1, even a single word, which
    has no ROUGE-2."""
    found, expected = rouge_words(answer), rouge_words(truth.text)
    if not found and not expected:  # the texts consist of signs only
        return float(fold_case(answer).split() == fold_case(truth.text).split() != [])
    if found == expected:
        return 1.0
    return rouge_mean([stem(word) for word in found], [stem(word) for word in expected])


def regression(answer: str, truth: Truth) -> float:
    """1 - min(1, relative difference); also 1 if both are written alike. If the truth is 0, only 0 is right."""
    found, expected = written_number(answer), written_number(truth.text)
    return 1.0 if are_alike(found, expected) else relative_score(parse_number(found), parse_number(expected))


def mathematical(answer: str, truth: Truth) -> float:
    """1 if the answer is mathematically the same as the truth."""
    return float(are_equal(answer, truth.text))


def relative_score(value: float | None, expected: float | None) -> float:
    """The score of ``regression`` for two numbers; 0 if one of them is None."""
    if value is None or expected is None:
        return 0.0
    if expected == 0.0:
        return float(value == 0.0)
    return 1.0 - min(1.0, abs(value - expected) / abs(expected))


def written_number(text: str) -> str:
    """The text of a number, with digits and signs in ASCII and without decoration."""
    return bare(fold_number(text))


def are_alike(found: str, expected: str) -> bool:
    """Whether two texts from ``written_number`` are equal and contain a digit. They need not be numbers that
    ``parse_number`` reads ("1/2", "3,14")."""
    return found == expected and any("0" <= character <= "9" for character in found)


def _has_decimal_part(written: str) -> bool:
    return "." in written or "," in written


JUDGES = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
    "math": mathematical,
    grounding.TEMPORAL: grounding.judge_span,
    grounding.SPATIAL: grounding.judge_box,
}
STRICT_JUDGES = {
    grounding.TEMPORAL: grounding.judge_span_strictly,
    grounding.SPATIAL: grounding.judge_box_strictly,
}
"""Where the protocol ``strict`` reads less than ``standard``: JSON alone."""
