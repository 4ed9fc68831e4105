"""The interface of everything that answers the questions of an evaluation: local models, servers, paid services."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ktr.evaluation.item import Answer
from megatron_ktr.types import VisualInput


@dataclass(frozen=True)
class AnswerSampling:
    """How a response is sampled; temperature 0 is greedy. All other settings of an engine are neutral, whatever the
    model's generation config says."""

    max_tokens: int = 1024
    temperature: float = 0.1
    top_p: float = 0.001
    top_k: int = 0
    """0: all tokens."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end a response. They stay in it."""


@dataclass(frozen=True)
class Question:
    """One question as an engine is asked it."""

    key: str
    """Identifies the answer in the store."""
    record: Mapping[str, Any]
    """A record with ``messages`` (``data/conversation.py``) and ``system_text``: what ``PromptBuilder.build`` takes.
    Parts of the messages that are media stand for ``media``, in order."""
    media: tuple[VisualInput, ...]
    """Decoded and resized, with the control applied."""
    sampling: AnswerSampling
    seed: int = 0
    """The evaluation's. Together with ``identity`` it seeds the sampling, so that a batch may have one seed."""
    draw: str = ""
    """What is asked, without the model: every model is given the same random numbers. Empty: the key."""

    @property
    def identity(self) -> str:
        """Tells the random numbers of this question from those of all others."""
        return self.draw or self.key


class EngineFailed(Exception):
    """The engine gave no answer, though the question is sound: a server was away, refused or ran out of memory. Nothing
    is stored for the question, so that a later run asks it again."""


class AnswerEngine(ABC):
    """Answers questions as they come."""

    identity: Mapping[str, str]
    """What tells this model from another: kind of engine, digest of the weights or the served name, ... Never a key."""
    capacity: int
    """How many questions should be open at a time to keep the engine busy."""

    @abstractmethod
    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        """Takes questions from the iterator while fewer than ``capacity`` are open, and yields each with its answer as
        soon as it is complete, in any order.

        A question that this model cannot take (too long for its context) is answered with ``Answer.problem`` set.
        """

    def close(self) -> None:  # noqa: B027 - some engines hold nothing that outlives them
        """Frees devices, processes and connections. The engine must not be used afterwards."""
