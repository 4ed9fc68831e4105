"""The source of a run that filters groups or retires records: it draws and answers until enough groups are good.

    begin     all replicas together draw the step's first ``wanted`` prompts (``data/together.py``)
    finish    until the step is decided (``rollout/filtering.py``):
                  answer what is not answered yet, tell all replicas the verdicts, decide;
                  if good groups are missing, draw further prompts together
              kept groups are spread evenly over the replicas; the place in the data moves behind what is used up

Every rank of the world makes the same calls in every round, however many prompts its own replica has in it. So
collective engines can refill, and an engine that sleeps between rollouts stays awake for all rounds of a step
(``RolloutEngine.awake``).

Servers answer replacements while the other groups of the first round are still running: as soon as a group is known to
be rejected, its replica asks the next of a few spare prompts. Which spare prompts are asked depends on the verdicts
alone: their number is the smallest a for which a rejected groups are among the first groups and the first a spares. A
spare that the step does not come to is drawn again by the next one.

With ``lag`` 1 the first round and its spares are answered in the background. Further rounds belong to ``finish``, or to
whatever comes before it and needs the step's end (``settle``, ``state_dict``), because then the engine still has the
weights that answered the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from megatron_ktr.data.source import DatasetSource
from megatron_ktr.distributed.agreement import gather_objects, on_every_rank
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import StepAbandoned
from megatron_ktr.rollout.filtering import Decision, FilterRule, Needs, Verdict, decide, spread_evenly, values_of
from megatron_ktr.rollout.second_prompt import Question
from megatron_ktr.rollout.source import ReplicaSource, pending_responses
from megatron_ktr.step.balance import Placement
from megatron_ktr.step.exchange import exchange_groups
from megatron_ktr.types import RolloutGroup

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Begun:
    """A step that has begun. Places are those of its draws, over all replicas (``data/together.py``)."""

    step: int
    needs: Needs
    num_window: int = 0
    num_usable: int = 0
    """The prompts of the window on all replicas; the other draws could not be used."""
    num_rounds: int = 0
    groups: dict[int, RolloutGroup] = dataclasses.field(default_factory=dict)
    """This replica's groups of the window, as they were drawn: on the reading rank, and on all ranks if the engine or
    the vision features need their prompts there."""
    questions: dict[int, Question] = dataclasses.field(default_factory=dict)
    """What the engine is asked for them, on ranks that ask."""
    spares: dict[int, RolloutGroup] = dataclasses.field(default_factory=dict)
    """Prompts beyond the window, on the reading rank."""
    answered: dict[int, RolloutGroup] = dataclasses.field(default_factory=dict)
    """Groups with responses, on the reading rank; answered spares among them."""
    verdicts: dict[int, tuple[int, Verdict]] = dataclasses.field(default_factory=dict)
    """(replica, verdict) of every answered group of the window, on every rank."""
    first_answers: Future[None] | None = None
    decision: Decision | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


class FilteredSource(ReplicaSource):
    """``ReplicaSource`` for a run whose replicas draw together. The data must be told so (``draw_together``)."""

    def __init__(
        self,
        local: DatasetSource | None,
        *,
        ranks: ParallelGroups,
        rule: FilterRule,
        groups_multiple: int = 1,
        **options: Any,
    ) -> None:
        """
        Args:
            groups_multiple: the number of groups of a replica is a multiple of it.
            options: those of ``ReplicaSource``.
        """
        super().__init__(local, ranks=ranks, **options)
        self.rule = rule
        self._multiple = groups_multiple
        self._begun: _Begun | None = None
        self._step_values: Mapping[str, float] = {}
        self._has_warned = False
        engine = None if self.sampler is None else self.sampler.engine
        about = (False, False) if engine is None else (engine.is_collective, engine.takes_more)
        is_collective, takes_more = self.from_local(about)
        self._shares_prompts = self.needs_weights and (is_collective or self._prepare is not None)
        """Whether all ranks of a replica need its prompts before they are answered."""
        refills = rule.kind != "off" and rule.max_rounds > 0
        # Vision features are made by all ranks of a replica together, which nobody does while groups are answered. And
        # what second prompts cost is measured in one call for all (``SecondsAlone``).
        asks_once = self._prepare is None and self._second is None
        self._asks_spares = takes_more and self.needs_weights and refills and asks_once

    @property
    def pending_step(self) -> int | None:
        """See ``StepSource``."""
        return None if self._begun is None else self._begun.step

    @property
    def step_values(self) -> Mapping[str, float]:
        """``filtering.values_of`` of a run that filters, and the retirement of its records (``data/together.py``)."""
        return self._step_values

    def begin(self, num_prompts: int, *, step: int) -> None:
        """Draws ``num_prompts`` for each replica. With ``lag`` 1, their responses are then sampled in the
        background."""
        size = self._ranks.data_size
        needs = Needs(num_prompts * size, least=size, multiple=self._multiple * size)
        begun = _Begun(step, needs)
        self._seconds_drawing = 0.0
        self._grow(begun, needs.wanted)
        if self._asks_spares:
            on_every_rank(lambda: self._draw_until(begun, begun.num_window + needs.wanted), ranks=self._ranks)
        self._begun = begun
        if self._background is not None:
            begun.first_answers = self._background.submit(self._answer_open, begun)

    def finish(self) -> list[RolloutGroup]:
        """The groups that this replica trains on. All ranks of a replica get the same."""
        assert self._begun is not None, "finish() before begin()"
        begun, self._begun = self._begun, None
        decision = self._complete(begun)
        of_replica: list[list[int]] = [[] for _ in range(self._ranks.data_size)]
        for verdict in decision.kept:
            of_replica[begun.verdicts[verdict.place][0]].append(verdict.place)
        groups = self._groups_at(begun, of_replica[self._ranks.data_rank])
        accuracies = {
            verdict.draw_number: verdict.accuracy
            for _, verdict in begun.verdicts.values()
            if verdict.place < decision.num_consumed and verdict.accuracy is not None
        }

        def settle() -> dict[str, float]:
            return {} if self.local is None else self.local.settle(decision.num_consumed, accuracies=accuracies)

        retired = self.from_local(on_every_rank(settle, ranks=self._ranks))
        self._step_values = {**begun.values, **retired}
        self._recorded = {}
        self._share_counts()
        self._warn_if_short(decision, begun)
        return self._spread(groups, [len(places) for places in of_replica])

    def settle(self) -> None:
        """See ``StepSource``."""
        if self._begun is not None and self.needs_weights and self.lag:
            self._complete(self._begun)

    def state_dict(self) -> dict[str, Any]:
        """The reading rank's state, on every rank of the replica: the place in the data before a step that has begun,
        because that step is settled by ``finish`` alone. With ``lag`` it also holds every response of the step, those
        of rejected groups among them: a resumed run must reject the same groups, and their weights are gone."""
        state = self.from_local(None if self.local is None else self.local.state_dict())
        begun = self._begun
        if begun is None or not (self.needs_weights and self.lag):
            return state
        try:
            self._complete(begun)
        except StepAbandoned:  # nobody answers: a resumed run asks anew, with its weights
            return state
        pending = pending_responses(begun.answered.values(), questions=begun.questions.values())
        return {**state, "pending": self.from_local(pending)}

    # Rounds

    def _complete(self, begun: _Begun) -> Decision:
        """Answers and draws until the step is decided. Collective over the world."""
        if begun.decision is not None:
            return begun.decision
        # The first round may be running in the background, with an engine that is always awake.
        stays_awake = contextlib.nullcontext() if self.sampler is None else self.sampler.engine.awake()
        with stays_awake:
            while True:
                try:
                    on_every_rank(lambda: self._answer(begun), ranks=self._ranks)
                except StepAbandoned:
                    self._begun = None  # it is not waited for a second time
                    raise
                self._judge(begun)
                verdicts = [verdict for _, verdict in (begun.verdicts[place] for place in sorted(begun.verdicts))]
                decision = decide(
                    verdicts,
                    num_window=begun.num_window,
                    num_rounds=begun.num_rounds,
                    needs=begun.needs,
                    rule=self.rule,
                )
                if not decision.num_more:
                    break
                self._grow(begun, decision.num_more)
                begun.num_rounds += 1
        spares = gather_objects(self._verdicts_of_spares(begun), group=self._ranks.data) if self._asks_spares else []
        if self.rule.kind != "off":
            begun.values = values_of(
                decision,
                verdicts,
                num_rounds=begun.num_rounds,
                num_first=begun.needs.wanted,
                spares=[verdict for found in spares for verdict in found],
            )
        begun.decision = decision
        return decision

    def _grow(self, begun: _Begun, number: int) -> None:
        """Lets the window grow by ``number`` prompts of all replicas. A draw that cannot be used is followed by one
        more. Collective over the world."""
        target = begun.num_usable + number
        while begun.num_usable < target:
            begun.num_window += target - begun.num_usable
            new = on_every_rank(lambda: self._draw_until(begun, begun.num_window), ranks=self._ranks)
            if self._shares_prompts:
                new = self.from_local(new)
            num_new = self.from_local(len(new))
            begun.num_usable += sum(gather_objects(num_new, group=self._ranks.data))
            begun.groups |= new
            if new and self.needs_weights:
                begun.questions |= zip(new, self._asked(list(new.values()), step=begun.step), strict=False)

    def _draw_until(self, begun: _Begun, number: int) -> dict[int, RolloutGroup]:
        """Takes this replica's prompts below place ``number`` that are not in the window yet, on the reading rank."""
        if self.local is None:
            return {}
        started = time.perf_counter()
        begun.spares |= self.local.next_together(number, num_step=begun.needs.wanted)
        new = {place: begun.spares[place] for place in sorted(begun.spares) if place < begun.num_window}
        for place in new:
            del begun.spares[place]
        self._seconds_drawing += time.perf_counter() - started
        return new

    def _answer(self, begun: _Begun) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Waits for the answers of the background, or answers here."""
        if begun.first_answers is not None:
            waiting, begun.first_answers = begun.first_answers, None
            waiting.result()
        else:
            self._answer_open(begun)

    def _answer_open(self, begun: _Begun) -> None:
        """Answers every group of the window that is not answered yet."""
        if not self.needs_weights:
            begun.answered |= begun.groups
        if self.sampler is None or not self.needs_weights:
            return
        known = {
            place: self._with_recorded(question)
            for place, question in begun.questions.items()
            if place not in begun.answered
        }
        if self._asks_spares and begun.num_rounds == 0:
            begun.answered |= answered_with_spares(
                known,
                spares=sorted(begun.spares.items()),
                answer=lambda question: self._answer_one(question, step=begun.step),
                ask=lambda group: self._with_recorded(self._asked([group], step=begun.step)[0]),
                is_rejected=lambda group: bool(self.rule.reason(group)),
                give_up=self.sampler.rewarder.close,
            )
            return
        begun.answered |= {place: question.group for place, question in known.items() if question.is_answered}
        open_places = [place for place, question in known.items() if not question.is_answered]
        if open_places or self.sampler.engine.is_collective:
            found = self.sampler.answer([known[place] for place in open_places], step=begun.step)
            begun.answered |= zip(open_places, found, strict=True)

    def _answer_one(self, question: Question, *, step: int) -> RolloutGroup:
        assert self.sampler is not None
        return question.group if question.is_answered else self.sampler.answer([question], step=step)[0]

    def _judge(self, begun: _Begun) -> None:
        """Tells all replicas the verdicts on the groups that this round answered."""
        found = None
        if self.local is not None:
            found = [
                Verdict.of(begun.answered[place], place=place, rule=self.rule)
                for place in begun.groups
                if place not in begun.verdicts
            ]
        for replica, verdicts in enumerate(gather_objects(self.from_local(found), group=self._ranks.data)):
            begun.verdicts |= {verdict.place: (replica, verdict) for verdict in verdicts}

    def _verdicts_of_spares(self, begun: _Begun) -> list[Verdict]:
        found = None
        if self.local is not None:
            found = [
                Verdict.of(group, place=place, rule=self.rule)
                for place, group in begun.answered.items()
                if place >= begun.num_window
            ]
        return self.from_local(found)

    # Groups

    def _groups_at(self, begun: _Begun, places: list[int]) -> list[RolloutGroup]:
        """This replica's groups at ``places`` with the prompts as they were drawn, on all of its ranks."""
        found = None
        if self.local is not None:
            found = [
                dataclasses.replace(
                    begun.groups[place],
                    rollouts=begun.answered[place].rollouts,
                    shuffled=begun.answered[place].shuffled,
                )
                for place in places
            ]
        if not self._shares_prompts:
            return self.from_local(found)
        answers = self.from_local(None if found is None else [(group.rollouts, group.shuffled) for group in found])
        return [
            dataclasses.replace(begun.groups[place], rollouts=rollouts, shuffled=shuffled)
            for place, (rollouts, shuffled) in zip(places, answers, strict=True)
        ]

    def _spread(self, groups: list[RolloutGroup], num_of_replica: list[int]) -> list[RolloutGroup]:
        """The groups of this replica after all replicas have the same number, or one more."""
        ends = [sum(num_of_replica[: replica + 1]) for replica in range(len(num_of_replica))]
        drawn = tuple(tuple(range(end - number, end)) for end, number in zip(ends, num_of_replica, strict=True))
        groups_of = tuple(tuple(part) for part in spread_evenly(num_of_replica))
        return exchange_groups(groups, Placement(drawn, groups_of, 1.0, 1.0), ranks=self._ranks)

    def _warn_if_short(self, decision: Decision, begun: _Begun) -> None:
        """Says once that the bound was reached. The metric filter/is_short says it of every step."""
        if decision.is_short and not self._has_warned and self._ranks.rank == 0:
            self._has_warned = True
            _log.warning(
                "step %d: only %d of %d groups are good after %d refill rounds (--filter-max-rounds): the step goes on "
                "with %d groups; the metric filter/is_short says it of later steps",
                begun.step,
                sum(verdict.is_good for verdict in decision.kept),
                begun.needs.wanted,
                begun.num_rounds,
                len(decision.kept),
            )


def answered_with_spares(
    questions: Mapping[int, Question],
    *,
    spares: list[tuple[int, RolloutGroup]],
    answer: Callable[[Question], RolloutGroup],
    ask: Callable[[RolloutGroup], Question],
    is_rejected: Callable[[RolloutGroup], bool],
    give_up: Callable[[], None] = lambda: None,
) -> dict[int, RolloutGroup]:
    """The answers to ``questions`` by place, and those to the first of ``spares``: one more is asked at once, beside
    what is running, whenever a group turns out to be rejected. The result does not depend on which answer comes
    first. ``give_up`` is called where one fails, so that the others are not waited for."""
    answered: dict[int, RolloutGroup] = {}
    free = iter(spares)
    with ThreadPoolExecutor(max(1, len(questions)), thread_name_prefix="groups") as pool:
        running: dict[Future[RolloutGroup], int] = {
            pool.submit(answer, question): place for place, question in questions.items()
        }
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(future)
                    answered[place] = future.result()
                    if is_rejected(answered[place]) and (spare := next(free, None)) is not None:
                        running[pool.submit(answer, ask(spare[1]))] = spare[0]
        except BaseException:
            for future in running:
                future.cancel()
            give_up()
            raise
    return answered
