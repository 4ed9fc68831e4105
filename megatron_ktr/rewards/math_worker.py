"""The process that compares mathematical answers: ``python -m megatron_ktr.rewards.math_worker LIMIT_BYTES``.

It speaks as ``processes/child.py`` says. The first request is the JSON of ``sys.path``. Further ones are
``[truth, answer, seconds]`` and are answered ``{"equal": true}``, or ``{"equal": null}`` where the time did not
suffice.

The time is that of the processor, not of the clock, so that a busy machine gives the same verdicts. A signal ends what
runs in Python. What does not come back to Python, such as the power of two huge numbers, is ended by the kernel, and
this process with it.
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import signal
import sys
import time
from typing import Any

from megatron_ktr.processes.child import adopt_orphans, end_with_parent, limit_memory, receive, send, take_pipes

_MORE_SECONDS = 2
"""Before the kernel ends the process."""


def main() -> None:
    requests, answers = take_pipes()
    end_with_parent()
    adopt_orphans()
    limit_memory(int(sys.argv[1]))
    logging.disable(logging.CRITICAL)
    send(answers, {"kind": "ready"})
    while (request := receive(requests)) is not None:
        given = json.loads(request)
        if len(given) == 3 and isinstance(given[2], int):
            send(answers, {"equal": _compare(*given)})
        else:
            sys.path[:] = given
            _prepare()
            send(answers, {"kind": "ready"})


def _prepare() -> None:
    """Imports what takes half a second, which is not the first answer's."""
    timeout = _package("math_verify.errors").TimeoutException

    def stop(number: int, frame: Any) -> None:
        raise timeout("no processor time is left")  # no ``Exception``, which sympy would catch

    signal.signal(signal.SIGPROF, stop)


def _compare(truth: str, answer: str, seconds: int) -> bool | None:
    timeout = _package("math_verify.errors").TimeoutException
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    last = int(time.process_time()) + 1 + seconds + _MORE_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (last if hard == resource.RLIM_INFINITY else min(last, hard), hard))
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            return _are_equal(_as_latex(truth), _as_latex(answer))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (timeout, MemoryError):
        return None


def _are_equal(truth: str, answer: str) -> bool:
    package = _package("math_verify")
    try:
        gold, found = (package.parse(text, parsing_timeout=0, raise_on_error=True) for text in (truth, answer))
        return bool(gold and found and package.verify(gold, found, timeout_seconds=0, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # what sympy and the parser raise for what is no mathematics
        return False


def _package(name: str) -> Any:
    return importlib.import_module(name)  # an optional package, which need not be there to check types


def _as_latex(text: str) -> str:
    """The text as one formula, unless it says itself where its formulas are. Of a text that is no formula, math-verify
    would take the last number: "2]" of "[1, 2]"."""
    is_marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    return text if is_marked else f"${text}$"


if __name__ == "__main__":
    main()
