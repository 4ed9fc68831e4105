"""Whether two mathematical answers are the same, as math-verify sees it, in bounded time.

Both texts are parsed as LaTeX or as plain expressions and compared by sympy. Some expressions keep sympy busy for ever
or fill the memory (``9^{9^{9^9}}``, ``(x+1)^{2000}``), and math-verify's own limits work in the main thread of a
process alone and go by the clock. So a child process compares (``math_worker.py``) with a limit of processor time, and
is killed from outside when that fails. An answer that cannot be compared in time is not right, and is counted.

    1/2 = 0.5 = \\frac{1}{2}   x = 3 is 3   50% = 0.5   1,000 = 1000   12 = 12 cm   (x+1)^2 = x^2 + 2x + 1
    1/3 != 0.333 (6 digits count)   "2" != "$1$ or $2$"   (1, 2) != [1, 2]

Texts that look the same are the same without it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from megatron_ktr.errors import UserError
from megatron_ktr.processes.process import ChildProcess, Words, WorkerLost
from megatron_ktr.rewards.fold import fold_forms

MOST_CHARACTERS = 2_000
"""Longer texts are no answer to a mathematical question."""
CPU_SECONDS = 5
"""Of the processor, in whole seconds, for one answer."""
KILL_SECONDS = 120.0
"""Of the clock, from outside. It is reached by what waits, which sympy does not."""
_MEMORY_BYTES = 2_000_000_000
_START_SECONDS = 120.0
_WORDS = Words(option="math-verify", remedy="is math-verify installed?")


@cache
def is_installed() -> bool:
    """Whether math-verify can be imported."""
    return importlib.util.find_spec("math_verify") is not None


def require_installed(what: str) -> None:
    """Raises ``UserError`` if math-verify is not installed, which ``what`` needs."""
    if not is_installed():
        raise UserError(f"{what} needs math-verify, which is not installed: pip install 'megatron-ktr[math]'")


def are_equal(answer: str, truth: str) -> bool:
    """Whether ``answer`` is mathematically the same as ``truth``.

    Raises:
        UserError: math-verify is not installed, or its process cannot be started.
    """
    if fold_forms(answer).split() == fold_forms(truth).split() != []:
        return True
    if not answer.strip() or not truth.strip() or max(len(answer), len(truth)) > MOST_CHARACTERS:
        return False
    return _comparer().compare(answer, truth)


def counts() -> Mapping[str, int]:
    """{"math": answers that could not be compared in time or memory since this process began}."""
    return dict(_lost)


_lost: Counter[str] = Counter()


class _Comparer:
    """One child, started when it is first needed by a thread of its own, which lives as long as this process."""

    def __init__(self) -> None:
        require_installed("the comparison of mathematical answers")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="math")
        self._child: ChildProcess | None = None

    def compare(self, answer: str, truth: str) -> bool:
        return self._thread.submit(self._compare, answer, truth).result()

    def _compare(self, answer: str, truth: str) -> bool:
        child = self._ready_child()
        request = json.dumps([truth, answer, CPU_SECONDS]).encode()
        try:
            found = child.ask(request, timeout_seconds=KILL_SECONDS).get("equal")
        except WorkerLost:
            self._child = None
            child.close()
            found = None
        if not isinstance(found, bool):
            _lost["math"] += 1
        return found is True

    def _ready_child(self) -> ChildProcess:
        if self._child is not None and self._child.is_gone:
            self._child.close()
            self._child = None
        if self._child is None:
            command = (sys.executable, "-m", "megatron_ktr.rewards.math_worker")
            child = ChildProcess(command, memory_bytes=_MEMORY_BYTES, words=_WORDS)
            child.start()
            try:
                child.ask(json.dumps(sys.path).encode(), timeout_seconds=_START_SECONDS)
            except WorkerLost as error:
                child.close()
                raise UserError(f"math-verify: {error}") from error
            self._child = child
        return self._child


_making = threading.Lock()


def _comparer() -> _Comparer:
    with _making:
        return _only_comparer()


@cache
def _only_comparer() -> _Comparer:
    return _Comparer()
