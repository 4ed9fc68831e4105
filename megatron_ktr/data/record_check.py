"""Checks all records before a model is built, as far as that is possible without decoding their media.

The problems found here are reported all together (``RecordProblems``), with counts and the numbers of the first
records. Problems that only decoding reveals, such as a damaged video or a prompt that is too long, cause a skip when
the record is drawn (``SkipCounter``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.files import MediaFiles
from megatron_ktr.data.media.request import NOTHING_ASKED, MediaSource, media_sources
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
    """Adds to ``problems`` the records that cannot be used.

    These are the records that ``loader`` could not turn into a prompt: a path leads out of the media root or to no
    file, a field contradicts the run's limits, a text contains control tokens or markers that do not match the media,
    or the wording template fails. They are also the records for which one of ``checks`` raises ``ValueError``.
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
            # This tests once whether the chat template allows a conversation to be split into turns. A failure is an
            # error of the model's files, not of this record, and stops the run.
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
            if source.kind not in loader.substitutes:  # a substitute would be shown instead
                raise
