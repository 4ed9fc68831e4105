"""Checks every record of a file, and the media that they show.

    records, one by one   what training checks before it builds a model (``RecordReader``), ids, tokens of the texts
    media, in processes   each once: opened, or decoded as training decodes it
    records again         media that do not decode, prompts that are too long

What is found stands in a ``Ledger``, on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from megatron_ktr.data.media.request import SYNONYMS, MediaSource, media_sources
from megatron_ktr.data.prepare.ledger import Finding, Ledger, ShownMedia
from megatron_ktr.data.prepare.media_looks import ProcessLimits, Seen, look_at_media, recall_media
from megatron_ktr.data.prepare.media_probe import Look
from megatron_ktr.data.prepare.media_state import MediaState
from megatron_ktr.data.prepare.options import ReadingOptions
from megatron_ktr.data.prepare.reasons import DOES_NOT_DECODE, DUPLICATE_ID, ONLY_A_CLIP, PROMPT_TOO_LONG, kind_of
from megatron_ktr.data.prepare.record_reader import CheckedRecord, RecordReader, visual_tokens
from megatron_ktr.data.records import Record

Decode = Literal["none", "sample", "all"]


@dataclass(frozen=True)
class MediaOptions:
    """Which media are decoded, and how."""

    decode: Decode = "sample"
    share: float = 0.05
    """Of the media of each folder and codec, with ``sample``."""
    fewest: int = 3
    """The fewest of each folder and codec."""
    seed: int = 0
    state: Path | None = None
    limits: ProcessLimits = ProcessLimits()


@dataclass
class Validation:
    """The result of a check. The findings themselves stand in ``ledger``, which is closed after use."""

    reading: ReadingOptions
    media: MediaOptions
    ledger: Ledger
    num_records: int = 0
    num_other_types: int = 0
    num_lengths_unknown: int = 0
    """Records whose prompts may be too long, because not all of their media were looked at."""
    kinds_of_media: dict[int, str] = field(default_factory=dict)
    """Media that cannot be used -> kind of the reason."""

    @property
    def num_usable(self) -> int:
        return self.num_records - sum(self.ledger.counts().values())


def validate(reading: ReadingOptions, media: MediaOptions) -> Validation:
    """Checks the file.

    Raises:
        UserError: the file is not JSON or has no records, the model or the wording cannot be used, or the state file
            is none.
    """
    reader = RecordReader(reading)
    result = Validation(reading, media, Ledger(seed=media.seed))
    state = MediaState(media.state)
    try:
        with tqdm(reader, unit=" records", desc="records", disable=None, leave=False) as records:
            for checked in records:
                _note_record(checked, result, reader)
        result.num_other_types = reader.num_other_types
        _look(result, reader, state)
        _settle(result, reader)
    except BaseException:
        result.ledger.close()
        raise
    finally:
        state.close()
    return result


def _note_record(checked: CheckedRecord, result: Validation, reader: RecordReader) -> None:
    result.num_records += 1
    number, record, file = checked.number, checked.record, str(result.reading.file)
    if record is not None:
        first = result.ledger.add_id(record["problem_id"], number)
        if first is not None:
            detail = f"record {first} has the problem_id {record['problem_id']!r} too"
            result.ledger.add_warning(Finding(number, file, DUPLICATE_ID, detail))
    if checked.problem is not None:
        reason = checked.problem.reason
        result.ledger.add_problem(Finding(number, checked.problem.medium or file, kind_of(reason), reason))
        return
    assert record is not None, "a record without fields has a problem"
    if clip := _clip_by_synonym(record):
        result.ledger.add_warning(Finding(number, file, ONLY_A_CLIP, clip))
    text_tokens = None if result.reading.model is None else reader.text_tokens(record)
    result.ledger.add_record(number, sources=media_sources(record), text_tokens=text_tokens)


def _clip_by_synonym(record: Record) -> str:
    """What to say of a record whose ``start`` and ``end`` are the clip to watch; "" for any other."""
    names = [name for name in SYNONYMS if name in record]
    if not any(SYNONYMS[name] in request for name in names for request in record["media_requests"]):
        return ""
    return (
        "the video is shown from its 'start' to its 'end' only; where these are the answer: --ignore-fields start,end"
    )


def _look(result: Validation, reader: RecordReader, state: MediaState) -> None:
    options, ledger = result.media, result.ledger
    if options.decode == "none":
        return
    if options.decode == "all":
        _look_at(Look.FRAMES, None, result, reader, state)
        return
    _look_at(Look.HEADER, None, result, reader, state)
    _look_at(Look.FRAMES, ledger.sample(share=options.share, fewest=options.fewest), result, reader, state)


def _look_at(look: Look, chosen: list[int] | None, result: Validation, reader: RecordReader, state: MediaState) -> None:
    """Looks at the media of these ids, at all of them for None."""
    ledger = result.ledger

    def media() -> Iterable[tuple[int, MediaSource]]:
        if chosen is None:
            return ledger.media(unseen_at=look)
        return ((medium, ledger.source_of(medium)) for medium in chosen if ledger.look_of(medium) < look)

    def note(seen: Seen) -> None:
        ledger.set_facts(seen.number, seen.facts)
        if seen.kind_of_problem:
            result.kinds_of_media[seen.number] = seen.kind_of_problem

    if result.media.state is not None:
        for seen in recall_media(media(), look=look, loader=reader.loader, state=state):
            note(seen)
    total = (ledger.num_media() if chosen is None else len(chosen)) - ledger.num_media(at_least=look)
    limits = result.media.limits
    for seen in look_at_media(
        media(), look=look, loader=reader.loader, limits=limits, state=state, total=max(total, 0)
    ):
        note(seen)


def _settle(result: Validation, reader: RecordReader) -> None:
    """Goes through the records that have no problem so far, with what is known of their media."""
    for number, text_tokens, media in result.ledger.records():
        if finding := _problem_with_media(number, media, result):
            result.ledger.add_problem(finding)
        else:
            _check_sizes(number, text_tokens, media, result, reader)


def _problem_with_media(number: int, media: list[ShownMedia], result: Validation) -> Finding | None:
    for shown in media:
        if shown.facts is not None and shown.facts.problem:
            kind = result.kinds_of_media.get(shown.number, DOES_NOT_DECODE)
            return Finding(number, _name(shown.source), kind, shown.facts.problem)
    return None


def _check_sizes(
    number: int, text_tokens: int | None, media: list[ShownMedia], result: Validation, reader: RecordReader
) -> None:
    settings = reader.loader.settings
    num_tokens, is_exact = text_tokens or 0, True
    for shown in media:
        if shown.facts is None or shown.facts.look == Look.HEADER:
            num_tokens, is_exact = num_tokens + 1, False  # a medium has at least one token
            continue
        try:
            num_tokens += visual_tokens(shown.facts, shown.source, settings)
        except ValueError as error:
            finding = Finding(number, _name(shown.source), DOES_NOT_DECODE, str(error))
            result.ledger.add_problem(finding)
            return
    most = result.reading.data.max_prompt_length
    if text_tokens is None:
        return
    if num_tokens > most:
        few = "" if is_exact else "at least "
        detail = f"{few}{num_tokens} tokens, at most {most} (--max-prompt-length)"
        result.ledger.add_problem(Finding(number, str(result.reading.file), PROMPT_TOO_LONG, detail))
    elif not is_exact:
        result.num_lengths_unknown += 1


def _name(source: MediaSource) -> str:
    return source.paths[0]
