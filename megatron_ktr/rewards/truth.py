"""The right answer of a question, against which answers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.rewards.text import extract_answer


@dataclass(frozen=True)
class Truth:
    """The right answer of one question."""

    text: str
    """The right answer without its ``<answer>`` tags. If it is empty, no answer is right, except under ``official``."""
    options: tuple[str, ...] = ()
    """The options of a multiple-choice question, as the record lists them."""
    is_written: bool = True
    """False if the record gives a JSON float: it states a value, but not with how many digits to write it."""

    @classmethod
    def of(cls, solution: str | int | float, *, options: Sequence[str] = ()) -> Truth:
        """Makes the truth from a record's ``solution``: text with or without ``<answer>`` tags, or a JSON number."""
        if isinstance(solution, str):
            inside = extract_answer(solution)
            return cls(solution.strip() if inside is None else inside, tuple(options))
        is_whole = isinstance(solution, float) and solution.is_integer()
        return cls(str(int(solution) if is_whole else solution), tuple(options), isinstance(solution, int))
