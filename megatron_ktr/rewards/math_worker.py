"""The process that compares mathematical answers: ``python -m megatron_ktr.rewards.math_worker LIMIT_BYTES``.

It speaks as ``processes/child.py`` says. The first request is the JSON of ``sys.path``. Further ones are
``[truth, answer, seconds]`` and are answered ``{"equal": true}``, or ``{"equal": null}`` where the time did not
suffice.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from megatron_ktr.processes.child import adopt_orphans, end_with_parent, limit_memory, receive, send, take_pipes


def main() -> None:
    requests, answers = take_pipes()
    end_with_parent()
    adopt_orphans()
    limit_memory(int(sys.argv[1]))
    logging.disable(logging.CRITICAL)
    send(answers, {"kind": "ready"})
    while (request := receive(requests)) is not None:
        given = json.loads(request)
        if given and len(given) == 3 and isinstance(given[2], int):
            send(answers, {"equal": _compare(*given)})
        else:
            sys.path[:] = given
            import math_verify  # noqa: F401 - takes half a second, which is not the first answer's

            send(answers, {"kind": "ready"})


def _compare(truth: str, answer: str, seconds: int) -> bool | None:
    from math_verify.errors import TimeoutException

    try:
        return any(_are_equal(*texts, seconds) for texts in _readings(truth, answer))
    except (TimeoutException, MemoryError):
        return None


def _are_equal(truth: str, answer: str, seconds: int) -> bool:
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        try:
            return parse(text, parsing_timeout=seconds, raise_on_error=True)
        except Exception:  # what sympy and the parser raise for what is no mathematics
            return []

    gold, found = parsed(truth), parsed(answer)
    try:
        return bool(gold and found and verify(gold, found, timeout_seconds=seconds, raise_on_error=True))
    except Exception:
        return False


def _readings(truth: str, answer: str) -> list[tuple[str, str]]:
    """The texts as LaTeX, for a bare "x^2" is not found otherwise, then as they are."""
    as_latex = (_in_dollars(truth), _in_dollars(answer))
    return list(dict.fromkeys((as_latex, (truth, answer))))


def _in_dollars(text: str) -> str:
    is_marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    return text if is_marked else f"${text}$"


if __name__ == "__main__":
    main()
