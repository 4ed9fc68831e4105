"""Early exit on request: when any rank gets SIGUSR1 or SIGTERM, the run saves after the current step and ends.

Schedulers send a signal some time before they take a machine away. The rank that gets it only remembers it. Before each
step all ranks compare the signals that they have received, one integer each. So all of them stop after the same step,
whichever rank got the signal. The run then saves a checkpoint and exits with ``EXIT_SAVED``. ``--resume`` continues
from there.
"""

from __future__ import annotations

import signal
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_ktr.web import leaving

LEAVE_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class LeaveRequest:
    """A context that catches ``signals`` while it is open; enter it in the main thread. ``agreed`` is collective.

    A second signal changes nothing. A launcher sends SIGTERM to the ranks of a node as soon as the first of them has
    exited, and the others must still finish. To end a run at once, send SIGINT or SIGKILL.
    """

    def __init__(self, signals: Sequence[signal.Signals], *, device: torch.device) -> None:
        self._signals = signals
        self.can_save = bool(signals)
        """Whether the run can save its state when it ends early: where it cannot, signals are not caught."""
        self._device = device
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> LeaveRequest:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        leaving.forget()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self._received = self._received or number
        leaving.ask_to_leave(signal.Signals(number).name)  # a step that waits for a server gives up

    def agreed(self, group: ProcessGroup | None) -> str | None:
        """The name of a signal that some rank of ``group`` has received, or None; the same on every rank."""
        received = self._received
        if group is not None and group.size() > 1:
            flag = torch.tensor(received, device=self._device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
            received = int(flag)
        return signal.Signals(received).name if received else None
