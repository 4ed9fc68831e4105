"""Accuracy reward by problem type (Video-R1 conventions): pure functions of two strings, each in [0, 1].

    multiple choice   1 if the letters are equal
    numerical         1 if equal after rounding to 2 decimals, and both or neither have a decimal part
    OCR               1 - word error rate, clipped to [0, 1]
    free-form         mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming
    regression        1 - min(1, |answer - truth| / |truth|)

The answer is the first ``<answer>`` block of the response; without one, the accuracy is 0. A "decimal part" means
that the text contains '.' or ','.

Questions with several right letters can be rewarded in parts (TW-GRPO, arXiv 2505.24718): with S the answer's letters
and T the right ones, |S| / |T| if S is a subset of T, else 0. A single wrong letter costs everything, or naming all
letters would pay.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from megatron_ktr.errors import UserError
from megatron_ktr.rewards.text import extract_answer, parse_number


def multiple_choice(answer: str, truth: str) -> float:
    """1 if the letters are equal; a trailing '.' or ')' and surrounding brackets do not matter."""
    return float(_choice(answer) == _choice(truth))


def soft_choice(answer: str, truth: str) -> float:
    """|S| / |T| if the answer's letters S are a subset of the right ones T, else 0; "B", "A, C", "AC" and "(A) and (C)"
    are letters, any other word makes the answer none."""
    letters, expected = _letters(answer), _letters(truth)
    return len(letters) / len(expected) if letters and letters <= expected else 0.0


def numerical(answer: str, truth: str) -> float:
    """1 if both are numbers, both or neither have a decimal part, and they agree to 2 decimals."""
    if ("." in answer or "," in answer) != ("." in truth or "," in truth):
        return 0.0
    value, expected = parse_number(answer), parse_number(truth)
    if value is None or expected is None:
        return 0.0
    return float(round(value, 2) == round(expected, 2))


def ocr(answer: str, truth: str) -> float:
    """1 - WER on lower-case words, clipped; an empty truth is matched only by an empty answer."""
    import jiwer

    # jiwer takes only blanks for word borders; a line break is one too.
    truth, answer = (" ".join(text.lower().split()) for text in (truth, answer))
    if not truth:
        return float(not answer)
    error = jiwer.wer(truth, answer)
    return min(1.0, max(0.0, 1.0 - error))


def free_form(answer: str, truth: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L with stemming."""
    scores = _rouge_scorer().score(truth, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


def regression(answer: str, truth: str) -> float:
    """1 - min(1, relative difference); a truth of 0 is matched only by 0."""
    value, expected = parse_number(answer), parse_number(truth)
    if value is None or expected is None:
        return 0.0
    if expected == 0.0:
        return float(value == 0.0)
    return 1.0 - min(1.0, abs(value - expected) / abs(expected))


ACCURACY_BY_TYPE: dict[str, Callable[[str, str], float]] = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
}


SOFT_BY_TYPE = ACCURACY_BY_TYPE | {"multiple choice": soft_choice}


def accuracy(
    response: str,
    *,
    solution: str,
    problem_type: str,
    by_type: Mapping[str, Callable[[str, str], float]] = ACCURACY_BY_TYPE,
) -> float:
    """Accuracy of a response against ``solution`` (with or without its ``<answer>`` tags).

    Raises UserError for an unknown ``problem_type``, naming the known ones.
    """
    score = by_type.get(problem_type)
    if score is None:
        raise UserError(f"problem_type {problem_type!r} is unknown, expected one of {sorted(by_type)}")
    answer = extract_answer(response)
    if answer is None:
        return 0.0
    truth = extract_answer(solution)
    return score(answer, truth if truth is not None else solution.strip())


def _choice(text: str) -> str:
    return text.strip().strip("().").strip()


def _letters(text: str) -> frozenset[str]:
    """The choices a text names; none if it says anything else."""
    words = [word for word in re.split(r"[\s,;/&().\[\]]+", text) if word and word != "and"]
    return frozenset("".join(words)) if all(re.fullmatch("[A-Z]+", word) for word in words) else frozenset()


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
