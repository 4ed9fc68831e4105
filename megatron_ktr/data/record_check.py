"""Everything that can be known of the records without decoding their media, before a model is built.

What is found here is told at once (``RecordProblems``), with counts and the numbers of the first records. What only
decoding tells, a damaged video or a prompt that is too long, is skipped where it is drawn (``SkipCounter``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media_files import MediaFiles
from megatron_ktr.data.media_source import NOTHING_ASKED, MediaSource, media_sources
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import Record
from megatron_ktr.data.reply import build_reply, check_reply
from megatron_ktr.data.unusable import UnusableMedia, UnusableSample
from megatron_ktr.errors import UserError


def check_questions(
    records: Sequence[Record],
    *,
    problems: RecordProblems,
    loader: PromptLoader,
    checks: Sequence[Callable[[Record], None]] = (),
) -> None:
    """Adds to ``problems`` the records that ``loader`` could not make a prompt of: paths that lead out of the media
    root or to no file, fields that contradict the run's limits, texts with control tokens or with other markers than
    media, wordings that fail; and those that one of ``checks`` refuses by a ``ValueError``.
    """
    files = MediaFiles(loader.media_root)
    is_conversation_seen = False
    for place, record in enumerate(records):
        if place in problems.places:
            continue
        try:
            sources = media_sources(record)
            for source in sources:
                _check_source(source, files=files, loader=loader)
            kinds = [source.kind for source in sources]
            loader.builder.messages(record, kinds)
            if "reply_turns" in record:
                check_reply(record, builder=loader.builder)
            for check in checks:
                check(record)
        except (UnusableSample, UserError, ValueError) as error:
            reason = f"{error.source}: {error.reason}" if isinstance(error, UnusableMedia) else error
            reason = error.reason if isinstance(error, UnusableSample) and reason is error else reason
            problems.add(place, number=record["record_number"], problem_id=record["problem_id"], reason=reason)
            continue
        if len(record.get("reply_turns", ())) > 1 and not is_conversation_seen:
            is_conversation_seen = True
            # Whether the chat template can be split into turns: an error of the model's files, not of this record.
            build_reply(record, kinds=kinds, builder=loader.builder)


def _check_source(source: MediaSource, *, files: MediaFiles, loader: PromptLoader) -> None:
    if source.request != NOTHING_ASKED:
        sampling = replace(loader.sampling, multiple=loader.settings.temporal_patch_size)
        source.request.sampling(sampling, is_pictures=source.is_pictures)
        source.request.settings(loader.settings, kind=source.kind)
    for written in source.paths:
        try:
            files.check(written)
        except UnusableMedia:
            if source.kind not in loader.substitutes:  # which is shown instead
                raise
