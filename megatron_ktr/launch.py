"""A launcher like torchrun that lets runs save before they end: ``python -m megatron_ktr.launch`` takes the arguments
of torchrun.

It differs from torchrun in four ways:

- It forwards SIGUSR1 and SIGTERM to the ranks of this node, which save after their step (``run/interruption.py``), and
  waits for them. torchrun dies of SIGUSR1, and kills the ranks 30 seconds after SIGTERM.
- It exits with the exit code of the ranks. torchrun turns every failure into 1, even the 75 that means "saved, start me
  again".
- It reports a failed rank in one line, below the messages of that rank. torchrun adds a traceback of its own.
- If a node cannot reach node 0, it says so in one line after ten minutes (``--rdzv-conf timeout=SECONDS`` sets another
  time). torchrun takes up to 1.7 times as long and writes C++ stack traces.

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

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megatron_ktr.distributed.rendezvous import RENDEZVOUS_MINUTES, Deadline, check_own_address, connect
from megatron_ktr.errors import UserError, run_cli
from megatron_ktr.run.interruption import EXIT_SAVED, LEAVE_SIGNALS

LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"
"""Signals that still end the ranks."""


class _Forwarding:
    """Forwards ``LEAVE_SIGNALS`` to the ranks, from a thread. While the main thread waits inside C++ for other nodes,
    Python runs no signal handler, but it writes to the wake-up descriptor at once, which the thread reads."""

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
    # Older versions of torch have no such argument and read this variable instead.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    # It logs an error for every rank that ends. Our own line reports failures, and ending on request is none.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    _check_arguments(arguments)
    forwarding = _Forwarding()
    _find_node_0(arguments)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _report(error, was_asked=forwarding.was_asked)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the ranks were ended, nothing was saved", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except (torch.distributed.DistError, RendezvousError) as error:
        where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the nodes did not find each other at {where}: {reason} Are NNODES and the processes per node the same "
            "everywhere, and NODE_RANK another one on every node?"
        ) from error
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what torchrun would answer with a traceback, and sets how long nodes wait for each other."""
    try:
        config, _, _ = torchrun.config_from_args(arguments)
    except (ValueError, IndexError, AssertionError) as error:
        raise UserError(f"arguments of the launcher: {error} (see --help)") from error
    if config.min_nodes < 1 or config.nproc_per_node < 1:
        raise UserError(
            f"--nnodes and --nproc-per-node must be at least 1, got {arguments.nnodes} and {arguments.nproc_per_node}"
        )
    if arguments.rdzv_backend == "static" and not 0 <= arguments.node_rank < config.max_nodes:
        raise UserError(
            f"--node-rank must be 0 .. {config.max_nodes - 1} (--nnodes {arguments.nnodes}), got {arguments.node_rank}"
        )
    port = arguments.master_port
    if port is not None and not 0 < port < 2**16:
        raise UserError(f"--master-port must be 1 .. 65535, got {port}")
    given = dict(part.strip().partition("=")[::2] for part in arguments.rdzv_conf.split(","))
    timeout = given.get("timeout", str(round(RENDEZVOUS_MINUTES * 60)))
    if not timeout.isdecimal() or int(timeout) < 1:
        raise UserError(f"--rdzv-conf timeout={timeout}: expected whole seconds of at least 1")
    if "timeout" not in given and arguments.rdzv_backend == "static":
        # torchrun's own default is 15 minutes.
        arguments.rdzv_conf = f"{arguments.rdzv_conf},timeout={timeout}".lstrip(",")


def _find_node_0(arguments: argparse.Namespace) -> None:
    """Waits until the launcher of node 0 can be reached; on node 0, checks that others can reach it.

    torchrun would do this inside C++: it would wait longer than it says, and write stack traces to the error stream.
    """
    if arguments.standalone or arguments.rdzv_backend != "static":
        return
    if not arguments.rdzv_endpoint and arguments.master_port is None and arguments.nnodes in ("1", "1:1"):
        return  # torchrun takes a free port of this machine
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or 29500}"
    address, port = parse_rendezvous_endpoint(endpoint, default_port=29500)
    seconds = torchrun.config_from_args(arguments)[0].rdzv_configs["timeout"]
    deadline = Deadline(int(seconds) / 60)
    if arguments.node_rank == 0:
        check_own_address(address, port, deadline=deadline)
    else:
        connect(address, port, deadline=deadline)


def _report(error: ChildFailedError, *, was_asked: bool) -> int:
    """Returns the exit code of the launcher. It also prints which rank failed, unless all ranks left on request."""
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
