"""The process in which users' own rewards run: ``python -m megatron_ktr.rewards.worker LIMIT_BYTES``.

It speaks as ``processes/child.py`` says. A request is pickled:

    ("paths", sys.path, directory)                where modules are found, as in the training process
    ("load", module:function)                     is answered when its module is imported: how the function is called
                                                  ({"style": ..., "is_async": ...}), or {"failed": text}
    ("score", module:function, inputs, seconds)   is answered {"index": i, "value": x} for each of the inputs, in any
                                                  order, or {"index": i, "failed": [kind, text]}

It has neither torch nor Megatron, unless a reward imports them, and sees no device.
"""

from __future__ import annotations

import os
import pickle
import sys
from functools import cache
from typing import IO, Any

from megatron_ktr.errors import UserError
from megatron_ktr.processes.child import adopt_orphans, end_with_parent, limit_memory, receive, send, take_pipes
from megatron_ktr.rewards.plug_in import Failed, PlugIn, Value

_MOST_CHARACTERS = 2000
"""Of a message."""
_own_pid = 0


def main() -> None:
    global _own_pid
    requests, answers = take_pipes()
    end_with_parent()
    adopt_orphans()
    limit_memory(int(sys.argv[1]))
    _own_pid = os.getpid()
    send(answers, {"kind": "ready"})
    while (request := receive(requests)) is not None:
        kind, *arguments = pickle.loads(request)
        if kind == "paths":
            sys.path[:] = arguments[0]
            os.chdir(arguments[1])
            send(answers, {"kind": "ready"})
        elif kind == "load":
            send(answers, _form_of(arguments[0]))
        else:
            _score(answers, *arguments)


def _score(answers: IO[bytes], path: str, inputs: list[Any], seconds: float) -> None:
    try:
        plug_in = _loaded(path)
    except UserError as error:
        failed = Failed("error", f"failed: {error}")
        found = iter([(index, failed) for index in range(len(inputs))])
    else:
        found = plug_in.score(inputs, timeout_seconds=seconds)
    for index, value in found:
        if os.getpid() != _own_pid:  # a process that the reward has forked came back from it
            os._exit(0)
        send(answers, _answer(index, value))


def _form_of(path: str) -> dict[str, Any]:
    try:
        plug_in = _loaded(path)
    except UserError as error:
        return {"failed": str(error)[:_MOST_CHARACTERS]}
    return {"style": plug_in.style, "is_async": plug_in.is_async}


@cache
def _loaded(path: str) -> PlugIn:
    return PlugIn.load(path)


def _answer(index: int, value: Value) -> dict[str, Any]:
    if isinstance(value, Failed):
        return {"index": index, "failed": [value.kind, value.text[:_MOST_CHARACTERS]]}
    return {"index": index, "value": value}


if __name__ == "__main__":
    main()
