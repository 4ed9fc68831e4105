"""torch's elastic agent, which starts the ranks of a node and looks after them, with what a training run needs.

- A rank that ends with a code of ``FINAL_CODES`` ends the run: starting it again would give the same.
- When a rank fails, the others of its node have ``GRACE_SECONDS`` to notice it and to say so. Then they are killed.
- It notices a node that shows no sign of life, even while the ranks wait for that node in a collective.
- Ranks end with the agent (``lifeline.py``), and what they have started ends with them.
- A node that is cut off ends its ranks, and does not close the rendezvous for the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

from megatron_ktr.errors import EXIT_ALARM, EXIT_OTHER_RANK, EXIT_SAVED, EXIT_USER
from megatron_ktr.launching.lifeline import with_lifeline
from megatron_ktr.launching.supervisor import Budget, end_strays

FINAL_CODES = frozenset({EXIT_USER, EXIT_SAVED, EXIT_ALARM})
"""What a rank ends with if the run shall not be started again: wrong input, saved on request, ended by a guard."""
GRACE_SECONDS = 5.0
"""The time in which the other ranks of a node may notice by themselves that one has failed."""
CUT_OFF_SECONDS = 20.0
"""How long node 0 may take to answer. The other nodes notice after 15 seconds that a node is cut off, and wait 30 more
for another one; its ranks must have ended by then."""
_SURE_SECONDS = 3.0
"""A node that changes its place in the rendezvous is in no list for a moment."""


@dataclass
class Failure:
    """The first rank of this node that failed."""

    rank: int
    pid: int
    code: int

    def __str__(self) -> str:
        how = f"ended with code {self.code}" if self.code >= 0 else f"was killed by {signal.Signals(-self.code).name}"
        return f"rank {self.rank} (process {self.pid} on {os.uname().nodename}) {how}"


@dataclass
class Control:
    """What launcher and agent tell each other."""

    budget: Budget
    was_asked: bool = False
    """Whether the run was asked to leave; it is not started again then."""
    num_starts: int = 0
    failure: Failure | None = None


class Agent(LocalElasticAgent):
    """See above. ``control`` outlives the agent."""

    def __init__(self, *args: Any, control: Control, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._control = control
        self._nodes: frozenset[Any] = frozenset()
        self._missing_since: float | None = None
        self._failed_at: float | None = None
        self._is_broken = False
        self._asks_since: float | None = None
        self._wrap_command()
        threading.Thread(target=self._end_when_cut_off, name="contact", daemon=True).start()

    def _wrap_command(self) -> None:
        spec = self._worker_group.spec
        if isinstance(spec.entrypoint, str):  # a function is run in a process that torch forks
            spec.entrypoint, spec.args = with_lifeline(spec.entrypoint, [str(text) for text in spec.args])

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            # torch returns nothing for a spare node that was not needed until the end.
            return super().run(role) or RunResult(state=WorkerState.SUCCEEDED)  # pyright: ignore[reportCallIssue]
        finally:
            end_strays()

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super()._invoke_run(role)
        except (RendezvousError, torch.distributed.DistError) as error:
            self._is_broken = True
            if not isinstance(error, RendezvousClosedError):
                self._leave_open()
            raise
        finally:
            self._asks_since = None

    def _leave_open(self) -> None:
        """Lets the other nodes meet without this one. torch would close the rendezvous for all of them."""
        handler: Any = self._rdzv_handler
        if hasattr(handler, "_stop_heartbeats"):
            handler._stop_heartbeats()
        handler.shutdown = lambda: True

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler: Any = self._rdzv_handler
        if hasattr(handler, "_bootstrap_store_info"):
            # torch keeps the address of the first rank 0, also when another node has become the first since.
            handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)  # pyright: ignore[reportCallIssue]
        self._nodes = self._present_nodes() or frozenset()
        self._missing_since, self._failed_at, self._is_broken = None, None, False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._control.budget.left = self._remaining_restarts
        self._control.num_starts += 1
        self._control.failure = None
        return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        present = self._present_nodes()
        lost = frozenset() if present is None else self._nodes - present
        # torch starts all ranks again for nodes that wait, maybe before we have looked, and does not count it.
        if self._control.failure is None and self._failed_ranks(worker_group):
            print(
                f"{self._control.failure}; all ranks start again, as those of other nodes do",
                file=sys.stderr,
                flush=True,
            )
        elif lost and not self._is_broken:
            reason = f"node {_addresses(lost)} shows no sign of life; all ranks start again, with a node that waited"
            print(reason, file=sys.stderr, flush=True)
        # A node more is a reason to save first. Without a node that belongs to them, the ranks can only wait.
        self._is_broken = self._is_broken or bool(lost)
        self._shutdown(timeout=self._shutdown_timeout)
        end_strays()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(death_sig, min(timeout, int(GRACE_SECONDS)) if self._is_broken else timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._asks_since = None
        result = self._look_at_workers(worker_group)
        if result.state is WorkerState.HEALTHY:
            # What torch does next is to ask node 0 whether nodes are waiting.
            self._asks_since = time.monotonic()
        return result

    def _end_when_cut_off(self) -> None:
        """A thread: ends ranks and agent when node 0 has not answered for too long. torch's client has a timeout, but
        then waits for node 0 to confirm it."""
        while True:
            time.sleep(1.0)
            asks_since = self._asks_since
            if asks_since is None or time.monotonic() < asks_since + CUT_OFF_SECONDS:
                continue
            for pid in self._pcontext.pids().values() if self._pcontext else ():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            end_strays()
            self._control.budget.is_cut_off = True
            os._exit(EXIT_OTHER_RANK)

    def _look_at_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._let_others_notice(worker_group):
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.state is WorkerState.HEALTHY and (lost := self._lost_nodes()):
            self._is_broken = True
            self._say_restart(f"node {lost} shows no sign of life")
            return RunResult(state=WorkerState.UNHEALTHY)
        if result.state is WorkerState.FAILED:
            self._judge(result, worker_group)
        return result

    def _judge(self, result: RunResult, worker_group: WorkerGroup) -> None:
        """Decides whether the ranks are started again."""
        self._is_broken = True
        if self._control.failure is None and result.failures:  # it failed after our look and before torch's
            local_rank, first = min(result.failures.items(), key=lambda item: item[1].timestamp)
            rank = worker_group.workers[local_rank].global_rank
            self._control.failure = Failure(rank=rank, pid=first.pid, code=first.exitcode)
        codes = {failure.exitcode for failure in result.failures.values()}
        if self._control.failure is not None:
            codes.add(self._control.failure.code)
        if self._control.was_asked or codes & FINAL_CODES:
            self._remaining_restarts = 0
        elif self._control.failure is not None:
            self._say_restart(str(self._control.failure))

    def _say_restart(self, reason: str) -> None:
        if not self._remaining_restarts:
            if self._control.failure is None:  # of a rank that failed, the launcher's last line tells
                print(f"error: {reason}", file=sys.stderr, flush=True)
            return
        number = self._control.budget.total - self._remaining_restarts + 1
        print(
            f"{reason}; all ranks start again from the newest intact checkpoint (restart {number} of "
            f"{self._control.budget.total})",
            file=sys.stderr,
            flush=True,
        )

    def _let_others_notice(self, worker_group: WorkerGroup) -> bool:
        """Whether a rank has failed and the others may still say what they know of it. Kills them when their time is
        over: they wait for the failed one, and would not leave on SIGTERM."""
        codes = self._failed_ranks(worker_group)
        if not codes:
            return False
        pcontext: Any = self._pcontext
        handlers = pcontext.subprocess_handlers
        running = [handlers[local_rank] for local_rank, code in codes.items() if code is None]
        # Ranks that leave on request do so one after the other, each when its files are written.
        if not running or EXIT_SAVED in codes.values():
            return False
        assert self._failed_at is not None
        if time.monotonic() < self._failed_at + GRACE_SECONDS:
            return True
        for handler in running:
            handler.close(death_sig=signal.SIGKILL)
            handler.proc.wait()
        return False

    def _failed_ranks(self, worker_group: WorkerGroup) -> dict[int, int | None]:
        """The exit codes of this node's ranks, by local rank, None for those that run; empty if none has failed. The
        first that has is remembered."""
        handlers = getattr(self._pcontext, "subprocess_handlers", None)
        if not handlers or self._control.was_asked:
            return {}
        codes = {local_rank: handler.proc.poll() for local_rank, handler in handlers.items()}
        failed = [local_rank for local_rank, code in codes.items() if code]
        if failed and self._control.failure is None:
            first = failed[0]
            rank = worker_group.workers[first].global_rank
            self._control.failure = Failure(rank=rank, pid=handlers[first].proc.pid, code=codes[first])
            self._failed_at = time.monotonic()
        return codes if failed else {}

    def _lost_nodes(self) -> str:
        """The nodes of this start that are gone, or ""."""
        present = self._present_nodes()
        if present is None or self._nodes <= present:
            self._missing_since = None
            return ""
        now = time.monotonic()
        self._missing_since = self._missing_since or now
        if now < self._missing_since + _SURE_SECONDS:
            return ""
        return _addresses(self._nodes - present)

    def _present_nodes(self) -> frozenset[Any] | None:
        """The nodes that the rendezvous knows to live; None where it is static and knows nothing of them."""
        holder = getattr(self._rdzv_handler, "_state_holder", None)
        if holder is None:
            return None
        state = holder.state
        return frozenset(state.participants) | frozenset(state.wait_list)


def _addresses(nodes: frozenset[Any]) -> str:
    return ", ".join(sorted(node.addr for node in nodes))
