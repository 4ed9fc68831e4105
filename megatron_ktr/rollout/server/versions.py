"""The labels of weights, and which of them a response may have been sampled from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_ktr.rollout.server.client import ServerProblem
from megatron_ktr.rollout.server.wire import Sample

_MOST_LABELS = 64
"""Labels that are remembered: a request is answered within a few updates."""


class OldWeights(ServerProblem):
    """An answer was sampled from other weights than the current ones."""


class Versions:
    """The labels of a run's updates, in order. ``current`` is None before the first update."""

    def __init__(self, *, in_flight_updates: bool) -> None:
        self.current: str | None = None
        self._in_flight = in_flight_updates
        self._labels: deque[str] = deque(maxlen=_MOST_LABELS)

    def add(self, label: str) -> None:
        self.current = label
        self._labels.append(label)

    def num_mixed(self, samples: Sequence[Sample], *, started_with: str | None) -> int:
        """The number of responses that mix versions; 0 where none may.

        With ``in_flight_updates`` a response may mix versions from the one when the request started on. Without, every
        response must have a single version: the one when the request started, or the current one.

        Raises:
            OldWeights: a response was sampled from other weights.
        """
        if started_with is None:
            return 0
        known = self._since(started_with) if self._in_flight else {started_with, self.current}
        num_mixed = 0
        for versions in (sample.versions for sample in samples):
            is_mixed = len(set(versions)) > 1
            if not set(versions) <= known or (is_mixed and not self._in_flight):
                raise OldWeights(f"a response sampled from weights {', '.join(versions)}, expected {started_with}")
            num_mixed += is_mixed
        return num_mixed

    def _since(self, first: str) -> set[str | None]:
        labels = list(self._labels)
        return set(labels[labels.index(first) :]) if first in labels else set(labels)
