"""A run that is asked to leave: SIGUSR1 or SIGTERM to any of its ranks ends it after the step, saved.

Schedulers send a signal some time before they take a machine away. The rank that gets it only remembers it. Before each
step all ranks compare what they have seen, one integer each, so that they stop after the same step whichever of
them was asked; the trainer then saves a checkpoint and exits with ``EXIT_SAVED``. ``--resume`` goes on from there.
"""

from __future__ import annotations

import signal
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

EXIT_SAVED = 75
"""Exit code of a run that left when asked to and is to be started again with ``--resume`` (EX_TEMPFAIL)."""
LEAVE_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class LeaveRequest:
    """Catches ``signals`` while it is open, in the main thread; ``agreed`` is collective.

    A second signal changes nothing: a launcher ends the ranks of a node with SIGTERM when the first of them is gone,
    and the others must still get to their own end. Whoever will not wait sends SIGINT or SIGKILL.
    """

    def __init__(self, signals: Sequence[signal.Signals], *, device: torch.device) -> None:
        self._signals = signals
        self._device = device
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> LeaveRequest:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self, group: ProcessGroup | None) -> str | None:
        """The name of a signal that some rank of ``group`` has received, the same on every rank; None: none has."""
        received = self._received
        if group is not None and group.size() > 1:
            flag = torch.tensor(received, device=self._device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
            received = int(flag)
        return signal.Signals(received).name if received else None
