"""Runs users' own rewards in processes (``worker.py``). One that hangs, crashes, swells or forks costs its response.

A response is at fault if it is the one that was being judged when the process was lost. Of responses that are awaited
together (async functions) those without a value are judged again one by one in a new process; each then stands for
itself. A function of a whole group is one call: if it fails, all of the group's responses have failed, because it could
say something else about fewer of them.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from megatron_ktr.errors import UserError, one_line
from megatron_ktr.processes.process import ChildProcess, Words, WorkerLost
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.plug_in import Failed, Form, Style, Value, timed_out

_log = logging.getLogger(__name__)
_COMMAND = (sys.executable, "-m", "megatron_ktr.rewards.worker")
_WORDS = Words(
    option="reward_workers",
    remedy="--reward-workers 0 runs rewards in the training process",
    memory_option="--reward-worker-memory-gb",
)
_GRACE_SECONDS = 2.0
"""More than a function has: one that waits ends itself in time, and an answer takes a moment to arrive."""
_LOAD_SECONDS = 120.0
"""The time in which a process must have imported the module of a reward, before the time of the reward itself."""


class PlugInPool:
    """``num_workers`` processes, started when they are first needed, each by a thread that lives as long as it."""

    def __init__(self, num_workers: int, *, timeout_seconds: float, memory_bytes: int) -> None:
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward worker")
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._running: set[ChildProcess] = set()
        self._is_closed = False

    def score(self, plug_in: Form, inputs: Sequence[RewardInput]) -> list[Value]:
        """The values of the responses of one group. May be called by several threads.

        Raises:
            UserError: no process can be started.
        """
        # One after the other, the responses of a group can be shared out; together, they belong to one call.
        num_shares = min(self.num_workers, len(inputs)) if plug_in.is_one_by_one else 1
        shares = [range(first, len(inputs), num_shares) for first in range(num_shares)]
        found: dict[int, Value] = {}
        for future in [self._threads.submit(self._score_share, plug_in, inputs, share) for share in shares]:
            found |= future.result()
        return [found[index] for index in range(len(inputs))]

    def load(self, path: str) -> Form:
        """How the function ``module:function`` is called. A process imports its module, and this one never does: an
        import may hang, too, or end the process that it runs in.

        Raises:
            UserError: it cannot be loaded, or no process can be started.
        """
        return self._threads.submit(self._load, path).result()

    def close(self) -> None:
        """Ends all processes, also those that hang."""
        with self._lock:
            self._is_closed = True
            running = list(self._running)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in running:
            worker.end()
        self._threads.shutdown(wait=True)
        for worker in running:
            worker.close()

    def _load(self, path: str) -> Form:
        worker = self._worker()
        try:
            answer = self._imported(worker, path)
            if "failed" in answer:
                raise UserError(str(answer["failed"]))
            style: Any = answer.get("style")
            is_async = answer.get("is_async")
            if style not in get_args(Style) or not isinstance(is_async, bool):
                raise WorkerLost("died", "the worker gave a senseless answer")
        except WorkerLost as error:
            self._drop(worker)
            raise UserError(f"reward {path!r} cannot be loaded: {error}") from None
        return Form(path, style, is_async)

    def _imported(self, worker: ChildProcess, path: str) -> dict[str, Any]:
        """What a process says after it has imported the module of a reward.

        Raises:
            WorkerLost: the import hangs, or has ended the process.
        """
        try:
            answer = worker.ask(pickle.dumps(("load", path)), timeout_seconds=_LOAD_SECONDS)
        except WorkerLost as error:
            text = f"its module is not imported after {_LOAD_SECONDS:g} s"
            raise WorkerLost("died", text if error.why == "timeout" else str(error)) from None
        self._of_thread.loaded.add(path)
        return answer

    def _score_share(self, plug_in: Form, inputs: Sequence[RewardInput], places: Sequence[int]) -> dict[int, Value]:
        found: dict[int, Value] = {}
        if not plug_in.is_one_by_one:
            self._ask(plug_in, inputs, list(places), found)
        while together := [place for place in places if place not in found]:
            self._ask(plug_in, inputs, together if plug_in.is_one_by_one else together[:1], found)
        return found

    def _ask(self, plug_in: Form, inputs: Sequence[RewardInput], places: list[int], found: dict[int, Value]) -> None:
        """Adds to ``found`` what a process says about ``places``. If it is lost, the response at fault has failed: the
        first without a value where they were judged one by one, or there is but one."""
        worker = self._worker()
        seconds = self.timeout_seconds + _GRACE_SECONDS
        request = pickle.dumps(("score", plug_in.path, [inputs[place] for place in places], self.timeout_seconds))
        try:
            if plug_in.path not in self._of_thread.loaded:
                self._imported(worker, plug_in.path)  # what is wrong is said again where a value is asked for
            answer = worker.ask(request, timeout_seconds=seconds)
            for number in range(len(places)):
                if number:
                    answer = worker.next_answer(timeout_seconds=seconds)
                index, value = _read(answer, len(places))
                found[places[index]] = value
        except WorkerLost as error:
            self._drop(worker)
            with self._lock:
                if self._is_closed:
                    raise UserError("reward_workers: the run ends while a reward is computed") from None
            failed = Failed(error.why, f"failed: {error}")
            if error.why == "timeout":
                failed = timed_out(self.timeout_seconds)
            _log.warning("%s", one_line(f"reward {plug_in.name!r}: {error}; its process is replaced"))
            missing = [place for place in places if place not in found]
            if plug_in.is_batched:
                found |= dict.fromkeys(missing, failed)
            elif plug_in.is_one_by_one or len(places) == 1:
                found[missing[0]] = failed

    def _worker(self) -> ChildProcess:
        """The process of the calling thread, started if it is not there."""
        worker: ChildProcess | None = getattr(self._of_thread, "worker", None)
        if worker is not None and worker.is_gone:
            self._drop(worker)
            worker = None
        if worker is None:
            worker = ChildProcess(_COMMAND, memory_bytes=self.memory_bytes, words=_WORDS)
            with self._lock:
                self._running.add(worker)
                if self._is_closed:
                    worker.end()
            try:
                worker.start()
                worker.ask(pickle.dumps(("paths", sys.path, os.getcwd())), timeout_seconds=_LOAD_SECONDS)
            except (UserError, WorkerLost) as error:
                with self._lock:
                    self._running.discard(worker)
                raise UserError(str(error)) from error
            self._of_thread.worker, self._of_thread.loaded = worker, set()
        return worker

    def _drop(self, worker: ChildProcess) -> None:
        self._of_thread.worker = None
        with self._lock:
            self._running.discard(worker)
        worker.close()


def _read(answer: dict[str, Any], size: int) -> tuple[int, Value]:
    """(place among ``size`` inputs, value) of an answer.

    Raises:
        WorkerLost: it is no such answer.
    """
    index, value, failed = answer.get("index"), answer.get("value"), answer.get("failed")
    if type(index) is int and 0 <= index < size:
        if isinstance(failed, list) and len(failed) == 2:
            return index, Failed(str(failed[0]), str(failed[1]))
        if value is None or (isinstance(value, float) and math.isfinite(value)):
            return index, value
    raise WorkerLost("died", "the worker gave a senseless answer")
