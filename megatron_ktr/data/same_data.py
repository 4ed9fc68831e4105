"""Digests of what a run is trained on, and the refusal to resume it with something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.records import digest_of_records
from megatron_ktr.errors import UserError


def records_digest(sources: Sequence[RecordSource]) -> str:
    """A digest of the records in their order. It covers only the records in use, not those of the file that
    ``--problem-types`` excludes."""
    return _together(digest_of_records(source.records) for source in sources)


def wording_digest(sources: Sequence[RecordSource]) -> str:
    """A digest of the templates that word the questions."""
    return _together(source.loader.wording_digest for source in sources)


def left_out_digest(sources: Sequence[RecordSource]) -> str:
    """A digest of the records that are passed over."""
    return _together(xxhash.xxh3_128(np.packbits(source.is_left_out).tobytes()).hexdigest() for source in sources)


def has_digests(state: Mapping[str, Any]) -> bool:
    """Whether a saved state says which records it was trained on."""
    return "records_digest" in state


def require_same_content(state: Mapping[str, Any], *, records: str, wording: str, num_records: int) -> None:
    """Compares a saved state with the digests of this run; one of an early version has none, and passes.

    Raises:
        UserError: the records, or the wordings, are others.
    """
    if not has_digests(state):
        return
    if state["records_digest"] != records:
        raise UserError(
            f"resume: the {num_records} records are not those of the saved run (same number, other content "
            "or order): give --data-path or --replay-path the same questions, only their directory may change"
        )
    if state["wording_digest"] != wording:
        raise UserError(
            "resume: --prompt-template is not the text of the saved run, or --chat-template is not; only "
            "their place may change"
        )


def _together(digests: Iterable[str]) -> str:
    """One digest of all; of a single one itself."""
    first, *others = digests
    return xxhash.xxh3_128("".join((first, *others)).encode()).hexdigest() if others else first
