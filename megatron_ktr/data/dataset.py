"""The stream of training prompts: draws records in order, loads them, skips unusable ones, and can be resumed.

All ranks share one endless sequence of records, which consists of the orders of all epochs, one after the other.
Data-parallel rank r of n takes the elements r, r + n, r + 2n, ... The prompts of a step are therefore the same set for
every n (as long as nothing is skipped), no epoch loses its tail, and the state is a single number: how many elements
this rank has drawn.

With several files the sequence mixes them (``data/mixture.py``); each has its own order of epochs in it.

The place of an element in the sequence is the ``draw_number`` of its prompt. Seeds and stored responses are identified
by it. The problem id cannot serve for this, because several records may have the same one; nor can the record, because
it may be drawn several times in a step.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from megatron_ktr.data import same_data
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.mixture import MixtureOrder, RecordSource
from megatron_ktr.data.other_media import OtherMedia
from megatron_ktr.data.records import Record
from megatron_ktr.data.retirement import Retirement, RetirementRule
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.together import DrawCounts, TogetherDraws, UsedElement
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.data.workers.look_ahead import LookAhead, SampleMedia
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt

_MAX_FRUITLESS_DRAWS = 1000
"""The run stops after this many unusable samples in a row, even if each was rejected for its length only."""


@dataclass(frozen=True)
class Element:
    """One element of the sequence, as the position of a rank leads to it."""

    draw_number: int
    source: RecordSource
    record: Record
    next_position: int
    """The rank's position after it. Elements that are left out lie between."""


class PromptDataset:
    """An endless, seeded, resumable stream of prompts for one data-parallel rank."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        loader: PromptLoader,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        size: int = 1,
        skips: SkipCounter | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        """``left_out`` are indices of ``records`` that are passed over. They keep their place in the sequence. So the
        order of the others, and the place where a resumed run continues, do not depend on which records are usable now.
        (A length-bucketed order, ``RecordSource.buckets``, does depend on it.)
        """
        if not 0 <= rank < size:
            raise ValueError(f"expected a data-parallel rank in [0, {size}), got {rank}")
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.size = size
        self.skips = skips or SkipCounter()
        self.position = 0
        """The number of samples that this rank has drawn so far, including skipped ones."""
        self.num_given: Counter[str] = Counter()
        """The prompts given so far, by the name of their source."""
        self._pool: WorkerPool | None = None
        self._ahead: LookAhead[Element | UsedElement] | None = None
        self._prefetch_steps = 0
        self._others: OtherMedia | None = None
        self.together: TogetherDraws | None = None
        """The draws of a run whose replicas draw together (``draw_together``); ``next`` is then not called."""
        self._more_counts: list[Callable[[], Mapping[str, int]]] = []
        self._use((RecordSource(records, loader, left_out),))

    @classmethod
    def of_sources(cls, sources: Sequence[RecordSource], **options: Any) -> PromptDataset:
        """The stream of a mixture. ``options`` are those of the class, without ``left_out``, which each source has."""
        first = sources[0]
        dataset = cls(first.records, loader=first.loader, left_out=first.left_out, **options)
        dataset._use(tuple(sources))
        return dataset

    def _use(self, sources: tuple[RecordSource, ...]) -> None:
        if any(len(source.left_out) >= len(source.records) for source in sources):
            raise UserError("data_path: no records to draw prompts from")
        self.sources = sources
        self._order = MixtureOrder(
            [source.draws for source in sources],
            [len(source.records) for source in sources],
            seed=self.seed,
            shuffle=self.shuffle,
            buckets=sources[0].buckets,
        )

    @property
    def records(self) -> Sequence[Record]:
        """The records of the only source, or of a mixture's first."""
        return self.sources[0].records

    @property
    def loader(self) -> PromptLoader:
        """The loader of the only source, or of a mixture's first; the loaders of a mixture count together."""
        return self.sources[0].loader

    def loader_of(self, prompt: Prompt) -> PromptLoader:
        """The loader that made ``prompt``."""
        return next(source.loader for source in self.sources if not self.is_mixture or source.name == prompt.source)

    @property
    def is_mixture(self) -> bool:
        return len(self.sources) > 1

    @property
    def num_records(self) -> int:
        return sum(len(source.records) for source in self.sources)

    def draw_together(self, rule: RetirementRule | None) -> None:
        """Lets all replicas draw the prompts of a step together (``data/together.py``), and retires easy records by
        ``rule``, if there is one. It comes before the first draw."""
        self.together = TogetherDraws(
            self.sources,
            self._order,
            rank=self.rank,
            size=self.size,
            load=self._load_used,
            counts=DrawCounts(self.loader.counts, self.skips, self.num_given),
            retirement=Retirement(rule, [len(one.records) for one in self.sources]) if rule else None,
        )

    def read_ahead(self, pool: WorkerPool, *, prefetch_steps: int = 1) -> None:
        """Lets the workers of ``pool``, which ``close`` ends, load the media from now on. While the prompts of one step
        are used, those of the next ``prefetch_steps`` are loading. Prompts and state stay the same."""
        self._pool, self._prefetch_steps = pool, prefetch_steps
        self._ahead = LookAhead(
            element_at=self._next_element,
            submit=lambda element: pool.submit(partial(element.source.loader.read_media, element.record)),
        )
        self.count_too(pool.counts)

    def show_other_media(self) -> None:
        """From now on every prompt also has the media of another question. Comes after ``read_ahead``, if at all."""
        self._others = OtherMedia(seed=self.seed, element_at=self._next_element, pool=self._pool)

    def count_too(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Adds counts to the metrics that depend on the machine, such as cache hits. They are not part of the state."""
        self._more_counts.append(counts)

    def close(self) -> None:
        """Ends the workers. What they have read ahead is dropped."""
        if self._ahead is not None:
            self._ahead.drop()
        if self._others is not None:
            self._others.close()
        if self._pool is not None:
            self._pool.close()

    @property
    def num_kept(self) -> int:
        """The number of prompts in an epoch, without the records that are passed over. An epoch of a mixture is one
        period of it."""
        return sum(source.num_kept for source in self.sources)

    @property
    def num_skipped(self) -> int:
        return self.skips.num_skipped

    @property
    def counts(self) -> dict[str, int]:
        """Counts for the metrics. Over the whole run: the loader's, ``skipped/<kind>`` for each kind of skip, and of a
        mixture ``source/<name>``, the prompts given of each source. Since this process began: those of caches and
        workers."""
        found = dict(self.loader.counts) | {f"skipped/{kind}": number for kind, number in self.skips.by_kind.items()}
        found |= {f"source/{source.name}": self.num_given[source.name] for source in self.sources if self.is_mixture}
        for counts in self._more_counts:
            found |= counts()
        return found

    @property
    def wordings(self) -> tuple[str, ...]:
        """How questions are worded, one line for each wording in use."""
        return tuple(dict.fromkeys(source.loader.describe_wording() for source in self.sources))

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        place = self._element(self.position) if self.together is None else self.together.cursor
        return place // self._order.period

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next ``num_prompts`` usable prompts; each skipped sample is replaced by the one after it.

        Raises:
            UserError: too large a share of the samples is unusable, or there is no usable sample.
        """
        prompts: list[Prompt] = []
        fruitless = 0
        while len(prompts) < num_prompts:
            element, load = self._draw(num_prompts - len(prompts) + num_prompts * self._prefetch_steps)
            try:
                prompts.append(self._placed(load(), element))
                self.num_given[prompts[-1].source] += 1
                fruitless = 0
            except UnusableSample as error:
                self.skips.count_skip(error, number=element.record.get("record_number"))
                fruitless += 1
                if fruitless >= min(self._order.round + self.skips.min_drawn, _MAX_FRUITLESS_DRAWS):
                    raise UserError(
                        f"no usable prompt among the last {fruitless} samples; the last one: {error}"
                    ) from None
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """The position and the counts of this rank, as plain numbers and text."""
        shared = {} if self.together is None else self.together.state_dict()
        position = max(0, -(-(shared["cursor"] - self.rank) // self.size)) if shared else self.position
        state = {
            **shared,
            "position": position,
            "epoch": self.epoch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "rank": self.rank,
            "size": self.size,
            "num_records": self.num_records,
            "records_digest": self.records_digest,
            "wording_digest": self.wording_digest,
            "skips": self.skips.state_dict(),
            "counts": dict(self.loader.counts),
        }
        if self.lengths_digest:
            state["lengths_digest"] = self.lengths_digest
        if self.is_mixture:
            return state | {"mixture": self._mixture, "num_given": self._num_given()}
        return state | {"rewards": self._mixture[0][1]}

    @property
    def _mixture(self) -> list[list[Any]]:
        """What a resumed run must mix alike, as JSON reads it again: the draws in a period and reward parts of each
        source."""
        return [[source.draws, None if source.rewards is None else list(source.rewards)] for source in self.sources]

    def _num_given(self) -> list[int]:
        return [self.num_given[source.name] for source in self.sources]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where ``state_dict`` was taken. Raises as ``require_same`` does."""
        self.require_same(state)
        self.position = int(state["position"])
        if self.together is not None:
            self.together.load_state_dict(state)
        self.skips.load_state_dict(state["skips"])
        self.loader.counts.clear()
        self.loader.counts.update({str(name): int(count) for name, count in state["counts"].items()})
        given = zip(self.sources, state.get("num_given", []), strict=False)
        self.num_given.clear()
        self.num_given.update({source.name: int(number) for source, number in given})

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Refuses a place in other data; changes nothing.

        Raises:
            UserError: the state is from a run with other data, another seed or shuffling, or another number of
                data-parallel ranks (see ``reshard_states`` for the latter).
        """
        if list(state.get("mixture", [])) != (self._mixture if self.is_mixture else []):
            raise UserError(
                "resume: --data-path does not mix the files of the saved run in the same way (number, order, weights "
                "or epochs, reward_functions); only their places and names may change"
            )
        if state.get("rewards", self._mixture[0][1]) != self._mixture[0][1]:
            raise UserError("resume: the file of --data-path has other reward_functions than in the saved run")
        ours = {"num_records": self.num_records, "seed": self.seed, "shuffle": self.shuffle}
        ours |= {"rank": self.rank, "size": self.size}
        for name, value in ours.items():
            if state[name] != value:
                raise UserError(
                    f"resume: the data position was saved with {name} = {state[name]}, this run has {value}"
                )
        same_data.require_same_content(
            state, records=self.records_digest, wording=self.wording_digest, num_records=self.num_records
        )
        if state.get("lengths_digest", "") != self.lengths_digest:
            raise UserError(
                "resume: the lengths of the records, by which --length-buckets orders them, are not those of the saved "
                "run: media were exchanged, or became readable or unreadable (records left out count too); restore "
                "them, or start anew from the export"
            )

    @cached_property
    def records_digest(self) -> str:
        return same_data.records_digest(self.sources)

    @property
    def wording_digest(self) -> str:
        return same_data.wording_digest(self.sources)

    @property
    def left_out_digest(self) -> str:
        return same_data.left_out_digest(self.sources)

    @property
    def lengths_digest(self) -> str:
        """A digest of the lengths by which records are ordered; empty where they are not."""
        buckets = self.sources[0].buckets
        return "" if buckets is None else buckets.digest

    def _element(self, position: int) -> int:
        return self.rank + position * self.size

    def _draw(self, num_wanted: int) -> tuple[Element, Callable[[], Prompt]]:
        """The next element and what loads it. Workers then have ``num_wanted`` elements in hand, this one included."""
        if self._others is not None:
            self._others.draw(self.position, num_wanted=num_wanted)
        if self._ahead is None:
            element = self._element_at(self.position)
            load = partial(element.source.loader.load, element.record)
        else:
            found, media = self._ahead.take(self.position, num_wanted=num_wanted)
            assert isinstance(found, Element)
            element, load = found, partial(_load_read, found, media)
        self.position = element.next_position
        self.skips.count_drawn()
        return element, load

    def _load_used(self, element: UsedElement, num_now: int, num_step: int) -> Prompt:
        """See ``data/together.py``."""
        num_wanted = num_now + num_step * self._prefetch_steps
        if self._others is not None:
            self._others.draw(element.draw_number, num_wanted=num_wanted)
        if self._ahead is None:
            prompt = element.source.loader.load(element.record)
        else:
            prompt = _load_read(element, self._ahead.take(element.draw_number, num_wanted=num_wanted)[1])
        return self._placed(prompt, element)

    def _placed(self, prompt: Prompt, element: Element | UsedElement) -> Prompt:
        """The prompt with what follows from its place in the sequence."""
        name = element.source.name if self.is_mixture else ""
        prompt = dataclasses.replace(prompt, draw_number=element.draw_number, source=name)
        return prompt if self._others is None else self._others.add_to(prompt, element)

    def _next_element(self, position: int) -> Element | UsedElement:
        return self.together.element_at(position) if self.together else self._element_at(position)

    def _element_at(self, position: int) -> Element:
        """The first element at or after a position that is not left out. It changes nothing."""
        for later in range(position, position + self._order.round + _MAX_FRUITLESS_DRAWS):
            draw_number = self._element(later)
            place = self._order.place_of(draw_number)
            source = self.sources[place.source]
            if not source.is_left_out[place.record]:
                return Element(draw_number, source, source.records[place.record], later + 1)
        # Without shuffling a replica may see the same few places in every epoch.
        raise UserError(f"data-parallel replica {self.rank} of {self.size} draws only records that cannot be used")


def _load_read(element: Element | UsedElement, media: Future[SampleMedia]) -> Prompt:
    """The prompt of media that a worker reads; waits until it has."""
    return element.source.loader.load(element.record, media.result())
