"""A launcher like torchrun for runs that are asked to leave, or that lose ranks and nodes on the way:
``python -m megatron_ktr.launch`` takes the arguments of torchrun.

It differs from torchrun in these ways:

- It forwards SIGUSR1 and SIGTERM to the ranks of this node, which save after their step (``run/interruption.py``), and
  waits for them. torchrun dies of SIGUSR1, and kills the ranks 30 seconds after SIGTERM.
- It exits with the exit code of the ranks. torchrun turns every failure into 1, even the 75 that means "saved, start me
  again".
- It reports a failed rank in one line, below the messages of that rank. torchrun adds a traceback of its own.
- If a node cannot reach node 0, it says so in one line after ten minutes (``--rdzv-conf timeout=SECONDS`` sets another
  time). torchrun takes up to 1.7 times as long and writes C++ stack traces.
- Ranks end with their launcher, and what they have started ends with them. Those of torchrun go on by themselves.
- With ``--max-restarts`` or ``--nnodes MIN:MAX`` it restarts what a restart can help, and nothing else. It outlives a
  killed agent and a lost node, and gives training ``--auto-resume`` (``launching/``).

It also exits with 75 if the signal comes while no rank runs, or before the ranks can catch signals: there was nothing
to save.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from functools import partial

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher import api as launcher_api

from megatron_ktr.distributed.rendezvous import check_own_address, connect
from megatron_ktr.distributed.waiting import Deadline
from megatron_ktr.errors import EXIT_OTHER_RANK, EXIT_SAVED, LostRankError, UserError, run_cli
from megatron_ktr.launching.agent import Agent, Control, Failure
from megatron_ktr.launching.arguments import (
    Meeting,
    check_arguments,
    find_meeting,
    may_restart,
    prepare_restarts,
    set_flight_recorder,
)
from megatron_ktr.launching.supervisor import Budget, supervise
from megatron_ktr.processes.child import adopt_orphans
from megatron_ktr.run.interruption import LEAVE_SIGNALS

LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"
"""Signals that still end the ranks."""


class _Forwarding:
    """Forwards ``LEAVE_SIGNALS`` to the ranks, from a thread. While the main thread waits inside C++ for other nodes,
    Python runs no signal handler, but it writes to the wake-up descriptor at once, which the thread reads."""

    def __init__(self, control: Control) -> None:
        self._control = control
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
            self._control.was_asked = True
            ranks = psutil.Process().children()
            if not ranks:
                os._exit(EXIT_SAVED)
            for process in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    arguments.signals_to_handle = LEFT_TO_TORCHRUN
    # Older versions of torch have no such argument and read this variable instead.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    # It logs an error for every rank that ends. Our own line reports failures, and ending on request is none.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    check_arguments(arguments)
    meeting = find_meeting(arguments)
    set_flight_recorder()
    budget = Budget(arguments.max_restarts)
    run_agent = partial(_run_agent, arguments, meeting, Control(budget))
    if not may_restart(arguments):
        return run_agent()
    prepare_restarts(arguments, meeting)
    return supervise(run_agent, budget=budget)


def _run_agent(arguments: argparse.Namespace, meeting: Meeting | None, control: Control) -> int:
    """Runs the ranks of this node until the run has ended, and returns the exit code."""
    _Forwarding(control)
    adopt_orphans()
    launcher_api.LocalElasticAgent = partial(Agent, control=control)  # pyright: ignore[reportAttributeAccessIssue]
    if meeting is not None:
        _find_node_0(meeting, is_first=control.budget.left == control.budget.total)
    arguments.max_restarts = control.budget.left
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _report(error, control)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the ranks were ended, nothing was saved", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except RendezvousClosedError:
        print("error: another node has ended the run, and its launcher says why", file=sys.stderr, flush=True)
        return EXIT_OTHER_RANK
    except (torch.distributed.DistError, RendezvousError) as error:
        return _lost_contact(error, arguments, meeting, control)
    return 0


def _find_node_0(meeting: Meeting, *, is_first: bool) -> None:
    """Waits until the launcher of node 0 can be reached; on node 0, checks that others can reach it. ``is_first`` says
    that the node was never reached before: then its address may be wrong.

    torchrun would do this inside C++: it would wait longer than it says, and write stack traces to the error stream.
    """
    deadline = Deadline(meeting.seconds / 60)
    try:
        if meeting.is_host:
            check_own_address(meeting.address, meeting.port, deadline=deadline)
        else:
            connect(meeting.address, meeting.port, deadline=deadline)
    except UserError as error:
        if is_first:
            raise
        raise LostRankError(str(error)) from error


def _lost_contact(error: Exception, arguments: argparse.Namespace, meeting: Meeting | None, control: Control) -> int:
    """The exit code when the nodes cannot meet. It tells the supervisor whether to try again."""
    where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not control.num_starts:
        raise UserError(
            f"the nodes did not find each other at {where}: {reason} Are NNODES and the processes per node the same "
            "everywhere, and NODE_RANK another one on every node?"
        ) from error
    if control.failure is not None:
        print(str(control.failure), file=sys.stderr, flush=True)
    if meeting is None or meeting.is_host or isinstance(error, RendezvousTimeoutError):
        print(f"error: the nodes did not meet again at {where}: {reason}", file=sys.stderr, flush=True)
    else:
        control.budget.is_cut_off = True
    return EXIT_OTHER_RANK


def _report(error: ChildFailedError, control: Control) -> int:
    """Returns the exit code of the launcher. It also prints which rank failed, unless all ranks left on request."""
    codes = {failure.exitcode for failure in error.failures.values()}
    unsaved = {-number for number in LEAVE_SIGNALS} if control.was_asked else set()
    if codes and codes <= {EXIT_SAVED} | unsaved:
        return EXIT_SAVED
    failure = control.failure
    if failure is None and error.failures:
        rank, first = error.get_first_failure()
        failure = Failure(rank=rank, pid=first.pid, code=first.exitcode)
    if failure is None:  # a node was lost, which the agent has said
        return EXIT_OTHER_RANK
    print(f"error: {failure}; its messages stand above", file=sys.stderr, flush=True)
    return failure.code if failure.code >= 0 else 128 - failure.code


if __name__ == "__main__":
    run_cli(main)
