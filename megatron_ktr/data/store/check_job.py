"""The part of a check of records that any process can do: a ``CheckJob`` can be sent to another process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

import megatron_ktr
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.media.request import SYNONYMS, media_sources
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.record_check import RecordChecker
from megatron_ktr.data.reward_checks import reward_checks
from megatron_ktr.data.store.record_store import FORMAT, RecordRules, RecordStore, StoreFile
from megatron_ktr.data.template import PromptBuilder
from megatron_ktr.errors import UserError
from megatron_ktr.files.listing import paths_below
from megatron_ktr.rewards.accuracy import known_types

CHUNK = 4096
"""Records that are checked together."""


@dataclass(frozen=True)
class CheckJob:
    """What a process needs to check records of a store; it can be sent to another process."""

    file: StoreFile | None
    path: Path
    rules: RecordRules
    builder: PromptBuilder
    settings: PreprocessSettings
    sampling: FrameSampling
    rewards: tuple[str, ...]
    """The built-in rewards that must be able to judge the records."""

    def checker(self) -> RecordChecker:
        loader = PromptLoader(self.builder, media_root=".", settings=self.settings, sampling=self.sampling)
        return RecordChecker(loader, checks=reward_checks(self.rewards))

    def key(self) -> str:
        """A digest of everything that can change the result."""
        tokenizer = self.builder.tokenizer
        parts = [
            FORMAT,
            self.rules,
            self.rewards,
            known_types(),  # a package that is installed later adds some
            self.settings,
            self.sampling,
            self.builder.wording.text,
            self.builder.control_pattern,
            self.builder.visual_tokens,
            getattr(tokenizer, "eos_token", None),
            getattr(tokenizer, "chat_template", None),
            _code_digest(),
        ]
        return xxhash.xxh3_128("\0".join(map(repr, parts)).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class ChunkFindings:
    """What was found in ``CHUNK`` records from ``start`` on."""

    start: int
    problems: list[tuple[int, int, str | None, str]]
    """(place, number in the file, problem id, reason) of the records that cannot be used."""
    media: list[str | None]
    """JSON of each record's media; null if there are none, or the record cannot be used."""
    clip_numbers: list[int]


def check_chunk(store: RecordStore, checker: RecordChecker, *, start: int) -> ChunkFindings:
    """Checks up to ``CHUNK`` records of a store, without looking for their files."""
    findings = ChunkFindings(start, [], [], [])
    for place in range(start, min(start + CHUNK, len(store))):
        media = None
        try:
            record = store[place]
        except ValueError as error:
            findings.problems.append((place, store.number_of(place), None, str(error)))
        else:
            sources = media_sources(record)
            found = checker.find_problem_of_text(record, sources)
            if found is not None:
                findings.problems.append((place, record["record_number"], record["problem_id"], found.reason))
            elif sources:
                media = json.dumps([[source.kind, source.written] for source in sources])
            if is_clip(record):
                findings.clip_numbers.append(record["record_number"])
        findings.media.append(media)
    return findings


def is_clip(record: Mapping[str, Any]) -> bool:
    """Whether a record shows a part of a video by fields that have another meaning in some data sets."""
    return bool(SYNONYMS.keys() & record.keys()) and any(
        SYNONYMS[name] in request for request in record.get("media_requests", ()) for name in SYNONYMS
    )


@cache
def _code_digest() -> str:
    """A digest of the code that checks, so that no other version's results are taken for its own."""
    digest = xxhash.xxh3_128()
    package = Path(megatron_ktr.__file__).parent
    for path in sorted(file for wing in ("data", "rewards") for file in paths_below(package / wing)):
        if path.suffix != ".py":
            continue
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(f"the program's own file {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
