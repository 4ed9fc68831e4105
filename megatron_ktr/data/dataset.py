"""Prompts for training: which record comes next on this rank, loaded, skipped where unusable, resumable.

All ranks walk through one endless sequence, the epochs' orders back to back; data-parallel rank r of n takes
elements r, r + n, r + 2n, ... So the prompts of a step are the same set whatever n is (as long as nothing is
skipped), no epoch loses its tail, and the whole state is one number: how many elements this rank has drawn.

An element's place in the sequence is the ``draw_number`` of its prompt. Seeds and kept responses go by it, not by the
problem id, which may stand on several records, nor by the record, which may be drawn several times in a step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import xxhash

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.records import Record, record_digest
from megatron_ktr.data.unusable import PromptTooLong, UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt

_log = logging.getLogger(__name__)
_MAX_FRUITLESS_DRAWS = 1000
"""So many samples in a row without a usable one stop the run, even if each was rejected for its length."""


class SkipCounter:
    """Counts samples drawn and skipped, and stops the run when too large a share is unusable.

    Over-long prompts are counted, but not in that share: leaving them out is a choice, not a defect of the data.
    """

    def __init__(self, *, max_skip_share: float = 0.1, min_drawn: int = 20) -> None:
        self.max_skip_share = max_skip_share
        self.min_drawn = min_drawn
        """The share means something only after so many samples."""
        self.num_drawn = 0
        self.by_kind: Counter[str] = Counter()
        self.last: UnusableSample | None = None

    @property
    def num_skipped(self) -> int:
        return sum(self.by_kind.values())

    def count_drawn(self) -> None:
        self.num_drawn += 1

    def count_skip(self, error: UnusableSample, *, number: object = None) -> None:
        """Logs path and reason, and ``number``, the record's in its file.

        Raises:
            UserError: more than ``max_skip_share`` of at least ``min_drawn`` samples are unusable.
        """
        self.by_kind[error.kind] += 1
        self.last = error
        _log.warning("skipped%s (%s): %s", "" if number is None else f" record {number}", error.kind, error)
        num_unusable = self.num_skipped - self.by_kind[PromptTooLong.kind]
        if self.num_drawn >= self.min_drawn and num_unusable > self.max_skip_share * self.num_drawn:
            raise UserError(
                f"{num_unusable} of {self.num_drawn} samples are unusable, more than max_skip_share "
                f"{self.max_skip_share:g}; the last one: {error}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn, "by_kind": dict(self.by_kind)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_drawn = int(state["num_drawn"])
        self.by_kind = Counter({str(kind): int(count) for kind, count in state["by_kind"].items()})


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
        """``left_out``: places in ``records`` that are passed over. They keep their place, so that the order of the
        others, and where a resumed run goes on, do not depend on what can be used today."""
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
        """Samples drawn by this rank so far, skipped ones included."""
        self._order: tuple[int, list[int]] | None = None

    @property
    def num_kept(self) -> int:
        """Records of an epoch, without those that are passed over."""
        return len(self.records) - len(self.left_out)

    @property
    def num_skipped(self) -> int:
        return self.skips.num_skipped

    @property
    def counts(self) -> dict[str, int]:
        """Over the whole run, for the metrics: the loader's counts, and ``skipped/<kind>`` for each kind of skip."""
        return dict(self.loader.counts) | {f"skipped/{kind}": number for kind, number in self.skips.by_kind.items()}

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self._element(self.position) // len(self.records)

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next ``num_prompts`` usable prompts; each skipped sample is replaced by the one after it.

        Raises:
            UserError: too large a share of samples is unusable, or none is.
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
        """Plain numbers and text: where this rank stands, and its counts."""
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
            UserError: taken with other data, seed, shuffling or number of data-parallel ranks (for the last, see
                ``reshard_states``).
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
        """Of the records in their order: those that are drawn, whatever else the file holds (``--problem-types``)."""
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
            raise UserError("resume: --prompt-template is not the text of the saved run; only its place may change")

    def _element(self, position: int) -> int:
        return self.rank + position * self.size

    def _draw(self) -> tuple[int, Record]:
        """The next usable element's place in the sequence, and its record."""
        for _ in range(len(self.records) + _MAX_FRUITLESS_DRAWS):
            element = self._element(self.position)
            place = self._place_of(element)
            self.position += 1
            if place not in self.left_out:
                self.skips.count_drawn()
                return element, self.records[place]
        # Without shuffling a replica may see the same few places in every epoch.
        raise UserError(f"data-parallel replica {self.rank} of {self.size} draws only records that cannot be used")

    def _place_of(self, element: int) -> int:
        epoch, offset = divmod(element, len(self.records))
        if not self.shuffle:
            return offset
        if self._order is None or self._order[0] != epoch:
            # Seeded by the sum of two far-apart streams: a generator takes one number, epochs and seeds are small.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.records), generator=generator).tolist())
        return self._order[1][offset]


def reshard_states(states: Iterable[Mapping[str, Any]], *, rank: int, size: int) -> dict[str, Any]:
    """State of rank ``rank`` of ``size`` from the states of all data-parallel ranks of a saved run.

    Same size: that rank's own state, exact. Another size: all ranks continue after the furthest sample that any rank
    has drawn, so none is seen twice; where ranks had skipped different numbers of samples, a few are passed over.
    Counts are kept once, on rank 0. Responses that were pending (``pending``, by ``Prompt.identity``) go to every rank:
    it draws some of their prompts again.
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
