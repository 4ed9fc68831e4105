"""Asks an engine what an output directory lacks, and stores each answer as it comes.

    while there are questions of which it is known that they are needed, and that are not answered:
        ask them in their order, store what is answered, put aside what the engine fails on
    the same once more for what was put aside

The order does not change the result: answers are found by what was asked. A run that ends at any moment is continued by
the same command.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.evaluation.asking.outcomes import Outcomes
from megatron_ktr.evaluation.asking.progress import Progress
from megatron_ktr.evaluation.asking.questions import Made, QuestionMaker, QuestionStream
from megatron_ktr.evaluation.asking.scaling import Ask
from megatron_ktr.evaluation.asking.store import AnswerStore
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.item import Answer, Condition

_LEAST_FAILURES = 20
"""So many failures without an answer between them end a run, or twice the engine's capacity if that is more: an engine
that is gone would otherwise be asked every question, with all its patience, in vain."""
_MOST_SHARE = 0.05
"""Of the time may go to results that are not the last."""


class Left(BaseException):
    """A signal asked the evaluation to end. Not an ``Exception``, so that no engine takes it for a failure."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Left`` inside, once; a second one has its usual effect. For the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def leave(number: int, frame: FrameType | None) -> None:
        restore()
        raise Left(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        restore()


@dataclass
class Publisher:
    """Writes results while the evaluation runs: seldom, and the seldomer the longer it takes."""

    publish: Callable[[], object]
    every_seconds: float = 30.0
    _last: float = field(default_factory=time.monotonic)
    _seconds: float = 0.0

    def answered(self) -> None:
        if time.monotonic() - self._last >= max(self.every_seconds, self._seconds / _MOST_SHARE):
            started = time.monotonic()
            self.publish()
            self._last = time.monotonic()
            self._seconds = self._last - started


def evaluate(
    engine: AnswerEngine,
    *,
    outcomes: Outcomes,
    asked: Sequence[tuple[str, Condition]],
    maker: QuestionMaker,
    store: AnswerStore,
    pool: WorkerPool | None = None,
    publisher: Publisher | None = None,
) -> Mapping[str, str]:
    """Stores the answers to all questions of ``asked`` (benchmark, condition). Returns, by key, why those that have no
    answer have none: empty if all went well.

    Raises:
        UserError: the store cannot be written.
    """
    known = outcomes.known_asks(asked, store.get)
    num_done = sum(key in store for key in known)
    with Progress(num_done=num_done, num_wanted=len(known)) as progress:
        asking = _Asking(engine, outcomes, maker=maker, store=store, pool=pool, progress=progress)
        asking.publisher = publisher
        for _ in range(2):
            asking.failures.clear()
            while missing := asking.missing(asked):
                asking.ask(missing)
                if asking.is_engine_gone:
                    return {
                        key: asking.failures.get(key, "not asked") for key in asking.missing(asked, also_failed=True)
                    }
        return dict(asking.failures)


class _Asking:
    """The state of ``evaluate``."""

    def __init__(
        self,
        engine: AnswerEngine,
        outcomes: Outcomes,
        *,
        maker: QuestionMaker,
        store: AnswerStore,
        pool: WorkerPool | None,
        progress: Progress,
    ) -> None:
        self.engine, self.outcomes, self.maker, self.store, self.pool = engine, outcomes, maker, store, pool
        self.progress = progress
        self.publisher: Publisher | None = None
        self.failures: dict[str, str] = {}
        self._num_failed_in_a_row = 0
        self._open: dict[str, Made] = {}
        self._unaskable: deque[Made] = deque()
        """Filled where the engine takes questions, which may be another thread; emptied by the one that stores."""

    @property
    def is_engine_gone(self) -> bool:
        return self._num_failed_in_a_row >= max(_LEAST_FAILURES, 2 * self.engine.capacity)

    def missing(self, asked: Sequence[tuple[str, Condition]], *, also_failed: bool = False) -> dict[str, Ask]:
        known = self.outcomes.known_asks(asked, self.store.get)
        self.progress.set_wanted(len(known))
        aside = () if also_failed else self.failures
        return {key: ask for key, ask in known.items() if key not in self.store and key not in aside}

    def ask(self, asks: Mapping[str, Ask]) -> None:
        """Puts every question to the engine; what it gives no answer to is in ``failures`` afterwards."""
        num_ahead = 2 * self.pool.num_workers if self.pool is not None else 1
        stream = QuestionStream(self.maker, list(asks.values()), pool=self.pool, num_ahead=num_ahead)
        answers = self.engine.answer(self._sound(stream))
        try:
            for question, answer in answers:
                self._store_unaskable()
                self._take(question, answer)
                if self.is_engine_gone:
                    return
            self._store_unaskable()
        finally:
            self._open.clear()
            stream.close()
            close = getattr(answers, "close", None)
            if close is not None:
                close()
        for key in asks:
            if key not in self.store and key not in self.failures:
                self._fail(key, "the engine gave nothing back")

    def _sound(self, stream: QuestionStream) -> Iterator[Question]:
        for made in stream:
            if made.question is None:
                self._unaskable.append(made)
            else:
                self._open[made.key] = made
                yield made.question

    def _take(self, question: Question, answer: Answer | EngineFailed) -> None:
        made = self._open.pop(question.key)
        if isinstance(answer, EngineFailed):
            self._fail(made.key, str(answer) or "no reason given")
            return
        self._num_failed_in_a_row = 0
        self._add(made, made.answered(answer))

    def _fail(self, key: str, reason: str) -> None:
        self._num_failed_in_a_row += 1
        self.failures[key] = reason
        self.progress.failed(reason)

    def _store_unaskable(self) -> None:
        while self._unaskable:
            made = self._unaskable.popleft()
            self._add(made, Answer("", problem=made.problem))

    def _add(self, made: Made, answer: Answer) -> None:
        ask = made.ask
        facts = {"benchmark": ask.item.benchmark, "item_id": ask.item.item_id, "condition": ask.condition.name}
        self.store.add(made.key, answer, {**facts, "round": ask.round, "vote": ask.vote})
        self.progress.answered()
        if self.publisher is not None:
            self.publisher.answered()
