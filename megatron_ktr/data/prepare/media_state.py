"""Remembers in a file which media were looked at and what was found, so that a check that was ended goes on later.

A medium is known by the resolved paths of its files, their sizes and times of change, and by the options that choose
its frames. Whatever changes one of them makes it unknown. The file is an SQLite database, which a killed process leaves
intact.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import xxhash

from megatron_ktr.data.prepare.media_probe import MediaFacts, MediaTask
from megatron_ktr.errors import UserError

_VERSION = 1
_SECONDS_BETWEEN_COMMITS = 2.0


class MediaState:
    """What is known of media. ``path`` None remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._last_commit = time.monotonic()
        if path is None:
            return
        try:
            self._database = sqlite3.connect(path)
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            is_new = not self._database.execute("SELECT 1 FROM sqlite_master").fetchone()
            if is_new:
                self._database.execute("CREATE TABLE media (key BLOB PRIMARY KEY, look INTEGER, facts TEXT)")
                self._database.execute(f"PRAGMA user_version = {_VERSION}")
                self._database.commit()
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"it has version {version}, expected {_VERSION}")
        except sqlite3.Error as error:
            raise self._error(error) from error

    def find(self, task: MediaTask) -> MediaFacts | None:
        """What was found when the medium was looked at as closely as ``task`` asks, or more closely."""
        if self._database is None:
            return None
        key = _key(task)
        if key is None:
            return None
        try:
            row = self._database.execute(
                "SELECT facts FROM media WHERE key = ? AND look >= ?", (key, int(task.look))
            ).fetchone()
            return None if row is None else MediaFacts.from_json(json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._error(error) from error

    def remember(self, task: MediaTask, facts: MediaFacts) -> None:
        """Stores what was found; at the latest two seconds and one medium later it is on disk."""
        if self._database is None or (key := _key(task)) is None:
            return
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO media VALUES (?, ?, ?)",
                (key, int(facts.look), json.dumps(replace(facts, problem=facts.problem[:500]).to_json())),
            )
            if time.monotonic() - self._last_commit > _SECONDS_BETWEEN_COMMITS:
                self._database.commit()
                self._last_commit = time.monotonic()
        except sqlite3.Error as error:
            raise self._error(error) from error

    def close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.commit()
            self._database.close()
            self._database = None

    def _error(self, error: Exception) -> UserError:
        return UserError(f"--state {self._path} cannot be used: {error}; expected a file of an earlier check, or none")


def _key(task: MediaTask) -> bytes | None:
    """None if a file is gone."""
    files = []
    for path in task.paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        files.append([path, status.st_size, status.st_mtime_ns])
    request = task.source.request.given()
    how = [task.source.kind, task.source.is_pictures, repr(task.sampling), sorted(request.items())]
    return xxhash.xxh3_128(json.dumps([files, how]).encode(errors="surrogatepass")).digest()
