"""torchrun for runs that are asked to leave: ``python -m megatron_ktr.launch`` takes torchrun's arguments.

Three things differ from torchrun:

- SIGUSR1 and SIGTERM go to the ranks of this node, which save after their step (``interruption.py``), and the launcher
  waits for them. torchrun dies of the first, and 30 seconds after the second kills the ranks.
- The exit code is the ranks': torchrun turns every one of them into 1, also the 75 of "saved, start me again".
- A rank that fails is one line. Its own messages stand above; torchrun adds its traceback to them.

Asked while no rank runs, or before the ranks can catch signals, it also exits with 75: there was nothing to save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_ktr.errors import UserError, run_cli
from megatron_ktr.interruption import EXIT_SAVED, LEAVE_SIGNALS

LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"
"""Signals that still end the ranks."""


class _Forwarding:
    """Hands ``LEAVE_SIGNALS`` on to the ranks, from a thread: while the main thread waits inside C++ for other nodes,
    Python runs no handler, but the wake-up descriptor is written to at once."""

    def __init__(self) -> None:
        self.was_asked = False
        self._wakes, writes = socket.socketpair()
        writes.setblocking(False)
        signal.set_wakeup_fd(writes.detach())
        for number in LEAVE_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._forward, name="signals", daemon=True).start()

    def _forward(self) -> None:
        while True:
            (number,) = self._wakes.recv(1)
            if number not in LEAVE_SIGNALS:
                continue
            self.was_asked = True
            ranks = psutil.Process().children()
            if not ranks:
                os._exit(EXIT_SAVED)
            for process in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    arguments.signals_to_handle = LEFT_TO_TORCHRUN
    # Older torch reads the variable and knows no such argument.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    # What it logs of ranks that end is in our own line, and is no error where they were asked to.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    forwarding = _Forwarding()
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _report(error, was_asked=forwarding.was_asked)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the ranks were ended, nothing was saved", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except torch.distributed.DistError as error:
        where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        raise UserError(f"the nodes did not find each other at {where}: {error}") from error
    return 0


def _report(error: ChildFailedError, *, was_asked: bool) -> int:
    """The exit code of the launcher; says which rank failed, unless all of them left as they were asked to."""
    codes = {failure.exitcode for failure in error.failures.values()}
    unsaved = {-number for number in LEAVE_SIGNALS} if was_asked else set()
    if codes <= {EXIT_SAVED} | unsaved:
        return EXIT_SAVED
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    where = f"rank {rank} (process {failure.pid} on {os.uname().nodename})"
    print(f"error: {where} {how}; its messages stand above", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    run_cli(main)
