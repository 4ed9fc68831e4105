"""Video-R1's evaluation (``src/eval_bench.py``), which Video-KTR's table follows for all but Video-Holmes.

The answer is the content of the first ``<answer>`` block.
Without a block, or with an empty one, it is the whole output.

    multiple choice   1 if the texts are equal to the character
    numerical         1 if equal after rounding to 2 decimals, and both or neither text contains '.' or ','
    regression        mean relative accuracy: the share of the thresholds t = 0.50, 0.55, ..., 0.95 with
                      |answer - truth| / (|truth| + 1e-8) < 1 - t, in float32
    all other types   0, so that OCR and free-form answers are never right; but mathematics, times and boxes, which the
                      harness does not know, are judged as in training (``rewards/official.py``)

The training reward of the same release (``rewards/official.py``) differs in the fallback to the whole output, in
regression, and in that it pays for OCR and free-form. One failing item makes its batch of 64 wrong in the release; that
is not repeated here. A ``solution`` without tags is taken as it is, while the release would read nothing from it.

Read in: zywang0104/Video-KTR, ``src/eval_bench.py`` (its copy of tulerfeng/Video-R1's file, which was not found).
"""

from __future__ import annotations

import torch

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import option_texts, truth_of
from megatron_ktr.rewards import grounding, official
from megatron_ktr.rewards.accuracy import accuracy_of_record
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.text import extract_answer
from megatron_ktr.rewards.truth import Truth

_THRESHOLDS = torch.arange(0.5, 0.95 + 0.05 / 2, 0.05, dtype=torch.float32)


def find_answer(response: str) -> str:
    """The text that is compared with the truth."""
    return extract_answer(response) or response


def mean_relative_accuracy(answer: float, truth: float) -> float:
    """The score of ``regression`` for two numbers. If the truth is 0, only 0 is right; NaN and infinity score 0."""
    value, expected = (torch.tensor(number, dtype=torch.float64).float() for number in (answer, truth))
    difference = (value - expected).abs() / (expected.abs() + 1e-8)
    return float((difference < 1 - _THRESHOLDS).float().mean())


def regression(answer: str, truth: Truth) -> float:
    """``mean_relative_accuracy`` of what Python's ``float`` reads, without commas; 0 for anything else."""
    value, expected = official.number_of(answer), official.number_of(truth.text)
    return 0.0 if value is None or expected is None else mean_relative_accuracy(value, expected)


_JUDGES = {
    "multiple choice": official.multiple_choice,
    "numerical": official.numerical,
    "regression": regression,
}


_OF_OTHER_RELEASES = ("math", grounding.TEMPORAL, grounding.SPATIAL)


def judge(item: Item, response: str) -> Verdict:
    """The harness' verdict. An output without a block counts as an answer if it is an answer and nothing else: a letter
    of the options or a number."""
    if item.record["problem_type"] in _OF_OTHER_RELEASES:
        return _as_in_training(item, response)
    answer, truth = find_answer(response), truth_of(item)
    score_of = _JUDGES.get(item.record["problem_type"])
    score = score_of(answer, truth) if score_of is not None else 0.0
    is_answer = bool(extract_answer(response)) or score > 0 or _stands_alone(item, answer)
    return Verdict(score, answer.strip() if is_answer else None)


def _as_in_training(item: Item, response: str) -> Verdict:
    protocol = PROTOCOLS["official"]
    answer = protocol.finder_of(item.record["problem_type"])(response)
    return Verdict(accuracy_of_record(response, item.record, protocol=protocol), answer or None)


def _stands_alone(item: Item, answer: str) -> bool:
    if item.record["problem_type"] == "multiple choice":
        return answer.strip() in option_texts(item)
    return official.number_of(answer) is not None
