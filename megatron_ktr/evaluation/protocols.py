"""What each protocol says about an answer. All are computed from the stored response, so that no run has to choose.

official   the harness behind the paper's figure of the benchmark, with its slips (``judges``)
strict     exactly one answer block, with nothing but the letter or the number in it
lenient    the right answer however it is worded, in a block or without one

and the benchmark's ``other_judges``. ``strict`` and ``lenient`` are those of the rewards (``rewards/protocols.py``),
for all benchmarks alike, but for one thing: in regression they give the mean relative accuracy, as all harnesses that
have such questions do, where training pays 1 - relative difference. Otherwise the columns could not be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal, get_args

from megatron_ktr.evaluation.benchmark import Benchmark, Judge
from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import option_texts, truth_of
from megatron_ktr.rewards import lenient, standard
from megatron_ktr.rewards.choices import named_labels, read_label, read_letters
from megatron_ktr.rewards.fold import fold_case
from megatron_ktr.rewards.protocols import PROTOCOLS, Protocol
from megatron_ktr.rewards.text import has_reasoning_format, parse_number
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.worded_number import read_number

ProtocolName = Literal["official", "strict", "lenient"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)
"""The protocols that every benchmark has."""
NUMBER_TYPES = ("numerical", "regression")


def judge_all(benchmark: Benchmark, item: Item, response: str) -> dict[str, Verdict]:
    """The verdicts on a response by protocol: ``PROTOCOL_NAMES``, then the benchmark's ``other_judges``."""
    judges = {"official": benchmark.official, **JUDGES, **benchmark.other_judges}
    return {name: judge(item, response) for name, judge in judges.items()}


def has_format(response: str) -> bool:
    """Whether a response is one reasoning block and then one answer block, with nothing around them."""
    return has_reasoning_format(response)


def mean_relative_accuracy(value: float | None, truth: float | None) -> float:
    """The share of t = 0.50, 0.55, ..., 0.95 with |value - truth| / |truth| < 1 - t, in exact arithmetic.

    An error on a border does not count (Video-R1's harness and the definition of VSI-Bench, arXiv 2412.14171, have the
    same "<"; VSI-Bench's code has "<="). If the truth is 0, only 0 is right. None, which is no number, scores 0.
    """
    if value is None or truth is None:
        return 0.0
    # As they are written: the float 1.05 is not 1.05, and the borders are where answers are.
    exact_value, exact_truth = Fraction(str(value)), Fraction(str(truth))
    if exact_truth == 0:
        return float(exact_value == 0)
    difference = abs(exact_value - exact_truth) / abs(exact_truth)
    return sum(difference < Fraction(step, 20) for step in range(1, 11)) / 10


def _regression(read_answer: Callable[[str], float | None], read_truth: Callable[[str], float | None]):
    def judge(answer: str, truth: Truth) -> float:
        if standard.are_alike(standard.written_number(answer), standard.written_number(truth.text)):
            return 1.0
        return mean_relative_accuracy(read_answer(answer), read_truth(truth.text))

    return judge


def _strict_number(text: str) -> float | None:
    return parse_number(standard.written_number(text))


def _with_regression(protocol: Protocol, judge: Callable[[str, Truth], float]) -> Protocol:
    return dataclasses.replace(protocol, judges={**protocol.judges, "regression": judge})


STRICT = _with_regression(PROTOCOLS["strict"], _regression(_strict_number, _strict_number))
LENIENT = _with_regression(PROTOCOLS["lenient"], _regression(lenient.stated_number, read_number))


def judge_strictly(item: Item, response: str) -> Verdict:
    """The verdict of the protocol ``strict``. Its answer is the letter or the number if there is nothing else in the
    one block, and in text questions the text."""
    return _verdict(item, response, STRICT, read_letters_of=_strict_labels, read_number_of=_strict_number)


def judge_leniently(item: Item, response: str) -> Verdict:
    """The verdict of the protocol ``lenient``. Its answer is the letter that is named, even if it is named by the
    option's text, or the number without what it is worded with."""
    return _verdict(item, response, LENIENT, read_letters_of=_lenient_labels, read_number_of=lenient.stated_number)


JUDGES: Mapping[str, Judge] = {"strict": judge_strictly, "lenient": judge_leniently}
"""The protocols that do not depend on the benchmark."""


def _verdict(
    item: Item,
    response: str,
    protocol: Protocol,
    *,
    read_letters_of: Callable[[str, Mapping[str, str]], frozenset[str]],
    read_number_of: Callable[[str], float | None],
) -> Verdict:
    kind = item.record["problem_type"]
    answer = protocol.finder_of(kind)(response)
    judge = protocol.judges.get(kind)
    if not answer or judge is None:
        return Verdict(0.0, None)
    score = judge(answer, truth_of(item))
    if kind == "multiple choice" and item.record["options"]:
        found = ",".join(sorted(read_letters_of(answer, option_texts(item)))) or None
    elif kind in NUMBER_TYPES:
        value = read_number_of(answer)
        found = None if value is None else f"{value:.15g}"
    else:
        found = " ".join(fold_case(answer).split())
    # What scores has been read, in whatever way ("1/2" for the truth "1/2" is no number of the strict protocol).
    return Verdict(score, answer if found is None and score > 0 else found)


def _strict_labels(answer: str, options: Mapping[str, str]) -> frozenset[str]:
    label = read_label(answer)
    if label in options:
        return frozenset({label})
    letters = read_letters(answer)
    return letters if letters <= options.keys() else frozenset()


def _lenient_labels(answer: str, options: Mapping[str, str]) -> frozenset[str]:
    return next((labels for part in lenient.readings(answer) if (labels := named_labels(part, options))), frozenset())
