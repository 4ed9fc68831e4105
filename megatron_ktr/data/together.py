"""The draws of a step that all replicas make together, for runs that filter groups or retire records.

Without these a replica takes every n-th element of the sequence (``data/dataset.py``). Here all replicas take the next
elements of the sequence *that are used*, in turns: those left out and those retired are passed over first. So the
prompts of a step are the same for every number of replicas, whatever was passed over, and the place in the data is one
number for all of them.

    cursor          the place of the sequence at which the step begins; the same on every replica
    place k         the k-th used element from the cursor on; replica (turn + k) mod n draws it
    next(number)    this replica's elements at the places below ``number``, those not drawn before
    settle(number)  the first ``number`` places are used up: the cursor moves behind them

What was drawn beyond the places that are used up stays in memory and is drawn again by the next step, by the same
replica. Counts are those of elements that are used up. So the state is that before the step until ``settle``, however
much was drawn, and a resumed run draws the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ktr.data.mixture import MixtureOrder, RecordSource
from megatron_ktr.data.records import Record
from megatron_ktr.data.retirement import Retirement
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt

_MAX_FRUITLESS_DRAWS = 1000
"""The run stops after this many unusable samples in a row on one replica, even if each was rejected for its length."""


@dataclass(frozen=True)
class UsedElement:
    """One element of the sequence that is not passed over."""

    draw_number: int
    source_index: int
    source: RecordSource
    record_index: int
    epoch: int
    """The epoch of its source."""
    next_position: int = 0
    """The draw number of this replica's next element, as far as that can be foreseen."""

    @property
    def record(self) -> Record:
        return self.source.records[self.record_index]


@dataclass(frozen=True)
class Drawn:
    """One element that this replica has drawn."""

    place: int
    """Among the draws of the step, over all replicas."""
    element: UsedElement
    prompt: Prompt | None
    """None: it could not be used."""
    error: UnusableSample | None
    counts: Mapping[str, int]
    """What loading it has counted."""


Load = Callable[[UsedElement, int, int], Prompt]
"""Makes the prompt of an element. The numbers are how many elements this replica draws now, this one included, and how
many in an ordinary step, for workers that load ahead. Raises ``UnusableSample``."""


@dataclass(frozen=True)
class DrawCounts:
    """What is counted when draws are used up."""

    loading: Counter[str]
    """What ``Load`` adds to."""
    skips: SkipCounter
    given: Counter[str]
    """Prompts by the name of their source."""


class TogetherDraws:
    """The draws of one replica."""

    def __init__(
        self,
        sources: Sequence[RecordSource],
        order: MixtureOrder,
        *,
        rank: int,
        size: int,
        load: Load,
        counts: DrawCounts,
        retirement: Retirement | None = None,
    ) -> None:
        self.retirement = retirement
        self.cursor = 0
        self.turn = 0
        self.num_passed_over = 0
        """Elements passed over because they were retired, since the run began."""
        self.epochs = [0] * len(sources)
        """The epoch of each source that was reached last."""
        self._sources, self._order = sources, order
        self._rank, self._size = rank, size
        self._load, self._counts = load, counts
        self._elements: list[UsedElement] = []
        """The elements of the step at places 0, 1, ..., as far as they were looked up."""
        self._walk = self._used(0)
        self._loaded: dict[int, Drawn] = {}
        """What was drawn and is not used up, by draw number."""
        self._num_drawn = 0
        """Places of the step that ``draw`` was asked for."""
        self._num_fruitless = 0

    def next(self, number: int, *, num_step: int) -> list[tuple[int, Prompt]]:
        """This replica's prompts at the places below ``number`` that no earlier call of the step returned, each with
        its place, without those that cannot be used. ``num_step`` are the draws of an ordinary step.

        Raises:
            UserError: there is no usable sample.
        """
        while len(self._elements) < number:
            self._elements.append(next(self._walk))
        places = [place for place in range(self._num_drawn, number) if self._is_own(place)]
        self._num_drawn = max(self._num_drawn, number)
        share = -(-num_step // self._size)
        drawn = [self._draw(place, len(places) - index, share) for index, place in enumerate(places)]
        return [(one.place, one.prompt) for one in drawn if one.prompt is not None]

    def settle(self, number: int, *, accuracies: Mapping[int, float]) -> None:
        """Uses up the first ``number`` places; what this replica drew of them now counts. ``accuracies`` are the mean
        accuracies of all replicas' groups, by draw number.

        Raises:
            UserError: too large a share of the samples is unusable.
        """
        used = self._elements[:number]
        own = [self._loaded.pop(used[place].draw_number) for place in range(number) if self._is_own(place)]
        end = used[-1].draw_number + 1 if used else self.cursor
        self.num_passed_over += self._count_passed_over(end, num_used=len(used))
        for element in used:
            self.epochs[element.source_index] = max(self.epochs[element.source_index], element.epoch)
            if self.retirement is not None and element.draw_number in accuracies:
                accuracy = accuracies[element.draw_number]
                self.retirement.note(element.source_index, element.record_index, epoch=element.epoch, accuracy=accuracy)
        self._go_to(end, turn=(self.turn + len(used)) % self._size)
        for drawn in own:
            self._count(drawn)

    def _count(self, drawn: Drawn) -> None:
        counts = self._counts
        counts.loading.update(drawn.counts)
        counts.skips.count_drawn()
        if drawn.prompt is not None:
            counts.given[drawn.prompt.source] += 1
        if drawn.error is not None:
            counts.skips.count_skip(drawn.error, number=drawn.element.record.get("record_number"))

    def element_at(self, position: int) -> UsedElement:
        """This replica's element at or after ``position``, which must be that of one of its elements; with the position
        of the one after it. It changes nothing."""
        walk = self._used(position)
        first = next(walk)
        for _ in range(self._size - 1):
            next(walk)
        return UsedElement(
            first.draw_number, first.source_index, first.source, first.record_index, first.epoch, next(walk).draw_number
        )

    @property
    def values(self) -> dict[str, float]:
        """Metrics, the same on every replica: how many records are retired, and how many draws passed them over."""
        if self.retirement is None:
            return {}
        return {
            "retirement/retired": float(self.retirement.num_retired(self.epochs)),
            "retirement/passed_over": float(self.num_passed_over),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins. Replica 0 also holds what is known of the records; it is the same on all."""
        state: dict[str, Any] = {"cursor": self.cursor, "turn": self.turn, "passed_over": self.num_passed_over}
        state["source_epochs"] = list(self.epochs)
        if self.retirement is not None and self._rank == 0:
            state["retirement"] = self.retirement.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict`` was taken, by any number of replicas (``data/reshard.py``)."""
        if self.retirement is not None:
            try:
                self.retirement.load_state_dict(state["retirement"])
            except ValueError as error:
                raise UserError(f"resume: {error}") from error
        self.num_passed_over = int(state["passed_over"])
        self.epochs = [int(epoch) for epoch in state["source_epochs"]]
        self._loaded.clear()
        self._go_to(int(state["cursor"]), turn=int(state["turn"]) % self._size)

    def _go_to(self, cursor: int, *, turn: int) -> None:
        self.cursor, self.turn = cursor, turn
        # Who is retired may have changed, so everything behind the cursor is looked up anew.
        self._elements, self._walk, self._num_drawn = [], self._used(cursor), 0
        self._loaded = {number: drawn for number, drawn in self._loaded.items() if number >= cursor}

    def _is_own(self, place: int) -> bool:
        return (self.turn + place) % self._size == self._rank

    def _draw(self, place: int, num_now: int, num_step: int) -> Drawn:
        element = self._elements[place]
        found = self._loaded.get(element.draw_number)
        if found is None:
            found = self._load_new(place, element, num_now, num_step)
        self._loaded[element.draw_number] = found = Drawn(place, element, found.prompt, found.error, found.counts)
        self._num_fruitless = self._num_fruitless + 1 if found.error is not None else 0
        if self._num_fruitless >= min(self._order.round + self._counts.skips.min_drawn, _MAX_FRUITLESS_DRAWS):
            raise UserError(
                f"no usable prompt among the last {self._num_fruitless} samples; the last one: {found.error}"
            )
        return found

    def _load_new(self, place: int, element: UsedElement, num_now: int, num_step: int) -> Drawn:
        loading = self._counts.loading
        before = Counter(loading)
        prompt, problem = None, None
        try:
            prompt = self._load(element, num_now, num_step)
        except UnusableSample as error:
            problem = error
        counted = {name: number - before[name] for name, number in loading.items() if number != before[name]}
        # What is drawn counts when it is used up, not before: a resumed run may have to draw it again.
        loading.clear()
        loading.update(before)
        return Drawn(place, element, prompt, problem, counted)

    def _used(self, position: int) -> Iterator[UsedElement]:
        """The elements from ``position`` on that are not passed over."""
        num_passed = 0
        # Every record returns after this many epochs of its source at the latest.
        limit = self._order.round * (2 + (0 if self.retirement is None else self.retirement.longest))
        while True:
            source, record, epoch = self._order.visit(position)
            if not self._is_passed_over(source, record, epoch):
                num_passed = 0
                yield UsedElement(position, source, self._sources[source], record, epoch)
            elif (num_passed := num_passed + 1) > limit:
                raise UserError("data_path: no records to draw prompts from")
            position += 1

    def _is_passed_over(self, source: int, record: int, epoch: int) -> bool:
        if self._sources[source].is_left_out[record]:
            return True
        return self.retirement is not None and self.retirement.is_retired(source, record, epoch=epoch)

    def _count_passed_over(self, end: int, *, num_used: int) -> int:
        """Retired elements between the cursor and ``end``. It must be called before anything of the step is noted."""
        if self.retirement is None:
            return 0
        visits = (self._order.visit(position) for position in range(self.cursor, end))
        num_left_out = sum(bool(self._sources[visit.source].is_left_out[visit.record]) for visit in visits)
        return end - self.cursor - num_used - num_left_out
