"""Tells all ranks what happened on one of them: an error, or the result of an action that only one rank takes.

If one rank alone raises, the others wait for it for ever in their next collective. So every action that may fail on
some ranks only (one rank cannot read a file, one rank talks to a server) goes through ``on_every_rank``. An error that
every rank raises alike needs no messages between ranks; ``errors.same_on_every_rank`` marks it.

Every function here is collective: all ranks of the group call it, in the same order. ``group=None`` means a single
process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.collectives import broadcast_object
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import StepAbandoned, TransientError, UserError, is_transient, told_to_every_rank

T = TypeVar("T")


def gather_objects(value: T, *, group: ProcessGroup | None) -> list[T]:
    """Gives every rank the values of all ranks, in rank order. For small values only, since they are pickled."""
    if group is None or group.size() == 1:
        return [value]
    values = cast(list[T], [None] * group.size())
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def raise_on_every_rank(failure: Exception | None, *, group: ProcessGroup | None) -> None:
    """If any rank passes a failure, every rank raises a ``UserError`` with the message of the first rank that failed.

    A rank whose own failure is not a ``UserError`` raises that failure instead, with its traceback. Where ranks fail in
    no other way than by errors that may pass (``is_transient``), every rank raises ``TransientError``; where they fail
    in no other way than by ``StepAbandoned``, that.
    """
    own = failure if isinstance(failure, StepAbandoned) else None
    mine = None if failure is None else (str(failure), own and (own.asked_by,), is_transient(failure))
    failed = [one for one in gather_objects(mine, group=group) if one is not None]
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    # First what no new start can mend.
    for message, abandoned, may_pass in sorted(failed, key=lambda one: (one[1] is not None, one[2])):
        with told_to_every_rank():
            if abandoned is not None:
                # A signal that one rank got is that of the run (``run/interruption.py``).
                signals = [other[0] for _, other, _ in failed if other is not None and other[0] is not None]
                raise StepAbandoned(message, asked_by=signals[0] if signals else None)
            raise TransientError(message) if may_pass else UserError(message)


def on_every_rank(action: Callable[[], T], *, ranks: ParallelGroups) -> T:
    """Runs ``action`` on every rank and returns its result on this one. If it raises ``UserError`` or ``OSError`` on
    any rank, every rank of the world raises an error with those words."""
    failure, result = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    raise_on_every_rank(failure, group=ranks.world)
    return cast(T, result)


def result_of_rank_zero(action: Callable[[], T], *, ranks: ParallelGroups) -> T:
    """Runs ``action`` on rank 0 only and returns its result on every rank of the world."""
    result: Any = on_every_rank(lambda: action() if ranks.rank == 0 else None, ranks=ranks)
    return broadcast_object(result, group=ranks.world, source=0)
