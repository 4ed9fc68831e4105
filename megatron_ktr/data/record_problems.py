"""Collects what is wrong with the records of a file, to report all problems together."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError

_log = logging.getLogger(__name__)
_NUM_EXAMPLES = 3
_NUM_KINDS = 6


@dataclass
class RecordProblems:
    """The records that cannot be used. ``settle`` either stops the run or names them in a warning.

    Reasons that differ only in their quotations or numbers count as one kind.
    """

    option: str
    path: Path
    remedy: str = ""
    """What the message tells to do, for example a command that shows all problems."""
    places: set[int] = field(default_factory=set)
    """The indices of these records in the list of records."""
    _by_kind: dict[str, list[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, place: int, *, number: int, problem_id: str | None, reason: object) -> None:
        """Adds the reason why the record at index ``place``, which is record ``number`` of the file, cannot be used.
        Only the first reason of a record counts."""
        if place in self.places:
            return
        self.places.add(place)
        text = " ".join(str(reason).split())
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|, got .*", "", text)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._by_kind.setdefault(kind, [])
        if len(examples) < _NUM_EXAMPLES:
            named = f"record {number}" if problem_id is None else f"record {number} (problem_id {problem_id})"
            # The first record of a kind is shown with its reason, the others only with their number.
            examples.append(f"{named}: {text}" if not examples else named)

    def settle(self, num_records: int, *, max_share: float, is_spokesman: bool = True) -> frozenset[int]:
        """The indices of the records to leave out. With ``is_spokesman`` a warning names them.

        Raises:
            UserError: more than ``max_share`` of the records, or all of them, cannot be used.
        """
        num_bad = len(self.places)
        if not num_bad:
            return frozenset()
        told = f"{self.option}: {self.path}, {num_bad} of {num_records} records cannot be used: {self._summary()}"
        if num_bad > max_share * num_records or num_bad == num_records:
            raise UserError(f"{told}; --max-skip-share {max_share:g} is the share that may be left out{self._remedy}")
        if is_spokesman:
            _log.warning("%s; they are left out (at most --max-skip-share %g)%s", told, max_share, self._remedy)
        return frozenset(self.places)

    def state_dict(self) -> dict[str, Any]:
        """What was added so far, as JSON can represent it."""
        return {"places": sorted(self.places), "by_kind": self._by_kind, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state_dict`` returned in place of what was added."""
        self.places = set(state["places"])
        self._by_kind = {kind: list(examples) for kind, examples in state["by_kind"].items()}
        self._counts = dict(state["counts"])

    @property
    def _remedy(self) -> str:
        return f"; {self.remedy}" if self.remedy else ""

    def _summary(self) -> str:
        kinds = sorted(self._by_kind, key=lambda kind: -self._counts[kind])
        parts = []
        for kind in kinds[:_NUM_KINDS]:
            first, *others = self._by_kind[kind]
            count = self._counts[kind]
            also = f" (also {', '.join(others)}{', ...' if count > _NUM_EXAMPLES else ''})" if others else ""
            parts.append((f"{count} x " if count > 1 or len(kinds) > 1 else "") + first + also)
        if len(kinds) > _NUM_KINDS:
            parts.append(f"{sum(self._counts[kind] for kind in kinds[_NUM_KINDS:])} for other reasons")
        return "; ".join(parts)
