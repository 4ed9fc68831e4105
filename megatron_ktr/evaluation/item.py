"""What evaluation works with: questions of benchmarks, the ways of asking them, answers, and verdicts on answers.

Item -- asked under a Condition --> Answer (one, or several if the condition votes) -- judged --> Outcome
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Control = Literal["intact", "shuffled", "blank", "hidden"]
"""What the model is shown of the media.

intact     the media as they are
shuffled   the frames in random order, which removes their order
blank      every pixel black, which removes all that can be seen
hidden     no media at all: the question as text alone
"""
CONTROLS: tuple[Control, ...] = get_args(Control)


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    benchmark: str
    """Name of the benchmark, as in ``registry.BENCHMARKS``; for a file of one's own, the file's name without ending."""
    item_id: str
    """The benchmark's own identity of the question, unique within the benchmark."""
    record: Mapping[str, Any]
    """The question as a checked record (``data/records.py``): problem, options, problem_type, solution, media, ..."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Value by axis, e.g. {"subtask": "TCI"}. The axes are those of the benchmark."""
    video_id: str = ""
    """Questions with the same video belong together when confidence intervals are resampled."""


@dataclass(frozen=True)
class Condition:
    """How the questions of one column of the table are asked."""

    frames: int
    """The most frames of a video that the model is shown."""
    control: Control = "intact"
    scaling: str = "single"
    """``single``: one answer. ``votes:N`` or ``sparse_to_dense``: the majority of several (``scaling.py``)."""

    @property
    def name(self) -> str:
        """The name of the column, such as "32", "32 shuffled" or "32 votes:5"."""
        words = [str(self.frames), *([self.control] if self.control != "intact" else [])]
        return " ".join([*words, *([self.scaling] if self.scaling != "single" else [])])


@dataclass(frozen=True)
class Answer:
    """What an engine said to one question, or why nothing could be asked."""

    text: str
    num_tokens: int = 0
    """Tokens of the response, as the engine counts them; 0 if it does not tell."""
    num_prompt_tokens: int = 0
    num_frames: int = 0
    """Frames that were shown."""
    seconds: float = 0.0
    """From sending the question until the answer was complete; questions that are answered together share the time."""
    is_finished: bool = True
    """False if the response was cut off at the limit of tokens."""
    problem: str = ""
    """Why the question could not be asked (its media cannot be decoded, ...). Such an item counts as wrong."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one answer under one protocol."""

    score: float
    """In [0, 1]."""
    answer: str | None
    """What the protocol read as the answer; None if it found none."""


@dataclass(frozen=True)
class Outcome:
    """One item under one condition: its answers and the verdicts on the one that counts."""

    item: Item
    condition: Condition
    answers: tuple[Answer, ...]
    """In the order in which they were asked; more than one if the condition votes."""
    text: str
    """The response that is judged: the only one, or one that gave the answer of the majority."""
    verdicts: Mapping[str, Verdict]
    """By protocol: official, strict, lenient, and others that the benchmark has."""
    has_format: bool
    """Whether the response is a reasoning block and an answer block."""

    @property
    def problem(self) -> str:
        """Why the item could not be asked; "" if it could."""
        return next((answer.problem for answer in self.answers if answer.problem), "")

    @property
    def is_truncated(self) -> bool:
        """Whether one of the responses was cut off."""
        return any(not answer.is_finished for answer in self.answers)


@dataclass(frozen=True)
class Evaluation:
    """All that an output directory holds, complete or not."""

    settings: Mapping[str, Any]
    """As in the directory's ``settings.json``: model, engine, benchmarks, sampling, ..."""
    items: tuple[Item, ...]
    conditions: tuple[Condition, ...]
    outcomes: tuple[Outcome, ...]
    """Of the items that are answered so far."""

    @property
    def num_wanted(self) -> int:
        return len(self.items) * len(self.conditions)
