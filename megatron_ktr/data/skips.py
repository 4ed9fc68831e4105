"""Counts the samples that a run draws and skips, and stops the run if too large a share of them is unusable."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_ktr.data.unusable import PromptTooLong, UnusableSample
from megatron_ktr.errors import UserError

_log = logging.getLogger(__name__)


class SkipCounter:
    """Counts samples drawn and skipped, and stops the run if too large a share is unusable.

    Over-long prompts are counted but do not belong to that share: leaving them out is a choice, not a defect of the
    data.
    """

    def __init__(self, *, max_skip_share: float = 0.1, min_drawn: int = 20) -> None:
        self.max_skip_share = max_skip_share
        self.min_drawn = min_drawn
        """The share is checked only after this many samples, as it means little before."""
        self.num_drawn = 0
        self.by_kind: Counter[str] = Counter()
        self.last: UnusableSample | None = None

    @property
    def num_skipped(self) -> int:
        return sum(self.by_kind.values())

    def count_drawn(self) -> None:
        self.num_drawn += 1

    def count_skip(self, error: UnusableSample, *, number: object = None) -> None:
        """Counts a skipped sample and logs its path, the reason, and ``number``, the record's number in its file.

        Raises:
            UserError: more than ``max_skip_share`` of at least ``min_drawn`` samples are unusable.
        """
        self.by_kind[error.kind] += 1
        self.last = error
        _log.warning("skipped%s (%s): %s", "" if number is None else f" record {number}", error.kind, error)
        num_unusable = self.num_skipped - self.by_kind[PromptTooLong.kind]
        if self.num_drawn >= self.min_drawn and num_unusable > self.max_skip_share * self.num_drawn:
            raise UserError(
                f"{num_unusable} of {self.num_drawn} samples are unusable, more than max_skip_share "
                f"{self.max_skip_share:g}; the last one: {error}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn, "by_kind": dict(self.by_kind)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_drawn = int(state["num_drawn"])
        self.by_kind = Counter({str(kind): int(count) for kind, count in state["by_kind"].items()})
