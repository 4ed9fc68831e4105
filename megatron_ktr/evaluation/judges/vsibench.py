"""VSI-Bench's own rule: the first word, compared as a letter or by mean relative accuracy.

The first word ends at the first blank; full stops at its end are dropped. A letter is compared ignoring case, so that
"A)" is wrong. A number scores the share of the thresholds t = 0.50, 0.55, ..., 0.95 with
|answer - truth| / truth <= 1 - t: an error on the border counts as right, other than in Video-R1's harness.

Read in: EvolvingLMMs-Lab/lmms-eval and vision-x-nyu/thinking-in-space, ``lmms_eval/tasks/vsibench/utils.py``.
"""

from __future__ import annotations

import numpy as np

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import right_letter, truth_of, without_reasoning
from megatron_ktr.rewards.official import number_of

_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def first_word(answer: str) -> str:
    return answer.split(" ")[0].rstrip(".").strip()


def mean_relative_accuracy(answer: float, truth: float) -> float:
    """The score of a number. If the truth is 0, which the harness does not bear, only 0 is right."""
    if truth == 0:
        return float(answer == 0)
    with np.errstate(all="ignore"):
        return float((np.float64(abs(answer - truth)) / np.float64(truth) <= 1 - _THRESHOLDS).mean())


def judge(item: Item, response: str) -> Verdict:
    """The rule on the answer without its reasoning."""
    word = first_word(without_reasoning(response))
    if item.record["problem_type"] == "multiple choice":
        right = right_letter(item)
        return Verdict(float(bool(right) and word.lower() == right.lower()), word or None)
    try:
        value = float(word)
    except ValueError:
        return Verdict(0.0, None)
    expected = number_of(truth_of(item).text)
    return Verdict(0.0 if expected is None else mean_relative_accuracy(value, expected), word)
