"""Answers questions with anything that samples responses to prompts in batches: Hugging Face's model, or the engine of
a training run between two of its steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.engines.prompts import CannotAsk, PromptMaker, answer_of
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, RolloutGroup

Sample = Callable[[Sequence[Prompt], SamplingSettings], Sequence[RolloutGroup]]
"""The group of every prompt, in order. Each group has one response."""
Asked = list[tuple[Question, Prompt]]


class RolloutAnswers(AnswerEngine):
    """Takes ``capacity`` questions at a time and samples those with equal settings together.

    Questions of a batch share its time: each has the batch's seconds divided by its number of questions.
    """

    def __init__(
        self,
        sample: Sample,
        *,
        prompts: PromptMaker,
        capacity: int,
        identity: Mapping[str, str],
        close: Callable[[], None] | None = None,
    ) -> None:
        self.capacity = capacity
        self.identity = dict(identity)
        self._sample = sample
        self._prompts = prompts
        self._close = close

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        """See ``AnswerEngine``."""
        while batch := list(itertools.islice(questions, self.capacity)):
            alike: dict[SamplingSettings, Asked] = {}
            for question in batch:
                try:
                    prompt, sampling = self._prompts.make(question)
                except CannotAsk as error:
                    yield question, Answer("", problem=str(error))
                    continue
                alike.setdefault(sampling, []).append((question, prompt))
            for sampling, asked in alike.items():
                yield from self._answers(asked, sampling)

    def close(self) -> None:
        """See ``AnswerEngine``."""
        if self._close is not None:
            self._close()

    def _answers(self, asked: Asked, sampling: SamplingSettings) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        began = time.perf_counter()
        try:
            groups = self._sample([prompt for _, prompt in asked], sampling)
        except EngineFailed as error:
            yield from ((question, error) for question, _ in asked)
            return
        seconds = (time.perf_counter() - began) / len(asked)
        for (question, prompt), group in zip(asked, groups, strict=True):
            yield question, answer_of(group.rollouts[0], prompt, seconds=seconds)
