"""The stream of training prompts: draws records in order, loads them, skips unusable ones, and can be resumed.

All ranks share one endless sequence of records, which consists of the orders of all epochs, one after the other.
Data-parallel rank r of n takes the elements r, r + n, r + 2n, ... The prompts of a step are therefore the same set for
every n (as long as nothing is skipped), no epoch loses its tail, and the state is a single number: how many elements
this rank has drawn.

The place of an element in the sequence is the ``draw_number`` of its prompt. Seeds and stored responses are identified
by it. The problem id cannot serve for this, because several records may have the same one; nor can the record, because
it may be drawn several times in a step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import xxhash

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.order import EpochOrder
from megatron_ktr.data.records import Record, record_digest
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt

_log = logging.getLogger(__name__)
_MAX_FRUITLESS_DRAWS = 1000
"""The run stops after this many unusable samples in a row, even if each was rejected for its length only."""


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
        """
        if len(left_out) >= len(records):
            raise UserError("data_path: no records to draw prompts from")
        if not 0 <= rank < size:
            raise ValueError(f"expected a data-parallel rank in [0, {size}), got {rank}")
        self.records = records
        self.loader = loader
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.size = size
        self.skips = skips or SkipCounter()
        self.left_out = frozenset(left_out)
        self.position = 0
        """The number of samples that this rank has drawn so far, including skipped ones."""
        self._order = EpochOrder(len(records), seed=seed, shuffle=shuffle)

    @property
    def num_kept(self) -> int:
        """The number of records in an epoch, without those that are passed over."""
        return len(self.records) - len(self.left_out)

    @property
    def num_skipped(self) -> int:
        return self.skips.num_skipped

    @property
    def counts(self) -> dict[str, int]:
        """Counts over the whole run, for the metrics: the loader's, and ``skipped/<kind>`` for each kind of skip."""
        return dict(self.loader.counts) | {f"skipped/{kind}": number for kind, number in self.skips.by_kind.items()}

    @property
    def wordings(self) -> tuple[str, ...]:
        """How questions are worded, one line for each wording in use."""
        return (self.loader.describe_wording(),)

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self._element(self.position) // len(self.records)

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next ``num_prompts`` usable prompts; each skipped sample is replaced by the one after it.

        Raises:
            UserError: too large a share of the samples is unusable, or there is no usable sample.
        """
        prompts: list[Prompt] = []
        fruitless = 0
        while len(prompts) < num_prompts:
            draw_number, record = self._draw()
            try:
                prompts.append(dataclasses.replace(self.loader.load(record), draw_number=draw_number))
                fruitless = 0
            except UnusableSample as error:
                self.skips.count_skip(error, number=record.get("record_number"))
                fruitless += 1
                if fruitless >= min(len(self.records) + self.skips.min_drawn, _MAX_FRUITLESS_DRAWS):
                    raise UserError(
                        f"no usable prompt among the last {fruitless} samples; the last one: {error}"
                    ) from None
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """The position and the counts of this rank, as plain numbers and text."""
        return {
            "position": self.position,
            "epoch": self.epoch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "rank": self.rank,
            "size": self.size,
            "num_records": len(self.records),
            "records_digest": self.records_digest,
            "wording_digest": self.loader.wording_digest,
            "skips": self.skips.state_dict(),
            "counts": dict(self.loader.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where ``state_dict`` was taken.

        Raises:
            UserError: the state is from a run with other data, another seed or shuffling, or another number of
                data-parallel ranks (see ``reshard_states`` for the latter).
        """
        ours = {"num_records": len(self.records), "seed": self.seed, "shuffle": self.shuffle}
        ours |= {"rank": self.rank, "size": self.size}
        for name, value in ours.items():
            if state[name] != value:
                raise UserError(
                    f"resume: the data position was saved with {name} = {state[name]}, this run has {value}"
                )
        self._require_same_content(state)
        self.position = int(state["position"])
        self.skips.load_state_dict(state["skips"])
        self.loader.counts = Counter({str(name): int(count) for name, count in state["counts"].items()})

    @cached_property
    def records_digest(self) -> str:
        """A digest of the records in their order. It covers only the records in use, not those of the file that
        ``--problem-types`` excludes."""
        digests = (record.get("record_digest") or record_digest(record) for record in self.records)
        return xxhash.xxh3_128("".join(digests).encode()).hexdigest()

    def _require_same_content(self, state: Mapping[str, Any]) -> None:
        if "records_digest" not in state:
            _log.warning("resume: the checkpoint does not say which records it was trained on; they are not compared")
            return
        if state["records_digest"] != self.records_digest:
            raise UserError(
                f"resume: the {len(self.records)} records are not those of the saved run (same number, other content "
                "or order): give --data-path or --replay-path the same questions, only their directory may change"
            )
        if state["wording_digest"] != self.loader.wording_digest:
            raise UserError(
                "resume: --prompt-template is not the text of the saved run, or --chat-template is not; only "
                "their place may change"
            )

    def _element(self, position: int) -> int:
        return self.rank + position * self.size

    def _draw(self) -> tuple[int, Record]:
        """(place in the sequence, record) of the next element that is not left out."""
        for _ in range(len(self.records) + _MAX_FRUITLESS_DRAWS):
            element = self._element(self.position)
            place = self._order.place_of(element)
            self.position += 1
            if place not in self.left_out:
                self.skips.count_drawn()
                return element, self.records[place]
        # Without shuffling a replica may see the same few places in every epoch.
        raise UserError(f"data-parallel replica {self.rank} of {self.size} draws only records that cannot be used")


def reshard_states(states: Iterable[Mapping[str, Any]], *, rank: int, size: int) -> dict[str, Any]:
    """The state of rank ``rank`` of ``size``, from the states of all data-parallel ranks of a saved run.

    With the same size it is the saved state of that rank. With another size all ranks continue after the furthest
    sample that any rank has drawn, so that no sample is seen twice; if the ranks had skipped different numbers of
    samples, a few samples are passed over. The sum of all counts goes to rank 0. Pending responses (``pending``, by
    ``Prompt.identity``) go to every rank, because each draws some of their prompts again.
    """
    saved = sorted(states, key=lambda state: state["rank"])
    old_size = int(saved[0]["size"])
    if len(saved) != old_size:
        raise ValueError(f"expected the states of all {old_size} data-parallel ranks, got {len(saved)}")
    if size == old_size:
        return dict(saved[rank])
    furthest = max(int(state["position"]) for state in saved) * old_size
    skips, counts = SkipCounter(), Counter[str]()
    if rank == 0:
        for state in saved:
            skips.num_drawn += int(state["skips"]["num_drawn"])
            skips.by_kind.update(state["skips"]["by_kind"])
            counts.update(state["counts"])
    position = -(-(furthest - rank) // size) if furthest > rank else 0
    state = {**saved[0], "position": position, "rank": rank, "size": size}
    state["epoch"] = (rank + position * size) // int(state["num_records"])
    pending = {name: found for other in saved for name, found in other.get("pending", {}).items()}
    if pending:
        state["pending"] = pending
    return {**state, "skips": skips.state_dict(), "counts": dict(counts)}
