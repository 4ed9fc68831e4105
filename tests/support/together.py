"""Replicas that draw together from made records, without media and without files."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import Any

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.retirement import RetirementRule
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.types import Prompt

ABOVE_HALF = RetirementRule(above=0.5, num_epochs=1, decay=0.5)


class Loader:
    """Makes prompts without media; records with ``unusable`` cannot be used. Counts every load that succeeds."""

    wording_digest = "w"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.num_loads = 0

    def load(self, record: dict[str, Any], media: Any = None) -> Prompt:
        self.num_loads += 1
        if record.get("unusable"):
            raise UnusableMedia(record["problem_id"], "made so")
        self.counts["decoder/made"] += 1
        return Prompt(record["problem_id"], (1, 2), record=record)

    def read_media(self, record: dict[str, Any], decode: Any = None) -> list[Any]:
        return []


class NowPool:
    """Workers that have read everything at once. Remembers what they were given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def counts(self) -> dict[str, int]:
        return {}

    def submit(self, job: Any) -> Future[Any]:
        self.given.append(job.args[0]["problem_id"])
        done: Future[Any] = Future()
        done.set_result(job(None))
        return done

    def close(self) -> None:
        """Nothing to close."""


def replicas(
    size: int,
    *,
    numbers: tuple[int, ...] = (7,),
    rule: RetirementRule | None = ABOVE_HALF,
    left_out: tuple[int, ...] = (2,),
    unusable: tuple[int, ...] = (),
    shuffle: bool = True,
    draws: int = 0,
) -> list[PromptDataset]:
    found = []
    for rank in range(size):
        loader = Loader()
        sources = [
            RecordSource(
                [
                    {"problem_id": f"{name}{index}", "record_digest": f"{index}", "unusable": index in unusable}
                    for index in range(number)
                ],
                loader,  # type: ignore[arg-type]
                left_out if name == "a" else (),
                name=name,
                draws=draws or number,
            )
            for name, number in zip("abc", numbers, strict=False)
        ]
        skips = SkipCounter(max_skip_share=1.0)
        dataset = PromptDataset.of_sources(sources, seed=3, rank=rank, size=size, skips=skips, shuffle=shuffle)
        dataset.draw_together(rule)
        found.append(dataset)
    return found
