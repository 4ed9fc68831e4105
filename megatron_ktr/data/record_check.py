"""Checks all records before a model is built, as far as that is possible without decoding their media.

The problems found here are reported all together (``RecordProblems``), with counts and the numbers of the first
records. Problems that only decoding reveals, such as a damaged video or a prompt that is too long, cause a skip when
the record is drawn (``SkipCounter``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.files import MediaFiles
from megatron_ktr.data.media.request import NOTHING_ASKED, MediaSource, media_sources
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import Record
from megatron_ktr.data.reply import build_reply, check_reply
from megatron_ktr.data.unusable import UnusableMedia, UnusableSample
from megatron_ktr.errors import TransientError, UserError


@dataclass(frozen=True)
class FoundProblem:
    """Why a record cannot be used."""

    reason: str
    medium: str | None = None
    """The path, as the record writes it, if the reason is about one of its media."""


def check_questions(
    records: Sequence[Record],
    *,
    problems: RecordProblems,
    loader: PromptLoader,
    checks: Sequence[Callable[[Record], None]] = (),
) -> None:
    """Adds to ``problems`` the records that cannot be used; see ``RecordChecker``."""
    checker = RecordChecker(loader, checks=checks)
    for place, record in enumerate(records):
        if place in problems.places:
            continue
        if found := checker.find_problem(record):
            problems.add(place, number=record["record_number"], problem_id=record["problem_id"], reason=found.reason)


class RecordChecker:
    """Finds the records that ``loader`` could not turn into a prompt, without decoding their media.

    A path leads out of the media root or to no file, a field contradicts the run's limits, a text contains control
    tokens or markers that do not match the media, or the wording template fails. Records for which one of ``checks``
    raises ``ValueError`` are found too.
    """

    def __init__(self, loader: PromptLoader, *, checks: Sequence[Callable[[Record], None]] = ()) -> None:
        self.loader = loader
        self._checks = checks
        self._files = MediaFiles(loader.media_root)
        self._is_conversation_seen = False

    def find_problem(self, record: Record) -> FoundProblem | None:
        """The first reason why a record of ``records.check_record`` cannot be used; None if it can.

        Raises:
            UserError: the chat template does not let a conversation be split into its turns. That is an error of the
                model's files, not of the record, and is tested with the first conversation of several answers.
        """
        sources = media_sources(record)
        return self.find_problem_of_files(sources) or self.find_problem_of_text(record, sources)

    def find_problem_of_text(self, record: Record, sources: Sequence[MediaSource]) -> FoundProblem | None:
        """The same, whatever files there are; ``sources`` are the record's media."""
        for source in sources:
            if source.request != NOTHING_ASKED and (found := self._problem_of_request(source)):
                return found
        try:
            self.loader.builder.messages(record, [source.kind for source in sources])
            if "reply_turns" in record:
                check_reply(record, builder=self.loader.builder)
            for check in self._checks:
                check(record)
        except UnusableSample as error:
            return FoundProblem(error.reason)
        except (UserError, ValueError) as error:
            return FoundProblem(str(error))
        if len(record.get("reply_turns", ())) > 1 and not self._is_conversation_seen:
            self._is_conversation_seen = True
            build_reply(record, kinds=[source.kind for source in sources], builder=self.loader.builder)
        return None

    def find_problem_of_files(self, sources: Sequence[MediaSource]) -> FoundProblem | None:
        """Whether a path leads out of the media root or to no file. Raises ``TransientError`` where that cannot be seen
        now."""
        for source in sources:
            for written in source.paths:
                try:
                    self._files.check(written)
                except TransientError:
                    raise
                except UnusableMedia as error:
                    if source.kind not in self.loader.substitutes:  # a substitute would be shown instead
                        return FoundProblem(f"{error.source}: {error.reason}", medium=written)
                except (UserError, ValueError) as error:
                    return FoundProblem(str(error), medium=written)
        return None

    def _problem_of_request(self, source: MediaSource) -> FoundProblem | None:
        try:
            sampling = replace(self.loader.sampling, multiple=self.loader.settings.temporal_patch_size)
            source.request.sampling(sampling, is_pictures=source.is_pictures)
            source.request.settings(self.loader.settings, kind=source.kind)
        except (UserError, ValueError) as error:
            return FoundProblem(str(error))
        return None
