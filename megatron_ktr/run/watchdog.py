"""Ends a rank that hangs: one that stays in one phase of a step for longer than ``hang_timeout_minutes``.

A collective with too few ranks waits until the timeout of its backend, and says neither who is missing nor what for. An
endless loop has no timeout at all. So every rank has a thread that looks at the time since its phase began. When that
is too long, the thread

- writes the stacks of all threads to ``run_dir/hangs/rank_N.txt``,
- says in one line, and as an incident, in which phase and collective its rank waits, and which ranks did not come,
- and ends the process with ``EXIT_HANG``, so that a launcher can start the run again.

A second thread writes where this rank is to the store of the run every few seconds. From that, the first rank that
hangs learns of the others: one whose entries stand still is stopped, or its node is gone; one that is in no collective
is what the others wait for. Only that rank speaks. Without a store (``None``) each rank speaks for itself.

The time between two phases counts as one: recording, saving a checkpoint, evaluating.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.errors import EXIT_HANG, UserError
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.processes.frames import place_of_main_thread
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.step_report import StepReport

FOLDER = "hangs"
_LOOKS = 4
"""Entries of a rank within the limit."""
_MOST_SECONDS_BETWEEN_LOOKS = 5.0
_TELLING_SECONDS = 30.0
"""How long the store or the disk may take while a rank ends. It ends in any case."""
_CLOSE_SECONDS = 2.0
_BUSY_SECONDS = 10.0
"""So much later than it wanted may a thread wake up on a busy machine."""
_MOST_NAMED = 8


@dataclass(frozen=True)
class Entry:
    """Where a rank is, as the others see it."""

    beat: int
    """Grows with every entry."""
    moves: int
    """How many phases the rank has begun or ended."""
    step: int
    phase: str
    is_collective: bool
    """Whether its main thread waits for other ranks."""
    place: str

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}, {self.place}"


class Watchdog(StepHook):
    """Watches this rank from its creation until ``close``. ``end`` ends the process; tests replace it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        limit_minutes: float,
        timer: PhaseTimer,
        connect: Callable[[], Any] = lambda: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """``connect`` gives a connection to the store of the run that no other thread uses, or None."""
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._limit_seconds = 60 * limit_minutes
        self._pause = min(self._limit_seconds / _LOOKS, _MOST_SECONDS_BETWEEN_LOOKS)
        self._connect, self._end = connect, end
        self._step, self._moves, self._beats = 0, 0, 0
        self._phase: str | None = None
        self._since = time.monotonic()
        self._is_closed = threading.Event()
        self._timer = timer
        timer.listeners.append(self._move)
        self._threads = [
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True)
            for target in (self._watch, self._publish)
        ]
        for thread in self._threads:
            thread.start()

    def before_step(self, step: int) -> None:
        self._step = step
        self._move(None)

    def after_step(self, report: StepReport) -> Stop | None:
        self._move(None)
        return None

    def close(self) -> None:
        self._is_closed.set()
        self._timer.listeners.remove(self._move)
        for thread in self._threads:
            # One that waits for a store which is gone ends with the process.
            thread.join(_CLOSE_SECONDS)

    def _move(self, phase: str | None) -> None:
        self._since, self._phase = time.monotonic(), phase
        self._moves += 1

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._is_closed.wait(self._pause / 4):
            now = time.monotonic()
            if stopped := stopped_seconds(now - looked, wanted=self._pause / 4):
                # A process that was stopped (ctrl-Z, a frozen container) has not hung meanwhile.
                self._since += stopped
            looked = now
            if now - self._since < self._limit_seconds:
                continue
            # A store or a disk that does not answer must not keep this rank alive.
            teller = threading.Thread(target=self._tell, name="watchdog_tell", daemon=True)
            teller.start()
            teller.join(_TELLING_SECONDS + 4 * self._pause)
            self._end(EXIT_HANG)
            return

    def _entry(self) -> Entry:
        self._beats += 1
        place = place_of_main_thread()
        phase = "between phases" if self._phase is None else f"phase {self._phase}"
        return Entry(self._beats, self._moves, self._step, phase, place.is_collective, str(place))

    def _publish(self) -> None:
        """Writes this rank's entry to the store now and then. A store that is gone is no reason to end a run."""
        store = None
        with contextlib.suppress(UserError, RuntimeError, OSError):
            store = self._connect()
        while store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                store.set(_key(self._rank), json.dumps(asdict(self._entry())))
            if self._is_closed.wait(self._pause):
                return

    def _tell(self) -> None:
        entry = self._entry()
        with contextlib.suppress(OSError):
            self._write_stacks(entry)
        store = None
        try:
            store = self._connect()
            if store is not None and store.add("watchdog speaker", 1) > 1:
                # The launcher ends all ranks soon after the first; that must be the one that speaks.
                with contextlib.suppress(RuntimeError, OSError):
                    store.wait(["watchdog has spoken"], datetime.timedelta(seconds=_TELLING_SECONDS))
                return
            others = "" if store is None else self._verdict(store)
        except (UserError, RuntimeError, OSError):
            others = "the store of the run, on rank 0's node, does not answer"
        minutes = self._limit_seconds / 60
        text = f"rank {self._rank} hangs for {minutes:.3g} minutes (hang_timeout_minutes) in {entry}"
        text += f"; {others}" if others else ""
        text += f"; stacks are in {self._run_dir / FOLDER} (exit code {EXIT_HANG})"
        Incidents(self._run_dir).add("hang", text, step=self._step, rank=self._rank, phase=entry.phase)
        if store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                store.set("watchdog has spoken", "yes")

    def _write_stacks(self, entry: Entry) -> None:
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        with (folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"\n{now} rank {self._rank}, process {os.getpid()}, {entry}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _verdict(self, store: Any) -> str:
        before = self._entries(store)
        # Twice the time between two entries: a rank that lives has written one.
        time.sleep(2 * self._pause)
        return missing_ranks(before, self._entries(store), world_size=self._world_size, speaker=self._rank)

    def _entries(self, store: Any) -> dict[int, Entry]:
        found: dict[int, Entry] = {}
        for rank in range(self._world_size):
            if store.check([_key(rank)]):
                found[rank] = Entry(**parse_json(store.get(_key(rank)).decode()))
        return found


def stopped_seconds(passed: float, *, wanted: float) -> float:
    """For how long this process stood still, if a thread that wanted to sleep for ``wanted`` seconds has slept for
    ``passed``. A busy machine lets it sleep somewhat longer; that is not counted."""
    return passed - wanted if passed > 2 * wanted + _BUSY_SECONDS else 0.0


def missing_ranks(before: dict[int, Entry], after: dict[int, Entry], *, world_size: int, speaker: int) -> str:
    """Which ranks the others wait for, and where those are, from the entries of all ranks at two times. Every rank that
    lives has written a new entry between the two. Of ``speaker`` it is known already where it is."""
    silent, busy = [], []
    for rank in range(world_size):
        if rank == speaker and rank not in after:
            continue
        if rank not in after:
            silent.append(f"rank {rank} has never shown a sign of life")
        elif rank != speaker and rank in before and before[rank].beat == after[rank].beat:
            silent.append(f"rank {rank} shows no sign of life (last seen in {after[rank]})")
        elif rank != speaker and not after[rank].is_collective:
            busy.append(f"rank {rank} did not come: it is in {after[rank]}")
    if silent or busy:
        return _listed([*silent, *busy])
    if speaker in after and not after[speaker].is_collective:
        return "the other ranks wait for it" if world_size > 1 else ""
    least = min((entry.moves for entry in after.values()), default=0)
    behind = [rank for rank, entry in after.items() if entry.moves == least]
    if len(behind) < len(after):
        return _listed([f"rank {rank} is behind: it is in {after[rank]}" for rank in behind])
    places = {str(entry): rank for rank, entry in sorted(after.items(), reverse=True)}
    if len(places) > 1:
        return _listed([f"rank {rank} waits in {place}" for place, rank in sorted(places.items(), key=lambda p: p[1])])
    return "all ranks wait in the same place"


def _listed(texts: list[str]) -> str:
    return "; ".join(texts[:_MOST_NAMED]) + (
        f"; and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    )


def _key(rank: int) -> str:
    return f"watchdog rank {rank}"
