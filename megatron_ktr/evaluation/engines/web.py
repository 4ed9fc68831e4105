"""Answers questions by requests to a server (``web/client.py``): what ``chat.py`` and ``served.py`` share."""

from __future__ import annotations

import contextlib
import queue
import time
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.web.client import REDIRECTED, Loop, NoReply, Refusal, Web


class WebAnswers(AnswerEngine):
    """Keeps ``capacity`` questions open at one server."""

    def __init__(self, web: Web, loop: Loop, *, capacity: int) -> None:
        self.capacity = capacity
        self._web, self._loop = web, loop
        self._has_answered = False
        """Whether the server has answered a question. Until then a refusal is about settings, not about a question."""

    @abstractmethod
    async def _ask(self, question: Question) -> Answer:
        """The answer to one question, without ``seconds``.

        Raises:
            EngineFailed: there is none.
            UserError: no question will be answered.
        """

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        """See ``AnswerEngine``.

        Raises:
            UserError: the server refuses all questions. Those that are open then are not answered.
        """
        done: queue.SimpleQueue[tuple[Question, Future[Answer]]] = queue.SimpleQueue()
        asked: set[Future[Answer]] = set()
        has_more = True
        try:
            while True:
                while has_more and len(asked) < self.capacity and done.empty():
                    question = next(questions, None)
                    if question is None:
                        has_more = False
                        break
                    future = self._loop.start(self._timed(question))
                    asked.add(future)
                    future.add_done_callback(lambda found, question=question: done.put((question, found)))
                if not asked:
                    return
                question, future = done.get()
                asked.discard(future)
                try:
                    answer: Answer | EngineFailed = future.result()
                except EngineFailed as error:
                    answer = error
                yield question, answer
        finally:
            for future in asked:
                future.cancel()

    def close(self) -> None:
        """See ``AnswerEngine``."""
        # All answers are there: a connection that cannot be closed in order is dropped with the loop.
        with contextlib.suppress(Exception):
            self._loop.start(self._web.close()).result(timeout=10)
        self._loop.close()

    async def _timed(self, question: Question) -> Answer:
        began = time.perf_counter()
        try:
            answer = await self._ask(question)
        except Refusal as error:
            answer = self._refused(error)
        except NoReply as error:
            raise EngineFailed(str(error)) from error
        self._has_answered = True
        return Answer(**{**vars(answer), "seconds": time.perf_counter() - began})

    def _refused(self, error: Refusal) -> Answer:
        """The answer to a question that is refused as too long or by a filter; raises for all others."""
        if (problem := problem_of(error)) is not None:
            return Answer("", problem=problem)
        is_first = not self._has_answered
        if error.status in (401, 402) or 300 <= error.status < 400 or (is_first and error.status in (403, 404)):
            raise UserError(f"{self._web.address.api} refuses the questions: {error}{_advice(error.status)}")
        raise EngineFailed(f"refused: {error}")


_TOO_LONG = (
    "context length",
    "context_length",
    "maximum model length",
    "max_model_len",
    "context window",
    "too many tokens",
)
_FILTERED = ("content_filter", "content_policy", "content management policy", "responsibleai")


def problem_of(error: Refusal) -> str | None:
    """Why the server cannot take this question, though it takes others; None if the refusal says something else."""
    if error.status not in (400, 413, 422):
        return None
    said = f"{error.code} {error.said}".lower()
    if any(words in said for words in _TOO_LONG):
        return f"too long for the server's model: {error.message}"
    if any(words in said for words in _FILTERED):
        return f"the server's filter refuses it: {error.message}"
    return None


def _advice(status: int) -> str:
    if 300 <= status < 400:
        return REDIRECTED
    if status in (401, 403):
        return " (the key: --api-key-env NAME)"
    return " (the address and the model's name: --server-url, --served-model)" if status == 404 else ""
