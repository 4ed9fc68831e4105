"""A seeded sample of the records that can be used, with what is known of their media."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.data.prepare.media_looks import ProcessLimits, look_at_media
from megatron_ktr.data.prepare.media_probe import Look, MediaFacts
from megatron_ktr.data.prepare.reasons import kind_of
from megatron_ktr.data.prepare.record_reader import CheckedRecord, RecordReader
from megatron_ktr.errors import UserError


@dataclass
class RecordSample:
    """Some records of a file, in its order, and counts of all of them."""

    records: list[CheckedRecord]
    """Those without a problem, drawn at random."""
    named: dict[int, CheckedRecord] = field(default_factory=dict)
    """Those asked for by number, with or without a problem."""
    num_records: int = 0
    num_usable: int = 0
    problem_types: Counter[str] = field(default_factory=Counter)
    data_types: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    """Kinds of problems of the records that cannot be used."""
    seed: int = 0

    def drawn(self, number: int) -> list[CheckedRecord]:
        """``number`` of ``records``, drawn at random, in the order of the file."""
        chosen = random.Random(self.seed).sample(self.records, min(number, len(self.records)))
        return sorted(chosen, key=lambda checked: checked.number)


def sample_records(reader: RecordReader, *, size: int, seed: int = 0, named: Collection[int] = ()) -> RecordSample:
    """Reads the whole file and keeps ``size`` usable records (reservoir sampling), and those of the numbers ``named``.

    Raises:
        UserError: the file has no record of one of these numbers.
    """
    generator = random.Random(seed)
    sample = RecordSample([], seed=seed)
    for checked in reader:
        sample.num_records += 1
        if checked.number in named:
            sample.named[checked.number] = checked
        if checked.problem is not None or checked.record is None:
            sample.problems[kind_of(checked.problem.reason if checked.problem else "")] += 1
            continue
        sample.problem_types[checked.record["problem_type"]] += 1
        sample.data_types[checked.record["data_type"]] += 1
        sample.num_usable += 1
        if len(sample.records) < size:
            sample.records.append(checked)
        elif (place := generator.randrange(sample.num_usable)) < size:
            sample.records[place] = checked
    if missing := set(named) - sample.named.keys():
        raise UserError(f"--records: {reader.reading.file} has no record {min(missing)} of the wanted types")
    sample.records.sort(key=lambda checked: checked.number)
    return sample


@dataclass(frozen=True)
class PromptFacts:
    """What decides the length of one prompt."""

    number: int
    text_tokens: int
    """Tokens without those of media; 0 if no model was given."""
    media: tuple[tuple[MediaSource, MediaFacts], ...]


@dataclass(frozen=True)
class SampledPrompts:
    """The records of a sample whose media can be read."""

    prompts: list[PromptFacts]
    media: dict[MediaSource, MediaFacts]
    """Each medium once, with those that cannot be read."""


def sampled_prompts(sample: RecordSample, reader: RecordReader, *, limits: ProcessLimits) -> SampledPrompts:
    """Reads the sizes and numbers of frames of all media of the sample, without decoding them."""
    sources = list(dict.fromkeys(source for record in sample.records for source in media_sources(_fields(record))))
    media = {
        sources[seen.number]: seen.facts
        for seen in look_at_media(
            enumerate(sources), look=Look.INDEX, loader=reader.loader, limits=limits, total=len(sources)
        )
    }
    prompts = []
    for checked in sample.records:
        shown = tuple((source, media[source]) for source in media_sources(_fields(checked)))
        if not any(facts.problem for _, facts in shown):
            tokens = 0 if reader.reading.model is None else reader.text_tokens(_fields(checked))
            prompts.append(PromptFacts(checked.number, tokens, shown))
    return SampledPrompts(prompts, {source: media[source] for source in sources})


def _fields(checked: CheckedRecord) -> Mapping[str, object]:
    assert checked.record is not None, "records of a sample can be used"
    return checked.record
