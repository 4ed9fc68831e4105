"""Easy-prompt retirement: a record that the policy answers right again and again is passed over for some epochs.

    a <- mean accuracy of the group                        the first time that the record is answered
    a <- decay x a + (1 - decay) x mean accuracy           every later time, in the order of draws
    a > above, answered in epoch e   =>   passed over in the epochs e + 1 .. e + num_epochs, and drawn again after them

A record keeps its running accuracy ``a`` while it is retired. If it is answered right once more when it returns, it
retires again; if it has been forgotten, its accuracy falls and it stays.

Epochs are those of the record's own file. Whether a record is passed over depends on the answers of the whole run
alone: every replica is told those of all replicas, so that all hold the same numbers, and a record keeps its place in
the order of epochs. No published code keeps such a running accuracy through a restart; POLARIS drops easy prompts
between the stages of its training by hand, and Online Difficulty Filtering (arXiv 2504.03380, section 4) bounds what a
group can teach by the variance p (1 - p) of its accuracy.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_FLOAT, _INT = np.dtype("<f8"), np.dtype("<i4")


@dataclass(frozen=True)
class RetirementRule:
    """When a record retires and for how long."""

    above: float
    """The running accuracy that it must exceed."""
    num_epochs: int = 1
    """The epochs in which it is then passed over."""
    decay: float = 0.5
    """The weight of the earlier accuracies, in [0, 1)."""


class Retirement:
    """The running accuracies of all records of a run, and who is retired until when."""

    def __init__(self, rule: RetirementRule, num_records: Sequence[int]) -> None:
        """``num_records`` has one number for each source of the mixture."""
        self.rule = rule
        self._accuracy = [np.full(number, np.nan, dtype=_FLOAT) for number in num_records]
        self._returns = [np.zeros(number, dtype=_INT) for number in num_records]
        """The first epoch in which each record is drawn again; 0 where it never retired."""

    def is_retired(self, source: int, record: int, *, epoch: int) -> bool:
        """Whether the record is passed over in this epoch of its source."""
        return bool(epoch < self._returns[source][record])

    def note(self, source: int, record: int, *, epoch: int, accuracy: float) -> None:
        """Takes the mean accuracy, in [0, 1], of the record's responses in ``epoch``."""
        known = self._accuracy[source]
        before = float(known[record])
        decay = self.rule.decay
        known[record] = accuracy if np.isnan(before) else decay * before + (1.0 - decay) * accuracy
        if known[record] > self.rule.above:
            # A record that a step draws twice was answered in two epochs; the later return counts.
            self._returns[source][record] = max(self._returns[source][record], epoch + 1 + self.rule.num_epochs)

    def num_retired(self, epochs: Sequence[int]) -> int:
        """How many records are passed over in ``epochs``, the present epoch of each source, or in the next one."""
        return sum(int((returns > epoch).sum()) for returns, epoch in zip(self._returns, epochs, strict=True))

    @property
    def longest(self) -> int:
        """No record is passed over in more epochs than these in a row."""
        return self.rule.num_epochs

    def state_dict(self) -> list[dict[str, str]]:
        """The numbers of each source, compressed, as text that JSON can hold: 2 to 12 bytes a record."""
        return [
            {"accuracy": _to_text(accuracy), "returns": _to_text(returns)}
            for accuracy, returns in zip(self._accuracy, self._returns, strict=True)
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: the state is damaged, or of other sources.
        """
        lengths = [len(accuracy) for accuracy in self._accuracy]
        if len(state) != len(lengths):
            raise ValueError(f"retirement: expected the state of {len(lengths)} sources, got {len(state)}")
        self._accuracy = [
            _from_text(one["accuracy"], _FLOAT, number) for one, number in zip(state, lengths, strict=True)
        ]
        self._returns = [_from_text(one["returns"], _INT, number) for one, number in zip(state, lengths, strict=True)]


def _to_text(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode("ascii")


def _from_text(text: str, dtype: np.dtype, number: int) -> np.ndarray:
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"retirement: the state is damaged: {error}") from error
    values = np.frombuffer(content, dtype=dtype).copy() if len(content) % dtype.itemsize == 0 else np.empty(0)
    if len(values) != number:
        raise ValueError(f"retirement: expected the numbers of {number} records, got {len(values)}")
    return values
