"""Evaluation between the steps of a training run, by the run's own engine.

    for each set of held-out questions
        each replica takes every n-th question, a few dozens at a time
            the reading rank    decodes media, words and tokenises the questions
            all ranks           the engine answers them with the weights of the last step (``ReplicaSource.sample``)
    rank 0      judges all answers, writes ``eval/step_XXXXXXXX``, and tells everyone the figures

A run that is resumed with further sets asks them alone of the step that it goes on from. Their directory is then
``eval/step_XXXXXXXX_2``: the answers to the sets of before stay where they are.

Everything but the sampling is what ``tools/evaluate.py`` does. The directory is one of its output directories: its
``report`` adds the page, and its ``compare`` reads it. It appears under its name when it is complete.

The metrics of a set, shares of its questions:

    eval/<set>/accuracy              under the protocol ``official``: the figure of the tool and of the paper's table
    eval/<set>/strict, .../lenient   under the other protocols, and under those that the benchmark has of its own
    eval/<set>/format                of the questions that were asked: responses with reasoning and answer blocks
    eval/<set>/truncated             of the questions that were asked: responses that were cut off
    eval/<set>/unusable              questions that could not be asked and count as wrong
    eval/<set>/response_length       in tokens, of the questions that were asked
    eval/<set>/<axis>/<category>     accuracy in a category, of axes that have few
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.distributed.agreement import gather_objects, on_every_rank, result_of_rank_zero
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.outcomes import Outcomes, write_items
from megatron_ktr.evaluation.asking.questions import Made, QuestionMaker, QuestionStream
from megatron_ktr.evaluation.asking.scaling import Ask
from megatron_ktr.evaluation.asking.settings import EvaluationSettings, read_settings
from megatron_ktr.evaluation.asking.store import AnswerStore
from megatron_ktr.evaluation.engines.prompts import CannotAsk, PromptMaker, answer_of
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.evaluation.results.publish import publish
from megatron_ktr.evaluation.training.held_out import HeldOut, accuracy_of, logged_axes
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.run.directory import EVALUATIONS, step_name
from megatron_ktr.types import Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What all ranks know of the sets, though only reading ranks have read them."""

    names: tuple[str, ...]
    num_items: Mapping[str, int]
    sampling: Mapping[str, SamplingSettings]

    @classmethod
    def of(cls, held_out: HeldOut) -> Plan:
        asked = held_out.settings.benchmarks
        return cls(
            tuple(one.name for one in held_out.sets),
            {one.name: len(one.items) for one in held_out.sets},
            {
                name: SamplingSettings(
                    num_generations=1,
                    max_response_length=found.sampling.max_tokens,
                    temperature=found.sampling.temperature,
                    top_p=found.sampling.top_p,
                    top_k=found.sampling.top_k,
                    stop=found.sampling.stop,
                    presence_penalty=found.sampling.presence_penalty,
                    frequency_penalty=found.sampling.frequency_penalty,
                    seed=held_out.settings.seed,
                )
                for name, found in asked.items()
            },
        )


class TrainingEvaluation:
    """The evaluations of one run. Every rank holds one; calls are collective over the world."""

    def __init__(
        self,
        held_out: HeldOut | None,
        *,
        options: EvaluationOptions,
        ranks: ParallelGroups,
        source: ReplicaSource,
        prompts: PromptMaker,
        send_weights: Callable[[], None],
        make_pool: Callable[[], WorkerPool | None] = lambda: None,
    ) -> None:
        """
        Args:
            held_out: the questions, on reading ranks; None on the others.
            prompts: makes prompts of them.
            send_weights: gives the engine the weights of the policy; collective.
            make_pool: the processes that decode on a reading rank, or None: the rank decodes by itself.
        """
        self.options = options
        self._held_out = held_out
        self._ranks = ranks
        self._source = source
        self._prompts = prompts
        self._send_weights = send_weights
        self._make_pool = make_pool
        plan = None if held_out is None else Plan.of(held_out)
        self._plan: Plan = broadcast_object(plan, group=ranks.world, source=0)

    @property
    def figures(self) -> tuple[str, ...]:
        """A metric of each set."""
        return tuple(map(accuracy_of, self._plan.names))

    def __call__(
        self, step: int, *, is_leaving: Callable[[], bool], known: Collection[str] = ()
    ) -> dict[str, float] | None:
        """The metrics of the model that ``step`` left. None if the run is asked to leave before all is answered: then
        nothing is written, and the run that is resumed evaluates the step again. Sets whose ``figures`` are among
        ``known`` are not asked.

        Raises:
            UserError: on every rank: the engine failed, or the answers cannot be written.
        """
        names = [name for name in self._plan.names if accuracy_of(name) not in known]
        if not names:
            return {}
        held_out = None if self._held_out is None else self._held_out.without(set(self._plan.names) - set(names))
        settings = None if held_out is None else self._settings_of(held_out, step)
        answers: dict[str, Answer] = {}
        needs_weights = True
        with contextlib.closing(self._reader(held_out, settings)) as reader:
            for name in names:
                for _ in range(self._num_rounds(name)):
                    if is_leaving():
                        return None
                    if needs_weights:
                        self._send_weights()
                        needs_weights = not self._source.keeps_weights
                    answers |= self._round(name, reader, step=step)
        gathered = gather_objects(answers, group=self._ranks.world)
        everything = {key: answer for found in gathered for key, answer in found.items()}
        return result_of_rank_zero(lambda: self._finish(step, held_out, settings, everything), ranks=self._ranks)

    # Asking

    def _num_rounds(self, name: str) -> int:
        """How often the engine is asked for a set: equally often on all replicas, as the call is collective. (Replica 0
        has the most questions.)"""
        per_replica = -(-self._plan.num_items[name] // self._ranks.data_size)
        return -(-per_replica // self.options.questions_together)

    def _round(self, name: str, reader: _Reader, *, step: int) -> dict[str, Answer]:
        """The next answers of this replica, on its reading rank; empty on the others."""
        made, prompts, answers = on_every_rank(lambda: self._read(name, reader), ranks=self._ranks)
        prompts = self._source.from_local(prompts)
        started = time.perf_counter()
        groups = self._source.sample(prompts, sampling=self._plan.sampling[name])
        if self._held_out is None:
            return {}
        seconds = (time.perf_counter() - started) / max(len(prompts), 1)
        for one, prompt, group in zip(made, prompts, groups, strict=True):
            answers[one.key] = one.answered(answer_of(group.rollouts[0], prompt, seconds=seconds))
        return answers

    def _read(self, name: str, reader: _Reader) -> tuple[list[Made], list[Prompt], dict[str, Answer]]:
        """(questions that can be asked, their prompts, answers to those that cannot) of the next round."""
        asked: list[Made] = []
        prompts: list[Prompt] = []
        answers: dict[str, Answer] = {}
        wanted = self._plan.sampling[name].max_response_length
        for made in reader.next(name, self.options.questions_together):
            if made.question is None:
                answers[made.key] = Answer("", problem=made.problem)
                continue
            try:
                prompt, sampling = self._prompts.make(made.question)
                if sampling.max_response_length < wanted:
                    raise CannotAsk(
                        f"its prompt of {len(prompt.token_ids)} tokens leaves no room for a response of {wanted} "
                        f"(--max-prompt-length, --eval-max-tokens)"
                    )
            except CannotAsk as error:
                answers[made.key] = Answer("", problem=str(error))
                continue
            asked.append(made)
            prompts.append(prompt)
        return asked, prompts, answers

    def _reader(self, held_out: HeldOut | None, settings: EvaluationSettings | None) -> _Reader:
        if held_out is None or settings is None:
            return _Reader({}, pool=None)
        pool = self._make_pool()
        maker = QuestionMaker(
            settings,
            key_of=settings.key,
            preprocess=PreprocessSettings(**settings.preprocess),
            media_roots={one.name: one.media_root for one in held_out.sets},
            wordings={one.name: one.wording for one in held_out.sets},
        )
        streams = {}
        for one in held_out.sets:
            own = one.items[self._ranks.data_rank :: self._ranks.data_size]
            asks = [Ask(item, held_out.condition) for item in own]
            num_ahead = 2 * pool.num_workers if pool is not None else 1
            streams[one.name] = QuestionStream(maker, asks, pool=pool, num_ahead=num_ahead)
        return _Reader(streams, pool=pool)

    # Results

    def _settings_of(self, held_out: HeldOut, step: int) -> EvaluationSettings:
        run_dir = Path(self.options.run_dir)
        return dataclasses.replace(
            held_out.settings,
            model=f"{run_dir.name or run_dir} after step {step}",
            identity={"engine": f"training, {self.options.engine}", "run": str(run_dir), "step": str(step)},
        )

    def _finish(
        self,
        step: int,
        held_out: HeldOut | None,
        settings: EvaluationSettings | None,
        answers: Mapping[str, Answer],
    ) -> dict[str, float]:
        assert settings is not None and held_out is not None, "rank 0 reads"
        target = _place(Path(self.options.run_dir) / EVALUATIONS / step_name(step), settings)
        scratch = target.with_name(f".{target.name}")
        items = held_out.items
        asks = {settings.key(ask): ask for ask in (Ask(item, held_out.condition) for item in items)}
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            write_items(scratch, items)
            settings.write(scratch)
            with contextlib.closing(AnswerStore(scratch)) as store:
                for key, ask in asks.items():
                    facts = {"benchmark": ask.item.benchmark, "item_id": ask.item.item_id}
                    facts |= {"condition": ask.condition.name, "round": ask.round, "vote": ask.vote}
                    store.add(key, answers[key], facts)
                evaluation = Outcomes(settings, items).evaluation(store.get)
            # Without the page, for which all videos would be decoded once more.
            results = publish(scratch, evaluation, protocol="official", is_partial=True)
            shutil.rmtree(target, ignore_errors=True)  # of a run that died before it had recorded the figures
            scratch.rename(target)
        except OSError as error:
            raise UserError(f"--run-dir: cannot write {target}: {error.strerror or error}") from error
        _name_unusable(answers, asks, target)
        return figures_of_results(results, logged_axes(held_out))


def _place(directory: Path, settings: EvaluationSettings) -> Path:
    """Where an evaluation is written: ``directory``, or the first free name_2, name_3, ... if that holds answers to
    other sets. Answers to the same sets are replaced: they are of a run that died before it had recorded the figures,
    and a set stays what it is as long as the run has it (``same_sets.py``)."""
    number, place = 1, directory
    while place.exists() and not _holds(place, settings):
        number += 1
        place = directory.with_name(f"{directory.name}_{number}")
    return place


def _holds(directory: Path, settings: EvaluationSettings) -> bool:
    try:
        found = read_settings(directory)
    except UserError:  # damaged: what is left of it stays
        return False
    return found is not None and found.benchmarks.keys() == settings.benchmarks.keys()


class _Reader:
    """The questions of this replica, in the order of its sets."""

    def __init__(self, streams: Mapping[str, QuestionStream], *, pool: WorkerPool | None) -> None:
        self._streams = streams
        self._iterators: dict[str, Iterator[Made]] = {name: iter(stream) for name, stream in streams.items()}
        self._pool = pool

    def next(self, name: str, number: int) -> list[Made]:
        """The next ``number`` questions of a set, fewer at its end. None on ranks that do not read."""
        return list(itertools.islice(self._iterators[name], number)) if self._iterators else []

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        if self._pool is not None:
            self._pool.close()


def figures_of_results(results: Mapping[str, Any], axes: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, float]:
    """The metrics of ``results.json`` (``aggregate.results_of``) with one condition. ``axes`` are those to log."""
    values: dict[str, float] = {}
    for name, benchmark in results["benchmarks"].items():
        (found,) = benchmark["conditions"]
        prefix = f"eval/{name}"
        for protocol, figures in found["protocols"].items():
            values[f"{prefix}/{'accuracy' if protocol == 'official' else protocol}"] = figures["accuracy"]
        num_asked = found["num_asked"]
        if num_asked:
            values[f"{prefix}/format"] = found["format_rate"]
            values[f"{prefix}/truncated"] = found["num_truncated"] / num_asked
            values[f"{prefix}/response_length"] = found["cost"]["response_tokens"]
        values[f"{prefix}/unusable"] = 1 - num_asked / found["num_items"]
        by_category = found["protocols"]["official"]["by_category"]
        for axis, categories in axes.get(name, {}).items():
            for category in categories:
                values[f"{prefix}/{axis}/{category}"] = by_category[axis][category]["accuracy"]
    return values


def _name_unusable(answers: Mapping[str, Answer], asks: Mapping[str, Ask], target: Path) -> None:
    unusable = [(asks[key].item, answer.problem) for key, answer in answers.items() if answer.problem]
    if unusable:
        item, reason = unusable[0]
        _log.warning(
            "evaluation: %d questions could not be asked and count as wrong (first: %s/%s: %s); all of them: %s",
            len(unusable),
            item.benchmark,
            item.item_id,
            reason,
            target / "results.json",
        )
