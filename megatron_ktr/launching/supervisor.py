"""The process that a user or a scheduler starts. It does nothing but start the agent, hand signals on to it, and start
it again when it is killed, as the kernel does to a process when memory runs out, or when it has lost node 0.

The agent is a fork of this process. It ends with this process, and the ranks end with the agent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable

import psutil

from megatron_ktr.errors import EXIT_SAVED
from megatron_ktr.processes.child import adopt_orphans, end_with_parent
from megatron_ktr.processes.process import descendants_of
from megatron_ktr.run.interruption import LEAVE_SIGNALS

_HANDED_ON = (*LEAVE_SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NUMBERS = struct.Struct("<qq")
_STRAYS_SECONDS = 10.0


class Budget:
    """How often this node may still start anew. Agent and supervisor share it, and what the agent says as it ends."""

    def __init__(self, num_restarts: int) -> None:
        self.total = num_restarts
        self._memory = mmap.mmap(-1, _NUMBERS.size)  # shared with forks
        _NUMBERS.pack_into(self._memory, 0, num_restarts, 0)

    @property
    def left(self) -> int:
        return _NUMBERS.unpack_from(self._memory)[0]

    @left.setter
    def left(self, number: int) -> None:
        _NUMBERS.pack_into(self._memory, 0, number, self.is_cut_off)

    @property
    def is_cut_off(self) -> bool:
        """Whether the agent has ended because node 0 does not answer."""
        return bool(_NUMBERS.unpack_from(self._memory)[1])

    @is_cut_off.setter
    def is_cut_off(self, value: bool) -> None:
        _NUMBERS.pack_into(self._memory, 0, self.left, value)

    def __str__(self) -> str:
        return f"restart {self.total - self.left} of {self.total}"


def supervise(run_agent: Callable[[], int], *, budget: Budget) -> int:
    """Returns the exit code of ``run_agent``, which runs in a process of its own. If that process is killed, or loses
    node 0, it is started again, as long as ``budget`` lasts. In the process of the agent, this returns the agent's code
    too."""
    adopt_orphans()
    # From here on signals wait until they are asked for, so that none is lost between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_HANDED_ON})
    while True:
        budget.is_cut_off = False
        agent = os.fork()
        if agent == 0:
            end_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, *_HANDED_ON})
            return run_agent()
        code, was_asked = _wait(agent)
        end_strays()
        if code >= 0 and not budget.is_cut_off:
            return code
        if code < 0 and was_asked:
            return EXIT_SAVED if -code in LEAVE_SIGNALS else 128 - code
        where = f"process {agent} on {os.uname().nodename}"
        reason = (
            f"the launcher ({where}) was killed by {signal.Signals(-code).name}, and its ranks with it"
            if code < 0
            else f"node 0 does not answer, and the launcher ({where}) has ended its ranks"
        )
        if was_asked or not budget.left:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return 128 - code if code < 0 else code
        budget.left -= 1
        print(f"{reason}; starting again from the newest intact checkpoint ({budget})", file=sys.stderr, flush=True)


def _wait(agent: int) -> tuple[int, bool]:
    """The exit code of ``agent``, negative for a signal, and whether it was asked to end."""
    was_asked = False
    while True:
        found = signal.sigwaitinfo({signal.SIGCHLD, *_HANDED_ON})
        if found.si_signo == signal.SIGCHLD:
            code = _reap(agent)
            if code is not None:
                return code, was_asked
            continue
        was_asked = True
        # What a terminal sends reaches the agent, too; what comes from a process may be for this process alone.
        if found.si_pid or found.si_signo in LEAVE_SIGNALS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, found.si_signo)


def _reap(agent: int) -> int | None:
    """Reaps every child that has ended. The exit code of ``agent``; None while it runs."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == agent:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def end_strays() -> None:
    """Kills all descendants of this process, and waits until they are gone. A rank that was killed leaves its data
    workers and engines behind; this process has adopted them."""
    deadline = time.monotonic() + _STRAYS_SECONDS
    while (strays := descendants_of(os.getpid())) and time.monotonic() < deadline:
        for stray in strays:
            with contextlib.suppress(psutil.Error):
                stray.kill()
        for stray in strays:
            # Not every descendant is a child already.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(stray.pid, os.WNOHANG)
        time.sleep(0.02)
