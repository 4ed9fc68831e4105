"""The reading ranks of all replicas, as far as they must agree about the servers they share."""

from __future__ import annotations

import secrets
from typing import Any

from torch.distributed import ProcessGroup

from megatron_ktr.distributed.agreement import gather_objects, raise_on_every_rank
from megatron_ktr.errors import UserError


class Replicas:
    """Every reading rank holds one and calls its methods in the same order. ``group`` None: a lone replica.

    Ranks belong to ``group`` in the order of their replicas. ``run`` is a name for this run of the program, the same
    on all of them: labels of an earlier run that a server still carries are nobody's current weights.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self.rank = 0 if self._group is None else self._group.rank()
        self.size = 1 if self._group is None else self._group.size()
        self.run: str = self.gather(secrets.token_hex(4))[0]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's ``value``, by rank, on everybody."""
        return gather_objects(value, group=self._group)

    def raise_any(self, problem: str | None) -> None:
        """Raises on all ranks if any has a problem."""
        raise_on_every_rank(None if problem is None else UserError(problem), group=self._group)

    def own(self, urls: list[str]) -> list[str]:
        """Those this rank gives weights to: each server has one owner, and owners have about equally many."""
        return urls[self.rank :: self.size]
