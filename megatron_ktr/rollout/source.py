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

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ktr.data.source import DatasetSource
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.rewards import DEFAULT_REWARDS, Rewarder
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.sampling import SamplingSettings
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

    def answer(self, groups: Sequence[RolloutGroup], *, step: int) -> list[RolloutGroup]:
        """``groups`` with responses and their rewards. A group that a collective engine does not yield on this rank is
        returned unchanged.

        The rewards of a group are computed in a separate thread as soon as its last response is complete, several
        groups at a time if users' functions have several processes.
        """
        answered = list(groups)
        with ThreadPoolExecutor(self.rewarder.num_threads, thread_name_prefix="rewards") as pool:
            rewarded: dict[int, Future[list[RolloutGroup]]] = {}
            for index, group in self.engine.stream([group.prompt for group in groups], step=step):
                names = self.rewards_of_source.get(group.prompt.source, self.rewards)
                rewarded[index] = pool.submit(self.rewarder.reward, [group], names=names)
            for index, result in rewarded.items():
                answered[index] = result.result()[0]
        return answered


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
        self._drawn: _Draw | None = None
        self._recorded: dict[str, tuple[Rollout, ...]] = {}
        engine = None if sampler is None else sampler.engine
        about = engine and (engine.gather_weights_to, engine.runs_vision_encoder, engine.keeps_weights)
        about = self.from_local(about)
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
        asked = self._asked(groups) if self.needs_weights else groups
        self._drawn = _Draw(step, groups, asked=asked, state_before=state)
        if self._background is not None:
            self._drawn.answers = self._background.submit(self._answer, self._drawn)

    def finish(self) -> list[RolloutGroup]:
        """The groups whose prompts ``begin`` drew, with responses and rewards. All ranks of a replica get the same."""
        assert self._drawn is not None, "finish() before begin()"
        drawn, self._drawn = self._drawn, None
        if not self.needs_weights:
            self._share_counts()
            return drawn.groups
        answered = self._answers(drawn)
        rollouts = self.from_local(None if self.local is None else [group.rollouts for group in answered])
        self._share_counts()
        return [dataclasses.replace(group, rollouts=found) for group, found in zip(drawn.groups, rollouts, strict=True)]

    def sample(self, prompts: Sequence[Prompt], *, sampling: SamplingSettings, step: int = 0) -> list[RolloutGroup]:
        """Groups of responses to ``prompts`` without rewards, on all ranks of the replica.

        The call is collective, and all ranks of a replica pass the same prompts. It neither draws from the data nor
        affects the step that has begun; with ``lag``, ``settle`` comes first.
        """
        asked = self._asked([RolloutGroup(prompt, ()) for prompt in prompts])

        def ask() -> list[tuple[Rollout, ...]]:
            if self.sampler is None:
                return []
            shown = [group.prompt for group in asked]
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

    def state_dict(self) -> dict[str, Any]:
        """The reading rank's state, on every rank of the replica.

        If a step has begun, the state holds the place in the data before its prompts were drawn. With ``lag`` it also
        holds the step's responses, because the weights that sampled them are gone when the run resumes.
        """
        if self._drawn is None:
            return self.from_local(None if self.local is None else self.local.state_dict())
        answered = self._answers(self._drawn) if self.needs_weights and self.lag else []
        pending = {group.prompt.identity: [_plain(rollout) for rollout in group.rollouts] for group in answered}
        return self.from_local({**self._drawn.state_before, "pending": pending})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pending = state.get("pending", {})
        self._recorded = {name: tuple(Rollout(**_tuples(value)) for value in found) for name, found in pending.items()}
        on_every_rank(lambda: self.local and self.local.load_state_dict(state), ranks=self._ranks)

    def close(self) -> None:
        """Ends the engine and the data workers. The groups of a step that has begun are dropped."""
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)
        if self.local is not None:
            self.local.close()
        if self.sampler is not None:
            self.sampler.engine.close()
            self.sampler.rewarder.close()

    def _asked(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """``groups`` with the prompts that the engine sees."""
        if self._prepare is None or not self.has_engine:
            return groups
        prompts = self._prepare([group.prompt for group in groups])
        return [dataclasses.replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)]

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
        recorded, self._recorded = self._recorded, {}
        known = [dataclasses.replace(group, rollouts=recorded.get(group.prompt.identity, ())) for group in drawn.asked]
        open_places = [index for index, group in enumerate(known) if not group.rollouts]
        if open_places or self.sampler.engine.is_collective:
            found = self.sampler.answer([known[index] for index in open_places], step=drawn.step)
            for index, group in zip(open_places, found, strict=True):
                known[index] = group
        return known

    def _share_counts(self) -> None:
        found = None
        if self.local is not None:
            engine = {}
            if self.sampler is not None:
                engine = {**self.sampler.engine.counts, **self.sampler.rewarder.take_counts()}
            found = self.local.num_skipped, {**self.local.counts, **engine}, self._seconds_drawing
        self._num_skipped, self._counts, self._data_wait_seconds = self.from_local(found)

    def from_local(self, value: Any) -> Any:
        """The ``value`` of the reading rank on all ranks of the replica; collective."""
        source = torch.distributed.get_global_rank(self._ranks.model, 0)
        return broadcast_object(value, group=self._ranks.model, source=source)


@dataclasses.dataclass
class _Draw:
    step: int
    groups: list[RolloutGroup]
    asked: list[RolloutGroup]
    """The same groups with the prompts that the engine sees."""
    state_before: dict[str, Any]
    """The state of the local source before these groups were drawn."""
    answers: Future[list[RolloutGroup]] | None = None


def _plain(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a dict that JSON can represent."""
    return {**dataclasses.asdict(rollout), "rewards": dict(rollout.rewards)}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
