"""Ways to find and judge an answer; each is one file, chosen by name (``--answer-protocol``).

official   the releases' verdicts, slips included
strict     one answer block and no second; letters and numbers alone in it
standard   the first answer block, judged as under strict: what training pays for, unless told otherwise
lenient    the right answer however it is worded, with or without a block
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_ktr.rewards import lenient, official, standard
from megatron_ktr.rewards.text import extract_answer, extract_only_answer, has_reasoning_format
from megatron_ktr.rewards.truth import Truth

Judge = Callable[[str, Truth], float]


@dataclass(frozen=True)
class Protocol:
    """How a response becomes an answer, and an answer a number."""

    find_answer: Callable[[str], str | None]
    """From a response; None means that it gives none, which is worth 0."""
    judges: Mapping[str, Judge]
    """By problem type, each in [0, 1]."""
    has_format: Callable[[str], bool] = has_reasoning_format
    """Whether a response gets the format reward."""


PROTOCOLS = {
    "official": Protocol(official.find_answer, official.JUDGES, official.has_format),
    "strict": Protocol(extract_only_answer, standard.JUDGES),
    "standard": Protocol(extract_answer, standard.JUDGES),
    "lenient": Protocol(lenient.find_answer, lenient.JUDGES),
}
STANDARD = PROTOCOLS["standard"]
