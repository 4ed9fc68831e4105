"""Reads and checks the records of a file one by one, as training does before it builds a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.data.prepare.media_probe import MediaFacts
from megatron_ktr.data.prepare.options import ReadingOptions, build_loader
from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.data.record_check import FoundProblem, RecordChecker
from megatron_ktr.data.records import Record, check_record, check_writable
from megatron_ktr.data.reward_checks import reward_checks
from megatron_ktr.data.store.record_store import problem_type_of
from megatron_ktr.data.template import PromptBuilder
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import DEFAULT_REWARDS
from megatron_ktr.types import VisualInput

_MOST_TYPES = 20
"""The most problem types to name in a message."""


@dataclass(frozen=True)
class CheckedRecord:
    """One record of the file, and why it cannot be used, if it cannot."""

    number: int
    """Its place in the file, from 1; in JSONL the line."""
    record: Record | None
    """None if its fields cannot be read."""
    problem: FoundProblem | None


class RecordReader:
    """The records of one file, in order, in constant memory. Those of other types than ``--problem-types`` are passed
    over."""

    def __init__(self, reading: ReadingOptions) -> None:
        self.reading = reading
        self.loader: PromptLoader = build_loader(reading)
        self.num_other_types = 0
        checks = reward_checks(reading.reward_functions or DEFAULT_REWARDS) if reading.purpose == "rl" else []
        if reading.purpose == "sft" and self.loader.builder.tokenizer.eos_token is None:
            raise UserError("model: the tokenizer has no end token, which given responses need (eos_token)")
        self._checker = RecordChecker(self.loader, checks=checks)

    def __iter__(self) -> Iterator[CheckedRecord]:
        """Raises ``UserError`` if the file is not JSON, or holds no record of the wanted types."""
        data = self.reading.data
        wanted = set(data.problem_types)
        found_types: set[str] = set()
        num_records = 0
        for number, raw in iter_raw_records(self.reading.file, option="FILE"):
            problem_type = problem_type_of(raw)
            if problem_type is not None:
                if len(found_types) < _MOST_TYPES:
                    found_types.add(problem_type[:80])
                # A record without a valid type is not passed over, because it may be meant to be of a wanted type.
                if wanted and problem_type not in wanted:
                    self.num_other_types += 1
                    continue
            num_records += 1
            yield self._check(number, raw)
        if not num_records:
            why = f"none of problem_types {sorted(wanted)}; found {sorted(found_types)}" if found_types else ""
            raise UserError(f"FILE: {self.reading.file} has {why or 'no records at all'}")

    def _check(self, number: int, raw: object) -> CheckedRecord:
        try:
            check_writable(raw)
            record = check_record(
                raw,
                number=number,
                needs_solution=self.reading.purpose == "rl",
                needs_reply=self.reading.purpose == "sft",
                ignored=self.reading.data.ignore_fields,
            )
        except ValueError as error:
            return CheckedRecord(number, None, FoundProblem(str(error)))
        return CheckedRecord(number, record, self._checker.find_problem(record))

    def text_tokens(self, record: Mapping[str, object]) -> int:
        """The tokens of a usable record's prompt without those of its media."""
        return count_text_tokens(record, builder=self.loader.builder)


def count_text_tokens(record: Mapping[str, object], *, builder: PromptBuilder) -> int:
    """The tokens of a usable record's prompt without those of its media."""
    merge = builder.merge_size
    sources = media_sources(record)
    # A medium of this grid has one visual token.
    media = [
        VisualInput(kind=source.kind, frames_FCHW=torch.empty(0), grid_thw=(1, merge, merge)) for source in sources
    ]
    return len(builder.build(record, media).token_ids) - len(sources)


def frame_size(facts: MediaFacts, source: MediaSource, settings: PreprocessSettings) -> tuple[int, int]:
    """(height, width) of the medium's frames in a prompt.

    Raises:
        ValueError: the frames are too long and narrow, or the record asks for sizes outside the run's limits.
    """
    settings = source.request.settings(settings, kind=source.kind)
    return settings.frame_size(facts.height, facts.width, kind=source.kind, num_frames=facts.num_frames)


def visual_tokens(facts: MediaFacts, source: MediaSource, settings: PreprocessSettings) -> int:
    """The number of visual tokens of a medium in a prompt. Raises ``ValueError`` as ``frame_size`` does."""
    height, width = frame_size(facts, source, settings)
    time = math.ceil(facts.num_frames / settings.temporal_patch_size)
    grid = time, height // settings.patch_size, width // settings.patch_size
    return settings.num_visual_tokens(grid)
