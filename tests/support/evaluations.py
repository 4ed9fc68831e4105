"""An evaluation without a model: questions in a file, and an engine whose answers are a function of the question."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.evaluation.asking.directory import OutputDirectory
from megatron_ktr.evaluation.asking.questions import QuestionMaker
from megatron_ktr.evaluation.asking.run import Publisher, evaluate
from megatron_ktr.evaluation.asking.scaling import Voting
from megatron_ktr.evaluation.asking.settings import BenchmarkSettings, EvaluationSettings
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.item import Answer, Condition
from megatron_ktr.evaluation.reading.benchmark_files import ReadBenchmark, named_benchmarks, read_benchmark
from megatron_ktr.evaluation.results.publish import publish

PLAIN = (Condition(16), Condition(16, "hidden"))


def write_questions(path: Path, *, number: int, **changes: Any) -> Path:
    """A file of ``number`` questions without media, of two tasks; ``changes`` are fields of the first."""
    records = [
        {
            "problem_id": f"q{place}",
            "problem": f"What is number {place}?",
            "options": ["A. red", "B. blue", "C. green", "D. black"],
            "problem_type": "multiple choice",
            "solution": f"<answer>{'ABCD'[place % 4]}</answer>",
            "task": ("colour", "order")[place % 2],
        }
        for place in range(number)
    ]
    records[0].update(changes)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(records))
    return path


class FakeEngine(AnswerEngine):
    """Holds ``capacity`` questions open and answers the third of them first, so that answers come in another order."""

    def __init__(self, *, capacity: int = 5, identity: str = "fake") -> None:
        self.identity = {"engine": identity}
        self.capacity = capacity
        self.asked: list[Question] = []
        self.before_answer: Callable[[Question], None] = lambda question: None
        """Called before each answer; may raise ``EngineFailed``, or anything else."""

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        waiting: deque[Question] = deque()
        is_more = True
        while is_more or waiting:
            while is_more and len(waiting) < self.capacity:
                question = next(questions, None)
                if question is None:
                    is_more = False
                else:
                    self.asked.append(question)
                    waiting.append(question)
            if waiting:
                question = waiting[min(2, len(waiting) - 1)]
                waiting.remove(question)
                yield question, self._reply(question)

    def _reply(self, question: Question) -> Answer | EngineFailed:
        try:
            self.before_answer(question)
        except EngineFailed as error:
            return error
        return answer_to(question)


def answer_to(question: Question) -> Answer:
    """One in five has no answer block, one in seven is cut off."""
    parts = [part for message in question.record["messages"] for part in message["content"]]
    asked = f"{json.dumps(parts)} {question.seed} {question.key} {question.sampling}"
    noise = int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=4).digest(), "little")
    letter = "ABCD"[noise % 4]
    text = (
        f"<think>Number {noise}.</think>\n<answer>{letter}</answer>" if noise % 5 else f"It is {noise} \u2028 \ud800."
    )
    return Answer(text, num_tokens=noise % 90, num_prompt_tokens=30, seconds=0.5, is_finished=bool(noise % 7))


def settings_of(
    read: ReadBenchmark,
    *,
    conditions: Sequence[Condition] = PLAIN,
    identity: dict[str, str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> EvaluationSettings:
    asked = BenchmarkSettings(
        path=str(read.path),
        media_root=str(read.media_root),
        wording=read.wording.describe(),
        wording_digest=read.wording.digest,
        sampling=read.benchmark.sampling,
        frames=read.benchmark.frames,
        num_items=read.num_items,
        limit=None if len(read.items) == read.num_items else len(read.items),
    )
    return EvaluationSettings(
        model="fake",
        identity=identity or {"engine": "fake"},
        seed=seed,
        preprocess={"factor": 28},
        voting=Voting(),
        benchmarks={read.name: asked},
        asked=tuple((read.name, condition) for condition in conditions),
        **changes,
    )


def run_evaluation(
    file: Path,
    out: Path,
    engine: AnswerEngine,
    *,
    conditions: Sequence[Condition] = PLAIN,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """What the command does with a question file, without workers; returns what has no answer."""
    (named,) = named_benchmarks([str(file)], root=None)
    read = read_benchmark(named, media_root=None, wording=None, limit=limit, seed=seed)
    settings = settings_of(read, conditions=conditions, identity=dict(engine.identity), seed=seed)
    with OutputDirectory(out) as directory:
        directory.take_over(settings, read.items)
        maker = QuestionMaker(
            directory.outcomes.settings,
            key_of=directory.outcomes.key,
            preprocess=PreprocessSettings(),
            media_roots={read.name: read.media_root},
            wordings={read.name: read.wording},
        )
        outcomes, store = directory.outcomes, directory.store

        def write_results(*, is_partial: bool = True) -> None:
            publish(out, outcomes.evaluation(store.get), protocol="official", is_partial=is_partial)

        often = Publisher(write_results, every_seconds=0.0)
        missing = evaluate(engine, outcomes=outcomes, asked=settings.asked, maker=maker, store=store, publisher=often)
        write_results(is_partial=False)
    return dict(missing)
