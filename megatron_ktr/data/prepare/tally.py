"""Counts what a conversion did: records by kind, and what was skipped with the reasons and the first examples."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_KINDS = 64
NUM_EXAMPLES = 3
OTHERS = "(others)"
_CHANGING = re.compile(r"'[^']*'|\"[^\"]*\"|[\d.]+|, got .*", re.DOTALL)
"""What differs between reasons of one kind: quotations, numbers, what was got."""


@dataclass
class Reasons:
    """Reasons why records were skipped, by kind. The memory does not depend on how many there are."""

    num: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> the first records of it, with their whole reasons."""

    def add(self, number: int, reason: object) -> None:
        told = " ".join(str(reason).split())
        kind = _CHANGING.sub("", told)
        if kind not in self.counts and len(self.counts) >= MOST_KINDS:
            kind = OTHERS
        self.num += 1
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(f"record {number}: {told[:300]}")

    def lines(self, most: int = 8) -> list[str]:
        """The kinds with most records first, each with its first example."""
        kinds = [kind for kind, _ in self.counts.most_common(most)]
        lines = [f"{self.counts[kind]} x {self.examples[kind][0]}" for kind in kinds]
        rest = self.num - sum(self.counts[kind] for kind in kinds)
        return [*lines, f"{rest} x other reasons"] if rest else lines

    def as_json(self) -> list[dict[str, Any]]:
        return [{"num_records": count, "examples": self.examples[kind]} for kind, count in self.counts.most_common()]


def count(counter: Counter[str], name: str) -> None:
    """Counts ``name``; names beyond the first ``MOST_KINDS`` are counted together."""
    counter[name if name in counter or len(counter) < MOST_KINDS else OTHERS] += 1


@dataclass
class Tally:
    """What became of one published file."""

    num_read: int = 0
    """Records of the file; questions where one published record holds several."""
    num_written: int = 0
    by_problem_type: Counter[str] = field(default_factory=Counter)
    by_media: Counter[str] = field(default_factory=Counter)
    """Records with images, videos, both, or only text."""
    num_clips: int = 0
    num_with_reasoning: int = 0
    num_several_right: int = 0
    """Multiple-choice questions with several right letters."""
    skipped: Reasons = field(default_factory=Reasons)

    def add(self, record: dict[str, Any]) -> None:
        """Counts a record that was written; it is as ``check_record`` returns it."""
        self.num_written += 1
        kinds = {kind for kind, _ in record["media"]}
        count(self.by_media, " and ".join(sorted(kinds)) or "text")
        count(self.by_problem_type, record["problem_type"] or "(none)")
        self.num_clips += any("video_start" in request for request in record["media_requests"])
        self.num_with_reasoning += bool(record.get("process"))
        solution = record.get("solution")
        self.num_several_right += bool(record["options"]) and isinstance(solution, str) and "," in solution
