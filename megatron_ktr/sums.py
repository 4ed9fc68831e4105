"""Numbers of a step that add up over micro-batches and ranks, even while they are still on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Metrics:
    """Sums and counts, which ranks reduce by addition, and maxima, which they reduce by maximum. ``means()`` divides
    sums by counts at the very end.

    ``add_later`` adds numbers that are still on a device. They are read when a number is first asked for, all that were
    added and merged until then in one transfer. So the host waits once per update and not for each number.
    """

    def __init__(
        self,
        sums: Mapping[str, float] | None = None,
        counts: Mapping[str, float] | None = None,
        maxima: Mapping[str, float] | None = None,
    ) -> None:
        self._sums, self._counts, self._maxima = dict(sums or {}), dict(counts or {}), dict(maxima or {})
        self._unread: list[_Unread] = []

    @property
    def sums(self) -> dict[str, float]:
        self._read()
        return self._sums

    @property
    def counts(self) -> dict[str, float]:
        self._read()
        return self._counts

    @property
    def maxima(self) -> dict[str, float]:
        self._read()
        return self._maxima

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def add_max(self, name: str, value: float) -> None:
        largest, value = self._maxima.get(name, -math.inf), float(value)
        # The built-in ``max`` would keep or lose NaN depending on the order of its arguments.
        self._maxima[name] = value if value > largest or math.isnan(value) else largest

    def add_later(
        self, names: Sequence[str], values_n: Tensor, *, count: float | Tensor = 1.0, are_maxima: bool = False
    ) -> None:
        """Adds ``values_n`` [n], of any dtype and on any device, under ``names``. This acts like ``add`` (or
        ``add_max``) for each value, but the device is read later.

        ``count`` is the count of each value; a tensor of one element if it is still on a device. The tensors are kept,
        not copied.
        """
        if values_n.numel() != len(names):
            raise ValueError(f"{len(names)} names ({', '.join(names)}) for {values_n.numel()} numbers")
        self._unread.append(_Unread(tuple(names), values_n.detach(), count, are_maxima))

    def merge(self, other: Metrics) -> None:
        for name, value in other._sums.items():
            self.add(name, value, other._counts[name])
        for name, value in other._maxima.items():
            self.add_max(name, value)
        self._unread += other._unread

    def pop_sum(self, name: str) -> float:
        """Removes a name and returns its sum, for what adds up over ranks rather than being averaged."""
        self.counts.pop(name, None)
        return self.sums.pop(name, 0.0)

    def means(self) -> dict[str, float]:
        """Every mean and every maximum, by name."""
        return {name: value / max(self.counts[name], 1e-12) for name, value in self.sums.items()} | self.maxima

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metrics) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling. Numbers on a device are read first, since another rank could not read them from this
        rank's device."""
        self._read()
        return vars(self)

    def __repr__(self) -> str:
        return f"Metrics(sums={self.sums}, counts={self.counts}, maxima={self.maxima})"

    def _read(self) -> None:
        """Reads the numbers that are still on a device and adds them, in the order in which they were given."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        counted = [one for one in unread if isinstance(one.count, Tensor)]
        # fp64 holds every fp32 number and every count.
        parts = [one.values_n.double().reshape(-1) for one in unread]
        parts += [one.count.detach().double().reshape(1) for one in counted]
        numbers = iter(torch.cat(parts).tolist())
        values = [[next(numbers) for _ in one.names] for one in unread]
        counts = {id(one): next(numbers) for one in counted}
        for one, found in zip(unread, values, strict=True):
            for name, value in zip(one.names, found, strict=True):
                if one.are_maxima:
                    self.add_max(name, value)
                else:
                    self.add(name, value, counts.get(id(one), one.count))


@dataclass(frozen=True, eq=False)
class _Unread:
    names: tuple[str, ...]
    values_n: Tensor
    count: Any
    are_maxima: bool
