"""What went wrong in a run and was survived, or ended it: one JSON line each, in ``events.jsonl`` of the run directory.

    {"time": "2026-01-31T12:00:00+00:00", "step": 12, "kind": "alarm", "text": "gradient norm 50 ...", "name": ...}

``kind`` is one word for what happened (``alarm``, ``skipped_update``, ``save_failure``, ...), ``text`` one line for
people; a kind may have facts of its own beside them. Lines are only ever added, also by resumed runs.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_ktr.files.json_files import to_json
from megatron_ktr.files.line_log import LineLog
from megatron_ktr.terminal import printable, without_secrets

FILE = "events.jsonl"
_log = logging.getLogger(__name__)


class Incidents:
    """Adds incidents of one run; ``run_dir`` is None on ranks that do not write."""

    def __init__(self, run_dir: Path | None) -> None:
        self._path = None if run_dir is None else run_dir / FILE
        self.num_lost = 0
        """Incidents that could not be written, as on a full disk. A run never ends for that."""
        self.counts: Counter[str] = Counter()
        """Incidents of this process by kind."""

    def add(self, kind: str, text: str, *, step: int | None = None, **facts: Any) -> None:
        """Logs ``text`` as a warning, and appends the incident to the file."""
        if self._path is None:
            return
        self.counts[kind] += 1
        _log.warning("%s%s", "" if step is None else f"step {step}: ", printable(text))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = to_json({"time": now, "step": step, "kind": kind, "text": text, **facts})
        try:
            # Half a line of a disk that becomes full would make the next one unreadable, too.
            with contextlib.closing(LineLog(self._path)) as file:
                file.add(without_secrets(line))
        except OSError as error:
            self.num_lost += 1
            _log.warning("%s cannot be written: %s", self._path, error.strerror)
