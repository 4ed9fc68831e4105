"""What the processes of a run need to wait for each other: a place, a deadline, and a word to the user meanwhile."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

PATIENCE_SECONDS = 15.0
"""After this time, one line says who is waited for."""


@dataclass(frozen=True)
class Place:
    """The rank of this process in the run, and the address at which the processes meet."""

    rank: int
    world_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"MASTER_ADDR {self.address}, MASTER_PORT {self.port}"


class Deadline:
    """The time at which waiting ends."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._end = time.monotonic() + minutes * 60

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes"


def say_once(patience: Deadline | None, line: str) -> Deadline | None:
    """Prints ``line`` once ``patience`` has run out. Returns the patience for the next call; None after printing."""
    if patience is None or patience.seconds_left:
        return patience
    print(line, file=sys.stderr, flush=True)
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
