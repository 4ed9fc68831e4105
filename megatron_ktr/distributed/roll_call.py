"""Counts the processes of a run: every rank is there once, and all expect the same number of ranks.

One store may see a run start many times: that of a launcher outlives the ranks that it restarts, and the launchers of
several nodes count restarts each for itself. So rank 0 opens a meeting, under the next free number, and the others
register for the newest one until rank 0 says that it is complete. A meeting whose rank 0 has died is never completed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from megatron_ktr.distributed.waiting import PATIENCE_SECONDS, Deadline, Place, first_line, say_once
from megatron_ktr.errors import LostRankError, UserError


def call_roll(store: Any, place: Place, *, deadline: Deadline) -> str:
    """Waits until every rank has registered, each exactly once; returns the prefix of what belongs to this meeting.

    Raises:
        UserError: a rank is missing or there twice, or ranks expect different numbers of ranks.
        LostRankError: rank 0 is gone.
    """
    import torch.distributed as dist

    roll = dist.PrefixStore("meeting", store)
    try:
        number = _wait_for_all(roll, place, deadline=deadline)
    except (RuntimeError, OSError) as error:
        raise LostRankError(
            f"{place}: the connection to rank 0 broke while ranks were counted: {first_line(error)}"
        ) from error
    return f"meeting {number} complete"


def _wait_for_all(roll: Any, place: Place, *, deadline: Deadline) -> int:
    """The number of the meeting, when it is complete."""
    is_host = place.rank == 0
    number = _open_meeting(roll, place) if is_host else 0
    is_in = is_host
    patience = Deadline(PATIENCE_SECONDS / 60)
    # This polls in Python, with short pauses, so that signals are handled.
    pause = 0.01
    while True:
        if not is_host and (newest := _newest_meeting(roll)) > number:
            number, is_in = newest, _register(roll, place, newest)
        if is_host and roll.add(f"{number} present", 0) == place.world_size:
            roll.set(f"{number} complete", "yes")
        if is_in and roll.check([f"{number} complete"]):
            return number
        if deadline.seconds_left:
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
            if is_host:
                patience = say_once(patience, f"waiting for {_missing(roll, place, number)}")
            continue
        # Only rank 0 asks which ranks are missing: if a thousand ranks asked, the store would be overloaded.
        who = _missing(roll, place, number) if is_host else "some ranks (rank 0 says which)"
        raise UserError(
            f"{place}: after {deadline} {who} had not come: are NNODES and the processes per node the same everywhere, "
            "has every node started?"
        )


def _open_meeting(roll: Any, place: Place) -> int:
    number = int(roll.add("number of meetings", 1))
    if number > 1:
        _refuse_double(roll, place, number - 1)
    _register(roll, place, number)
    roll.set("newest", str(number))
    return number


def _newest_meeting(roll: Any) -> int:
    """Its number; 0 before the first."""
    return int(roll.get("newest")) if roll.check(["newest"]) else 0


def _register(roll: Any, place: Place, number: int) -> bool:
    """Enters this process into a meeting. False if an earlier process of this rank was in it; another meeting then
    follows."""
    if roll.add(f"{number} rank {place.rank}", 1) > 1:
        _refuse_double(roll, place, number)
        return False
    roll.set(f"{number} where {place.rank}", json.dumps([_launcher(), _where()]))
    size = int(roll.compare_set(f"{number} world size", "", str(place.world_size)))
    if size != place.world_size:
        raise UserError(
            f"{place}: this process was told of {place.world_size} ranks, another one of {size}: NNODES and the "
            "processes per node must be the same everywhere"
        )
    roll.add(f"{number} present", 1)
    return True


def _refuse_double(roll: Any, place: Place, number: int) -> None:
    """Raises ``UserError`` if the process that registered as this rank may still be waiting: the meeting is not
    complete, and no launcher has started this process in place of that one."""
    if roll.check([f"{number} complete"]):
        return
    launcher, other = json.loads(roll.get(f"{number} where {place.rank}"))
    if launcher is None or launcher != _launcher():
        raise UserError(
            f"{place}: rank {place.rank} is there already ({other}; this one is {_where()}): is NODE_RANK another one "
            "on every node?"
        )


def _where() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _launcher() -> str | None:
    """The launcher that has started this process, if any. It has each of its ranks once."""
    return f"{socket.gethostname()}, process {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def _missing(roll: Any, place: Place, number: int) -> str:
    absent = [rank for rank in range(place.world_size) if not roll.check([f"{number} where {rank}"])]
    shown = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    return f"{len(absent)} of {place.world_size} ranks ({shown})"
