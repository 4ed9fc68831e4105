"""Each rank says where it is: ``run_dir/status/rank_00000.json``, replaced whole every ``heartbeat_seconds``.

    {"time": 1769860800.1,            when it was written, in seconds since 1970
     "incarnation": "1769850000.2",   the same on all ranks of one start of the run: when it began
     "host": "node7", "pid": 4711, "process_started": 1769849990.4,
     "rank": 0, "world_size": 8, "heartbeat_seconds": 10.0,
     "state": "running",              or trained (the last step is done), left (asked to, or by an alarm), failed
     "step": 12, "num_steps": 1000, "first_step": 1, "last_done": 11,
     "phase": "rollout",              of the step (docs/architecture.md); null between phases: saving, evaluation's end
     "phase_since": 1769860795.0, "step_since": 1769860790.0,
     "last_step_seconds": 9.8,        from the end of the step before to the end of the last one, saving included
     "mean_step_seconds": 9.7,        of the last 20 such times
     "device_memory_peak_bytes": ..., "rss_bytes": ..., "open_files": ..., "threads": ...}

A thread writes the file. Nothing is sent to other ranks, and nothing is read from the device but counters that the host
keeps, so results and speed are those of a run without it. A file is about 600 bytes, written beside its place and
renamed, and not forced to the disk: on 1,000 ranks these are 100 small files a second at 10 seconds each. A file that
cannot be written is counted (``missed``) and tried again; no run ends for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from megatron_ktr.distributed.agreement import result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.files.json_files import to_json
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.status.files import FAILED, FOLDER, LEFT, RECENT_STEPS, RUNNING, TRAINED, rank_file
from megatron_ktr.run.step_report import StepReport

CLOSING_SECONDS = 10.0
"""How long the end of a run waits for a heartbeat that a file server does not take."""


def oldest_heartbeat(run_dir: Path) -> float | None:
    """How many seconds ago the rank that has been silent for longest wrote its file; None without files."""
    times = []
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - min(times) if times else None


class Heartbeat(StepHook):
    """Collective when it is built: rank 0 removes the files of ranks that an earlier start had and this one has not."""

    def __init__(
        self,
        run_dir: Path,
        *,
        ranks: ParallelGroups,
        platform: Platform,
        timer: PhaseTimer,
        every_seconds: float,
        first_step: int,
        num_steps: int,
    ) -> None:
        incarnation = result_of_rank_zero(lambda: _prepare(run_dir, world_size=ranks.world_size), ranks=ranks)
        self._path = rank_file(run_dir, ranks.rank)
        self._platform = platform
        self._every_seconds = every_seconds
        self._process = psutil.Process()
        now = time.time()
        self._facts: dict[str, Any] = {
            "incarnation": incarnation,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": self._process.create_time(),
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "heartbeat_seconds": self._every_seconds,
            "num_steps": num_steps,
            "first_step": first_step,
        }
        self._place: dict[str, Any] = {
            "state": RUNNING,
            "step": first_step - 1,
            "last_done": first_step - 1,
            "phase": None,
            "phase_since": now,
            "step_since": now,
            "last_step_seconds": None,
            "mean_step_seconds": None,
        }
        """Replaced whole by the main thread, so that the writing thread never sees half of a change."""
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._ended = time.monotonic()
        self.missed = 0
        timer.listeners.append(self.on_phase)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def on_phase(self, name: str | None) -> None:
        self._place = {**self._place, "phase": name, "phase_since": time.time()}

    def before_step(self, step: int) -> None:
        self._place = {**self._place, "step": step, "step_since": time.time()}

    def after_step(self, report: StepReport) -> None:
        now = time.monotonic()
        if report.step > self._facts["first_step"]:  # the first step of a process is longer than all others
            self._recent.append(now - self._ended)
        seconds, self._ended = now - self._ended, now
        mean = statistics.fmean(self._recent) if self._recent else None
        self._place = {
            **self._place,
            "last_done": report.step,
            "last_step_seconds": seconds,
            "mean_step_seconds": mean,
        }

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(CLOSING_SECONDS)
        is_last = self._place["last_done"] == self._facts["num_steps"]
        state = FAILED if sys.exc_info()[1] is not None else TRAINED if is_last else LEFT
        self._place = {**self._place, "state": state, "phase": None, "phase_since": time.time()}
        self._write()

    def _beat(self) -> None:
        self._write()
        while not self._stopping.wait(self._every_seconds):
            self._write()

    def _write(self) -> None:
        content = {"time": time.time(), **self._facts, **self._place, **self._resources(), "missed": self.missed}
        # Beside its place and renamed, so that no reader sees half of it. Not forced to the disk: after a power cut
        # nobody needs it.
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            scratch.write_text(to_json(content) + "\n", encoding="utf-8")
            scratch.replace(self._path)
        except OSError:
            self.missed += 1
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _resources(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {"device_memory_peak_bytes": self._platform.peak_memory_bytes()}
        for name, read in (
            ("rss_bytes", lambda: self._process.memory_info().rss),
            ("open_files", self._process.num_fds),
            ("threads", self._process.num_threads),
        ):
            try:
                found[name] = read()
            except (psutil.Error, OSError):
                found[name] = None
        return found


def _prepare(run_dir: Path, *, world_size: int) -> str:
    """Makes the folder and removes files of ranks that are no more. Returns the incarnation."""
    with contextlib.suppress(OSError):  # a full disk: the ranks count what they cannot write
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        for path in (run_dir / FOLDER).glob("rank_*.json"):
            number = path.stem.removeprefix("rank_")
            if number.isdecimal() and int(number) >= world_size:
                path.unlink(missing_ok=True)
        for path in (run_dir / FOLDER).glob(".rank_*"):
            path.unlink(missing_ok=True)  # of a process that was killed while it wrote
    return repr(time.time())
