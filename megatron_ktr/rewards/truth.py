"""What an answer is judged against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.rewards.text import extract_answer


@dataclass(frozen=True)
class Truth:
    """The right answer of one question."""

    text: str
    """Without its ``<answer>`` tags; nothing is right where it is empty."""
    options: tuple[str, ...] = ()
    """Of a multiple-choice question, as the record lists them."""
    is_written: bool = True
    """False for a JSON number, which says how much but not with how many digits to write it."""

    @classmethod
    def of(cls, solution: str | int | float, *, options: Sequence[str] = ()) -> Truth:
        """From a record's ``solution``: text with or without ``<answer>`` tags, or a JSON number."""
        if isinstance(solution, str):
            inside = extract_answer(solution)
            return cls(solution.strip() if inside is None else inside, tuple(options))
        is_whole = isinstance(solution, float) and solution.is_integer()
        return cls(str(int(solution) if is_whole else solution), tuple(options), isinstance(solution, int))
