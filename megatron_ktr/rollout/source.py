"""The source of the trainer's groups of responses: every rank holds one ``ReplicaSource``.

One rank of each replica, its *reading rank* (``ParallelGroups.is_source``), reads files. It sends what it draws
(``data/source.py``, ``replay.py``) to the other ranks of the replica. A video is thus decoded once per replica, and a
skipped sample is skipped on all ranks. If responses are to be sampled, an engine answers the prompts, and rewards are
computed while it still generates.

    begin(step)     draws the prompts; with ``lag`` 1 it also starts generation in a background thread
    finish()        returns the groups with rewards, on every rank of the replica
    sample(prompts) answers other prompts between steps: those of the sampler check, and of evaluation

An error on one rank is raised on every rank of the world (``on_every_rank``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ktr.data.source import DatasetSource
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import StepAbandoned
from megatron_ktr.rewards import DEFAULT_REWARDS, Rewarder
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.second_prompt import (
    SHUFFLED,
    Question,
    SecondPrompt,
    SecondsAlone,
    ask_twice,
    counts_of_questions,
    joined,
    prompts_of,
    with_prompts,
)
from megatron_ktr.types import Prompt, Rollout, RolloutGroup


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An engine and the rewards of its responses."""

    engine: RolloutEngine
    rewards: tuple[str, ...] = DEFAULT_REWARDS
    rewarder: Rewarder = dataclasses.field(default_factory=Rewarder)
    """Computes them."""
    rewards_of_source: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The reward parts of the sources of a mixture (``Prompt.source``) that have their own."""
    second: SecondPrompt | None = None
    """What is asked a second time, with shuffled frames; None if nothing is."""
    seconds_alone: SecondsAlone = dataclasses.field(default_factory=SecondsAlone)

    def answer(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """The groups of ``questions`` with responses and their rewards, those to second prompts among them. A group
        that a collective engine does not yield on this rank is returned unchanged.

        The rewards of a prompt's responses are computed in a separate thread as soon as the last of them is complete,
        several groups at a time if users' functions have several processes.
        """
        counts = counts_of_questions(questions, second=self.second)
        prompts = prompts_of(questions)
        found = self.engine.stream(prompts, step=step, counts=counts)
        num_first = len(questions)
        with ThreadPoolExecutor(self.rewarder.num_threads, thread_name_prefix="rewards") as pool:
            rewarded: dict[int, Future[list[RolloutGroup]]] = {}
            timed = self.seconds_alone.timed(found, num_first=num_first, num_second=len(prompts) - num_first)
            try:
                for place, group in timed:
                    names = self.rewards_of_source.get(group.prompt.source, self.rewards)
                    rewarded[place] = pool.submit(self.rewarder.reward, [group], names=names)
                return joined(questions, ((place, result.result()[0]) for place, result in rewarded.items()))
            except BaseException:  # the run ends: nobody waits for rewards that hang
                pool.shutdown(wait=False, cancel_futures=True)
                self.rewarder.close()
                raise


class ReplicaSource:
    """The source that the trainer draws from, on every rank.

    ``local`` reads the data; it is None except on the reading rank of each replica. ``sampler`` answers the prompts
    drawn. It exists on reading ranks only, or on every rank if its engine is collective. Its settings are taken from
    the reading rank, so that the other ranks need not know whether there is a sampler.
    """

    def __init__(
        self,
        local: DatasetSource | None,
        *,
        ranks: ParallelGroups,
        sampler: Sampler | None = None,
        lag: int = 0,
        prepare: Callable[[Sequence[Prompt]], list[Prompt]] | None = None,
        samples_steps: bool = True,
    ) -> None:
        """
        Args:
            prepare: turns prompts into those that the engine sees, for instance by adding vision features. It is
                collective and called on every rank.
            samples_steps: if False, the groups of steps have their responses already, and the sampler answers only
                ``sample``.
        """
        if (local is not None) != ranks.is_source:
            raise ValueError("exactly the source rank of each replica must hold a source")
        self.local = local
        self.sampler = sampler
        self.lag = lag
        self._ranks = ranks
        self._prepare = prepare
        self._num_skipped = 0
        self._counts: Mapping[str, int] = {}
        self._seconds_drawing = 0.0
        self._data_wait_seconds = 0.0
        self._shuffled_seconds = 0.0
        self._drawn: _Draw | None = None
        self._recorded: dict[str, tuple[Rollout, ...]] = {}
        engine = None if sampler is None else sampler.engine
        about = engine and (engine.gather_weights_to, engine.runs_vision_encoder, engine.keeps_weights)
        about, self._second = self.from_local((about, sampler and sampler.second))
        self.has_engine = about is not None
        self.needs_weights = self.has_engine and samples_steps
        self.gather_weights_to: Literal["all", "source"]
        self.gather_weights_to, self.needs_vision_weights, self.keeps_weights = about or ("source", False, True)
        is_ahead = lag and samples_steps and sampler is not None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rollout") if is_ahead else None

    @property
    def pending_step(self) -> int | None:
        """The step for which ``begin`` was called and ``finish`` not yet; None if there is none."""
        return None if self._drawn is None else self._drawn.step

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Gives the policy's exported weights to the engine. The iterator is collective and is always exhausted."""

        def load() -> None:
            try:
                if self.sampler is not None:
                    self.sampler.engine.load_weights(named_tensors)
            finally:
                # Ranks without an engine must iterate too, because each tensor is gathered by all ranks. So must a
                # reading rank that has failed, because the others learn of it only after the last tensor.
                for _ in named_tensors:
                    pass

        on_every_rank(load, ranks=self._ranks)

    def begin(self, num_prompts: int, *, step: int) -> None:
        """Draws ``num_prompts`` prompts for this replica. With ``lag`` 1, their responses are then sampled in the
        background."""

        def read() -> tuple[dict[str, Any], list[RolloutGroup]] | None:
            if self.local is None:
                return None
            before, started = self.local.state_dict(), time.perf_counter()
            groups = self.local.next(num_prompts)
            self._seconds_drawing = time.perf_counter() - started
            return before, groups

        state, groups = self.from_local(on_every_rank(read, ranks=self._ranks))
        asked = self._asked(groups, step=step) if self.needs_weights else []
        self._drawn = _Draw(step, groups, asked=asked, state_before=state)
        if self._background is not None:
            self._drawn.answers = self._background.submit(self._answer, self._drawn)

    def finish(self) -> list[RolloutGroup]:
        """The groups whose prompts ``begin`` drew, with responses and rewards. All ranks of a replica get the same."""
        assert self._drawn is not None, "finish() before begin()"
        drawn = self._drawn
        if not self.needs_weights:
            self._drawn = None
            self._share_counts()
            return drawn.groups
        answered = self._answers(drawn)
        self._drawn = None  # not before: a step that is abandoned has drawn nothing (``state_dict``)
        found = self.from_local(None if self.local is None else [(one.rollouts, one.shuffled) for one in answered])
        self._share_counts()
        return [
            dataclasses.replace(group, rollouts=rollouts, shuffled=shuffled)
            for group, (rollouts, shuffled) in zip(drawn.groups, found, strict=True)
        ]

    def sample(self, prompts: Sequence[Prompt], *, sampling: SamplingSettings, step: int = 0) -> list[RolloutGroup]:
        """Groups of responses to ``prompts`` without rewards, on all ranks of the replica.

        The call is collective, and all ranks of a replica pass the same prompts. It neither draws from the data nor
        affects the step that has begun; with ``lag``, ``settle`` comes first.
        """
        shown = self._shown(list(prompts))

        def ask() -> list[tuple[Rollout, ...]]:
            if self.sampler is None:
                return []
            return [group.rollouts for group in self.sampler.engine.generate(shown, step=step, sampling=sampling)]

        rollouts = self.from_local(on_every_rank(ask, ranks=self._ranks))
        return [RolloutGroup(prompt, found) for prompt, found in zip(prompts, rollouts, strict=True)]

    def settle(self) -> None:
        """See ``StepSource``."""
        if self._drawn is not None and self.needs_weights and self.lag:
            self._answers(self._drawn)

    @property
    def num_skipped(self) -> int:
        return self._num_skipped

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts of the reading rank's data loader and engine, by metric name, as of the last ``finish``."""
        return self._counts

    @property
    def data_wait_seconds(self) -> float:
        """How long the reading rank took to draw the prompts of the last ``finish``: what waits for it does nothing
        else."""
        return self._data_wait_seconds

    @property
    def step_values(self) -> Mapping[str, float]:
        """See ``StepSource``."""
        return {}

    @property
    def shuffled_seconds(self) -> float:
        """See ``StepSource``."""
        return self._shuffled_seconds

    def state_dict(self) -> dict[str, Any]:
        """The reading rank's state, on every rank of the replica.

        If a step has begun, the state holds the place in the data before its prompts were drawn. With ``lag`` it also
        holds the step's responses, because the weights that sampled them are gone when the run resumes. A step that was
        abandoned has none.
        """
        if self._drawn is None:
            return self.from_local(None if self.local is None else self.local.state_dict())
        answered: list[RolloutGroup] = []
        with contextlib.suppress(StepAbandoned):  # nobody answers: a resumed run asks anew, with its weights
            answered = self._answers(self._drawn) if self.needs_weights and self.lag else []
        pending = pending_responses(answered, questions=self._drawn.asked)
        return self.from_local({**self._drawn.state_before, "pending": pending})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pending = state.get("pending", {})
        self._recorded = {name: tuple(Rollout(**_tuples(value)) for value in found) for name, found in pending.items()}
        on_every_rank(lambda: self.local and self.local.load_state_dict(state), ranks=self._ranks)

    def close(self) -> None:
        """Ends the engine and the data workers. The groups of a step that has begun are dropped."""
        if self.sampler is not None:
            self.sampler.rewarder.close()  # what is answered ahead would wait for it
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)
        if self.local is not None:
            self.local.close()
        if self.sampler is not None:
            self.sampler.engine.close()

    def _asked(self, groups: list[RolloutGroup], *, step: int) -> list[Question]:
        """What the engine is asked for ``groups``, with the prompts that it sees."""
        if self._prepare is None and self.sampler is None:
            return []
        questions = ask_twice(groups, second=self._second, step=step)
        return with_prompts(questions, self._shown(prompts_of(questions)))

    def _shown(self, prompts: list[Prompt]) -> list[Prompt]:
        """``prompts`` as the engine sees them."""
        return prompts if self._prepare is None or not self.has_engine else self._prepare(prompts)

    def _answers(self, drawn: _Draw) -> list[RolloutGroup]:
        """The groups with responses. They are sampled once, either here or already in the background. An error on one
        rank is raised on every rank."""

        def wait() -> list[RolloutGroup]:
            if drawn.answers is None:
                drawn.answers = Future()
                drawn.answers.set_result(self._answer(drawn))
            return drawn.answers.result()

        return on_every_rank(wait, ranks=self._ranks)

    def _answer(self, drawn: _Draw) -> list[RolloutGroup]:
        if self.sampler is None:
            return drawn.groups
        known = [self._with_recorded(question) for question in drawn.asked]
        self._recorded = {}
        answered = [question.group for question in known]
        open_places = [index for index, question in enumerate(known) if not question.is_answered]
        if open_places or self.sampler.engine.is_collective:
            found = self.sampler.answer([known[index] for index in open_places], step=drawn.step)
            for index, group in zip(open_places, found, strict=True):
                answered[index] = group
        return answered

    def _with_recorded(self, question: Question) -> Question:
        """``question`` with the responses that a checkpoint has for it."""
        rollouts = self._recorded.get(question.group.prompt.identity, ())
        second = "" if question.second is None else question.second.identity
        shuffled = self._recorded.get(second, ())
        return dataclasses.replace(
            question,
            group=dataclasses.replace(question.group, rollouts=rollouts, shuffled=shuffled),
            is_second_answered=second in self._recorded,
        )

    def _share_counts(self) -> None:
        found = None
        if self.local is not None:
            engine: dict[str, float] = {}
            alone = 0.0
            if self.sampler is not None:
                engine = {**self.sampler.engine.counts, **self.sampler.rewarder.take_counts()}
                alone = self.sampler.seconds_alone.take()
            found = self.local.num_skipped, {**self.local.counts, **engine}, self._seconds_drawing, alone
        self._num_skipped, self._counts, self._data_wait_seconds, self._shuffled_seconds = self.from_local(found)

    def from_local(self, value: Any) -> Any:
        """The ``value`` of the reading rank on all ranks of the replica; collective."""
        source = torch.distributed.get_global_rank(self._ranks.model, 0)
        return broadcast_object(value, group=self._ranks.model, source=source)


@dataclasses.dataclass
class _Draw:
    step: int
    groups: list[RolloutGroup]
    asked: list[Question]
    """What the engine is asked for them; empty on ranks that ask nothing."""
    state_before: dict[str, Any]
    """The state of the local source before these groups were drawn."""
    answers: Future[list[RolloutGroup]] | None = None


def pending_responses(
    groups: Iterable[RolloutGroup], *, questions: Iterable[Question]
) -> dict[str, list[dict[str, Any]]]:
    """The responses of ``groups`` by the identity of the prompt they answer, as a dict that JSON can represent.

    Every second prompt of ``questions``, which the groups answer, has an entry. It is empty where its rewards have
    failed; without it, a resumed run would ask again, by other weights.
    """
    asked_twice = {question.second.identity for question in questions if question.second is not None}
    pending: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        pending[group.prompt.identity] = [_plain(rollout) for rollout in group.rollouts]
        second = dataclasses.replace(group.prompt, variant=SHUFFLED).identity
        if second in asked_twice:
            pending[second] = [_plain(rollout) for rollout in group.shuffled]
    return pending


def _plain(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a dict that JSON can represent."""
    return {**dataclasses.asdict(rollout), "rewards": dict(rollout.rewards)}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
