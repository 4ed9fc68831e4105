"""What happens on one rank and must be known on all: an error, or the result of an action that one rank takes.

A rank that raises alone leaves the others waiting in their next collective for ever. So whatever may fail on some ranks
only (a file that one of them cannot read, a server that one of them talks to) goes through ``on_every_rank``. An error
that every rank raises alike needs no message between them; ``errors.same_on_every_rank`` marks it.

Everything here is collective: every rank of the group calls it, in the same order. ``group=None`` is a lone process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank

T = TypeVar("T")


def gather_objects(value: T, *, group: ProcessGroup | None) -> list[T]:
    """Every rank's ``value``, by rank, on every rank. Small values only: they travel pickled."""
    if group is None or group.size() == 1:
        return [value]
    values = cast(list[T], [None] * group.size())
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def raise_on_every_rank(failure: Exception | None, *, group: ProcessGroup | None) -> None:
    """If any rank hands over a failure, every rank raises: a ``UserError`` with the first rank's message.

    A rank whose failure is no ``UserError`` raises that one, with its own traceback.
    """
    messages = gather_objects(None if failure is None else str(failure), group=group)
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    for message in messages:
        if message is not None:
            with same_on_every_rank():
                raise UserError(message)


def on_every_rank(action: Callable[[], T], *, ranks: ParallelGroups) -> T:
    """What ``action`` returns here. If it raises ``UserError`` on any rank, every rank of the world raises it."""
    failure, result = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    raise_on_every_rank(failure, group=ranks.world)
    return cast(T, result)


def result_of_rank_zero(action: Callable[[], T], *, ranks: ParallelGroups) -> T:
    """What ``action`` returns on rank 0, on every rank of the world; the others do not run it."""
    result: Any = on_every_rank(lambda: action() if ranks.rank == 0 else None, ranks=ranks)
    return broadcast_object(result, group=ranks.world, source=0)
