"""Communication among the reading ranks of all replicas, which must agree about the servers that they share."""

from __future__ import annotations

import secrets
from typing import Any

from torch.distributed import ProcessGroup

from megatron_ktr.distributed.agreement import gather_objects, raise_on_every_rank
from megatron_ktr.errors import UserError


class Replicas:
    """Every reading rank holds one and calls its methods in the same order. ``group`` is None for a single replica.

    Ranks belong to ``group`` in the order of their replicas. ``run`` is a random name of this run of the program, the
    same on all ranks. It is part of the labels of weights, so that a label which a server still carries from an earlier
    run never matches.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self.rank = 0 if self._group is None else self._group.rank()
        self.size = 1 if self._group is None else self._group.size()
        self.run: str = self.gather(secrets.token_hex(4))[0]

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in the order of ranks, on every rank."""
        return gather_objects(value, group=self._group)

    def raise_any(self, problem: UserError | None) -> None:
        """Raises it on all ranks if any rank has a problem."""
        raise_on_every_rank(problem, group=self._group)

    def own(self, urls: list[str]) -> list[str]:
        """The servers to which this rank sends weights. Each server has one owner; ranks own about equally many."""
        return urls[self.rank :: self.size]
