"""Answers questions with vLLM in processes of its own, on all GPUs at hand (``rollout/vllm/offline.py``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.engines.local import LocalModel
from megatron_ktr.evaluation.engines.prompts import CannotAsk, num_frames
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.rollout.vllm.offline import Finished, OfflineEngine, OfflineSettings


@dataclass(frozen=True)
class _Open:
    question: Question
    num_prompt_tokens: int
    began: float


class OfflineAnswers(AnswerEngine):
    """Keeps ``max_num_seqs`` questions open in every group."""

    def __init__(self, model: LocalModel, settings: OfflineSettings, *, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        self._prompts = model.prompts
        self._engine = OfflineEngine(settings, media=model.media, end_token_ids=model.end_token_ids)
        self._per_group = settings.max_num_seqs
        self._num_asked = 0
        self.capacity = self._per_group * self._engine.num_groups

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        """See ``AnswerEngine``. The questions that were open in a process that died are failures; others go on in the
        processes that are left.

        Raises:
            UserError: no process is left.
        """
        asked: dict[str, _Open] = {}
        has_more = True
        while True:
            while has_more and len(asked) < self._per_group * self._engine.num_groups:
                question = next(questions, None)
                if question is None:
                    has_more = False
                    break
                try:
                    prompt, sampling = self._prompts.make(question)
                except CannotAsk as error:
                    yield question, Answer("", problem=str(error))
                    continue
                # The same question may be asked a second time while vLLM forgets the first.
                self._num_asked += 1
                name = f"{self._num_asked} {question.key}"
                asked[name] = _Open(question, len(prompt.token_ids), time.perf_counter())
                self._engine.submit(name, prompt, sampling)
            if asked:
                for finished in self._engine.finished():
                    found = asked.pop(finished.name)
                    yield found.question, _answer(finished, found)
            elif not has_more:
                return
            if has_more and not self._engine.num_groups:
                raise UserError(f"every vLLM process has ended; the last one: {self._engine.last_words}")

    @property
    def num_groups(self) -> int:
        """Data-parallel groups that are alive."""
        return self._engine.num_groups

    def close(self) -> None:
        """See ``AnswerEngine``."""
        self._engine.close()


def _answer(finished: Finished, asked: _Open) -> Answer | EngineFailed:
    if finished.failure:
        return EngineFailed(finished.failure)
    if finished.refusal:
        return Answer("", problem=f"vLLM does not take it: {finished.refusal}")
    return Answer(
        text=finished.text,
        num_tokens=finished.num_tokens,
        num_prompt_tokens=asked.num_prompt_tokens,
        num_frames=num_frames(asked.question.media),
        seconds=time.perf_counter() - asked.began,
        is_finished=finished.is_finished,
    )
