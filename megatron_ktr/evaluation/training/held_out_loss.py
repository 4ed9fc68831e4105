"""The loss of held-out responses between the steps of a supervised run, by the policy itself (``--eval-loss-data``).

    eval/<set>/loss            -sum_t log p_t / N over the N tokens of the set that a training run would learn: those of
                               the assistant's turns. The mean of tokens, also where training averages responses
    eval_loss                  the same over all sets together; left out once a resumed run has other sets than those
                               over which the run took it first, and where a set is measured later than the others
    eval/<set>/loss_skipped    share of the set's records that could not be shown (a damaged video, a prompt that is too
                               long); they count nothing

Records are read, shown, packed and masked by the code of training; the passes have no gradient. Each replica takes
every n-th record, and sums are in fp64, so that the figures do not depend on the number of replicas but for rounding.
Nothing in training changes: the vision encoder's kept features stay as they are (``PolicyVision.apart``), readers and
their counts are others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import xxhash

from megatron_ktr.batch.packing import plan_micro_batches
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.records import digest_of_records
from megatron_ktr.data.reply import reply_group
from megatron_ktr.data.template import chat_format_digest
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.evaluation.training.held_out import SEED
from megatron_ktr.evaluation.training.same_sets import HeldOutSets
from megatron_ktr.files.json_files import to_json
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.step.balance import pack_by_tokens
from megatron_ktr.trainer import Trainer
from megatron_ktr.types import RolloutGroup

TOTAL = "eval_loss"
"""The metric over all sets together."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossSet:
    """The held-out records of one file."""

    source: RecordSource
    places: tuple[int, ...]
    """Indices of the records whose loss is measured, in the order of the file."""
    limit: int | None = None
    """How many were asked for; None: all."""

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the figure beside the model."""
        loader, records = self.source.loader, self.source.records
        facts = {
            # Of the whole file: which of them can be used changes with the media that are there, and may.
            "records": digest_of_records(records),
            "number of records": len(records) if self.limit is None else min(self.limit, len(records)),
            "rule for frames": dataclasses.asdict(loader.sampling),
            "pixels": dataclasses.asdict(loader.settings),
            "wording": loader.wording_digest,
            "longest prompt": loader.max_prompt_length,
            "chat template": chat_format_digest(loader.builder.tokenizer),
        }
        return json.loads(to_json(facts))  # as they are read again: JSON knows no tuples

    @property
    def facts_before(self) -> dict[str, Any]:
        """See ``HeldOutSets``: only the records that were measured counted."""
        digests = "".join(str(self.source.records[place]["record_digest"]) for place in self.places)
        return {
            "records": xxhash.xxh3_128(digests.encode()).hexdigest(),
            "number of records": len(self.places),
        }


@dataclass(frozen=True)
class HeldOutResponses(HeldOutSets):
    """All of them."""

    sets: tuple[LossSet, ...]

    @classmethod
    def of(cls, sources: Sequence[RecordSource], *, limit: int | None) -> HeldOutResponses:
        """The usable records of each file, or ``limit`` of them, drawn at random: the same ones in every evaluation,
        and those of a lower limit among those of a higher one."""
        sets = []
        for source in sources:
            usable = [place for place in range(len(source.records)) if not source.is_left_out[place]]
            if limit is not None:
                usable = sorted(sorted(usable, key=lambda place: (_rank(place), place))[:limit])
            sets.append(LossSet(source, tuple(usable), limit))
        return cls(tuple(sets))

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """See ``HeldOutSets``. The questions of a file may be answered too, under its name alone."""
        return {f"{one.name} (loss)": one.facts for one in self.sets}

    @property
    def facts_before(self) -> dict[str, dict[str, Any]]:
        return {f"{one.name} (loss)": one.facts_before for one in self.sets}

    @property
    def figures(self) -> dict[str, str]:
        return {f"{one.name} (loss)": _loss_of(one.name) for one in self.sets}

    @property
    def totals(self) -> dict[str, list[str]]:
        return {TOTAL: [one.name for one in self.sets]}

    @property
    def missing(self) -> dict[str, list[int]]:
        return {f"{one.name} (loss)": sorted(one.source.left_out) for one in self.sets}

    @property
    def lines(self) -> list[str]:
        """One line for each set, for the console."""
        return [
            f"loss on {one.name}: {len(one.places)} of {len(one.source.records)} records, the same in every evaluation"
            for one in self.sets
        ]


def _loss_of(name: str) -> str:
    return f"eval/{name}/loss"


def _rank(place: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{SEED} {place}".encode())


class LossEvaluation:
    """Measures the loss of all sets. Every rank holds one; calls are collective over the world."""

    def __init__(
        self,
        held_out: HeldOutResponses | None,
        *,
        trainer: Trainer,
        has_total: bool = True,
        make_pool: Callable[[], WorkerPool | None] = lambda: None,
    ) -> None:
        """
        Args:
            held_out: the records, on reading ranks; None on the others.
            has_total: whether the loss over all sets together is measured too.
            make_pool: the processes that decode on a reading rank, or None: the rank decodes by itself.
        """
        assert isinstance(trainer.source, ReplicaSource)  # as ``train.py`` made it
        self._held_out = held_out
        self._trainer = trainer
        self._source = trainer.source
        self._has_total = has_total
        self._make_pool = make_pool
        sizes = None if held_out is None else {one.name: len(one.places) for one in held_out.sets}
        self._num_records: dict[str, int] = broadcast_object(sizes, group=trainer.policy.ranks.world, source=0)

    @property
    def figures(self) -> tuple[str, ...]:
        """A metric of each set."""
        return tuple(map(_loss_of, self._num_records))

    def __call__(
        self, step: int, *, is_leaving: Callable[[], bool], known: Collection[str] = ()
    ) -> dict[str, float] | None:
        """The metrics of the model that ``step`` left; None if the run is asked to leave meanwhile. Sets whose
        ``figures`` are among ``known`` are not measured.

        Raises:
            UserError: on every rank: no record of a set could be shown.
        """
        policy, values = self._trainer.policy, {}
        total, total_tokens = 0.0, 0.0
        with policy.vision.apart(), self._pool() as pool:
            for index, (name, num_records) in enumerate(self._num_records.items()):
                if _loss_of(name) in known:
                    continue
                found = self._loss_of_set(index, num_records, pool=pool, is_leaving=is_leaving)
                if found is None:
                    return None
                loss, num_tokens, num_skipped = map(policy.global_count, found)
                if not num_tokens:
                    with same_on_every_rank():
                        raise UserError(f"--eval-loss-data: none of the {num_records} records of {name} could be shown")
                values |= {
                    _loss_of(name): loss / num_tokens,
                    f"eval/{name}/loss_skipped": num_skipped / num_records,
                }
                total, total_tokens = total + loss, total_tokens + num_tokens
        has_total = self._has_total and not any(figure in known for figure in self.figures)
        return ({TOTAL: total / total_tokens} if has_total else {}) | values

    def _loss_of_set(
        self, index: int, num_records: int, *, pool: WorkerPool | None, is_leaving: Callable[[], bool]
    ) -> tuple[float, float, float] | None:
        """(sum of -log p, its tokens, records skipped) of this replica's share of a set, on all of its ranks."""
        size, together = self._trainer.policy.ranks.data_size, self._trainer.prompts_per_rank
        # Replica 0 has the most records. All ask equally often, because reading is collective.
        num_rounds = math.ceil(math.ceil(num_records / size) / together)
        loss, num_tokens, num_skipped = 0.0, 0, 0
        for number in range(num_rounds):
            if is_leaving():
                return None
            read = on_every_rank(partial(self._read, index, number, pool=pool), ranks=self._trainer.policy.ranks)
            groups, skipped = self._source.from_local(read)
            more, tokens = self._loss_of_groups(groups)
            loss, num_tokens, num_skipped = loss + more, num_tokens + tokens, num_skipped + skipped
        return loss, num_tokens, num_skipped

    def _read(self, index: int, number: int, *, pool: WorkerPool | None) -> tuple[list[RolloutGroup], int] | None:
        """(records that can be shown, number of the others) of a round, on the reading rank."""
        if self._held_out is None:
            return None
        ranks, together = self._trainer.policy.ranks, self._trainer.prompts_per_rank
        one = self._held_out.sets[index]
        own = one.places[ranks.data_rank :: ranks.data_size][number * together : (number + 1) * together]
        records, loader = [one.source.records[place] for place in own], one.source.loader
        media = [pool and pool.submit(partial(loader.read_media, record)) for record in records]
        groups, reasons = [], []
        for record, found in zip(records, media, strict=True):
            try:
                prompt = loader.load(record, found.result() if found else None)
                groups.append(reply_group(prompt, builder=loader.builder))
            except UnusableSample as error:
                reasons.append(str(error))
        if reasons:
            _log.warning("loss on %s: %d records are skipped (first: %s)", one.name, len(reasons), reasons[0])
        return groups, len(reasons)

    def _loss_of_groups(self, groups: Sequence[RolloutGroup]) -> tuple[float, int]:
        """(sum of -log p, number of tokens) of the assistant's tokens. Without groups the pass is still entered, since
        it gathers parameters over replicas."""
        policy, scoring = self._trainer.policy, self._trainer.scoring
        parts = self._parts(groups)
        found = policy.score([cache(partial(scoring.pack, part, "intact")) for part in parts])
        loss, num_tokens = torch.zeros((), dtype=torch.float64, device=policy.platform.device), 0
        for part, statistics in zip(parts, found, strict=True):
            is_trained = [flag for group in part for flag in _trained(group)]
            num_tokens += sum(is_trained)
            if statistics is not None:  # on the last stage
                is_trained_R = torch.tensor(is_trained, device=statistics.logprob_R.device)
                loss -= statistics.logprob_R.double()[is_trained_R].sum()
        return policy.from_last_stage(float(loss)), num_tokens

    def _parts(self, groups: Sequence[RolloutGroup]) -> list[tuple[RolloutGroup, ...]]:
        """Micro-batches of the size that training has."""
        options = self._trainer.options.trainer
        if not groups:
            return []
        if options.max_tokens_per_microbatch is None:
            return plan_micro_batches(groups, groups_per_micro_batch=options.micro_batch_groups)
        sizes = [group.num_tokens for group in groups]
        parts = pack_by_tokens(sizes, costs=sizes, max_tokens=options.max_tokens_per_microbatch)
        return [tuple(groups[place] for place in part) for part in parts]

    @contextlib.contextmanager
    def _pool(self) -> Iterator[WorkerPool | None]:
        pool = None if self._held_out is None else self._make_pool()
        with contextlib.closing(pool) if pool is not None else contextlib.nullcontext():
            yield pool


def _trained(group: RolloutGroup) -> Sequence[bool]:
    """For each response token of a group, whether training would learn it."""
    return [flag for rollout in group.rollouts for flag in (rollout.is_trained or (True,) * len(rollout.token_ids))]
