"""Digests of the data of a run: what a resumed run, and every replica, must find as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.records import digest_of_records
from megatron_ktr.errors import UserError

_log = logging.getLogger(__name__)


class DataContent:
    """The digests of a run's sources."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = sources

    @cached_property
    def records(self) -> str:
        """Of the records in their order. It covers only the records in use, not those of the file that
        ``--problem-types`` excludes."""
        return _together(digest_of_records(source.records) for source in self._sources)

    @property
    def wording(self) -> str:
        """Of the templates that word the questions."""
        return _together(source.loader.wording_digest for source in self._sources)

    @property
    def left_out(self) -> str:
        """Of which records are passed over."""
        return _together(
            xxhash.xxh3_128(np.packbits(source.is_left_out).tobytes()).hexdigest() for source in self._sources
        )

    @property
    def lengths(self) -> str:
        """Of the lengths by which records are ordered; empty where they are not."""
        buckets = self._sources[0].buckets
        return "" if buckets is None else buckets.digest

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint says of them. The records left out are not in it: the media may be in another place."""
        state = {"records_digest": self.records, "wording_digest": self.wording}
        return state | ({"lengths_digest": self.lengths} if self.lengths else {})

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Raises ``UserError`` if the data are not those of the run that saved ``state``."""
        if "records_digest" not in state:
            _log.warning("resume: the checkpoint does not say which records it was trained on; they are not compared")
            return
        if state["records_digest"] != self.records:
            number = sum(len(source.records) for source in self._sources)
            raise UserError(
                f"resume: the {number} records are not those of the saved run (same number, other content "
                "or order): give --data-path or --replay-path the same questions, only their directory may change"
            )
        if state["wording_digest"] != self.wording:
            raise UserError(
                "resume: --prompt-template is not the text of the saved run, or --chat-template is not; only "
                "their place may change"
            )
        if state.get("lengths_digest", "") != self.lengths:
            raise UserError(
                "resume: the lengths of the records, by which --length-buckets orders them, are not those of the saved "
                "run: media were exchanged, or became readable or unreadable (records left out count too); restore "
                "them, or start anew from the export"
            )


def _together(digests: Iterable[str]) -> str:
    """One digest of all; of a single one itself."""
    first, *others = digests
    return xxhash.xxh3_128("".join((first, *others)).encode()).hexdigest() if others else first
