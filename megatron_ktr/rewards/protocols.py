"""Protocols: ways to find and judge an answer, chosen by name (``--answer-protocol``).

official   judges as the releases of Video-KTR and Video-R1 do, mistakes included
strict     needs exactly one answer block, with nothing but the letter or number in it
standard   takes the first answer block and judges it as strict does; the default, also for training
lenient    accepts the right answer however it is worded, with or without a block
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_ktr.rewards import grounding, lenient, official, standard
from megatron_ktr.rewards.text import extract_answer, extract_only_answer, has_reasoning_format
from megatron_ktr.rewards.truth import Truth

Judge = Callable[[str, Truth], float]


@dataclass(frozen=True)
class Protocol:
    """How the answer is found in a response, and how the answer is scored."""

    find_answer: Callable[[str], str | None]
    """Finds the answer in a response. None means that the response gives no answer, which scores 0."""
    judges: Mapping[str, Judge]
    """The function that scores an answer, in [0, 1], for each problem type."""
    has_format: Callable[[str], bool] = has_reasoning_format
    """Whether a response gets the format reward."""
    finders: Mapping[str, Callable[[str], str | None]] = field(default_factory=dict)
    """For problem types whose answer is found in another way than by ``find_answer``: how."""

    def finder_of(self, problem_type: str) -> Callable[[str], str | None]:
        """How the answer to a question of this type is found."""
        return self.finders.get(problem_type, self.find_answer)


PROTOCOLS = {
    "official": Protocol(
        official.find_answer,
        official.JUDGES,
        official.has_format,
        finders={grounding.TEMPORAL: grounding.find_last_answer},
    ),
    "strict": Protocol(extract_only_answer, standard.JUDGES | standard.STRICT_JUDGES),
    "standard": Protocol(extract_answer, standard.JUDGES),
    "lenient": Protocol(lenient.find_answer, lenient.JUDGES),
}
STANDARD = PROTOCOLS["standard"]
