"""What one check has found so far, in a temporary database on disk, so that memory does not grow with the file.

records    numbers of the records without a problem, with the tokens of their texts
media      each medium once, with what is known of it
uses       which record shows which medium
findings   problems and warnings
ids        the first record of each problem id
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from megatron_ktr.data.media.request import MediaRequest, MediaSource
from megatron_ktr.data.prepare.media_probe import Look, MediaFacts
from megatron_ktr.errors import one_line

_TABLES = """
CREATE TABLE records (number INTEGER PRIMARY KEY, text_tokens INTEGER);
CREATE TABLE media (id INTEGER PRIMARY KEY, digest BLOB UNIQUE, source TEXT, folder TEXT, place INTEGER,
                    codec TEXT, look INTEGER DEFAULT 0, is_bad INTEGER DEFAULT 0, facts TEXT);
CREATE TABLE uses (record INTEGER, medium INTEGER);
CREATE TABLE findings (number INTEGER, path TEXT, kind TEXT, detail TEXT, is_warning INTEGER);
CREATE TABLE ids (digest BLOB PRIMARY KEY, number INTEGER);
CREATE INDEX uses_of_records ON uses (record);
CREATE INDEX findings_in_order ON findings (is_warning, number);
"""


@dataclass(frozen=True)
class Finding:
    """What is wrong with one record."""

    number: int
    path: str
    """The medium as the record writes it, or the question file."""
    kind: str
    detail: str


@dataclass(frozen=True)
class ShownMedia:
    """A medium of a record, and what is known of it."""

    number: int
    source: MediaSource
    facts: MediaFacts | None


class Ledger:
    """See the module."""

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._database = sqlite3.connect("")  # a file of its own that SQLite deletes
        self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)

    def close(self) -> None:
        self._database.close()

    def add_record(self, number: int, *, sources: Sequence[MediaSource], text_tokens: int | None) -> None:
        """Notes a record without a problem, and its media."""
        self._database.execute("INSERT INTO records VALUES (?, ?)", (number, text_tokens))
        for source in sources:
            written = json.dumps([source.kind, source.written, source.request.given()], sort_keys=True)
            digest = xxhash.xxh3_128(written.encode(errors="surrogatepass")).digest()
            found = self._database.execute("SELECT id FROM media WHERE digest = ?", (digest,)).fetchone()
            if found is None:
                # A seeded shuffle that does not depend on the order of the file.
                place = xxhash.xxh3_64(written.encode(errors="surrogatepass"), seed=self._seed).intdigest() >> 1
                folder = source.paths[0].replace("\\", "/").rstrip("/").rpartition("/")[0]
                added = self._database.execute(
                    "INSERT INTO media (digest, source, folder, place) VALUES (?, ?, ?, ?)",
                    (digest, written, folder, place),
                )
                found = (added.lastrowid,)
            self._database.execute("INSERT INTO uses VALUES (?, ?)", (number, found[0]))

    def add_id(self, problem_id: str, number: int) -> int | None:
        """The number of the first record with this id, if ``number`` is not the first."""
        digest = xxhash.xxh3_128(problem_id.encode(errors="surrogatepass")).digest()
        if self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, number)).rowcount:
            return None
        return self._database.execute("SELECT number FROM ids WHERE digest = ?", (digest,)).fetchone()[0]

    def add_problem(self, finding: Finding) -> None:
        """Notes why a record cannot be used. Each record has at most one problem."""
        self._add(finding, is_warning=False)
        self._database.execute("DELETE FROM records WHERE number = ?", (finding.number,))

    def add_warning(self, finding: Finding) -> None:
        self._add(finding, is_warning=True)

    def set_facts(self, medium: int, facts: MediaFacts) -> None:
        self._database.execute(
            "UPDATE media SET facts = ?, look = ?, codec = ?, is_bad = ? WHERE id = ?",
            (json.dumps(facts.to_json()), int(facts.look), facts.codec, bool(facts.problem), medium),
        )

    def media(self, *, unseen_at: Look) -> Iterator[tuple[int, MediaSource]]:
        """(id, source) of the media that were not looked at this closely and have no problem so far."""
        return self._media_where("look < ? AND NOT is_bad", int(unseen_at))

    def sample(self, *, share: float, fewest: int) -> list[int]:
        """Ids of a seeded share of the media that open, at least ``fewest`` of each folder and codec."""
        chosen: list[int] = []
        groups = self._database.execute(
            "SELECT folder, codec, COUNT(*) FROM media WHERE look > 0 AND NOT is_bad "
            "GROUP BY folder, codec ORDER BY folder, codec"
        ).fetchall()
        for folder, codec, count in groups:
            wanted = max(fewest, -int(-count * share // 1))
            rows = self._database.execute(
                "SELECT id FROM media WHERE folder = ? AND codec = ? AND look > 0 AND NOT is_bad "
                "ORDER BY place, id LIMIT ?",
                (folder, codec, wanted),
            )
            chosen += [row[0] for row in rows]
        return chosen

    def source_of(self, medium: int) -> MediaSource:
        (written,) = self._database.execute("SELECT source FROM media WHERE id = ?", (medium,)).fetchone()
        return _source(written)

    def look_of(self, medium: int) -> int:
        """How closely the medium was looked at; 0 if it was not."""
        return self._database.execute("SELECT look FROM media WHERE id = ?", (medium,)).fetchone()[0]

    def numbers(self) -> Iterator[int]:
        """The numbers of the records without a problem, in order."""
        for (number,) in self._database.execute("SELECT number FROM records ORDER BY number"):
            yield number

    def records(self) -> Iterator[tuple[int, int | None, list[ShownMedia]]]:
        """(number, tokens of the text, media) of each record without a problem so far, in order. Records may get
        problems meanwhile."""
        last = -1
        while rows := self._database.execute(
            "SELECT number, text_tokens FROM records WHERE number > ? ORDER BY number LIMIT 1000", (last,)
        ).fetchall():
            for number, text_tokens in rows:
                shown = self._database.execute(
                    "SELECT id, source, facts FROM uses JOIN media ON media.id = uses.medium WHERE uses.record = ? "
                    "ORDER BY uses.rowid",
                    (number,),
                ).fetchall()
                media = [ShownMedia(medium, _source(source), _facts(facts)) for medium, source, facts in shown]
                yield number, text_tokens, media
            last = rows[-1][0]

    def findings(self, *, warnings: bool = False, kind: str | None = None, most: int = -1) -> Iterator[Finding]:
        """Problems or warnings by record number, all or those of one kind."""
        rows = self._database.execute(
            "SELECT number, path, kind, detail FROM findings WHERE is_warning = ? AND (? IS NULL OR kind = ?) "
            "ORDER BY number LIMIT ?",
            (warnings, kind, kind, most),
        )
        return (Finding(*row) for row in rows)

    def counts(self, *, warnings: bool = False) -> dict[str, int]:
        """The number of records by kind of finding, the most frequent first."""
        rows = self._database.execute(
            "SELECT kind, COUNT(*) FROM findings WHERE is_warning = ? GROUP BY kind ORDER BY COUNT(*) DESC, kind",
            (warnings,),
        )
        return dict(rows)

    def num_records(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM records").fetchone()[0]

    def num_only_opened(self) -> int:
        """The number of media that open, and were not decoded."""
        return self._database.execute(
            "SELECT COUNT(*) FROM media WHERE look = ? AND NOT is_bad", (int(Look.HEADER),)
        ).fetchone()[0]

    def num_media(self, *, at_least: Look | None = None) -> int:
        """The number of different media; with ``at_least``, of those that were looked at this closely."""
        return self._database.execute("SELECT COUNT(*) FROM media WHERE look >= ?", (int(at_least or 0),)).fetchone()[0]

    def _media_where(self, condition: str, *values: int) -> Iterator[tuple[int, MediaSource]]:
        last = 0
        # A page at a time, because media change while their tasks run.
        while rows := self._database.execute(
            f"SELECT id, source FROM media WHERE id > ? AND {condition} ORDER BY id LIMIT 1000", (last, *values)
        ).fetchall():
            for medium, source in rows:
                yield medium, _source(source)
            last = rows[-1][0]

    def _add(self, finding: Finding, *, is_warning: bool) -> None:
        self._database.execute(
            "INSERT INTO findings VALUES (?, ?, ?, ?, ?)",
            (finding.number, _writable(finding.path), finding.kind, one_line(_writable(finding.detail)), is_warning),
        )


def _source(written: str) -> MediaSource:
    kind, paths, request = json.loads(written)
    return MediaSource(kind, paths if isinstance(paths, str) else tuple(paths), MediaRequest(**request))


def _facts(written: str | None) -> MediaFacts | None:
    return None if written is None else MediaFacts.from_json(json.loads(written))


def _writable(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()
